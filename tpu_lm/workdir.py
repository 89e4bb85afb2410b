"""A working directory: one writer at a time, files whole or not at all."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator
from typing import Any

from tpu_lm.errors import UserError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Makes a working directory and holds it for this run.

  The lock is the operating system's: it ends with the process, however that
  ends, and a left-over file `lock` locks nothing. Of a run of several
  processes, the first holds the lock.

  Raises:
    UserError: the path is a file, cannot be written, or another process that
      is still running writes there.
  """
  import jax

  path = pathlib.Path(workdir)
  if jax.process_index() != 0:
    yield path
    return
  was_there = path.exists()
  make(path)
  try:
    with open(path / 'lock', 'a+') as f:
      _hold(f, path)
      yield path
  except UserError:
    if not was_there:
      _remove_if_empty(path)
    raise


def _remove_if_empty(path: pathlib.Path) -> None:
  """Removes a working directory in which nothing but locks was written."""
  found = {str(p.relative_to(path)) for p in path.rglob('*')}
  if found <= {'lock', 'data', 'data/.lock'}:
    shutil.rmtree(path, ignore_errors=True)


def make(workdir: str | os.PathLike) -> pathlib.Path:
  """Makes a working directory where it is missing, and checks it.

  Raises:
    UserError: the path, or one above it, is a file, or it cannot be written.
  """
  path = pathlib.Path(workdir)
  check('--workdir', path)
  try:
    path.mkdir(parents=True, exist_ok=True)
    with open(path / 'lock', 'a'):
      pass
  except OSError as e:
    raise UserError(
      f'--workdir={path}: cannot be written ({e.strerror}); give another'
      ' --workdir, or mend that'
    ) from e
  return path


def check(key: str, path: pathlib.Path) -> None:
  """Refuses a folder that cannot be one.

  Raises:
    UserError: the path, or one above it, is a file.
  """
  for part in (path, *path.parents):
    if part.exists() and not part.is_dir():
      raise UserError(
        f'{key}={path}: {part} is a file; give a folder, or move it away'
      )


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a JSON file that is whole or the old one, whatever happens.

  Raises:
    UserError: the disk is full, read-only or the like; the old file stands.
  """
  path = pathlib.Path(path)
  # Of this process, so that no two writers share a temporary file.
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with open(temporary, 'w', encoding='utf-8') as f:
      json.dump(value, f, indent=2, sort_keys=True, ensure_ascii=False)
      f.write('\n')
      f.flush()
      os.fsync(f.fileno())
    temporary.replace(path)
  except OSError as e:
    raise UserError(
      f'{path}: cannot be written ({e.strerror}); what was there stands'
    ) from e
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


def _hold(f: Any, path: pathlib.Path) -> None:
  """Locks an open file, and writes into it who holds it."""
  import fcntl

  try:
    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as e:
    if e.errno in _NO_LOCKS:  # some network file systems: better than nothing
      return
    f.seek(0)
    holder = f.read().strip() or 'another process'
    raise UserError(
      f'--workdir={path}: {holder} is writing there; wait until it ends or stop'
      ' it, or give another --workdir'
    ) from e
  f.truncate(0)
  f.write(f'process {os.getpid()} on {socket.gethostname()}\n')
  f.flush()
