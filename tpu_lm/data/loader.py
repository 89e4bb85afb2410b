"""Batches of prepared rows: a pure function of (manifest, seed, step).

Grain orders the rows: a global shuffle, another one each epoch, in O(1) per
row, and mixing of parts by weight. Nothing is kept between batches, so that
the step is the loader's whole state; every number of processes sees the same
global batches. Imports no TensorFlow.
"""

import functools
import os
import queue
import threading
import zlib
from collections.abc import Iterator

import grain
import numpy as np

from tpu_lm.data import manifest
from tpu_lm.errors import UserError

_OPEN_SHARDS = 256  # each holds a file open
_AHEAD = 2  # batches that wait
_OF_TOKENS = {'tokens': np.int32, 'loss_mask': bool, 'segment_ids': np.int32}


class Loader:
  """Rows of a split, by batches.

  Batch `i` holds rows i B .. (i + 1) B - 1 of the order. When shuffled, the
  order goes on forever, each epoch another permutation of all rows; else every
  row comes exactly once, and the last batch is filled with padding rows.

  Args:
    directory: a folder that `prepare` made.
    split: 'train' or 'heldout'.
    batch_size: rows of the global batch.
    seed: of the order.
    vocab_size: of the model; a batch with a higher id is refused, since a
      gather on the device would clamp it in silence.
    shuffle: False gives all rows once, in their order.
    part: (i, n): of each batch the i-th of n equal parts is given.
    verify: whether every shard is read and compared with its sha256 first.

  Raises:
    UserError: shards are missing or damaged, or the batch cannot be shared.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    split: str,
    batch_size: int,
    seed: int,
    vocab_size: int,
    shuffle: bool = True,
    part: tuple[int, int] = (0, 1),
    verify: bool = False,
  ):
    if split not in manifest.SPLITS:
      raise ValueError(f'{split=} is not one of {manifest.SPLITS}')
    self.part = part
    index, num_parts = part
    if batch_size % num_parts:
      raise UserError(
        f'batch_size={batch_size}: must be a multiple of the {num_parts} parts '
        'that processes take'
      )
    self.manifest = manifest.read(directory)
    manifest.check(self.manifest, contents=verify)
    self.length = self.manifest.length
    self.vocab_size = vocab_size
    self.batch_size = batch_size
    self._count = batch_size // num_parts
    self._first = self._count * index
    self._shards = []
    parts = self.manifest.splits(split)
    for part in parts:
      self._shards += part.shards
    ends = np.cumsum([shard.rows for shard in self._shards])
    self._starts = np.append(0, ends)
    self.num_rows = int(ends[-1]) if len(ends) else 0
    if not self.num_rows:
      raise UserError(f'{self.manifest.directory}: has no {split} rows')
    names = sorted({name for s in self._shards for name in s.files})
    ends = 'segment_ids'
    self._prefixes = [n.removesuffix(ends) for n in names if n.endswith(ends)]
    self._dtypes = {
      prefix + name: dtype
      for prefix in self._prefixes
      for name, dtype in _OF_TOKENS.items()
    }
    self._of_records = [n for n in names if n not in self._dtypes]
    self._dtypes |= dict.fromkeys(self._of_records, np.float32)
    self.num_batches = -(-self.num_rows // batch_size)
    self._order = _order(parts, seed) if shuffle else None
    self._open = functools.lru_cache(_OPEN_SHARDS)(self._array)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """This process's rows of batch `step`, which counts from 0.

    Returns:
      tokens int32, loss_mask bool, segment_ids int32 and positions int32, all
      [B, length + 1]. Padding has segment 0, position 0 and is masked. Rows of
      pairs have those four twice, with `chosen_` and `rejected_` before the
      names, and so on; what is of the records, not of their tokens, is
      float32 [B, S], entry s - 1 for segment s.

    Raises:
      UserError: a token id that the model does not have.
    """
    return self.rows_at(self.row_numbers(step))

  def crc(self, step: int, rows: dict[str, np.ndarray]) -> int:
    """Of the tokens of all processes: it tells if two runs saw the same.

    Args:
      step: of the batch.
      rows: `batch(step)`; they are read again if they are not all of it.
    """
    if self._count != self.batch_size:
      rows = self.rows_at(self.row_numbers(step, whole=True))
    names = sorted(name for name in rows if name.endswith('tokens'))
    return functools.reduce(
      lambda crc, name: zlib.crc32(rows[name].tobytes(), crc), names, 0
    )

  def rows_at(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of `batch` for the rows of these numbers; -1 is padding."""
    numbers = np.asarray(numbers, np.int64)
    shards = np.searchsorted(self._starts, numbers, 'right') - 1
    held = {
      int(shard): np.flatnonzero(shards == shard)
      for shard in np.unique(shards[numbers >= 0])
    }
    found = {}
    for column, dtype in self._dtypes.items():
      shape = (len(numbers), self._width(column))
      array = np.full(shape, column.endswith('loss_mask'), dtype)
      for shard, at in held.items():
        if column in self._shards[shard].files:
          local = numbers[at] - self._starts[shard]
          array[at] = self._open(shard, column)[local]
      found[column] = array
    for prefix in self._prefixes:
      segment_ids = found[f'{prefix}segment_ids']
      found[f'{prefix}loss_mask'] &= segment_ids != 0
      found[f'{prefix}positions'] = positions(segment_ids)
      self._check(found[f'{prefix}tokens'], numbers)
    return found

  def rows(self, step: int) -> list[tuple[str, int]]:
    """The (shard, row) of each row of `batch(step)`; ('padding', 0)."""
    names = []
    for row in self.row_numbers(step).tolist():
      if row < 0:
        names.append(('padding', 0))
        continue
      shard, local = self._place(row)
      names.append((self._shards[shard].name, local))
    return names

  def prefetch(
    self, first_step: int, last_step: int | None = None
  ) -> Iterator[dict[str, np.ndarray]]:
    """batch(first_step), batch(first_step + 1), … made ahead in a thread.

    Args:
      first_step: of the first batch.
      last_step: after which to stop; None goes on forever, or to the last
        batch where rows are not shuffled.
    """
    if last_step is None and self._order is None:
      last_step = self.num_batches - 1
    return _ahead(self.batch, first_step, last_step)

  def row_numbers(self, step: int, whole: bool = False) -> np.ndarray:
    """np.int64[B]: the rows of `batch(step)`; -1 is padding.

    Args:
      step: of the batch.
      whole: those of all processes, not of this one alone.
    """
    if step < 0 or (self._order is None and step >= self.num_batches):
      raise IndexError(f'{step=} of {self.num_batches} batches')
    first = step * self.batch_size + (0 if whole else self._first)
    count = self.batch_size if whole else self._count
    numbers = np.arange(first, first + count)
    if self._order is not None:
      return np.array([int(self._order[n]) for n in numbers.tolist()], np.int64)
    return np.where(numbers < self.num_rows, numbers, -1)

  def _place(self, row: int) -> tuple[int, int]:
    """Which shard holds the row, and where."""
    shard = int(np.searchsorted(self._starts, row, 'right')) - 1
    return shard, row - int(self._starts[shard])

  def _array(self, shard: int, column: str) -> np.ndarray:
    described = self._shards[shard]
    path = self.manifest.directory / described.files[column]['file']
    array = np.load(path, mmap_mode='r')
    wanted = (described.rows, self._width(column))
    if array.shape != wanted:
      raise UserError(
        f'{path}: has the shape {array.shape}, not {wanted}; run `tpu_lm '
        'prepare` again'
      )
    return array

  def _width(self, column: str) -> int:
    of_records = column in self._of_records
    return self.manifest.slots if of_records else self.length + 1

  def _check(self, tokens: np.ndarray, ids: np.ndarray) -> None:
    if tokens.max() < self.vocab_size:
      return
    at = int(np.argmax(tokens.max(axis=1) >= self.vocab_size))
    shard, local = self._place(int(ids[at]))
    path = self.manifest.directory / self._shards[shard].name
    raise UserError(
      f'{path}: row {local}: token id {tokens[at].max()} is not below the '
      f"model's vocabulary of {self.vocab_size}; prepare the data with the "
      "model's tokenizer, or set --config.model.vocab_size="
    )


