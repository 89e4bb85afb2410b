"""How good an answer about the generated world truly is; see data/world.py.

`kind='answer'`: 1 where the answer is right, else 0: of a number the last one
counts, a look-up must name the one right thing. `kind='reward'`: the true
reward behind the world's preferences: right, courteous, well formed, short.
"""

from collections.abc import Sequence

from tpu_lm.data import world, world_tasks
from tpu_lm.errors import UserError, nearest
from tpu_lm.scoring import RewardFn, Sample, Score

_KINDS = ('answer', 'reward')


def make(*, kind: str = 'answer', seed: int = 0) -> RewardFn:
  """Makes the reward.

  Args:
    kind: 'answer' or 'reward'.
    seed: of the world.
  """
  if kind not in _KINDS:
    raise UserError(
      f'rewards: world.kind={kind!r}: must be {" or ".join(_KINDS)}'
      f'{nearest(kind, _KINDS)}'
    )

  def score(sample: Sample) -> Score:
    try:
      asked = world_tasks.question_of(sample.prompt, seed)
    except ValueError as error:
      raise UserError(f'rewards: world: {error}') from error
    problem = {
      'prompt': sample.prompt,
      'kind': asked.kind,
      'answer': asked.answer,
    }
    right = world.check(problem, sample.text)
    value = float(right)
    if kind == 'reward':
      value = world.true_reward(sample.prompt, sample.text, seed)
    return Score(value, _is_read(asked, sample.text), asked.answer)

  def scores(samples: Sequence[Sample]) -> list[Score]:
    return [score(sample) for sample in samples]

  return scores


def _is_read(asked: world_tasks.Question, text: str) -> bool:
  """Whether the text names anything of the kind that is asked for."""
  if asked.kind not in world_tasks.POOLS:
    return world_tasks.last_number(text) is not None
  said = text.lower()
  return any(name.lower() in said for name in world_tasks.POOLS[asked.kind])
