"""Text laid into rows: tokenised, chunked and packed.

Documents are laid out in the order of their md5, each between end-of-text
tokens, so that the rows do not depend on the order of files or records.
"""

import contextlib
import hashlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tpu_lm.data import files, heldout, manifest, packing, sources
from tpu_lm.data.preparation import Preparation
from tpu_lm.errors import UserError

_BATCH = 4 << 20  # characters that are tokenised at once


class _Stream:
  """Tokens of one split's documents, end to end in a file."""

  def __init__(self, path: pathlib.Path, dtype: type, eot: int):
    self.path = path
    self.dtype = dtype
    self.text_bytes = 0
    self.starts: list[int] = []
    self.keys: list[bytes] = []
    self._eot = np.array([eot], dtype)
    self._count = 0
    self._open = False
    self._file = path.open('wb')

  def add(self, ids: np.ndarray) -> None:
    """Adds tokens to the document that is open, or opens one."""
    if not self._open:
      self.starts.append(self._count)
      self._open = True
      self._write(self._eot)
    self._write(ids)

  def end(self, key: bytes) -> None:
    self._write(self._eot)
    self.keys.append(key)
    self._open = False

  def _write(self, ids: np.ndarray) -> None:
    self._file.write(ids.tobytes())
    self._count += len(ids)

  def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens, and start and size of each document in order of its key."""
    self._file.close()
    if not self._count:
      return np.zeros(0, self.dtype), *np.zeros((2, 0), np.int64)
    starts = np.array(self.starts, np.int64)
    sizes = np.diff(np.append(starts, self._count))
    keys = np.frombuffer(b''.join(self.keys), '>u8').reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    tokens = np.memmap(self.path, self.dtype, 'r')
    return tokens, starts[order], sizes[order]

  def close(self) -> None:
    self._file.close()
    self.path.unlink(missing_ok=True)


class Text(Preparation):
  """Rows of `text`."""

  def field(self) -> str:
    return self.data.field

  def samples(self) -> Iterable[str]:
    for part in self.source.parts():
      for split, document in self._divided(part.source, self.rule):
        if split == 'train':
          yield from document.pieces()

  def parts(self) -> list[dict[str, Any]]:
    self.counts = {'empty_skipped': 0, 'bad_skipped': 0, 'documents': 0}
    self.counts |= {'line_ends_changed': 0, 'byte_order_marks': 0}
    parts = [self._part(i, part) for i, part in enumerate(self.source.parts())]
    if self.heldout is not None:
      whole = sources.Part('heldout', 0.0, self.heldout)
      parts.append(self._part(len(parts), whole))
    return parts

  def about(self, counts: dict[str, Any], total: dict[str, int]) -> str:
    return (
      f'{counts["documents"]:,} document(s), '
      f'{total["text_bytes"] / 1e6:,.2f} MB of text'
    )

  def _divided(
    self,
    source: sources.Source,
    rule: heldout.Rule | None,
    reading: files.Reading | None = None,
  ) -> Iterator[tuple[str, files.Document]]:
    """`heldout.divide`; refuses too many bad records at the end."""
    reading = reading or self.reading()
    yield from heldout.divide(source, rule, reading)
    self.check_share(source, reading)

  def _part(self, number: int, part: sources.Part) -> dict[str, Any]:
    """Tokenises, packs and writes one part; returns its description."""
    dtype = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32
    with contextlib.ExitStack() as stack:
      streams = {}
      for split in manifest.SPLITS:
        path = self.folder / f'{split}.stream.tmp'
        streams[split] = _Stream(path, dtype, self.tokenizer.eot_id)
        stack.callback(streams[split].close)
      self._tokenise(part, streams)
      several = len(self.source.parts()) > 1 or number
      splits = {
        split: self._write(stream, f'{number}-{split}' if several else split)
        for split, stream in streams.items()
      }
    return {'name': part.name, 'weight': part.weight, 'splits': splits}

  def _tokenise(self, part: sources.Part, streams: dict[str, _Stream]) -> None:
    reading = self.reading()
    rule = self.rule if part.weight else None
    batch: list[tuple[_Stream, str, bytes | None, str]] = []
    size = 0
    for split, document in self._divided(part.source, rule, reading):
      if split == 'empty':
        self.counts['empty_skipped'] += 1
        self.counts['documents'] -= 1
        continue
      stream = streams[split if part.weight else 'heldout']
      md5 = hashlib.md5()
      for text in document.pieces():
        data = text.encode()
        md5.update(data)
        stream.text_bytes += len(data)
        batch.append((stream, text, None, document.origin))
        size += len(text)
        if size >= _BATCH:
          self._encode(batch)
          size = 0
          self.progress(lambda: _done(streams))
      batch.append((stream, '', md5.digest(), document.origin))
    self._encode(batch)
    self.count(reading)

  def _encode(
    self, batch: list[tuple[_Stream, str, bytes | None, str]]
  ) -> None:
    """Tokenises the texts of `batch` and empties it."""
    specials = self.tokenizer.special_ids
    encoded = self.tokenizer.encode_batch([text for _, text, _, _ in batch])
    for (stream, _, key, origin), ids in zip(batch, encoded, strict=True):
      if key is not None:
        stream.end(key)
        continue
      array = np.asarray(ids, stream.dtype)
      if len(array) and np.isin(array, specials).any():
        raise UserError(
          f'{origin}: data.tokenizer={self.data.tokenizer} turns text into one '
          'of its special tokens; train one with --config.data.tokenizer=bpe'
        )
      stream.add(array)
    batch.clear()

  def _write(self, stream: _Stream, name: str) -> dict[str, Any]:
    """Packs and writes one split; returns its description."""
    length = self.data.length
    tokens, starts, sizes = stream.finish()
    plan = packing.plan(starts, sizes, length, self.data.packing)
    size = self.rows_a_shard(tokens.dtype.itemsize)

    def blocks() -> Iterator[dict[str, np.ndarray]]:
      for first in range(0, plan.num_rows, size):
        last = min(first + size, plan.num_rows)
        laid = packing.rows(
          tokens, plan, first, last, length, self.tokenizer.pad_id
        )
        yield dict(zip(('tokens', 'segment_ids'), laid, strict=True))

    slots = plan.num_rows * (length + 1)
    return {
      'rows': plan.num_rows,
      'documents': len(sizes),
      'documents_chunked': plan.num_split,
      'tokens': int(sizes.sum()),
      'targets': int((sizes - 1).sum()),
      'text_bytes': stream.text_bytes,
      'padding': slots - int(plan.size.sum()),
      'shards': manifest.write_shards(self.folder, name, blocks()),
    }


def _done(streams: dict[str, _Stream]) -> str:
  done = sum(stream.text_bytes for stream in streams.values())
  return f'{done / 1e6:,.0f} MB of text tokenised'
