"""From the user's text to rows that a trainer reads by number.

Sources are read, divided into train and held-out text, tokenised, chunked and
packed into rows of one length, which are written as shards and, last of all, a
manifest. The rows do not depend on the order of files or records: documents are
laid out in the order of their md5. Nothing here imports TensorFlow, unless the
source is read through it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import tpu_lm
from tpu_lm import tokenizer as tokenizer_lib
from tpu_lm.data import files, heldout, manifest, packing, sources
from tpu_lm.errors import UserError

SHARD_BYTES = 64 << 20  # of a shard's tokens
_BATCH = 4 << 20  # characters that are tokenised at once
_NAMED = ('tfds', 'hf', 'seqio')
Report = Callable[[str], Any]


def prepare(
  config: ConfigDict, directory: str | os.PathLike, report: Report = print
) -> manifest.Manifest:
  """Prepares the rows that `config.data` asks for, unless they are there.

  Every request has a folder of its own in `directory`, named by its hash, so
  that several live side by side.

  Args:
    config: a whole configuration; only its section `data` matters.
    directory: local folder, made where missing.
    report: is given each line that a user may want to see.

  Returns:
    The manifest; its `directory` is what a Loader takes.

  Raises:
    UserError: a mistake in source or configuration, or a full or read-only
      disk. Nothing half-written is left.
  """
  data = config.data
  directory = pathlib.Path(directory)
  _check(data)
  try:
    request = _request(data)
  except UserError:
    found = _without_source(data, directory)
    if found is None:
      raise
    report(
      f'data: {data.source} is not there; using the rows prepared from it in '
      f'{found.directory}'
    )
    return found
  folder = directory / manifest.digest(request)[:12]
  if _is_ready(folder):
    return _reuse(folder, report)
  with _writing(directory, folder):
    # Another process may have been faster.
    if _is_ready(folder):
      return _reuse(folder, report)
    if folder.exists():
      report(f'data: {folder} was left unfinished; doing it anew')
      shutil.rmtree(folder)
    try:
      folder.mkdir(parents=True)
      return _Preparation(data, folder, request, report).run()
    except BaseException:
      shutil.rmtree(folder, ignore_errors=True)
      raise


def _check(data: ConfigDict) -> None:
  packing.check(data.packing)
  if not data.heldout_source:
    heldout.check(data.heldout_share, data.heldout_by)
  if not 0 <= data.max_bad_share < 1:
    raise UserError(
      f'data.max_bad_share={data.max_bad_share}: must be at least 0 and below 1'
    )


def _request(data: ConfigDict) -> dict[str, Any]:
  """All that decides the rows and can be known without reading the text."""
  asked = data.to_dict()
  for key in ('dir', 'source', 'heldout_source'):
    del asked[key]
  if data.tokenizer != 'bpe':
    asked['vocab_size'] = 0
  if data.tokenizer not in tokenizer_lib.KINDS:
    asked['tokenizer'] = tokenizer_lib.load(data.tokenizer).digest
  return {
    'format': manifest.FORMAT,
    'data': asked,
    'sources': _stats(data.source, data.field),
    'heldout_sources': data.heldout_source
    and _stats(data.heldout_source, data.field),
  }


def _stats(source: str, field: str) -> list[dict[str, Any]]:
  # Datasets known by name are taken to keep what they hold: to ask them
  # would import TensorFlow.
  if source.startswith('tfds:world'):
    from tpu_lm.data import world

    return [{'name': source, 'version': world.version()}]
  if source.partition(':')[0] in _NAMED:
    return [{'name': source}]
  return sources.open(source, field).stats()


def _without_source(
  data: ConfigDict, directory: pathlib.Path
) -> manifest.Manifest | None:
  """Rows once prepared for `data` whose source is gone, as on a new machine."""
  if not data.source or os.path.exists(data.source):
    return None
  for file in sorted(directory.glob(f'*/{manifest.FILE}')):
    with contextlib.suppress(UserError):
      found = manifest.read(file.parent)
      if found.content['asked'] == _asked(data):
        return found
  return None


def _asked(data: ConfigDict) -> dict[str, Any]:
  return {key: value for key, value in data.items() if key != 'dir'}


def _is_ready(folder: pathlib.Path) -> bool:
  return (folder / manifest.FILE).is_file()


def _reuse(folder: pathlib.Path, report: Report) -> manifest.Manifest:
  found = manifest.read(folder)
  report(f'data: {found.total("train", "rows"):,} rows are there in {folder}')
  return found


@contextlib.contextmanager
def _writing(directory: pathlib.Path, folder: pathlib.Path) -> Iterator[None]:
  """One process at a time prepares; a disk's refusal is told to the user."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / '.lock').open('a') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      yield
  except OSError as error:
    raise UserError(
      f'{folder}: cannot be written ({error.strerror or error}); free space '
      'there, or choose another folder with --config.data.dir=DIR'
    ) from error


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


