"""How often a regular expression is found in an answer, as a share of `limit`.

With `limit=1` it is whether it is found. Matches do not overlap. An expression
with nested repeats, like (a+)+b, may take for ever: Python has no time limit.
"""

import itertools
import re
from collections.abc import Sequence

from tpu_lm.errors import UserError
from tpu_lm.scoring import RewardFn, Sample, Score


def make(
  *, pattern: str = '', limit: int = 1, ignore_case: bool = False
) -> RewardFn:
  """Makes the reward.

  Args:
    pattern: with '.' any character but a newline, ^ and $ the ends of a line.
    limit: the number of matches that is worth 1; more are worth no more.
    ignore_case: whether 'A' matches 'a'.
  """
  if not pattern or limit < 1:
    raise UserError(
      f'rewards: regex(pattern={pattern!r}, limit={limit}): needs a pattern, '
      'and a limit of at least 1'
    )
  found = compiled('regex', pattern, re.MULTILINE | ignore_case * re.IGNORECASE)

  def scores(samples: Sequence[Sample]) -> list[Score]:
    matches = (found.finditer(sample.text) for sample in samples)
    counts = [sum(1 for _ in itertools.islice(m, limit)) for m in matches]
    return [Score(n / limit, True, f'{n} of {limit}') for n in counts]

  return scores


def compiled(name: str, pattern: str, flags: int) -> re.Pattern:
  """The pattern of the reward `name`."""
  try:
    return re.compile(pattern, flags)
  except re.error as error:
    raise UserError(
      f'rewards: {name}.pattern={pattern!r}: no regular expression ({error})'
    ) from error
