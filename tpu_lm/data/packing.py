"""Documents of any length laid into rows of one length.

A row has length + 1 slots: its first `length` are inputs, its last `length`
targets. A document of n tokens longer than a row is chunked into pieces, piece
k being tokens [k length, (k + 1) length + 1): neighbours share one token, the
last of one being only a target and the first of the next only an input, so
that every token but a document's first is predicted exactly once.

`best_fit` keeps pieces whole: best-fit decreasing (Johnson et al., 1974; for
language models Ding et al., arXiv 2404.10830), the longest first, each into
the row with the least room that it fits into. `concat` lays documents end to
end and cuts every `length` tokens: no padding but in the last row, though
documents cross rows.

Records that must stay whole (conversations, pairs) are never chunked: they are
laid by `best_fit`, or one a row by `none`.
"""

from typing import NamedTuple

import numpy as np

from tpu_lm.errors import UserError, nearest

KINDS = ('best_fit', 'concat')
WHOLE_KINDS = ('best_fit', 'none')
BLOCK = 1 << 20  # tokens that are laid at once


class Plan(NamedTuple):
  """Where each piece goes; all arrays have one entry a piece.

  Attributes:
    start: np.int64, its first token in the stream of all tokens.
    size: np.int64, its number of tokens, at most length + 1.
    row: np.int64, sorted.
    column: np.int64, its first slot in the row.
    num_rows: rows in all.
    num_split: documents that became several pieces.
  """

  start: np.ndarray
  size: np.ndarray
  row: np.ndarray
  column: np.ndarray
  num_rows: int
  num_split: int


class Whole(NamedTuple):
  """Where each record goes; all arrays have one entry a record.

  Attributes:
    order: np.int64, the records by row and column.
    row: np.int64, sorted.
    column: np.int64, its first slot in the row.
    number: np.int64, which record of its row it is, from 1.
    num_rows: rows in all.
  """

  order: np.ndarray
  row: np.ndarray
  column: np.ndarray
  number: np.ndarray
  num_rows: int


def check(kind: str, rows: str = 'text') -> None:
  """Refuses a `data.packing` that rows of this kind do not have."""
  kinds = KINDS if rows == 'text' else WHOLE_KINDS
  if kind not in kinds:
    other = kind in KINDS or kind in WHOLE_KINDS
    what = f'not for rows of {rows}' if other else 'unknown'
    raise UserError(
      f'data.packing={kind}: {what}{nearest(kind, kinds)}; there are '
      f'{", ".join(kinds)}'
    )


def plan(starts: np.ndarray, sizes: np.ndarray, length: int, kind: str) -> Plan:
  """Lays documents into rows, in the order given; deterministic.

  Args:
    starts: np.int64[documents], the first token of each in the stream.
    sizes: np.int64[documents], their tokens, at least 2.
    length: of a row, which has one slot more.
    kind: 'best_fit' or 'concat'.
  """
  assert (sizes >= 2).all()
  if kind == 'concat':
    return _concat(starts, sizes, length)
  start, size, num_split = _pieces(starts, sizes, length)
  order = np.argsort(-size, kind='stable')
  row, column, num_rows = _best_fit(size[order], length + 1)
  by_row = np.lexsort((column, row))
  order = order[by_row]
  return Plan(
    start[order], size[order], row[by_row], column[by_row], num_rows, num_split
  )


def whole(sizes: np.ndarray, capacity: int, kind: str) -> Whole:
  """Lays records into rows, in the order given; deterministic.

  Args:
    sizes: np.int64[records], from 2 to `capacity` slots.
    capacity: slots of a row.
    kind: 'best_fit' or 'none'.
  """
  count = len(sizes)
  if kind == 'none':
    index = np.arange(count)
    zeros = np.zeros(count, np.int64)
    return Whole(index, index, zeros, zeros + 1, count)
  assert not count or 2 <= sizes.min() <= sizes.max() <= capacity
  order = np.argsort(-sizes, kind='stable')
  row, column, num_rows = _best_fit(sizes[order], capacity)
  by_row = np.lexsort((column, row))
  row = row[by_row]
  return Whole(order[by_row], row, column[by_row], _numbers(row), num_rows)


