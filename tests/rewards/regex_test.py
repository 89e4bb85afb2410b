"""Presence and counts of a pattern."""

import pytest

from tpu_lm.errors import UserError
from tpu_lm.rewards import regex
from tpu_lm.scoring import Sample


def values(*texts, **settings):
  given = [Sample([], text, {}) for text in texts]
  return [score.value for score in regex.make(**settings)(given)]


def test_presence():
  assert values('so: yes', 'no', 'yes yes', pattern='yes') == [1, 0, 1]


def test_counts_up_to_a_limit():
  texts = ('', '1', '1 2', '1 2 3', '1 2 3 4 5')
  assert values(*texts, pattern=r'\d', limit=4) == [0, 0.25, 0.5, 0.75, 1]


def test_lines_and_case():
  assert values('a\nStep 1\nb', 'a Step 1', pattern='^Step') == [1, 0]
  assert values('YES', pattern='yes') == [0]
  assert values('YES', pattern='yes', ignore_case=True) == [1]


def test_wrong_settings():
  for wrong, why in (
    ({}, 'needs a pattern'),
    ({'pattern': 'a', 'limit': 0}, 'a limit of at least 1'),
    ({'pattern': '('}, r"regex.pattern='\(': no regular expression"),
  ):
    with pytest.raises(UserError, match=why):
      regex.make(**wrong)
