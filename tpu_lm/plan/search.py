"""Looks for the configuration of the highest estimated speed that fits.

All meshes, microbatches, remat policies and chunks of the loss are weighed by
the analytic model of memory (memory.py) and a short one of time; only the most
promising ones are compiled, which takes minutes each.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tpu_lm import flops, models, sharding
from tpu_lm.errors import UserError
from tpu_lm.models import remat
from tpu_lm.plan import columns, estimate, memory, programs
from tpu_lm.plan.chips import Topology

_ROOM = 0.97  # of the memory that the analytic model may fill
_CHUNKS = (0, 512, 2048)
# The forward pass that is made again, by what is kept.
_AGAIN = {
  'none': 0.0, 'dots': 0.1, 'qkv': 0.75, 'attention': 0.85, 'full': 1.0,
  'offload': 1.0,
}  # fmt: skip


def search(
  config: Any,
  topology: Topology,
  devices: list[Any],
  tries: int,
  report: Callable[[str], None] = print,
) -> list[dict]:
  """The records of the best configurations that fit, the fastest first.

  Args:
    config: whose mesh, microbatches, remat and loss_chunk are varied.
    topology: to run on.
    devices: of it.
    tries: how many are compiled at most.
    report: is told of each.
  """
  ranked, count = _ranked(config, topology, devices)
  report(f'{topology.name}: {len(ranked)} of {count} may fit')
  found = []
  for seconds, given in ranked[:tries]:
    record = estimate.update(varied(config, given), topology, devices)
    record['overrides'] = given
    spelled = ' '.join(f'{key}={value}' for key, value in given.items())
    result = 'does not fit'
    if record['fits']:
      found.append(record)
      result = f'{record["seconds"]:.3f} s, MFU {record["mfu"]:.1%}'
    report(f'  {spelled}: guessed {seconds:.3f} s; compiled: {result}')
  return sorted(found, key=lambda record: -record['tokens_per_second'])


def varied(config: Any, given: dict[str, Any]) -> Any:
  """A copy of a configuration with these dotted keys."""
  config = copy.deepcopy(config)
  for key, value in given.items():
    section, _, name = key.rpartition('.')
    target = config[section] if section else config
    target[name] = value
  return config


def _ranked(config, topology: Topology, devices: list[Any]):
  """([(guessed seconds, overrides)], the fastest first; how many there were)"""
  ranked, count, made = [], 0, {}
  for given in candidates(config, topology):
    count += 1
    mesh = {key: n for key, n in given.items() if key.startswith('mesh.')}
    sizes = tuple(mesh.values())
    if sizes not in made:
      made[sizes] = _parts(varied(config, mesh | {'microbatches': 1}), devices)
    if made[sizes] is None:
      continue
    new = varied(config, given)
    network = models.make(
      new.model_name, new.model, new.data.vocab_size, new.data.length
    )
    parts = made[sizes]._replace(model=network)
    bars = memory.bars(parts, given['microbatches'])
    if bars.total <= _ROOM * topology.chip.memory:
      seconds = guessed(new, topology, parts)
      ranked.append((seconds, given))
  return sorted(ranked, key=lambda pair: pair[0]), count


def _parts(config: Any, devices: list[Any]) -> programs.Parts | None:
  """What the update is made of; None: this mesh divides not heads or rows."""
  try:
    return programs.assemble(config, devices)
  except UserError:
    return None


def candidates(config: Any, topology: Topology) -> Iterator[dict[str, Any]]:
  """Every combination that the number of devices allows."""
  rows = columns.batch(config, sharding.make_mesh(dict.fromkeys(
    sharding.AXES, 1
  )))  # fmt: skip
  rows = next(iter(rows.values())).shape[0]
  for mesh, policy, chunk in itertools.product(
    _meshes(config, topology), remat.POLICIES, _CHUNKS
  ):
    parts = mesh['mesh.data'] * mesh['mesh.fsdp'] * mesh['mesh.expert']
    for microbatches in _divisors(rows // parts) if rows % parts == 0 else ():
      if chunk > config.data.length:
        continue
      yield mesh | {
        'microbatches': microbatches,
        'model.remat': policy,
        'model.loss_chunk': chunk,
      }


def _meshes(config: Any, topology: Topology) -> Iterator[dict[str, int]]:
  """Sizes of all axes; data spans the slices, and more than 256 chips."""
  experts = config.model.get('num_experts', 0)
  inner = topology.slice_size
  for tensor, sequence, expert in itertools.product((1, 2, 4, 8), repeat=3):
    if sequence > 1 and config.data.length < 16_384:
      continue
    if expert > 1 and (not experts or experts % expert):
      continue
    rest, left = divmod(inner, tensor * sequence * expert)
    for fsdp in _divisors(rest) if not left else ():
      if (16 if rest > 16 else 1) <= fsdp <= 256:
        yield {
          'mesh.data': topology.num_slices * rest // fsdp,
          'mesh.fsdp': fsdp,
          'mesh.tensor': tensor,
          'mesh.sequence': sequence,
          'mesh.expert': expert,
        }


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def guessed(config: Any, topology: Topology, parts: programs.Parts) -> float:
  """Seconds of a step: products, and collectives that they do not hide."""
  network, mesh, chip = parts.model.config, parts.mesh, topology.chip
  tokens = columns.num_tokens(parts.batch) / topology.size
  forward = flops.forward_per_token(network, config.data.length) * tokens
  compute = forward * (3 + _AGAIN[network.remat]) / chip.flops
  size = np.dtype(network.dtype).itemsize
  own = memory.num_bytes(parts.state.params, size)
  shared = sharding.num_weight_shards(mesh)
  gathered = own * (shared - 1) * 3 * config.microbatches
  links = gathered / (4 * chip.link)
  tensor = mesh.shape['tensor'] * mesh.shape['sequence']
  rows = tokens * tensor * network.dim * size * network.num_layers
  waited = 8 * rows * (tensor - 1) / tensor / (2 * chip.link)
  replicas = mesh.shape['data']
  speed = chip.slices if topology.num_slices > 1 else 2 * chip.link
  across = 2 * memory.exchanged(parts) * (replicas - 1) / replicas / speed
  return max(compute, links) + 0.1 * min(compute, links) + waited + across
