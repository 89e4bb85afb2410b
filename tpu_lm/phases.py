"""What the run is doing right now, in one place.

The loop says `with phases('step'):`; from that come the seconds spent per
phase, the heartbeat of the watchdog and the points where `drill` kills.

Signals. SIGTERM and SIGINT ask the run to stop; the loop looks at
`stop_requested` at every step boundary, between batches of an evaluation and
while it prepares data, saves and ends with status 0. Python runs a signal
handler only between two bytecodes of the main thread, which never come while
XLA compiles; so the signal also wakes a thread (`signal.set_wakeup_fd`), and
when the main thread has not looked within some seconds, that thread saves the
state of the last boundary by itself and ends the process.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

KILL_AT = 'TPU_LM_KILL_AT'  # 'PHASE:COUNT', set by drill
HUNG = 70  # exit status of the watchdog


class Phases:
  """Phases of one run. Use from the main thread; `install` is optional."""

  def __init__(
    self,
    grace_seconds: float = 4.0,
    watchdog_seconds: float = 1800.0,
    alone: bool = True,
  ):
    """Starts the clock, and the watchdog where one is wanted.

    Args:
      grace_seconds: how long after a signal the main thread may take to reach
        a boundary before the watcher saves in its stead.
      watchdog_seconds: the run is ended when no phase begins or ends for so
        long; 0 for never.
      alone: whether this process may save by itself. One of several may not:
        it stops where all of them do.
    """
    self.seconds: dict[str, float] = {}  # per phase, nested phases taken out
    self.signal_name = ''  # of the signal that asked to stop
    self._grace, self._alone = grace_seconds, alone
    self._stack: list[str] = []
    self._mark = time.monotonic()  # since when the innermost phase is charged
    self._clock = threading.Lock()  # of the three above
    self._beat = time.monotonic()
    self._main = threading.get_ident()
    self._stop = threading.Event()
    self._seen = threading.Event()  # the main thread knows that it is to stop
    self._ended = threading.Event()
    self._turn = threading.Lock()  # who acts on the stop: watcher or main
    self._save: Callable[[], Any] | None = None
    self._handlers: dict[int, Any] = {}
    self._sockets: tuple[socket.socket, socket.socket] | None = None
    self._wakeup = -1
    if watchdog_seconds > 0:
      thread = threading.Thread(
        target=self._watch_progress,
        args=(watchdog_seconds,),
        name='watchdog',
        daemon=True,
      )
      thread.start()

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    """Charges the time inside to a phase; phases may be nested."""
    self._charge(lambda: self._stack.append(name))
    try:
      kill_point(name)
      yield
    finally:
      self._charge(self._stack.pop)

  def spent(self, now: float) -> dict[str, float]:
    """`seconds` with those of the phase under way, up to `now` (monotonic)."""
    with self._clock:
      found = dict(self.seconds)
      if self._stack:
        name = self._stack[-1]
        found[name] = found.get(name, 0.0) + max(now - self._mark, 0.0)
    return found

  def move(self, seconds: float, to: str) -> None:
    """Charges what has passed just now to another phase than the current."""
    if threading.get_ident() != self._main:
      return  # beside the main thread, whose time is what is charged
    self._charge()
    with self._clock:
      if self._stack:
        self.seconds[self._stack[-1]] -= seconds
      self.seconds[to] = self.seconds.get(to, 0.0) + seconds

  @property
  def current(self) -> str:
    return self._stack[-1] if self._stack else 'between phases'

  @property
  def stop_requested(self) -> bool:
    """Whether to stop; the main thread must then save and end by itself."""
    if not self._stop.is_set():
      return False
    if threading.get_ident() == self._main:
      with self._turn:  # held by a watcher that is saving and will end us
        self._seen.set()
    return True

  def request_stop(self, reason: str) -> None:
    """Asks the run to stop as a signal would."""
    self.signal_name = self.signal_name or reason
    self._stop.set()

  def boundary(self, save: Callable[[], Any] | None) -> None:
    """Tells how to save the state as it is now, should a signal come.

    Args:
      save: saves this boundary's state if that has not been done, and returns
        when it is committed; called from another thread. None: there is
        nothing to save yet.
    """
    self._beat = time.monotonic()
    with self._turn:
      self._save = save

  def install(self) -> bool:
    """Handles SIGTERM and SIGINT; returns whether it could.

    Only the main thread of a process may; elsewhere (some notebooks) signals
    keep their usual meaning.
    """
    if threading.current_thread() is not threading.main_thread():
      return False
    if self._sockets is not None:
      return True
    self._main = threading.get_ident()
    self._sockets = socket.socketpair()
    for end in self._sockets:
      end.setblocking(False)
    self._wakeup = signal.set_wakeup_fd(
      self._sockets[1].fileno(), warn_on_full_buffer=False
    )
    for number in (signal.SIGTERM, signal.SIGINT):
      self._handlers[number] = signal.signal(number, lambda *_: None)
    self._sockets[0].setblocking(True)
    threading.Thread(
      target=self._watch_signals, name='signals', daemon=True
    ).start()
    return True

  def close(self) -> None:
    """Gives the signals their former meaning and ends the threads."""
    self._charge()
    self._ended.set()
    if self._sockets is not None:
      signal.set_wakeup_fd(self._wakeup)
      for number, handler in self._handlers.items():
        signal.signal(number, handler)
      self._sockets[1].close()  # the watcher reads the end and returns
      self._sockets = None

  def __enter__(self) -> 'Phases':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def _charge(self, change: Callable[[], Any] = lambda: None) -> None:
    """Charges the innermost phase up to now, before it changes."""
    with self._clock:
      now = time.monotonic()
      if self._stack:
        name = self._stack[-1]
        spent = self.seconds.get(name, 0.0)
        self.seconds[name] = spent + now - self._mark
      self._mark = self._beat = now
      change()

  def _watch_signals(self) -> None:
    assert self._sockets is not None
    end = self._sockets[0]
    with end:
      while received := end.recv(64):
        for number in received:
          if number in (signal.SIGTERM, signal.SIGINT):
            self._act(signal.Signals(number))

  def _act(self, number: signal.Signals) -> None:
    if number == signal.SIGINT and self.signal_name == 'SIGINT':
      _end(f'ended by a second SIGINT while in {self.current}', 130)
    first = not self._stop.is_set()
    self.request_stop(number.name)
    if first:
      threading.Thread(
        target=self._save_in_main_s_stead, name='stop', daemon=True
      ).start()

  def _save_in_main_s_stead(self) -> None:
    if self._seen.wait(self._grace) or self._ended.is_set():
      return
    with self._turn:
      if self._seen.is_set() or self._ended.is_set():
        return
      where = f'stopped by {self.signal_name} while in {self.current}'
      if not self._alone:
        print(f'{where}: waiting for the others', file=sys.stderr, flush=True)
        return
      if self._save is None:
        _end(f'{where}: nothing to save yet', 0)
      try:
        self._save()
      except Exception as e:
        # The state may have been donated to the step that is running: the
        # next boundary is the earliest moment that can be saved.
        reason = str(e).split('\n')[0]
        print(
          f'{where}: the last boundary cannot be saved ({reason}); waiting'
          ' for the next',
          file=sys.stderr,
          flush=True,
        )
        return
      _end(f'{where}: the state of the last step is saved', 0)

  def _watch_progress(self, seconds: float) -> None:
    while not self._ended.wait(min(1.0, seconds / 4)):
      if time.monotonic() - self._beat > seconds:
        sys.stderr.flush()
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        _end(
          f'error: no progress for {seconds:g} seconds in phase'
          f' {self.current!r}; the stacks of all threads are above',
          HUNG,
        )


def leave(status: int) -> None:
  """Ends a process whose work is done, without Python's own tear-down.

  Call it last. A C++ thread (tensorstore's, XLA's) that asks for Python's lock
  during the tear-down aborts the process now and then: status -6 in 1 of some
  60 runs that had finished well.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _end(line: str, status: int) -> None:
  """Ends the process from any thread, whatever the main thread is doing."""
  print(line, file=sys.stderr)
  leave(status)


# Where drill kills.

_counts: dict[str, int] = {}


def kill_point(name: str) -> None:
  """Ends the process by SIGKILL where TPU_LM_KILL_AT says so.

  'save' is not the call that begins to save but the writing in the background:
  see `kill_while_writing`.
  """
  if name != 'save' and _due(name):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(temporary: Any) -> None:
  """The kill point 'save': when some of a step's data lie on the disk."""
  if not _due('save'):
    return

  def kill_at_first_data() -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
      # The folder is renamed at the commit: too late is as good as at last.
      if not temporary.exists() or any(temporary.glob('*/ocdbt*/d/*')):
        break
      time.sleep(0.0002)
    os.kill(os.getpid(), signal.SIGKILL)

  threading.Thread(target=kill_at_first_data, daemon=True).start()


def _due(name: str) -> bool:
  if KILL_AT not in os.environ:
    return False
  phase, count = os.environ[KILL_AT].split(':')
  if phase != name:
    return False
  _counts[name] = _counts.get(name, 0) + 1
  return _counts[name] == int(count)
