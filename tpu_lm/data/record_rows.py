"""Whole records laid into rows: the arrays of every kind.

  chat    tokens, segment_ids, loss_mask
  pairs   the same of chosen_ and rejected_; margins
  rated   the same, and of mismatched_: the prompt with the completion of the
          next record that has another one, by which KTO (arXiv 2402.01306,
          section 4.1) estimates its reference point; scores
  scored  tokens, segment_ids, loss_mask; scores
  prompts tokens, segment_ids, loss_mask, which is nowhere true; one a row

Arrays are [rows, length + 1], margins and scores float32 [rows, S], one entry
a record of the row. Records number s of a row are segment s of its every array.
"""

import pathlib
from typing import NamedTuple

import numpy as np

from tpu_lm.data import packing

PREFIXES = {
  'chat': ('',),
  'pairs': ('chosen_', 'rejected_'),
  'rated': ('', 'mismatched_'),
  'scored': ('',),
}
VALUES = {'chat': '', 'pairs': 'margins', 'rated': 'scores', 'scored': 'scores'}
COLUMNS = ('tokens', 'segment_ids', 'loss_mask')


class Store:
  """Token sequences and their masks, end to end in two files.

  A sequence ends with its last trained token, even where it is longer than a
  row; `laid` is how much of it a row takes. One of which nothing is trained is
  whole.
  """

  def __init__(self, folder: pathlib.Path, prefix: str, dtype: type):
    self._dtype = dtype
    self._paths = [folder / f'{prefix}{x}.stream.tmp' for x in ('ids', 'mask')]
    self._files = [path.open('wb') for path in self._paths]
    self.sizes: list[int] = []
    self.laid: list[int] = []
    self.begins: list[int] = []  # tokens before the first trained one

  def add(self, ids: np.ndarray, mask: np.ndarray, laid: int) -> None:
    trained = np.flatnonzero(mask)
    size = int(trained[-1]) + 1 if len(trained) else len(ids)
    self._files[0].write(ids[:size].astype(self._dtype).tobytes())
    self._files[1].write(mask[:size].tobytes())
    self.sizes.append(size)
    self.laid.append(laid)
    self.begins.append(int(trained[0]) if len(trained) else size)

  def finish(self) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and the mask of all sequences."""
    for file in self._files:
      file.close()
    if not self.sizes:
      return np.zeros(0, self._dtype), np.zeros(0, bool)
    ids, mask = self._paths
    return np.memmap(ids, self._dtype, 'r'), np.memmap(mask, bool, 'r')

  def close(self) -> None:
    for file, path in zip(self._files, self._paths, strict=True):
      file.close()
      path.unlink(missing_ok=True)


class Array(NamedTuple):
  """What one array of tokens is laid from, in the order of the records.

  Attributes:
    prefix: of its columns.
    tokens, mask: of all sequences, end to end.
    starts, sizes: np.int64[records, pieces] in them.
  """

  prefix: str
  tokens: np.ndarray
  mask: np.ndarray
  starts: np.ndarray
  sizes: np.ndarray


def laid(mask: np.ndarray, length: int) -> int:
  """How many tokens a row takes of a sequence; 0 where no target is left."""
  trained = np.flatnonzero(mask[:length])
  # The first token of a sequence is only read.
  return int(trained[-1]) + 1 if len(trained) and trained[-1] else 0


def array(
  prefix: str, store: Store, streams: tuple, chosen: np.ndarray
) -> Array:
  """The sequences of these records as they are."""
  sizes, taken = np.array(store.sizes), np.array(store.laid)
  starts = np.cumsum(sizes) - sizes
  return Array(prefix, *streams, starts[chosen, None], taken[chosen, None])


def mismatched(
  store: Store,
  streams: tuple[np.ndarray, np.ndarray],
  chosen: np.ndarray,
  completions: list[bytes],
  length: int,
) -> Array | None:
  """Each prompt with the completion of the next record that has another.

  Tokens are cut at the first trained one, where a model would begin to answer.

  Args:
    store: holds the sequences.
    streams: what its `finish` returned.
    chosen: np.int64[records], which of them, in their order; it is cyclic.
    completions: an md5 of each of the chosen.
    length: tokens that a row takes.

  Returns:
    None where all completions are the same.
  """
  keys = np.frombuffer(b''.join(completions), '>u8').reshape(-1, 2)
  last = np.flatnonzero((keys != np.roll(keys, -1, axis=0)).any(axis=1))
  if not len(last):
    return None
  count = len(chosen)
  before = last[np.searchsorted(last, np.arange(count)) % len(last)]
  other = (before + 1) % count
  sizes, begins = np.array(store.sizes), np.array(store.begins)
  starts = np.cumsum(sizes) - sizes
  sizes, begins, starts = sizes[chosen], begins[chosen], starts[chosen]
  room = length - begins
  first = starts[other] + begins[other]
  taken = np.minimum(sizes[other] - begins[other], room)
  mask = streams[1]
  for i in np.flatnonzero(taken == room):  # may end with what is not trained
    taken[i] = np.flatnonzero(mask[first[i] : first[i] + room[i]])[-1] + 1
  return Array(
    'mismatched_',
    *streams,
    np.stack([starts, first], axis=1),
    np.stack([begins, taken], axis=1),
  )


def sizes(arrays: list[Array]) -> np.ndarray:
  """np.int64[records], the slots that each takes: those of its longest part."""
  return np.max([one.sizes.sum(axis=1) for one in arrays], axis=0)


def rows(
  array: Array,
  plan: packing.Whole,
  first: int,
  last: int,
  length: int,
  pad: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tokens, segment ids and loss mask of rows first..last."""
  slots = length + 1
  shape = (last - first, slots)
  tokens = np.full(shape, pad, array.tokens.dtype)
  segments, mask = np.zeros(shape, np.uint16), np.zeros(shape, bool)
  # In blocks, as the index of a token takes four times its own memory.
  step = max(1, packing.BLOCK // slots)
  for start in range(first, last, step):
    begin, end = np.searchsorted(plan.row, [start, min(start + step, last)])
    record = plan.order[begin:end]
    sizes = array.sizes[record]
    at = packing.spread(array.starts[record].reshape(-1), sizes.reshape(-1))
    sizes = sizes.sum(axis=1)
    row = (plan.row[begin:end] - first) * slots
    to = packing.spread(row + plan.column[begin:end], sizes)
    tokens.reshape(-1)[to] = array.tokens[at]
    mask.reshape(-1)[to] = array.mask[at]
    segments.reshape(-1)[to] = np.repeat(plan.number[begin:end], sizes)
  return tokens, segments, mask


def values(
  numbers: np.ndarray, plan: packing.Whole, first: int, last: int, slots: int
) -> np.ndarray:
  """np.float32[rows, slots], one of `numbers` a record; 0 where none is."""
  begin, end = np.searchsorted(plan.row, [first, last])
  found = np.zeros((last - first, slots), np.float32)
  row, slot = plan.row[begin:end] - first, plan.number[begin:end] - 1
  found[row, slot] = numbers[plan.order[begin:end]]
  return found
