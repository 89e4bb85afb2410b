"""What a plan says of one program on one topology, as a plain record."""

from typing import Any

from tpu_lm import compiler, flops
from tpu_lm.plan import columns, hlo, memory, programs, schedule, timeline
from tpu_lm.plan.chips import Topology

HONEST = (
  "the compiler's program and a roofline, no measurement: products at the "
  "chip's peak, memory and links at their bandwidth"
)
_WITHOUT_GPU = (
  "; attention by chunks, since cuDNN's kernel is made only where a GPU is"
)
_HOUR = 3600.0


def update(config: Any, topology: Topology, devices: list[Any]) -> dict:
  """The record of a training step of this configuration.

  Keys: topology, chip, devices, slices, mesh, overrides' values, fits,
  refusal, memory (bytes by memory.NAMES, analytic, compiled, limit), compile_s
  and, if it fits, `time_of`'s, `budget`'s and timeline.

  Raises:
    UserError: the configuration cannot be on so many devices.
  """
  parts = programs.assemble(config, devices)
  bars = memory.bars(parts, config.microbatches)
  record = described(config, topology, parts.mesh)
  limit = topology.chip.memory
  record['memory'] = bars._asdict() | {'analytic': bars.total, 'limit': limit}
  options = compiler.options(config.compiler, parts.mesh)
  compiled = programs.compile_update(parts, options)
  record |= {
    'program': 'update',
    'compile_s': compiled.seconds,
    'fits': not compiled.refusal,
    'refusal': compiled.refusal,
  }
  if compiled.refusal:
    return record
  record['memory']['compiled'] = compiled.num_bytes
  tokens = columns.num_tokens(parts.batch)
  count = flops.train_per_token(parts.model.config, config.data.length)
  program = hlo.parse(compiled.text)
  held = 1 / parts.mesh.shape['expert']
  record |= time_of(program, topology, tokens, count, held)
  record |= budget(record, config, topology)
  record['timeline'] = timeline.timeline(program, topology, held)
  return record


def described(config: Any, topology: Topology, mesh: Any) -> dict:
  """What is planned."""
  return {
    'topology': topology.name,
    'chip': topology.chip.name,
    'devices': topology.size,
    'slices': topology.num_slices,
    'mesh': {axis: size for axis, size in mesh.shape.items() if size > 1},
    'stage': config.stage_name,
    'remat': config.model.get('remat', 'none'),
    'microbatches': config.microbatches,
    'batch_size': config.batch_size,
    'length': config.data.length,
    'note': HONEST + (_WITHOUT_GPU if topology.chip.is_gpu else ''),
  }


def time_of(
  program: hlo.Program,
  topology: Topology,
  tokens: int,
  count: float,
  held: float = 1.0,
) -> dict:
  """Time and what it is made of, from a schedule.

  Args:
    program: as it was compiled.
    topology: it is for.
    tokens: that one call works on, over all devices.
    count: model FLOPs a token.
    held: as in schedule.cost.

  Returns:
    seconds (of a call), by (seconds of matmul, memory, interconnect; what is
    left is the host's), bound, tokens_per_second, mfu, model_flops and
    hardware_flops (of a device), collectives by kind, overlapped (the share of
    the collectives' bytes within loops that is asynchronous).
  """
  cost = schedule.cost(program, topology, held)
  by = {
    'matmul': cost.matmul,
    'memory': cost.memory,
    'interconnect': cost.exposed,
  }
  model = count * tokens / topology.size
  return {
    'seconds': cost.seconds,
    'by': by,
    'bound': max(by, key=by.get),
    'tokens_per_second': tokens / cost.seconds,
    'mfu': model / cost.seconds / topology.chip.flops,
    'model_flops': model,
    'hardware_flops': cost.flops,
    'collectives': _by_kind(cost.collectives),
    'overlapped': _overlapped(cost.collectives),
  }


def _by_kind(collectives: list[schedule.Collective]) -> list[dict]:
  found = {}
  for one in collectives:
    wire = 'slices' if one.crosses_slices else 'links'
    row = found.setdefault(
      (one.kind, wire),
      {'kind': one.kind, 'over': wire, 'count': 0, 'bytes': 0.0}
      | {'overlapped_bytes': 0.0, 'seconds': 0.0},
    )
    row['count'] += one.times
    row['bytes'] += one.num_bytes * one.times
    row['overlapped_bytes'] += one.num_bytes * one.times * one.is_async
    row['seconds'] += one.seconds * one.times
  return sorted(found.values(), key=lambda row: -row['bytes'])


def _overlapped(collectives: list[schedule.Collective]) -> float:
  looped = [one for one in collectives if one.in_loop]
  total = sum(one.num_bytes * one.times for one in looped)
  asynchronous = sum(o.num_bytes * o.times for o in looped if o.is_async)
  return asynchronous / total if total else 1.0


def budget(record: dict, config: Any, topology: Topology) -> dict:
  """Days and chip-hours of all steps of a configuration."""
  seconds = record['seconds'] * config.steps
  return {
    'steps': config.steps,
    'days': seconds / _HOUR / 24,
    'chip_hours': seconds / _HOUR * topology.size,
  }
