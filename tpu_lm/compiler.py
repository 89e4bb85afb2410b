"""Options of XLA's TPU compiler, in small named groups.

They are given to each compilation (`jax.jit(…, compiler_options=…)`), not to
the process, so that `train` and `plan` compile alike. What each buys was read
off compiled programs (LOG.md); no TPU was at hand to measure it.
"""

from typing import Any

from jax.sharding import Mesh

from tpu_lm import sharding
from tpu_lm.errors import UserError, nearest

_YES = 'true'
GROUPS: dict[str, dict[str, str]] = {
  # Einsums over gathered weights stay one product: cut into windows, the step
  # of 1B parameters on 16 chips took 3.1 times as long.
  'whole_einsums': {
    'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000',
  },
  # Gradients are scattered while the products before them still run (v5e). The
  # fusions need more of the core's own memory than the default.
  'async_scatter': {
    'xla_enable_async_reduce_scatter_fusion': _YES,
    'xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter': _YES,
    'xla_tpu_scoped_vmem_limit_kib': '65536',
  },
  # Room in the core's own memory for splash attention's backward pass by
  # blocks of 2,048 keys: a tenth less time than with 1,024.
  'wide_vmem': {'xla_tpu_scoped_vmem_limit_kib': '32768'},
  # Gathers, scatters and sums of gradients run on the SparseCores (v5p, v6e):
  # all of them beside the products, none of them otherwise.
  'sparse_core': {
    'xla_tpu_enable_sparse_core_collective_offload_all_gather': _YES,
    'xla_tpu_enable_sparse_core_collective_offload_2d_all_gather': _YES,
    'xla_tpu_enable_sparse_core_collective_offload_3d_all_gather': _YES,
    'xla_tpu_enable_sparse_core_collective_offload_reduce_scatter': _YES,
    'xla_tpu_enable_sparse_core_collective_offload_all_reduce': _YES,
    'xla_tpu_enable_all_gather_offload_tracing': _YES,
    'xla_tpu_enable_reduce_scatter_offload_tracing': _YES,
    'xla_tpu_enable_all_reduce_offload_tracing': _YES,
  },
}
# By JAX's device_kind.
_CHOSEN = {
  'TPU v5 lite': ('whole_einsums', 'async_scatter'),
  'TPU v5': ('whole_einsums', 'wide_vmem', 'sparse_core'),
  'TPU v6 lite': ('whole_einsums', 'wide_vmem', 'sparse_core'),
}
_USUAL = ('whole_einsums', 'wide_vmem')


def options(groups: str, mesh: Mesh) -> dict[str, Any]:
  """The options of `groups`, names with commas; 'auto': by the devices.

  Alone, a device has no collectives: it is spared the options that make them
  asynchronous, with which a compilation takes up to three times as long. Where
  no weights are shared out no gradients are scattered: that is left out, too
  (on rows of 512k tokens over `sequence` XLA's TPU compiler aborts in it).

  Raises:
    UserError: there is no such group.
  """
  device = mesh.devices.flat[0]
  if device.platform != 'tpu':
    return {}
  names = [name.strip() for name in groups.split(',') if name.strip()]
  if names == ['auto']:
    names = _USUAL
    if mesh.devices.size > 1:
      names = _CHOSEN.get(device.device_kind, _USUAL)
    if 'async_scatter' in names and sharding.num_weight_shards(mesh) == 1:
      names = _USUAL
  found = {}
  for name in names:
    if name not in GROUPS:
      raise UserError(
        f'compiler={groups!r}: {name} is unknown{nearest(name, GROUPS)}; '
        f'there are auto, {", ".join(GROUPS)}'
      )
    found |= GROUPS[name]
  return found
