"""The programs of a run, made of shapes alone, compiled for devices elsewhere.

They are those of `train`: the same network, loss, optimizer, mesh and update.
"""

import functools
import importlib.util
import pathlib
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_lm import (
  models,
  optim,
  rollouts,
  sharding,
  stage,
  start,
  target,
  train,
  weights,
)
from tpu_lm.errors import UserError
from tpu_lm.models import moe
from tpu_lm.plan import columns, remembered


class Parts(NamedTuple):
  """What the update is made of, as shapes with their places."""

  model: Any
  mesh: Any
  state: train.State
  frozen: Any
  batch: dict[str, jax.ShapeDtypeStruct]
  update: Any  # jitted


class Compiled(NamedTuple):
  """A program of the compiler's, or why there is none."""

  num_bytes: int  # the most that a device holds; 0: it does not fit
  text: str  # the schedule
  seconds: float  # that the compilation took
  refusal: str = ''


def assemble(config: Any, devices: list[Any]) -> Parts:
  """Everything that `train` jits for an update, without an array."""
  mesh = sharding.make_mesh(config.mesh, devices)
  batch = columns.batch(config, mesh)
  rows = next(iter(batch.values())).shape[0]
  sharding.check_batch(mesh, rows, config.microbatches, config.data.length)
  if mesh.size < len(devices):
    raise UserError(
      f'mesh: makes use of {mesh.size} of {len(devices)} devices; set one axis '
      'to -1, which takes what is left'
    )
  model = models.make(
    config.model_name, config.model, config.data.vocab_size, config.data.length
  )
  moe.check_mesh(model.config, mesh)
  how = rollouts.sampling_of(config)
  tx, schedule = optim.make(
    config.optimizer, config.steps, how.num_updates if how else 1
  )
  made = stage.make(config.stage_name, model, _no_start, config.stage)
  with target.planned(mesh.devices.flat[0]), jax.set_mesh(mesh):
    whole = start.abstract(model, config, mesh)
    trainable, frozen = weights.partition(whole, config.trainable)
    begin = functools.partial(train.init, tx=tx, window=config.guard.window)
    state = sharding.abstract(jax.eval_shape(begin, trainable), mesh)
  # Lowered here, compiled below: options are given then.
  update = train.jitted(made.loss, tx, schedule, config, state, {})
  return Parts(model, mesh, state, frozen, batch, update)


def _no_start() -> Any:
  raise AssertionError('a plan has no parameters')


def compile_update(parts: Parts, flags: dict[str, Any]) -> Compiled:
  """Compiles the update with these options of the compiler."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  place = NamedSharding(parts.mesh, P())
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=place)
  arguments = parts.state, parts.frozen, parts.batch, key
  return compiled(parts.update, arguments, parts.mesh, flags)


def compiled(
  function: Any, arguments: tuple, mesh: Any, flags: dict[str, Any]
) -> Compiled:
  """Compiles a jitted function of shapes for the devices of a mesh."""
  with target.planned(mesh.devices.flat[0]), jax.set_mesh(mesh):
    lowered = function.lower(*arguments)
    name = remembered.key(lowered, mesh, flags, version())
    found = remembered.find(name)
    if found is None:
      found = _compiled(lowered, flags, mesh.devices.flat[0].platform)
      remembered.keep(name, found)
  return Compiled(**found)


def _compiled(
  lowered: Any, flags: dict[str, Any], platform: str
) -> dict[str, Any]:
  """The fields of `Compiled`."""
  begin = time.perf_counter()
  found = {'num_bytes': 0, 'text': '', 'refusal': ''}
  with tempfile.TemporaryDirectory() as folder:
    if platform == 'tpu':
      flags = flags | {'xla_dump_to': folder}
    if platform == 'gpu':  # kernels are not timed: there is no GPU
      flags = flags | {'xla_gpu_autotune_level': 0}
    try:
      made = lowered.compile(compiler_options=flags)
      found['num_bytes'] = _num_bytes(made, pathlib.Path(folder))
      found['text'] = made.as_text()
    except jax.errors.JaxRuntimeError as error:
      found['refusal'] = _refusal(str(error))
  return found | {'seconds': time.perf_counter() - begin}


def _num_bytes(made: Any, folder: pathlib.Path) -> int:
  """What a device needs for the arguments, temporary arrays and the program.

  Of the TPU compiler that is what it assigned, in its report: the `temp` of
  `memory_analysis()` was 52.9 GiB where it had assigned 37.3, since there what
  takes turns in one place counts twice, and the peak there omits loops.
  """
  stats = made.memory_analysis()
  code = stats.generated_code_size_in_bytes
  for path in folder.glob('*memory-usage-report.txt'):
    found = re.search(r'Total bytes: (\d+)', path.read_text())
    if found:  # the first memory space is the device's
      return int(found[1]) + code
  arrays = stats.argument_size_in_bytes + stats.output_size_in_bytes
  return arrays - stats.alias_size_in_bytes + stats.temp_size_in_bytes + code


def version() -> str:
  """Of the compiler."""
  from importlib import metadata

  names = [n for n in ('jax', 'libtpu') if importlib.util.find_spec(n)]
  return ', '.join(f'{name} {metadata.version(name)}' for name in names)


def _refusal(text: str) -> str:
  """The sentence of the compiler's that says what is too small."""
  for line in text.splitlines():
    if 'exceed' in line or 'Ran out of memory' in line:
      return line.strip()[:300]
  if 'RESOURCE_EXHAUSTED' in text:
    return text.splitlines()[0][:300]
  raise UserError(f'the compiler failed: {text.splitlines()[0][:300]}')
