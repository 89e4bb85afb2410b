"""Where text comes from: files, folders and datasets known by name.

`open` turns the user's `data.source` into a `Source`, which yields documents or
whole records one at a time, each with the place it came from, so that a
mistake is reported with file and line.
"""

import glob
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from tpu_lm.data import files
from tpu_lm.data.files import Document, Reading
from tpu_lm.errors import UserError, nearest


class Part(NamedTuple):
  """A source of a mixture, with its share of the rows drawn."""

  name: str
  weight: float
  source: 'Source'


class Source:
  """Documents of one origin.

  Attributes:
    name: as the user gave it.
    unknown: files of a folder that were left out because of their names.
  """

  def __init__(self, name: str, members: list, unknown: tuple[str, ...] = ()):
    self.name = name
    self.unknown = unknown
    self._members = members

  def documents(self, reading: Reading) -> Iterator[Document]:
    """Reads on as documents are asked for."""
    for member in self._members:
      yield from member.documents(reading)

  def records(self, reading: Reading) -> Iterator[tuple[str, Mapping]]:
    """(origin, fields) of each record; text files are refused."""
    for member in self._members:
      yield from member.records(reading)

  def stats(self) -> list[dict[str, Any]]:
    """What tells quickly that nothing has changed; reads no content."""
    return [member.stat() for member in self._members]

  def fingerprints(self) -> list[dict[str, Any]]:
    """`stats` with the sha256 of each file; complete after one pass."""
    return [
      member.stat() | {'sha256': member.sha256} for member in self._members
    ]

  def parts(self) -> list[Part]:
    return [Part('', 1.0, self)]


class Mixture(Source):
  """Several sources, from which rows are drawn by weight."""

  def __init__(self, name: str, parts: list[Part]):
    super().__init__(name, [m for p in parts for m in p.source._members])
    self._parts = parts

  def parts(self) -> list[Part]:
    return self._parts


def open(source: str, field: str) -> Source:
  """The source that `source` names.

  Args:
    source: a path (local, gs://, …) of a file, folder or glob; or
      tfds:NAME[/CONFIG][:VERSION][@SPLIT], hf:NAME[/CONFIG][@SPLIT],
      seqio:NAME[@SPLIT].
    field: of records, the field that holds the text; '' where they are read
      whole.

  Raises:
    UserError: there is no such thing, or it is empty.
  """
  if not source:
    raise UserError(
      'data.source: is empty; name your text with --config.data.source=PATH'
    )
  scheme, _, name = source.partition(':')
  if scheme == 'seqio':
    # Imports TensorFlow, so only where it is asked for.
    from tpu_lm.data import tasks

    return tasks.source(name)
  if scheme in ('tfds', 'hf'):
    from tpu_lm.data import named

    records = {'tfds': named.tfds_records, 'hf': named.hf_records}[scheme]
    return Source(source, [files.Records(source, records(name), field)])
  try:
    paths, unknown = _paths(source)
  except OSError as error:
    raise UserError(
      f'{source}: cannot be read ({error.strerror or error})'
    ) from error
  return Source(source, [_member(path, field) for path in paths], unknown)


def _member(path: epath.Path, field: str) -> files.TextFile | files.RecordFile:
  if files.kind_of(path) == 'text':
    return files.TextFile(path)
  return files.RecordFile(path, field)


def _paths(source: str) -> tuple[list[epath.Path], tuple[str, ...]]:
  """The files that a path, folder or glob means, and those left out."""
  path = epath.Path(os.path.expanduser(source))
  if path.is_dir():
    found = list(_walk(path))
  elif path.exists():
    if not files.kind_of(path):
      raise UserError(
        f'{source}: unknown kind of file; known are {files.KNOWN}: rename or '
        'convert it'
      )
    return [path], ()
  elif glob.has_magic(source):
    found = _glob(source)
  else:
    raise UserError(f'{source}: no such file or folder{_near(path)}')
  known = sorted((p for p in found if files.kind_of(p)), key=str)
  unknown = tuple(sorted(str(p) for p in found if not files.kind_of(p)))
  if not known:
    if unknown:
      what = f'none of its {len(unknown)} files is of a known kind'
    else:
      what = 'no file matches' if glob.has_magic(source) else 'is empty'
    raise UserError(f'{source}: {what}; known are {files.KNOWN}')
  return known, unknown


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
  """Every file below `folder` that is not hidden."""
  for path in folder.iterdir():
    if path.name.startswith('.'):
      continue
    if path.is_dir():
      yield from _walk(path)
    else:
      yield path


def _glob(pattern: str) -> list[epath.Path]:
  """The files that `pattern` matches."""
  if '://' not in pattern:
    names = glob.iglob(os.path.expanduser(pattern), recursive=True)
    found = [epath.Path(name) for name in names]
  else:
    parts = pattern.split('/')
    fixed = list(itertools.takewhile(lambda p: not glob.has_magic(p), parts))
    base = epath.Path('/'.join(fixed))
    found = list(base.glob('/'.join(parts[len(fixed) :])))
  return [path for path in found if not path.is_dir()]


def _near(path: epath.Path) -> str:
  """Names the file beside which has the nearest name, or the missing folder."""
  folder = path.parent
  if not folder.is_dir():
    return f'; nor is there a folder {folder}'
  beside = {p.name: str(p) for p in folder.iterdir()}
  close = nearest(path.name, beside)
  return close or f' in {folder}'