def _order(parts: list[manifest.Split], seed: int) -> grain.MapDataset:
  """The endless shuffled sequence of row numbers."""
  datasets, weights, start = [], [], 0
  for part in parts:
    if part.weight:
      rows = grain.MapDataset.range(start, start + part.rows)
      datasets.append(rows.seed(seed).shuffle().repeat(None))
      weights.append(part.weight)
    start += part.rows
  if len(datasets) == 1:
    return datasets[0]
  return grain.MapDataset.mix(datasets, weights)


def positions(segment_ids: np.ndarray) -> np.ndarray:
  """int32 [B, L]: each slot's place in its segment; 0 in padding."""
  index = np.arange(segment_ids.shape[1])
  begins = np.ones(segment_ids.shape, bool)
  begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
  begin = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
  return np.where(segment_ids != 0, index - begin, 0).astype(np.int32)


def _ahead(make, first: int, last: int | None) -> Iterator:
  """Yields make(first), make(first + 1), … made in a thread.

  The thread ends with the iterator, and its exception is raised where the
  batch that failed would have come.
  """
  ready: queue.Queue = queue.Queue(_AHEAD)
  stopped = threading.Event()

  def put(item: tuple) -> bool:
    while not stopped.is_set():
      try:
        ready.put(item, timeout=0.1)
      except queue.Full:
        continue
      return True
    return False

  def work() -> None:
    step = first
    try:
      while (last is None or step <= last) and put(('batch', make(step))):
        step += 1
      put(('end', None))
    except BaseException as error:
      put(('error', error))

  def take() -> Iterator:
    thread = threading.Thread(target=work, name='loader', daemon=True)
    thread.start()
    try:
      while True:
        kind, item = ready.get()
        if kind == 'error':
          raise item
        if kind == 'end':
          return
        yield item
    finally:
      stopped.set()
      thread.join()

  return take()
