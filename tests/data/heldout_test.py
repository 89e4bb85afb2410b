"""Which records are held out: by share, by md5, and where there are few."""

import hashlib

import numpy as np
import pytest

from tpu_lm.data import heldout


def keys(count):
  return [hashlib.md5(str(i).encode()).digest() for i in range(count)]


def test_a_share_of_md5_is_held_out():
  found = keys(2000)
  marks = heldout.marks(found, heldout.Rule(0.2, 'auto'))
  wanted = [key[0] < 0.2 * 256 - 1 for key in found]
  assert marks[np.array(wanted)].all()
  assert 0.17 < marks.mean() < 0.23
  order = np.random.default_rng(0).permutation(2000)
  again = heldout.marks(
    [found[i] for i in order], heldout.Rule(0.2, 'document')
  )
  np.testing.assert_array_equal(again, marks[order])


@pytest.mark.parametrize(('share', 'wanted'), [(0.0001, 1), (0.9999, 19)])
def test_both_sides_have_some_where_there_are_two(share, wanted):
  found = keys(20)
  marks = heldout.marks(found * 2, heldout.Rule(share, 'auto'))
  assert marks.sum() == 2 * wanted
  held = sorted(found)[:wanted]
  assert {k for k, m in zip(found * 2, marks, strict=True) if m} == set(held)


def test_one_or_none():
  rule = heldout.Rule(0.5, 'auto')
  assert not heldout.marks(keys(1) * 9, rule).any()
  assert heldout.marks([], rule).tolist() == []
  assert not heldout.marks(keys(9), None).any()


def test_tail_is_the_last():
  marks = heldout.marks(keys(21), heldout.Rule(0.1, 'tail'))
  assert np.flatnonzero(marks).tolist() == [18, 19, 20]
