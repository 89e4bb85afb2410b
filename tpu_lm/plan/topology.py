"""Devices that are not here, for the compiler to compile for.

The TPU compiler is a library (libtpu) that needs no TPU; that of GPUs is the
CUDA plug-in of JAX, which needs no GPU either.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from tpu_lm.errors import UserError
from tpu_lm.plan.chips import Topology

# Before JAX is imported: no TPU is looked for, and the compiler may be loaded
# by several processes at once. A program that was kept cannot be read back
# without its devices. Kernels tell the lines of source that they come from:
# without, a program is the same from any directory.
_ENVIRONMENT = {
  'JAX_ENABLE_COMPILATION_CACHE': '0',
  'JAX_TRACEBACK_IN_LOCATIONS_LIMIT': '0',
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


_PLUGINS = ('jax_plugins.xla_cuda13', 'jax_plugins.xla_cuda12')
_GPUS_A_HOST = 8
# An H100 as the CUDA driver describes it.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 84929347584
  l2_cache_size: 52428800
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


def set_up() -> None:
  """Readies this process to plan; before JAX is imported."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def devices(topology: Topology) -> list[Any]:
  """The devices of a topology.

  Raises:
    UserError: its compiler is not installed, or knows no such topology.
  """
  if topology.chip.is_gpu:
    return _gpus(topology)
  if not _is_installed('libtpu'):
    raise UserError(
      f'--topology={topology.name}: needs the TPU compiler; pip install '
      "'tpu_lm[plan]'"
    )
  from jax.experimental import topologies

  name = 'x'.join(map(str, topology.sides))
  options: dict[str, Any] = {}
  if topology.num_slices > 1:
    options['num_slices'] = topology.num_slices
  if topology.size == 1:  # a host has four otherwise
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    with _quiet():
      found = topologies.get_topology_desc(
        platform='tpu',
        topology_name=f'{topology.chip.name}:{name}',
        **options,
      )
  except Exception as error:  # whatever the compiler raises
    what = str(error).splitlines()[0]
    raise UserError(f'--topology={topology.name}: {what}') from error
  return list(found.devices)


def _is_installed(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:  # nor is the package that it would be in
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Lets libtpu's notes about the machine go to the void while it loads."""
  kept, void = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(void, 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(void)


def _gpus(topology: Topology) -> list[Any]:
  if not any(map(_is_installed, _PLUGINS)):
    raise UserError(
      f'--topology={topology.name}: needs the CUDA plug-in of JAX; pip install '
      "'tpu_lm[cuda]'"
    )
  from jax._src import xla_bridge
  from jax.experimental import topologies

  # JAX calls the platform of these devices gpu, which it can tell to be cuda
  # only where there is one (jax-ml/jax#23971).
  known = xla_bridge.canonicalize_platform
  xla_bridge.canonicalize_platform = lambda name: (
    'cuda' if name in ('gpu', 'cuda') else known(name)
  )
  hosts, left = divmod(topology.size, _GPUS_A_HOST)
  shape = (hosts, _GPUS_A_HOST) if hosts and not left else (1, topology.size)
  with _quiet():
    made = topologies.get_topology_desc(
      platform='cuda',
      topology='x'.join(map(str, (1, *shape))),
      target_config=_H100,
    )
  return list(made.devices)
