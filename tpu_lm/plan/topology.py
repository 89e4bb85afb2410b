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
# without its devices.
_ENVIRONMENT = {
  'JAX_ENABLE_COMPILATION_CACHE': '0',
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


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
  if importlib.util.find_spec('libtpu') is None:
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
  if importlib.util.find_spec('jax_plugins.xla_cuda13') is None:
    raise UserError(
      f'--topology={topology.name}: needs the CUDA plug-in of JAX; pip install '
      "'tpu_lm[cuda]'"
    )
  raise UserError(f'--topology={topology.name}: not yet')
