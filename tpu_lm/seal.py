"""The seal of a finished checkpoint step: which files it has, and their sums.

`seal.json` is written into the temporary folder of a step as the last file
before the rename that commits it, so a step either has a seal or is none.
It lists every file with its size and its CRC-32, and carries a CRC-32 of that
list. Any flipped bit, missing, truncated or foreign file is thereby known, and
named, before Orbax reads one of them; Orbax restores most of these in silence.
"""

import errno
import json
import zlib
from collections.abc import Iterator

from etils import epath

from tpu_lm.errors import UserError

NAME = 'seal.json'
# What Orbax writes while it commits on a store without an atomic rename.
LATE = ('_CHECKPOINT_METADATA', 'commit_success.txt')

_SMALL = 1 << 20  # bytes; a file up to this size always gets a CRC-32
_PIECE = 1 << 22  # bytes read at once


def write(folder: epath.Path, whole: bool, late: tuple[str, ...] = ()) -> None:
  """Writes the seal of a step.

  Args:
    folder: the step's folder with all of its files.
    whole: sum every file; else files above 1 MiB are sealed by their size
      alone (reading back what many machines wrote would take long, and the
      digests of the arrays cover their content).
    late: files at the top that are yet to be written; they are not sealed.
  """
  files = {}
  for name, path in _files(folder):
    if name in late or name == NAME:
      continue
    size = path.stat().length
    crc = _crc(path) if whole or size <= _SMALL else None
    files[name] = [size, crc]
  text = json.dumps(files, sort_keys=True)
  seal = {'crc': zlib.crc32(text.encode()), 'late': list(late), 'files': files}
  (folder / NAME).write_text(json.dumps(seal, sort_keys=True))


def fault(folder: epath.Path, thorough: bool = True) -> str | None:
  """Returns what is wrong with a sealed folder in one line, or None.

  Args:
    folder: the step's folder.
    thorough: read every file; else only files up to 1 MiB are read.

  Raises:
    UserError: a file may not be read, which says nothing about its content.
  """
  try:
    return _fault(folder, thorough)
  except OSError as e:
    if e.errno in (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE):
      raise UserError(
        f'{folder}: cannot be read ({e.strerror}); make it readable for this'
        ' user'
      ) from e
    return f'{e.filename or folder}: {e.strerror or e}'


def is_whole(folder: epath.Path) -> bool:
  """Returns whether a good seal covers the content of every file."""
  seal = json.loads((folder / NAME).read_bytes())
  return not any(crc is None for _, crc in seal['files'].values())


def _fault(folder: epath.Path, thorough: bool) -> str | None:
  if not folder.is_dir():
    return 'it is a file, not a folder'
  present = dict(_files(folder))
  if not present:
    return 'the folder is empty'
  if NAME not in present:
    return f'{NAME} is missing: not a whole checkpoint'
  try:
    seal = json.loads(present[NAME].read_bytes())
    files, late, crc = seal['files'], seal['late'], seal['crc']
    text = json.dumps(files, sort_keys=True)
    valid = zlib.crc32(text.encode()) == crc and set(late) <= set(LATE)
  except (ValueError, KeyError, TypeError):
    valid = False
  if not valid:
    return f'{NAME}: its own checksum is wrong'
  for name in sorted(set(files) - set(present)):
    return f'{name}: the file is missing'
  for name in sorted(set(present) - set(files) - {NAME, *late}):
    return f'{name}: a file that was not saved with it'
  for name in late:
    if name not in present:
      return f'{name}: the file is missing'
  for name, (size, crc) in sorted(files.items()):
    has = present[name].stat().length
    if has != size:
      return f'{name}: {has} bytes instead of {size}'
    if crc is None or (size > _SMALL and not thorough):
      continue
    if _crc(present[name]) != crc:
      return f'{name}: its content has changed (checksum)'
  return None


def _files(folder: epath.Path, prefix: str = '') -> Iterator:
  """Yields (name below the folder, path) of every file, sorted."""
  for path in sorted(folder.iterdir(), key=lambda p: p.name):
    name = prefix + path.name
    if path.is_dir():
      yield from _files(path, name + '/')
    else:
      yield name, path


def _crc(path: epath.Path) -> int:
  crc = 0
  with path.open('rb') as f:
    while piece := f.read(_PIECE):
      crc = zlib.crc32(piece, crc)
  return crc
