"""Every token is predicted exactly once, whatever the documents' lengths."""

import time

import numpy as np
import pytest

from tpu_lm.data import packing
from tpu_lm.errors import UserError


def documents(rng, count, longest):
  """Streams of unique tokens, and each document's start and size."""
  sizes = rng.integers(2, longest + 1, count)
  starts = np.cumsum(sizes) - sizes
  return np.arange(sizes.sum(), dtype=np.uint32) + 7, starts, sizes


@pytest.mark.parametrize('kind', packing.KINDS)
def test_each_token_is_predicted_once_from_the_one_before(kind):
  rng = np.random.default_rng(0)
  for length in (2, 3, 5, 16, 61):
    for longest in (2, 4, 16, 17, 200):
      count = int(rng.integers(1, 40))
      stream, starts, sizes = documents(rng, count, longest)
      order = rng.permutation(count)
      plan = packing.plan(starts[order], sizes[order], length, kind)
      tokens, segments = packing.rows(
        stream, plan, 0, plan.num_rows, length, pad=0
      )
      assert tokens.shape == (plan.num_rows, length + 1)
      assert (tokens[segments == 0] == 0).all()
      counts = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
      predicted = tokens[:, 1:][counts].tolist()
      # Tokens are numbered, so a neighbour of another document would show.
      assert (tokens[:, :-1][counts] + 1 == tokens[:, 1:][counts]).all()
      expected = np.delete(stream, starts).tolist()
      assert sorted(predicted) == expected


@pytest.mark.parametrize('kind', packing.KINDS)
def test_segments_count_from_one_without_gaps(kind):
  rng = np.random.default_rng(1)
  stream, starts, sizes = documents(rng, 50, 30)
  plan = packing.plan(starts, sizes, 20, kind)
  _, segments = packing.rows(stream, plan, 0, plan.num_rows, 20, pad=0)
  for row in segments.astype(int):
    held = row[: np.count_nonzero(row)]  # padding is at the end
    assert held[0] == 1
    assert set(np.diff(held)) <= {0, 1}
    assert not row[len(held) :].any()


@pytest.mark.parametrize('kind', packing.KINDS)
def test_rows_of_a_range_are_those_of_the_whole(kind, monkeypatch):
  stream, starts, sizes = documents(np.random.default_rng(2), 60, 50)
  plan = packing.plan(starts, sizes, 16, kind)
  whole = packing.rows(stream, plan, 0, plan.num_rows, 16, 0)
  monkeypatch.setattr(packing, 'BLOCK', 60)
  for first in range(0, plan.num_rows, 7):
    part = packing.rows(
      stream, plan, first, min(first + 7, plan.num_rows), 16, 0
    )
    for a, b in zip(whole, part, strict=True):
      np.testing.assert_array_equal(a[first : first + 7], b)


def best_fit_decreasing(sizes, capacity):
  """The rooms left in the rows, by the definition."""
  rooms = []
  for size in sorted(sizes, reverse=True):
    fitting = [(room, i) for i, room in enumerate(rooms) if room >= size]
    if fitting:
      rooms[min(fitting)[1]] -= size
    else:
      rooms.append(capacity - size)
  return sorted(rooms)


def test_best_fit_is_best_fit_decreasing():
  rng = np.random.default_rng(3)
  for _ in range(20):
    _, starts, sizes = documents(rng, 80, 32)
    plan = packing.plan(starts, sizes, 31, 'best_fit')
    filled = np.bincount(plan.row, plan.size, plan.num_rows).astype(int)
    assert sorted(32 - filled) == best_fit_decreasing(sizes.tolist(), 32)
    assert plan.num_split == 0
    assert len(plan.size) == 80  # no document that fits is cut


def test_concat_pads_only_the_last_row():
  stream, starts, sizes = documents(np.random.default_rng(4), 100, 40)
  plan = packing.plan(starts, sizes, 32, 'concat')
  _, segments = packing.rows(stream, plan, 0, plan.num_rows, 32, 0)
  assert (segments[:-1] != 0).all()
  assert plan.num_rows == -(-(len(stream) - 1) // 32)


@pytest.mark.parametrize('kind', packing.WHOLE_KINDS)
def test_whole_records_lie_side_by_side(kind):
  rng = np.random.default_rng(6)
  for count in (1, 7, 90):
    sizes = rng.integers(2, 33, count)
    plan = packing.whole(sizes, 32, kind)
    assert sorted(plan.order.tolist()) == list(range(count))
    assert sorted(set(plan.row.tolist())) == list(range(plan.num_rows))
    for row in range(plan.num_rows):
      held = np.flatnonzero(plan.row == row)
      ends = np.cumsum(sizes[plan.order[held]])
      assert plan.column[held].tolist() == [0, *ends[:-1].tolist()]
      assert ends[-1] <= 32
      assert plan.number[held].tolist() == list(range(1, len(held) + 1))
      assert kind == 'best_fit' or len(held) == 1
    if kind == 'best_fit':
      filled = np.bincount(plan.row, sizes[plan.order]).astype(int)
      assert sorted(32 - filled) == best_fit_decreasing(sizes.tolist(), 32)


def test_nothing_gives_no_rows():
  none = np.zeros(0, np.int64)
  for kind in packing.WHOLE_KINDS:
    assert packing.whole(none, 16, kind).num_rows == 0
  for kind in packing.KINDS:
    assert packing.plan(none, none, 16, kind).num_rows == 0


def test_many_pieces_are_planned_quickly():
  sizes = np.random.default_rng(5).integers(2, 1025, 200_000)
  began = time.process_time()
  packing.plan(np.cumsum(sizes) - sizes, sizes, 1024, 'best_fit')
  assert time.process_time() - began < 5


def test_unknown_kind_names_the_nearest():
  with pytest.raises(UserError, match=r"data.packing=bestfit: .*'best_fit'"):
    packing.check('bestfit')
  for rows, kind in (('text', 'none'), ('pairs', 'concat')):
    with pytest.raises(UserError, match=f'={kind}: not for rows of {rows}'):
      packing.check(kind, rows)
