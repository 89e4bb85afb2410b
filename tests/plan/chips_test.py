import pytest

from tpu_lm.errors import UserError
from tpu_lm.plan import chips


@pytest.mark.parametrize(
  ('name', 'chip', 'sides', 'slices', 'size'),
  [
    ('v5e-256', 'v5e', (16, 16), 1, 256),
    ('v5e-8', 'v5e', (2, 4), 1, 8),
    ('2xv5e-256', 'v5e', (16, 16), 2, 512),
    ('v6e-256', 'v6e', (16, 16), 1, 256),
    # v4 and v5p count cores, two a chip.
    ('v5p-128', 'v5p', (4, 4, 4), 1, 64),
    ('v5p-2048', 'v5p', (8, 8, 16), 1, 1024),
    ('v4-8', 'v4', (2, 2, 1), 1, 4),
    ('v5e:4x4', 'v5e', (4, 4), 1, 16),
    ('4xv5p:2x2x4', 'v5p', (2, 2, 4), 4, 64),
    ('h100-8', 'h100', (8,), 1, 8),
  ],
)
def test_names_are_those_of_the_cloud(name, chip, sides, slices, size):
  found = chips.find(name)
  assert found.name == name
  assert found.chip is chips.CHIPS[chip]
  assert (found.sides, found.num_slices) == (sides, slices)
  assert found.size == size
  assert found.slice_size == size // slices


@pytest.mark.parametrize(
  'name',
  ['v5e-255', 'v5p-4', 'v9-8', '0xv5e-8', 'v5e', 'v5e:0x4', 'v5e-4x4', '',
   'v5e:2x2x2', 'v5p:4x4',
   'h100', 'v5p-7'],
)  # fmt: skip
def test_an_unknown_one_lists_those_that_are_known(name):
  with pytest.raises(UserError) as caught:
    chips.find(name)
  said = str(caught.value)
  assert said.startswith(f'--topology={name}: unknown')
  for known in ('v5e-256', 'v5p-128', 'v6e-8', 'v4-8', 'h100-8', 'v5e:4x4'):
    assert known in said


def test_a_slip_of_the_pen_is_told_the_nearest():
  with pytest.raises(UserError, match=r"v5e-265: unknown .*'v5e-256'\?"):
    chips.find('v5e-265')


def test_all_that_are_listed_are_found():
  for name in chips.known():
    assert chips.find(name).size >= 1
