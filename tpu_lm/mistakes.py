"""Mistakes of a configuration that are seen before any data are read."""

import dataclasses
import pathlib
from typing import Any

from ml_collections import ConfigDict

from tpu_lm import (
  checkpoint,
  models,
  processes,
  rollouts,
  sharding,
  stage,
  start,
  weights,
)
from tpu_lm import config as configs
from tpu_lm.errors import UserError
from tpu_lm.models import moe

# Keys whose change makes another run of it: its state cannot be continued, or
# its batches would be others. The mesh is none of them.
_FIXED = (
  'seed', 'batch_size', 'data.length', 'data.rows', 'model', 'stage',
  'init_from', 'transforms', 'trainable', 'optimizer.name',
)  # fmt: skip
_FREE = ('model.attention', 'model.remat', 'model.unroll')  # how, not what


def check(config: ConfigDict, mesh: Any) -> None:
  """Names the first one.

  Raises:
    UserError: a model, stage, evaluation or start that cannot be.
  """
  if processes.many():
    processes.share(mesh)
  draft = models.make(config.model_name, config.model, 1, config.data.length)
  moe.check_mesh(draft.config, mesh)
  shapes = start.abstract(draft, config, mesh)
  try:
    weights.partition(shapes, config.trainable)
  except ValueError as error:
    raise UserError(f'trainable: {error}') from error
  module = stage.find('tpu_lm.stages', config.stage_name, 'stage_name')
  stage.check_hparams(module.make, config.stage, 'stage')
  evals = {
    name: stage.find('tpu_lm.evals', name, 'evals') for name in config.evals
  }
  how = rollouts.sampling_of(config)
  if how is None:
    return
  how.check()
  _check_updates(config, mesh, how)
  for name, one in evals.items():
    if getattr(one, 'READS_ROWS', True):
      raise UserError(
        f'evals={name}: reads rows of text, and data.rows=prompts has none; '
        'take rewards, or none'
      )


def _check_updates(
  config: ConfigDict, mesh: Any, how: rollouts.Sampling
) -> None:
  """Refuses answers that cannot be divided into the updates asked for."""
  together = config.stage.get('together', 1)
  num_rows = config.batch_size * how.group // max(together, 1)
  shards = sharding.num_batch_shards(mesh)
  parts = how.minibatches * config.microbatches * shards
  if num_rows % parts:
    raise UserError(
      f'stage.minibatches={how.minibatches}: {num_rows} rows of answers '
      f'(batch_size={config.batch_size}, stage.group={how.group}, '
      f'{together} together) cannot be divided into minibatches x '
      f'microbatches x devices = {parts}'
    )


# A working directory that is there already.


def check_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Refuses a directory of another run."""
  path = workdir / 'config.json'
  folder = workdir / 'checkpoints'
  saved = checkpoint.Checkpoints(folder, read_only=True).steps()
  if not (path.exists() and saved):
    return
  old, new = _resolved(configs.read(path)), _resolved(config)
  # Sections last: another family is named, not what it changes.
  for key in sorted(old.keys() | new.keys(), key=lambda k: ('.' in k, k)):
    before, now = old.get(key), new.get(key)
    if before != now and key.startswith(_FIXED) and key not in _FREE:
      raise UserError(
        f'{workdir}: was made with {key}={before!r}, not {now!r}; '
        f'give another --workdir, or the same {key}'
      )


def check_damaged(workdir: pathlib.Path) -> None:
  """Refuses to begin anew where all checkpoints are damaged."""
  damaged = workdir / 'checkpoints' / 'damaged'
  if damaged.is_dir() and any(damaged.iterdir()):
    raise UserError(
      f'{workdir}: every checkpoint is damaged, and set aside in '
      f'{damaged}; remove that folder to train from the start again'
    )


def check_data(
  config: ConfigDict, workdir: pathlib.Path, cause: Exception | None
) -> None:
  """Names the data key that differs from the run's own, if one does."""
  old = configs.flatten(configs.read(workdir / 'config.json'))
  for key, now in configs.flatten(config).items():
    if key.startswith('data.') and key != 'data.dir' and old[key] != now:
      raise UserError(
        f'{workdir}: was trained with {key}={old[key]!r}, not {now!r}; '
        f'give the same {key}, or another --workdir'
      ) from cause


def _resolved(config: ConfigDict) -> dict[str, Any]:
  """Every key of a configuration, those of the family's preset included."""
  made = models.make(config.model_name, config.model, 1, config.data.length)
  fields = dataclasses.asdict(made.config)
  return configs.flatten(config) | {f'model.{k}': v for k, v in fields.items()}
