"""The whole answer, letter for letter."""

import pytest

from tpu_lm.errors import UserError
from tpu_lm.rewards import exact
from tpu_lm.scoring import Sample


def score(text, record, **settings):
  (found,) = exact.make(**settings)([Sample([], text, record)])
  return found


@pytest.mark.parametrize(
  ('text', 'known', 'settings', 'value'),
  [
    ('Luton', 'Luton', {}, 1),
    (' Luton\n', 'Luton', {}, 1),
    (' Luton', 'Luton', {'strip': False}, 0),
    ('luton', 'Luton', {}, 0),
    ('lUTON', 'Luton', {'casefold': True}, 1),
    ('STRASSE', 'Straße', {'casefold': True}, 1),
    ('In Luton', 'Luton', {}, 0),
    ('Lut', 'Luton', {}, 0),
    ('42', 42, {}, 1),
    ('b', ['a', 'b'], {}, 1),
    ('c', ['a', 'b'], {}, 0),
  ],
)
def test_values(text, known, settings, value):
  found = score(text, {'answer': known}, **settings)
  assert (found.value, found.parsed) == (value, True)


def test_an_empty_answer_is_counted_apart():
  found = score(' ', {'answer': 'a'})
  assert (found.value, found.parsed) == (0, False)


def test_another_key():
  assert score('a', {'label': 'a', 'answer': 'b'}, key='label').value == 1
  with pytest.raises(UserError, match=r"key='label': the record has 'answer'"):
    score('a', {'answer': 'a'}, key='label')
