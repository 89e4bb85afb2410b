"""What an answer's length costs, from 0 to 1; to be subtracted: `- length(…)`.

`limit`, the soft overlong punishment of DAPO (arXiv 2503.14476, equation 13),
without its sign: with n tokens, L_max = `limit` and L_cache = `cache`

  0                                  n <= L_max - L_cache
  (n - (L_max - L_cache)) / L_cache  up to L_max
  1                                  above

`target`: |n - target| / target, at most 1.
"""

from collections.abc import Sequence

from tpu_lm.errors import UserError
from tpu_lm.scoring import RewardFn, Sample, Score


def make(*, limit: int = 0, cache: int = -1, target: int = 0) -> RewardFn:
  """Makes the reward; `limit` or `target` must be given.

  Args:
    limit: tokens from which on an answer costs 1.
    cache: tokens below the limit over which the cost grows; -1: a fifth of
      the limit, as the paper has it (4,096 of 20,480).
    target: tokens that cost nothing.
  """
  cache = limit // 5 if cache == -1 else cache
  if (limit > 0) == (target > 0) or min(limit, target) < 0:
    raise UserError(
      f'rewards: length(limit={limit}, target={target}): give one of them, '
      'a number of tokens above 0'
    )
  if not 0 <= cache <= limit:
    raise UserError(
      f'rewards: length.cache={cache}: must be from 0 to limit={limit}'
    )

  def cost(num_tokens: int) -> float:
    if target:
      return min(1.0, abs(num_tokens - target) / target)
    over = num_tokens - (limit - cache)
    return min(1.0, max(0.0, over / cache)) if cache else float(over > 0)

  def scores(samples: Sequence[Sample]) -> list[Score]:
    return [
      Score(cost(s.num_tokens), True, f'{s.num_tokens} tokens') for s in samples
    ]

  return scores
