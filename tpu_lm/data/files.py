"""Documents out of files: plain text, JSON Lines, JSON lists and Parquet.

A text file is one document and is read in pieces, however long it is; a record
of the other kinds is one, by its field that holds text. Records can also be
had whole, with all their fields. Text is UTF-8; a byte-order mark is taken
away and CR LF becomes LF, both counted. What is wrong is told with file and
line.
"""

import codecs
import collections
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from tpu_lm.errors import UserError, nearest

PIECE = 1 << 18  # characters of a document that are held at once

_KINDS = {
  '.txt': 'text',
  '.md': 'text',
  '.jsonl': 'lines',
  '.json': 'list',
  '.parquet': 'parquet',
}
KNOWN = '.txt, .md, .jsonl, .json (each also .gz) and .parquet'
SKIP = 'or skip such records with --config.data.max_bad_share=0.01'

# Where tokenisers of the Llama-3 kind begin a new word in any case, so that
# pieces give the tokens of the whole.
_CUT = re.compile(r'(?<=\n)(?=\S)|(?<=\S)(?= )')


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, in pieces of at most about PIECE characters.

  Attributes:
    origin: where it stands, e.g. 'books.jsonl:17'.
    pieces: gives the pieces in order, and may be called again.
    is_file: whether it is a whole text file.
  """

  origin: str
  pieces: Callable[[], Iterator[str]]
  is_file: bool = False


@dataclasses.dataclass
class Reading:
  """What happened in one pass over a source.

  Attributes:
    tolerant: whether bad records are skipped and counted.
    records: how many there were, bad ones included.
    bad: messages of the first bad records.
    num_bad: how many there were.
    crlf: line ends turned from CR LF to LF, by origin.
    bom: origins whose byte-order mark was taken away.
  """

  tolerant: bool = False
  records: int = 0
  bad: list[str] = dataclasses.field(default_factory=list)
  num_bad: int = 0
  crlf: dict[str, int] = dataclasses.field(default_factory=dict)
  bom: set[str] = dataclasses.field(default_factory=set)

  def refuse(self, message: str) -> None:
    """Counts a bad record, or raises where none is tolerated."""
    if not self.tolerant:
      raise UserError(message)
    self.num_bad += 1
    if len(self.bad) < 3:
      self.bad.append(message)


def kind_of(path: epath.Path) -> str | None:
  """text, lines, list or parquet, by the name; None where it is unknown."""
  name = path.name.lower().removesuffix('.gz')
  kind = _KINDS.get(os.path.splitext(name)[1])
  if kind == 'parquet' and path.name.lower().endswith('.gz'):
    return None
  return kind


class _File:
  """A file, whose sha256 is known once it has been read to its end."""

  def __init__(self, path: epath.Path):
    self.path = path
    self.sha256 = ''

  def stat(self) -> dict[str, Any]:
    path = os.fspath(self.path)
    if '://' in path:
      found = self.path.stat()
      size, mtime = found.length, int(found.mtime * 1e9)
    else:
      path = os.path.abspath(path)
      found = os.stat(path)
      size, mtime = found.st_size, found.st_mtime_ns
    return {'path': path, 'size': size, 'mtime_ns': mtime}

  def read(self, take: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    """`take(stream)`, with the errors of damaged files told to the user."""
    zipped = self.path.name.lower().endswith('.gz')
    try:
      hashed = _Hashed(self.path.open('rb'))
      with io.BufferedReader(hashed, 1 << 20) as raw:
        yield from take(gzip.GzipFile(fileobj=raw) if zipped else raw)
        while raw.read(1 << 20):
          pass
        self.sha256 = hashed.hash.hexdigest()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
      raise UserError(
        f'{self.path}: not a whole gzip file ({error}); copy or download it '
        'again'
      ) from error
    except OSError as error:
      raise UserError(
        f'{self.path}: cannot be read ({error.strerror or error})'
      ) from error


class _Hashed(io.RawIOBase):
  """Hashes what is read through it."""

  def __init__(self, raw: Any):
    self._raw = raw
    self.hash = hashlib.sha256()

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    data = self._raw.read(len(buffer))
    self.hash.update(data)
    buffer[: len(data)] = data
    return len(data)

  def close(self) -> None:
    self._raw.close()
    super().close()


class TextFile(_File):
  """A text file: one document."""

  def documents(self, reading: Reading) -> Iterator[Document]:
    reading.records += 1
    yield Document(str(self.path), lambda: self._pieces(reading), is_file=True)

  def records(self, reading: Reading) -> Iterator[tuple[str, Mapping]]:
    del reading
    raise UserError(
      f'{self.path}: is text, where records of fields are asked for; give '
      'JSON Lines, JSON or Parquet, or train on text with '
      '--config.stage_name=pretrain'
    )

  def _pieces(self, reading: Reading) -> Iterator[str]:
    reading.crlf[str(self.path)] = 0
    return cut(self.read(lambda stream: self._blocks(stream, reading)))

  def _blocks(self, stream: Any, reading: Reading) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder('utf-8')()
    name, line, held = str(self.path), 1, ''
    for number in itertools.count():
      data = stream.read(PIECE)
      try:
        text = held + decoder.decode(data, final=not data)
      except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b'\n')
        raise UserError(_not_utf8(f'{name}:{line}', error)) from error
      line += text.count('\n')
      if number == 0 and text.startswith('\ufeff'):
        reading.bom.add(name)
        text = text[1:]
      held = '\r' if data and text.endswith('\r') else ''
      text, count = unix(text.removesuffix(held) if held else text)
      reading.crlf[name] += count
      yield text
      if not data:
        return


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
  byte = error.object[error.start]
  guess = 'utf-16' if error.object[:2] in (b'\xff\xfe', b'\xfe\xff') else None
  return (
    f'{where}: byte 0x{byte:02x} is not UTF-8; convert the file, e.g. '
    f'iconv -f {guess or "latin1"} -t utf-8 FILE > NEW'
  )


def unix(text: str) -> tuple[str, int]:
  """`text` with LF line ends, and how many were CR LF."""
  if '\r\n' not in text:
    return text, 0
  return text.replace('\r\n', '\n'), text.count('\r\n')


def cut(blocks: Iterable[str]) -> Iterator[str]:
  """The same text in pieces of at most PIECE characters, none empty.

  They end at line ends or before spaces where there are any.
  """
  held = ''
  for block in blocks:
    held += block
    start = 0
    while len(held) - start > PIECE:
      end = _end(held, start)
      yield held[start:end]
      start = end
    held = held[start:]
  if held:
    yield held


def _end(text: str, start: int) -> int:
  """Where the piece that begins at `start` is best cut."""
  limit = start + PIECE
  for back in (1 << 12, PIECE // 2):
    found = list(_CUT.finditer(text, limit - back, limit))
    if found:
      return found[-1].start()
  return limit


class Records:
  """Records that come as mappings, each with its origin.

  Args:
    name: of the whole.
    records: gives (origin, record) pairs; may be called again.
    field: that holds the text.
  """

  sha256 = ''

  def __init__(
    self,
    name: str,
    records: Callable[[Reading], Iterator[tuple[str, Any]]],
    field: str,
  ):
    self._name = name
    self._records = records
    self._field = field

  def stat(self) -> dict[str, Any]:
    return {'name': self._name}

  def documents(self, reading: Reading) -> Iterator[Document]:
    for origin, record in self._records(reading):
      reading.records += 1
      text = self._text(origin, record, reading)
      if text is not None:
        yield _document(origin, text)

  def records(self, reading: Reading) -> Iterator[tuple[str, Mapping]]:
    """Whole records, as they are, each with its origin."""
    for origin, record in self._records(reading):
      reading.records += 1
      if self._is_object(origin, record, reading, 'give it fields'):
        yield origin, record

  def _is_object(
    self, origin: str, record: Any, reading: Reading, mend: str
  ) -> bool:
    """Whether a record has fields; refuses it where it has none."""
    if isinstance(record, Mapping):
      return True
    reading.refuse(
      f'{origin}: a record must be a JSON object, not '
      f'{type(record).__name__}; {mend}, {SKIP}'
    )
    return False

  def _text(self, origin: str, record: Any, reading: Reading) -> str | None:
    """The text of a record; None where the record is bad."""
    mend = f'write {{"{self._field}": "…"}}'
    if not self._is_object(origin, record, reading, mend):
      return None
    if self._field not in record:
      reading.refuse(
        f"{origin}: has no field '{self._field}'"
        f'{nearest(self._field, record)}; its fields are '
        f'{", ".join(record) or "none"}: name one with --config.data.field=…, '
        f'{SKIP}'
      )
      return None
    text = record[self._field]
    try:
      if isinstance(text, bytes):
        text = text.decode()
      if not isinstance(text, str):
        reading.refuse(
          f"{origin}: field '{self._field}' holds {_spoken(text)}, not text; "
          f'name another with --config.data.field=…, {SKIP}'
        )
        return None
      text.encode()
    except UnicodeError as error:
      reading.refuse(
        f"{origin}: field '{self._field}' is no valid text ({error}); mend "
        f'the record, {SKIP}'
      )
      return None
    if text.startswith('\ufeff'):
      reading.bom.add(origin)
      text = text[1:]
    text, count = unix(text)
    if count:
      reading.crlf[origin] = count
    return text


def _document(origin: str, text: str) -> Document:
  return Document(origin, lambda: cut([text]))


def _spoken(value: Any) -> str:
  return 'null' if value is None else f'{value!r:.40} ({type(value).__name__})'


class RecordFile(_File):
  """A JSON Lines, JSON or Parquet file; '' for `field` reads every field."""

  def __init__(self, path: epath.Path, field: str):
    super().__init__(path)
    self._field = field
    read = {
      'lines': self._lines,
      'list': self._list,
      'parquet': self._parquet,
    }[kind_of(path)]
    self._reader = Records(str(path), read, field)

  def documents(self, reading: Reading) -> Iterator[Document]:
    return self._reader.documents(reading)

  def records(self, reading: Reading) -> Iterator[tuple[str, Mapping]]:
    return self._reader.records(reading)

  def _lines(self, reading: Reading) -> Iterator[tuple[str, Any]]:
    return self.read(lambda stream: self._take_lines(stream, reading))

  def _take_lines(
    self, stream: Any, reading: Reading
  ) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, start=1):
      if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
      if not line.strip():
        continue
      origin = f'{self.path}:{number}'
      try:
        record = json.loads(line.decode())
      except UnicodeDecodeError as error:
        message = _not_utf8(origin, error)
      except (ValueError, RecursionError) as error:
        at = getattr(error, 'colno', None)
        what = getattr(error, 'msg', error)
        message = (
          f'{origin}: not a JSON object ({what}'
          + (f' at column {at}' if at else '')
          + f'); mend the line, {SKIP}'
        )
      else:
        yield origin, record
        continue
      reading.records += 1
      reading.refuse(message)

  def _list(self, reading: Reading) -> Iterator[tuple[str, Any]]:
    def take(stream: Any) -> Iterator[tuple[str, Any]]:
      data = stream.read().removeprefix(codecs.BOM_UTF8)
      try:
        records = json.loads(data.decode())
      except UnicodeDecodeError as error:
        line = data[: error.start].count(b'\n') + 1
        raise UserError(_not_utf8(f'{self.path}:{line}', error)) from error
      except json.JSONDecodeError as error:
        hint = (
          'one object a line is JSON Lines: name the file .jsonl'
          if error.msg == 'Extra data'
          else 'mend the file'
        )
        raise UserError(
          f'{self.path}:{error.lineno}: not JSON ({error.msg} at column '
          f'{error.colno}); {hint}'
        ) from error
      if not isinstance(records, list):
        raise UserError(
          f'{self.path}: must hold a list of objects, not {_spoken(records)}; '
          'one object a line is .jsonl'
        )
      for number, record in enumerate(records, start=1):
        yield f'{self.path}: record {number}', record

    return self.read(take)

  def _parquet(self, reading: Reading) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    # Parquet is read out of order, so it is hashed by a pass of its own.
    if not self.sha256:
      collections.deque(self.read(lambda stream: iter(())), maxlen=0)
    try:
      with self.path.open('rb') as stream:
        file = pyarrow.parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        if self._field and self._field not in names:
          raise UserError(
            f"{self.path}: has no column '{self._field}'"
            f'{nearest(self._field, names)}; its columns are '
            f'{", ".join(names)}: name one with --config.data.field=…'
          )
        number = 0
        columns = [self._field] if self._field else None
        for batch in file.iter_batches(1024, columns=columns):
          for record in batch.to_pylist():
            number += 1
            yield f'{self.path}: row {number}', record
    except (pyarrow.ArrowException, OSError) as error:
      raise UserError(
        f'{self.path}: not a whole Parquet file '
        f'({str(error).splitlines()[0]}); copy or download it again'
      ) from error
