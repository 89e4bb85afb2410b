"""What a reward model says of an answer (stage_name=reward)."""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from tpu_lm import preference, sharding, start
from tpu_lm.data import answer_rows, chat
from tpu_lm.errors import UserError
from tpu_lm.scoring import RewardFn, Sample, Score


def make(
  *, workdir: str = '', batch_size: int = 32, limit: float = 0.0
) -> RewardFn:
  """The scalar at the last token of the answer, by the model's own template.

  Args:
    workdir: of a run of stage_name=reward.
    batch_size: answers at a time, rounded up to what the devices divide.
    limit: rewards are clipped to -limit .. limit; 0: none.

  Raises:
    UserError: there is no reward model.
  """
  if not workdir:
    raise UserError("reward: model needs model(workdir='DIR')")
  loaded = start.load(workdir)
  if not loaded.model.config.scalar_head:
    raise UserError(
      f'reward: model(workdir={workdir!r}): has no scalar head; name a run of '
      'stage_name=reward'
    )
  shards = sharding.num_batch_shards(loaded.mesh)
  batch_size = -(-batch_size // shards) * shards
  template = chat.load('', loaded.tokenizer, pathlib.Path(workdir, 'tokenizer'))

  @jax.jit
  def rewards(params, batch):
    return preference.rewards(loaded.model, params, batch, 1)[0][:, 0]

  def part(samples: Sequence[Sample]) -> list[float]:
    # As the records of pairs are laid out, the stop token included.
    texts = [_record(sample) for sample in samples]
    found = list(template.encode_batch(texts))
    for one in found:
      if isinstance(one, ValueError):
        raise UserError(f'reward: model: {one}')
    prompts, answers = [], []
    for ids, mask in found:
      first, last = np.flatnonzero(mask)[[0, -1]]
      prompts.append(ids[:first].tolist())
      answers.append(ids[first : last + 1].tolist())
    # Always as many rows: one program a length.
    missing = batch_size - len(prompts)
    rows = answer_rows.rows(
      prompts + prompts[:1] * missing, answers + answers[:1] * missing
    )
    with jax.set_mesh(loaded.mesh):
      put = sharding.put_batch(rows, loaded.mesh)
      return np.asarray(rewards(loaded.params, put))[: len(samples)].tolist()

  def score(samples: Sequence[Sample]) -> list[Score]:
    values = []
    for first in range(0, len(samples), batch_size):
      values += part(samples[first : first + batch_size])
    if limit:
      values = np.clip(values, -limit, limit).tolist()
    return [Score(value) for value in values]

  return score


def _record(sample: Sample) -> tuple:
  answer = {'role': 'assistant', 'content': sample.text}
  return [*sample.prompt, answer], len(sample.prompt), None
