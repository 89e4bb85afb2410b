"""The other processes of a run: when one is gone, all end, and say which.

A collective with a process that was killed waits for minutes or for ever. So
each process keeps a connection to process 0 from the start. The system closes
it when a process ends, however that ends; process 0 then tells the others, and
each ends with one line and the status GONE. A machine that vanishes without
closing anything is noticed by JAX's own heartbeats, which end a process with
a longer text.

JAX's coordinator lives in process 0: where that one is killed, JAX may abort
the others (status -6) before they have told why.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

GONE = 75  # exit status: another process is gone; sysexits.h: try again
_KEY = 'tpu_lm/peers'
_PATIENCE = 60.0  # seconds to connect in
_GRACE = 3.0  # in which a process may tell a failure of its own
_MEND = (
  'start the same command again on every process: the run goes on from its '
  'last checkpoint'
)


class Peers:
  """Watches the other processes from threads until `close`.

  Args:
    store: JAX's key-value store of all processes.
    host: of process 0.
    count: of the processes.
    index: of this one.
    end: ends this process with a line and a status; for tests.
  """

  def __init__(
    self,
    store: Any,
    host: str,
    count: int,
    index: int,
    end: Callable[[str], None] | None = None,
  ):
    self._index, self._count = index, count
    self._end = end or _end
    self._closed = threading.Event()
    self._told = threading.Lock()  # held for good by whoever ends the process
    self._links: dict[int, socket.socket] = {}
    self._left = threading.Semaphore(0)  # one release for each that has left
    if index == 0:
      server = socket.create_server(('', 0), backlog=count)
      token = secrets.token_hex(16)
      store.key_value_set(_KEY, f'{server.getsockname()[1]} {token}')
      _thread(self._accept, server, token)
      return
    port, token = store.blocking_key_value_get(
      _KEY, int(1000 * _PATIENCE)
    ).split()
    link = socket.create_connection((host, int(port)), _PATIENCE)
    link.settimeout(None)
    link.sendall(f'{token} {index}\n'.encode())
    self._links[0] = link
    _thread(self._read, 0, link.makefile('r'))

  def close(self, reason: str = '') -> None:
    """Leaves the others: done, or with the reason of a failure.

    Process 0 goes last, since JAX aborts the others when it ends.
    """
    if reason and not self._told.acquire(blocking=False):
      self._closed.wait(2 * _GRACE)  # another thread is ending this process
    self._closed.set()
    self._tell(f'failed {self._index} ended: {reason}' if reason else 'done')
    if self._index == 0:
      for _ in range(self._count - 1):
        if not self._left.acquire(timeout=2 * _GRACE):
          return

  def wait(self) -> None:
    """Of a failed collective: gives the reason time to be told here."""
    self._closed.wait(2 * _GRACE)

  def _accept(self, server: socket.socket, token: str) -> None:
    with server:
      while len(self._links) < self._count - 1:
        link, _ = server.accept()
        with contextlib.suppress(OSError, ValueError):
          lines = link.makefile('r')
          given, index = lines.readline().split()
          if secrets.compare_digest(given, token):
            self._links[int(index)] = link
            _thread(self._read, int(index), lines)

  def _read(self, index: int, lines: Any) -> None:
    """Follows what a process says until its connection ends."""
    word, said = '', ''
    with contextlib.suppress(OSError):
      for line in lines:
        word, _, said = line.strip().partition(' ')
        if word in ('failed', 'done'):
          break
    self._left.release()
    if word == 'done' or self._closed.is_set():
      return
    why = 'is gone (killed, or its machine lost)'
    if word == 'failed':
      lost, _, why = said.partition(' ')
      index = int(lost)
    # By what they share all processes often fail alike: each tells its own.
    # But where process 0 was killed, JAX is about to abort this one.
    if self._index == 0 or (word == 'failed' and index == 0):
      self._closed.wait(_GRACE)
    self._lost(index, why)

  def _lost(self, index: int, why: str) -> None:
    if self._closed.is_set() or not self._told.acquire(blocking=False):
      return
    if self._index == 0:
      self._tell(f'failed {index} {why}')
      self._closed.wait(_GRACE)  # the others end before their coordinator
    self._end(f'error: process {index} {why}; {_MEND}')

  def _tell(self, word: str) -> None:
    line = ' '.join(word.split())[:2000]
    for link in list(self._links.values()):
      with contextlib.suppress(OSError):
        link.sendall(f'{line}\n'.encode())


def _thread(function: Callable, *args: Any) -> None:
  threading.Thread(
    target=function, args=args, name='peers', daemon=True
  ).start()


def _end(line: str) -> None:
  # Not by way of Python's streams, whose locks the main thread may hold.
  os.write(sys.__stderr__.fileno(), f'{line}\n'.encode())
  os._exit(GONE)
