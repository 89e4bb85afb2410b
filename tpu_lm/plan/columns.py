"""The batch of each stage as shapes: what `train` would put on the devices."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_lm import rollouts, sharding, stage
from tpu_lm.buckets import room_for
from tpu_lm.errors import UserError

_TOKENS = ('tokens', 'segment_ids', 'positions')
_KEPT_BY_RECORD = 16  # records that a packed row is taken to hold
_HALVES = {
  'pairs': ('chosen_', 'rejected_'), 'rated': ('', 'mismatched_'),
}  # fmt: skip
_VALUES = {'pairs': 'margins', 'rated': 'scores', 'scored': 'scores'}


def batch(config: Any, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """The columns that the update of this configuration reads."""
  kind = stage.rows_of(config)
  if kind == 'prompts' and config.stage_name == 'distill':
    raise UserError(
      'stage_name=distill: is planned on rows that were prepared, not on its '
      'own answers; leave data.rows out'
    )
  columns = _sampled(config) if kind == 'prompts' else _prepared(config, kind)
  place = NamedSharding(mesh, P(sharding.rows_over(mesh)))
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for name, (shape, dtype) in columns.items()
  }


def _rows(shape: tuple[int, int], prefix: str = '') -> dict:
  found = {prefix + name: (shape, np.int32) for name in _TOKENS}
  return found | {f'{prefix}loss_mask': (shape, np.bool_)}


def _prepared(config: Any, kind: str) -> dict:
  """Rows as they were prepared, and what the stage keeps beside them."""
  count, length = config.batch_size, config.data.length
  shape = count, length + 1
  slots = count, _KEPT_BY_RECORD
  columns = {}
  for prefix in _HALVES.get(kind, ('',)):
    columns |= _rows(shape, prefix)
    if kind in _HALVES:
      columns[f'reference_{prefix}logps'] = slots, np.float32
  if kind in _VALUES:
    columns[_VALUES[kind]] = slots, np.float32
  if kind == 'rated':
    columns['reference_point'] = (count,), np.float32
  if config.stage_name == 'distill':
    columns |= _taught(config, count, length)
  return columns


def _taught(config: Any, count: int, length: int) -> dict:
  """What is kept of a teacher."""
  top_k = config.stage.get('top_k', 0)
  if not top_k:
    raise UserError(
      'stage.top_k=0: a plan does not open the teacher; set stage.top_k to how '
      'many of its likeliest tokens are kept'
    )
  return {
    'teacher_ids': ((count, length, top_k), np.int32),
    'teacher_logps': ((count, length, top_k + 1), np.float32),
  }


def _sampled(config: Any) -> dict:
  """Rows of prompts and answers; prompts are taken to fill `data.length`."""
  how = rollouts.sampling_of(config)
  together = config.stage.get('together', 1)
  count = config.batch_size * how.group // how.minibatches // together
  answers = how.max_new_tokens * together
  shape = count, room_for(config.data.length + answers) + 1
  logps = (count, shape[1] - 1), np.float32
  columns = _rows(shape) | {'sampler_logps': logps}
  if config.stage_name == 'ppo':
    names = ('advantages', 'returns', 'old_values', 'old_logps')
    return columns | dict.fromkeys(names, logps)
  columns['advantages'] = (count, together)[: 1 + (together > 1)], np.float32
  if together > 1:
    columns['answer_at'] = (count, together, how.max_new_tokens), np.int32
  if how.num_updates > 1:
    columns['old_logps'] = logps
  if config.stage.get('beta', 0):
    columns['reference_logps'] = logps
  return columns


def num_tokens(columns: dict[str, jax.ShapeDtypeStruct]) -> int:
  """How many tokens the network reads in an update."""
  return sum(
    math.prod((x.shape[0], x.shape[1] - 1))
    for name, x in columns.items()
    if name.endswith('tokens') and not name.startswith('mismatched_')
  )