def _pieces(
  starts: np.ndarray, sizes: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, int]:
  counts = -(-(sizes - 1) // length)
  number = _counting(counts)
  start = np.repeat(starts, counts) + number * length
  size = np.minimum(np.repeat(sizes, counts) - number * length, length + 1)
  return start, size, int((counts > 1).sum())


def _counting(counts: np.ndarray) -> np.ndarray:
  """[0 .. counts[0]-1, 0 .. counts[1]-1, …]."""
  total = int(counts.sum())
  return np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)


def spread(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """The indices of all ranges [start, start + size), end to end."""
  return np.repeat(starts, sizes) + _counting(sizes)


def _numbers(row: np.ndarray) -> np.ndarray:
  """Counts the pieces of each row from 1; `row` must be sorted."""
  new_row = np.append(True, row[1:] != row[:-1])[: len(row)]
  index = np.arange(len(row))
  return index - np.maximum.accumulate(np.where(new_row, index, 0)) + 1


def _best_fit(
  sizes: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray, int]:
  """Row and column of each piece; `sizes` must fall.

  Rows are kept by the room left in them, with a bit set per room that has
  any, so that a piece finds its row in O(capacity / 64).
  """
  row = np.zeros(len(sizes), np.int64)
  column = np.zeros(len(sizes), np.int64)
  num_full = int((sizes == capacity).sum())
  row[:num_full] = np.arange(num_full)
  num_rows = num_full
  with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
  rooms = 0
  rows_of, columns_of = [], []
  for size in sizes[num_full:].tolist():
    fitting = rooms >> size
    if fitting:
      room = size + (fitting & -fitting).bit_length() - 1
      chosen = with_room[room].pop()
      if not with_room[room]:
        rooms ^= 1 << room
    else:
      room, chosen = capacity, num_rows
      num_rows += 1
    rows_of.append(chosen)
    columns_of.append(capacity - room)
    left = room - size
    # The smallest piece has two tokens.
    if left >= 2:
      with_room[left].append(chosen)
      rooms |= 1 << left
  row[num_full:] = rows_of
  column[num_full:] = columns_of
  return row, column, num_rows


def _concat(starts: np.ndarray, sizes: np.ndarray, length: int) -> Plan:
  """Documents end to end; a row's last token is the next row's first."""
  total = int(sizes.sum())
  begin = np.cumsum(sizes) - sizes  # in the row of all documents
  num_rows = -(-(total - 1) // length)
  first_row = begin // length
  last_row = (begin + sizes - 1) // length
  # A token at a row's first slot is also at the last slot of the row before.
  first_row -= (begin % length == 0) & (begin > 0)
  last_row = np.minimum(last_row, num_rows - 1)
  counts = last_row - first_row + 1
  row = np.repeat(first_row, counts) + _counting(counts)
  begin_of = np.repeat(begin, counts)
  end_of = np.repeat(begin + sizes, counts)
  left = np.maximum(begin_of, row * length)
  right = np.minimum(end_of, row * length + length + 1)
  size = right - left
  start = np.repeat(starts, counts) + left - begin_of
  column = left - row * length
  order = np.lexsort((column, row))
  return Plan(
    start[order],
    size[order],
    row[order],
    column[order],
    num_rows,
    int((counts > 1).sum()),
  )


def rows(
  stream: np.ndarray, packed: Plan, first: int, last: int, length: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows first..last of the plan.

  Returns:
    tokens of the stream's dtype and segment ids, np.uint16, both
    [last - first, length + 1]; segments count from 1 in each row, 0 is padding.
  """
  shape = (last - first, length + 1)
  tokens = np.full(shape, pad, stream.dtype)
  segments = np.zeros(shape, np.uint16)
  # In blocks, as the index of a token takes four times its own memory.
  step = max(1, BLOCK // (length + 1))
  for start in range(first, last, step):
    block = slice(start - first, min(start + step, last) - first)
    _lay(stream, packed, start, tokens[block], segments[block])
  return tokens, segments


def _lay(
  stream: np.ndarray,
  packed: Plan,
  first: int,
  tokens: np.ndarray,
  segments: np.ndarray,
) -> None:
  """Fills both arrays with the rows from `first` on."""
  num_rows, slots = tokens.shape
  begin, end = np.searchsorted(packed.row, [first, first + num_rows])
  size = packed.size[begin:end]
  row = packed.row[begin:end] - first
  to = spread(row * slots + packed.column[begin:end], size)
  tokens.reshape(-1)[to] = stream[spread(packed.start[begin:end], size)]
  segments.reshape(-1)[to] = np.repeat(_numbers(row), size)
