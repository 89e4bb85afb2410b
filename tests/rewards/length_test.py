"""Equation 13 of DAPO by hand; a target; wrong settings."""

import pytest

from tpu_lm.errors import UserError
from tpu_lm.rewards import length
from tpu_lm.scoring import Sample


def costs(*counts, **settings):
  given = [Sample([], 'a', {}, n) for n in counts]
  return [score.value for score in length.make(**settings)(given)]


def test_the_papers_own_numbers():
  """Section 3.4: 16,384 tokens, 4,096 more for the punishment."""
  counts = (1, 16384, 16385, 18432, 20480, 20481, 40000)
  expected = [0, 0, 1 / 4096, 0.5, 1, 1, 1]
  assert costs(*counts, limit=20480) == expected
  assert costs(*counts, limit=20480, cache=4096) == expected


def test_no_cache_is_a_hard_limit():
  assert costs(9, 10, 11, limit=10, cache=0) == [0, 0, 1]
  assert costs(2, 3, 4, limit=4, cache=4) == [0.5, 0.75, 1]


def test_a_target():
  assert costs(10, 5, 15, 0, 40, target=10) == [0, 0.5, 0.5, 1, 1]


@pytest.mark.parametrize(
  'wrong',
  [
    {},
    {'limit': 5, 'target': 5},
    {'limit': -5},
    {'limit': 5, 'target': -5},
    {'limit': 5, 'cache': 6},
    {'limit': 5, 'cache': -2},
  ],
)
def test_wrong_settings(wrong):
  with pytest.raises(UserError, match='rewards: length'):
    length.make(**wrong)