@dataclasses.dataclass
class _Preparation:
  """One run of `prepare`."""

  data: ConfigDict
  folder: pathlib.Path
  request: dict[str, Any]
  report: Report

  def run(self) -> manifest.Manifest:
    data, began = self.data, time.monotonic()
    self._source = sources.open(data.source, data.field)
    self._heldout = None
    self._rule = None
    if data.heldout_source:
      self._heldout = sources.open(data.heldout_source, data.field)
    else:
      self._rule = heldout.check(data.heldout_share, data.heldout_by)
    self._said = began
    self._counts = {'empty_skipped': 0, 'bad_skipped': 0, 'documents': 0}
    self._counts |= {'line_ends_changed': 0, 'byte_order_marks': 0}
    self._bad: list[str] = []
    self._tokenizer = self._make_tokenizer()
    parts = [self._part(i, part) for i, part in enumerate(self._source.parts())]
    if self._heldout is not None:
      whole = sources.Part('heldout', 0.0, self._heldout)
      parts.append(self._part(len(parts), whole))
    self._check_rows(parts)
    self._tokenizer.save(self.folder)
    content = self._content(parts)
    for line in self._summary(content, time.monotonic() - began):
      self.report(line)
    return manifest.write(self.folder, content)

  def _make_tokenizer(self) -> tokenizer_lib.Tokenizer:
    kind = self.data.tokenizer
    if kind not in tokenizer_lib.KINDS:
      return tokenizer_lib.load(kind)
    sample = tokenizer_lib.Sample()
    if kind == 'bpe':
      for part in self._source.parts():
        for split, document in self._divided(part.source, self._rule):
          if split == 'train':
            for piece in document.pieces():
              sample.add(piece)
    return tokenizer_lib.train(sample.texts(), kind, self.data.vocab_size)

  def _divided(
    self,
    source: sources.Source,
    rule: heldout.Rule | None,
    reading: files.Reading | None = None,
  ) -> Iterator[tuple[str, files.Document]]:
    """`heldout.divide`; refuses too many bad records at the end."""
    if reading is None:
      reading = files.Reading()
    share = self.data.max_bad_share
    reading.tolerant = share > 0
    yield from heldout.divide(source, rule, reading)
    if reading.num_bad > share * reading.records:
      raise UserError(
        f'{source.name}: {reading.num_bad} of {reading.records} records are '
        f'bad, above data.max_bad_share={share}; the first: {reading.bad[0]}'
      )

  def _part(self, number: int, part: sources.Part) -> dict[str, Any]:
    """Tokenises, packs and writes one part; returns its description."""
    dtype = np.uint16 if self._tokenizer.vocab_size <= 1 << 16 else np.uint32
    with contextlib.ExitStack() as stack:
      streams = {}
      for split in manifest.SPLITS:
        path = self.folder / f'{split}.stream.tmp'
        streams[split] = _Stream(path, dtype, self._tokenizer.eot_id)
        stack.callback(streams[split].close)
      self._tokenise(part, streams)
      several = len(self._source.parts()) > 1 or number
      splits = {
        split: self._write(stream, f'{number}-{split}' if several else split)
        for split, stream in streams.items()
      }
    return {'name': part.name, 'weight': part.weight, 'splits': splits}

  def _tokenise(self, part: sources.Part, streams: dict[str, _Stream]) -> None:
    reading = files.Reading()
    rule = self._rule if part.weight else None
    batch: list[tuple[_Stream, str, bytes | None, str]] = []
    size = 0
    for split, document in self._divided(part.source, rule, reading):
      if split == 'empty':
        self._counts['empty_skipped'] += 1
        self._counts['documents'] -= 1
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
          self._progress(streams)
      batch.append((stream, '', md5.digest(), document.origin))
    self._encode(batch)
    self._counts['documents'] += reading.records - reading.num_bad
    self._counts['bad_skipped'] += reading.num_bad
    self._counts['line_ends_changed'] += sum(reading.crlf.values())
    self._counts['byte_order_marks'] += len(reading.bom)
    self._bad += reading.bad

  def _encode(
    self, batch: list[tuple[_Stream, str, bytes | None, str]]
  ) -> None:
    """Tokenises the texts of `batch` and empties it."""
    specials = self._tokenizer.special_ids
    encoded = self._tokenizer.encode_batch([text for _, text, _, _ in batch])
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

  def _progress(self, streams: dict[str, _Stream]) -> None:
    if time.monotonic() - self._said > 10:
      self._said = time.monotonic()
      done = sum(stream.text_bytes for stream in streams.values())
      self.report(f'data: {done / 1e6:,.0f} MB of text tokenised')

  def _write(self, stream: _Stream, name: str) -> dict[str, Any]:
    """Packs and writes one split; returns its description."""
    length = self.data.length
    tokens, starts, sizes = stream.finish()
    plan = packing.plan(starts, sizes, length, self.data.packing)
    size = max(1, SHARD_BYTES // ((length + 1) * tokens.dtype.itemsize))

    def blocks() -> Iterator[dict[str, np.ndarray]]:
      for first in range(0, plan.num_rows, size):
        last = min(first + size, plan.num_rows)
        laid = packing.rows(
          tokens, plan, first, last, length, self._tokenizer.pad_id
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

  def _check_rows(self, parts: list[dict[str, Any]]) -> None:
    """Refuses a part to train on without rows, and a held-out split of none."""
    name = self.data.source
    documents = self._counts['documents']
    if not documents:
      raise UserError(f'{name}: holds no text; name a source that does')
    for part in parts:
      if part['weight'] and not part['splits']['train']['rows']:
        where = f'{name}: {part["name"]}' if part['name'] else name
        raise UserError(
          f'{where}: leaves no rows to train on; give more text, or hold out '
          'less with --config.data.heldout_share='
        )
    if not any(part['splits']['heldout']['rows'] for part in parts):
      if self.data.heldout_source:
        raise UserError(f'{self.data.heldout_source}: holds no text')
      raise UserError(
        f'{name}: data.heldout_share={self.data.heldout_share} of {documents} '
        'documents leaves no held-out rows; raise it, give more text, or name '
        'a text of its own with --config.data.heldout_source=PATH'
      )

  def _content(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
    data = self.data
    opened = [s for s in (self._source, self._heldout) if s is not None]
    content = {
      'format': manifest.FORMAT,
      'code_version': tpu_lm.__version__,
      'asked': _asked(data),
      'request': self.request,
      'tokenizer': {
        'digest': self._tokenizer.digest,
        'vocab_size': self._tokenizer.vocab_size,
        'kind': data.tokenizer,
      },
      'length': data.length,
      'packing': data.packing,
      'heldout': {'source': data.heldout_source}
      if data.heldout_source
      else self._rule._asdict(),
      'sources': [f for s in opened for f in s.fingerprints()],
      'unknown_files': [name for s in opened for name in s.unknown],
      'counts': self._counts,
      'bad_records': self._bad[:10],
      'parts': parts,
    }
    return content | {'fingerprint': manifest.fingerprint(content)}

  def _summary(self, content: dict[str, Any], seconds: float) -> Iterator[str]:
    """What the user is told: what was read, left out, and became of it."""
    made = manifest.Manifest(self.folder, content)
    counts, unknown = content['counts'], content['unknown_files']
    total = {
      key: sum(made.total(split, key) for split in manifest.SPLITS)
      for key in ('text_bytes', 'tokens')
    }
    yield (
      f'data: {self._source.name}: {counts["documents"]:,} document(s), '
      f'{total["text_bytes"] / 1e6:,.2f} MB of text, {total["tokens"]:,} '
      f'tokens of {made.vocab_size:,} kinds, {seconds:.1f} s'
    )
    for key, what in (
      ('empty_skipped', 'empty documents skipped'),
      ('bad_skipped', 'bad records skipped'),
      ('line_ends_changed', 'line ends changed from CR LF to LF'),
      ('byte_order_marks', 'byte-order marks taken away'),
    ):
      if counts[key]:
        first = f', the first: {self._bad[0]}' if key == 'bad_skipped' else ''
        yield f'  {counts[key]:,} {what}{first}'
    if unknown:
      names = ', '.join(os.path.basename(name) for name in unknown[:3])
      more = ', …' if len(unknown) > 3 else ''
      yield f'  {len(unknown):,} files of unknown kinds left out: {names}{more}'
    for split in manifest.SPLITS:
      rows = made.total(split, 'rows')
      padding = made.total(split, 'padding') / (rows * (made.length + 1))
      yield (
        f'  {split}: {made.total(split, "documents"):,} document(s), '
        f'{made.total(split, "documents_chunked"):,} cut, in {rows:,} '
        f'rows of {made.length}, {padding:.1%} padding'
      )
    yield f'  in {self.folder}'
