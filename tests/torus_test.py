import itertools
import types

import numpy as np
import pytest

from tpu_lm import torus
from tpu_lm.errors import UserError


def chips(*sides, slices=1):
  """Devices of TPU slices; ids run along the first side, as on TPUs."""
  corners = list(itertools.product(*map(range, reversed(sides))))
  return [
    types.SimpleNamespace(
      id=n + slice_index * len(corners),
      coords=(*reversed(corner), *(0,) * (3 - len(sides))),
      core_on_chip=0,
      device_kind='TPU v5 lite',
      platform='tpu',
      process_index=0,
      slice_index=slice_index,
    )
    for slice_index in range(slices)
    for n, corner in enumerate(corners)
  ]


def test_sides_are_those_of_one_slice():
  assert torus.sides(chips(4, 8)) == (4, 8, 1)
  assert torus.sides(chips(2, 4, slices=3)) == (2, 4, 1)
  assert torus.num_slices(chips(2, 4, slices=3)) == 3


def test_other_devices_lie_on_no_torus():
  plain = [types.SimpleNamespace(id=0, platform='cpu')]
  assert torus.sides(plain) == ()
  assert torus.num_slices(plain) == 1


@pytest.mark.parametrize(
  ('size', 'sides', 'expected'),
  [
    (256, (16, 16, 1), (16, 16)),
    (16, (16, 16, 1), (16,)),
    (32, (16, 16, 1), (16, 2)),
    (64, (4, 4, 4), (4, 4, 4)),
    (128, (8, 8, 16), (16, 8)),
    (8, (2, 4, 1), (4, 2)),
    (512, (16, 16, 1), (16, 32)),  # over slices: what is left
    (3, (4, 4, 1), (3,)),  # along no ring
    (1, (4, 4, 1), (1,)),
    (8, (), (8,)),  # no torus
  ],
)
def test_a_size_is_made_of_whole_rings(size, sides, expected):
  found = torus.rings(size, sides)
  assert found == expected
  assert np.prod(found) == size


def test_no_more_rings_than_are_asked_for():
  assert torus.rings(64, (4, 4, 4), most=2) == (4, 16)


def lines(array, axis: int):
  """Devices along an axis, as sets of coordinates that vary."""
  moved = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
  for row in moved:
    yield [{device.coords[n] for device in row} for n in range(3)]


def test_each_ring_of_fsdp_lies_along_one_side():
  shape = {'data': 1, 'fsdp': 4, 'fsdp_y': 4, 'tensor': 1}
  found = torus.arranged(shape, chips(4, 4))
  assert found.shape == (1, 4, 4, 1)
  assert len({device.id for device in found.flat}) == 16
  sides = set()
  for axis in (1, 2):
    for x, y, _ in lines(found, axis):
      assert sorted(map(len, (x, y))) == [1, 4]
      sides.add((axis, len(x)))
  assert len(sides) == 2  # one along x, the other along y


def test_data_spans_the_slices_and_nothing_else_does():
  shape = {'data': 4, 'fsdp': 4, 'fsdp_y': 2, 'tensor': 1}
  found = torus.arranged(shape, chips(4, 4, slices=2))
  assert found.shape == (4, 4, 2, 1)
  slices = np.vectorize(lambda device: device.slice_index)(found)
  assert (slices == slices[:, :1, :1]).all()
  assert set(slices[:, 0, 0, 0]) == {0, 1}


def test_data_that_does_not_span_the_slices_is_refused():
  shape = {'data': 3, 'fsdp': 8}
  with pytest.raises(UserError, match=r'mesh\.data=3: .* a multiple of 2'):
    torus.arranged(shape, chips(4, 3, slices=2))


def test_what_cannot_be_laid_out_names_the_sizes():
  shape = {'data': 1, 'fsdp': 5, 'tensor': 3}
  with pytest.raises(UserError, match=r'fsdp=5 x tensor=3 .*\(4, 4, 1\)'):
    torus.arranged(shape, chips(4, 4))
