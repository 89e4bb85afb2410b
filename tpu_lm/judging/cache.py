"""Replies kept on disk, so that a run can resume and nothing is paid twice.

One JSON object a line, appended as replies come: {"key", "text", "finished",
"prompt_tokens", "completion_tokens"}. A line that was cut off by a crash is
left out, and what was lost with it is asked again.
"""

import hashlib
import json
import os
import pathlib
import threading
from typing import Any, NamedTuple

from tpu_lm.errors import UserError


class Reply(NamedTuple):
  """What a model said."""

  text: str
  finished: bool = True  # it stopped by itself; else it was cut off
  prompt_tokens: int = 0
  completion_tokens: int = 0
  error: str = ''  # not empty: there is no reply, and why; never kept


def key(*parts: Any) -> str:
  """The sha256 of what decides a reply, in hexadecimal digits."""
  text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(text.encode('utf-8', 'backslashreplace')).hexdigest()


class Cache:
  """Replies by key; of a file, or where it is '' in memory alone.

  Raises:
    UserError: the file can be neither read nor written.
  """

  def __init__(self, path: str | pathlib.Path = ''):
    self._replies: dict[str, Reply] = {}
    self._lock = threading.Lock()
    self._file: int | None = None
    self.damaged = 0  # lines of the file that say nothing
    if not path:
      return
    self._path = path = pathlib.Path(path).expanduser()
    try:
      if path.exists() and not path.is_file():
        raise OSError('is no plain file')
      path.parent.mkdir(parents=True, exist_ok=True)
      # Many processes may append: a line is one write.
      flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
      self._file = os.open(path, flags, 0o600)
      self._read(path)
    except OSError as error:
      raise UserError(
        f'cache={path}: cannot be used ({error.strerror or error}); name a '
        'file that can be written'
      ) from error

  def __len__(self) -> int:
    return len(self._replies)

  def get(self, key: str) -> Reply | None:
    """The reply that is known."""
    with self._lock:
      return self._replies.get(key)

  def put(self, key: str, reply: Reply) -> None:
    """Keeps a reply, at once."""
    with self._lock:
      self._replies[key] = reply
      if self._file is not None:
        self._append(_line(key, reply))

  def close(self) -> None:
    """Ends the writing."""
    with self._lock:
      if self._file is not None:
        os.close(self._file)
        self._file = None

  def _append(self, line: bytes) -> None:
    try:
      if os.write(self._file, line) < len(line):
        raise OSError('no space left')
    except OSError as error:
      raise UserError(
        f'cache={self._path}: cannot be written ({error.strerror or error}); '
        'free space there and run again'
      ) from error

  def _read(self, path: pathlib.Path) -> None:
    content = path.read_bytes()
    for line in content.splitlines():
      try:
        found = json.loads(line)
        name = found.pop('key')
        reply = Reply(**found)
        if not isinstance(reply.text, str) or not isinstance(name, str):
          raise ValueError
        self._replies[name] = reply
      except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        self.damaged += 1
    if content and not content.endswith(b'\n'):
      os.write(self._file, b'\n')


def _line(key: str, reply: Reply) -> bytes:
  fields = {'key': key} | reply._asdict()
  del fields['error']
  # In ASCII: what a model says may hold halves of surrogate pairs.
  return json.dumps(fields).encode() + b'\n'
