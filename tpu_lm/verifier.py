"""Compares LaTeX by math-verify (Apache-2.0), in processes of its own.

Sympy may hang, crash or eat the memory, and math-verify's own time limit works
in the main thread alone. So each comparison is done by a worker process that
is started when first needed (never by a fork of this process, which holds a
device and threads), ends itself by an alarm, and is then replaced.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

_START = 60.0  # seconds that a worker may take to import sympy
_MEMORY = 2 << 30  # bytes that a worker may map
_PROGRAM = 'from tpu_lm import verifier; verifier.serve()'


class Verdict(NamedTuple):
  """What the library could read, and whether the two are equal."""

  reference: bool
  answer: bool
  equal: bool


def serve() -> None:
  """A worker: reads [seconds, reference, answer], writes a `Verdict`.

  One line of JSON each; 'ready' comes first.
  """
  import logging
  import resource
  import signal

  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  most = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
  resource.setrlimit(resource.RLIMIT_AS, (most, hard))
  replies = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # whatever the library prints is no reply
  import math_verify

  logging.disable()
  config = (math_verify.LatexExtractionConfig(),)
  print('ready', file=replies, flush=True)
  # Ends the process, also in the middle of a long computation in C.
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  for line in sys.stdin:
    seconds, *pair = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    reference, answer = (
      math_verify.parse(
        f'${text}$', config, 'no_fallback', parsing_timeout=None
      )
      for text in pair
    )
    same = bool(reference and answer) and math_verify.verify(
      reference, answer, allow_set_relation_comp=True, timeout_seconds=None
    )
    signal.setitimer(signal.ITIMER_REAL, 0)
    verdict = Verdict(bool(reference), bool(answer), same)
    print(json.dumps(verdict), file=replies, flush=True)


class _Worker:
  """A process that runs `serve`."""

  def __init__(self):
    folders = [str(pathlib.Path(__file__).parents[1])]
    if 'PYTHONPATH' in os.environ:
      folders.append(os.environ['PYTHONPATH'])
    self._process = subprocess.Popen(
      [sys.executable, '-P', '-c', _PROGRAM],
      env=os.environ | {'PYTHONPATH': os.pathsep.join(folders)},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    if self._line(_START) != 'ready\n':
      self.close()
      raise ChildProcessError('a process of math-verify did not start')

  def _line(self, seconds: float) -> str:
    """The next line; no whole one where the process ends or takes too long."""
    timer = threading.Timer(seconds, self._process.kill)
    timer.start()
    try:
      return self._process.stdout.readline()
    finally:
      timer.cancel()

  def alive(self) -> bool:
    return self._process.poll() is None

  def ask(self, seconds: float, pair: tuple[str, str]) -> Verdict | None:
    """None: the process has ended."""
    try:
      print(json.dumps((seconds, *pair)), file=self._process.stdin, flush=True)
    except OSError:
      return None
    line = self._line(seconds + 1)
    return Verdict(*json.loads(line)) if line.endswith('\n') else None

  def close(self) -> None:
    self._process.kill()
    self._process.wait()
    for pipe in (self._process.stdin, self._process.stdout):
      with contextlib.suppress(OSError):  # unsent words to one who is gone
        pipe.close()


class Verifier:
  """A pool of workers, each started when those that are there are busy.

  Args:
    number: of workers at most.
    seconds: that one comparison may take.
  """

  def __init__(self, number: int, seconds: float):
    self._seconds = seconds
    self._threads = concurrent.futures.ThreadPoolExecutor(number, 'verifier')
    self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()

  def verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict | None]:
    """Compares (reference, answer) pairs of LaTeX.

    Returns:
      For each pair what was found. An answer that ends its worker, by time,
      memory or a crash, counts as not read. None: no worker could be started.
    """
    return list(self._threads.map(self._verdict, pairs))

  def _verdict(self, pair: tuple[str, str]) -> Verdict | None:
    try:
      worker = self._idle_worker() or _Worker()
    except ChildProcessError:
      return None
    verdict = worker.ask(self._seconds, pair)
    if verdict is None:
      worker.close()
      return Verdict(reference=True, answer=False, equal=False)
    self._idle.put(worker)
    return verdict

  def _idle_worker(self) -> _Worker | None:
    """One that waits for work and has not died meanwhile."""
    while not self._idle.empty():
      with contextlib.suppress(queue.Empty):
        worker = self._idle.get_nowait()
        if worker.alive():
          return worker
        worker.close()
    return None

  def close(self) -> None:
    """Ends all workers."""
    self._threads.shutdown()
    while not self._idle.empty():
      self._idle.get().close()
