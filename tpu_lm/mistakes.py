"""Mistakes of a configuration that are seen before any data are read."""

from typing import Any

import jax
from ml_collections import ConfigDict

from tpu_lm import models, rollouts, sharding, stage, start, weights
from tpu_lm.errors import UserError


def check(config: ConfigDict, mesh: Any) -> None:
  """Names the first one.

  Raises:
    UserError: a model, stage, evaluation or start that cannot be.
  """
  draft = models.make(config.model_name, config.model, 1, config.data.length)
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
  if jax.process_count() > 1:
    raise UserError(
      f'stage_name={config.stage_name}: answers its own prompts, which several '
      'processes cannot do together yet; run one process'
    )
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
