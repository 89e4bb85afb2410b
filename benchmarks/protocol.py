"""How a benchmark is timed, alone or in turn with others in one run.

Alone: `--warm` units are thrown away, `--units` are timed, one JSON line is
printed. With `--serve` the program prints READY after the warm-up, answers
each line `GO n` with `T [[wall, cpu, others], …]` for n units, and `END` with
the JSON line, so that a driver can run several programs in turn, A B A B ….
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator

import psutil

SHAPES = {
  # dim, layers, heads, kv heads, hidden, vocabulary, length, batch
  'micro': (128, 4, 4, 2, 384, 512, 256, 16),
  'small': (512, 8, 8, 4, 1536, 8192, 512, 4),
}
_START = psutil.Process().create_time()


class _Enough(Exception):
  pass


def parser() -> argparse.ArgumentParser:
  """The options that every benchmark has."""
  made = argparse.ArgumentParser()
  made.add_argument('--shape', default='micro', choices=SHAPES)
  made.add_argument('--units', type=int, default=10)
  made.add_argument('--warm', type=int, default=3)
  made.add_argument('--serve', action='store_true')
  return made


def _busy() -> float:
  """CPU seconds that the whole machine has spent (Linux)."""
  with open('/proc/stat') as file:
    fields = [int(x) for x in file.readline().split()[1:9]]
  spent = sum(fields) - fields[3] - fields[4]  # without idle and waiting
  return spent / os.sysconf('SC_CLK_TCK')


class Clock:
  """Times units: call `tick` after each, when its result is there."""

  def __init__(self, name: str, args: argparse.Namespace, unit_tokens: int):
    self._name, self._args, self._unit_tokens = name, args, unit_tokens
    self._count, self._times, self._asked = 0, [], 0
    self._answer = []
    self.facts = {}  # more for the JSON line
    # What libraries print must not mix with the protocol.
    self._out = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)
    self._first = 0.0
    self.restart()

  def restart(self) -> None:
    """What happened since the last tick belongs to no unit."""
    self._wall, self._cpu = time.perf_counter(), time.process_time()
    self._machine = _busy()

  def tick(self) -> None:
    """Ends a unit."""
    wall = time.perf_counter() - self._wall
    cpu = time.process_time() - self._cpu
    others = max(_busy() - self._machine - cpu, 0.0)
    self._count += 1
    if self._count == 1:
      self._first = time.time() - _START
    if self._count > self._args.warm:
      self._times.append((wall, cpu, others))
      self._answer.append((round(wall, 6), round(cpu, 6), round(others, 3)))
      if not self._args.serve and len(self._times) >= self._args.units:
        raise _Enough
      if self._args.serve and len(self._answer) == self._asked:
        print('T', json.dumps(self._answer), file=self._out)
        self._wait()
    elif self._count == self._args.warm and self._args.serve:
      print('READY', file=self._out)
      self._wait()
    self.restart()

  def _wait(self) -> None:
    words = sys.stdin.readline().split()
    if not words or words[0] == 'END':
      raise _Enough
    self._asked, self._answer = int(words[1]), []

  @property
  def walls(self) -> list[float]:
    """Seconds of each timed unit."""
    return [times[0] for times in self._times]

  @property
  def is_warm(self) -> bool:
    """Whether the unit under way is timed."""
    return self._count >= self._args.warm

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Runs until enough units are timed, then prints the JSON line."""
    with contextlib.suppress(_Enough):
      yield
    wall, cpu, others = (
      statistics.median(column)
      for column in zip(*self._times or [(float('nan'),) * 3], strict=True)
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = {
      'name': self._name,
      'shape': self._args.shape,
      'n': len(self._times),
      'unit_s_median': round(wall, 5),
      'unit_cpu_s_median': round(cpu, 5),
      'others_cores': round(others / wall, 2),
      'startup_to_first_unit_s': round(self._first, 2),
      'peak_rss_mb': memory // 1024,
      'tok_per_s': round(self._unit_tokens / wall, 1),
    }
    line |= self.facts
    print(json.dumps(line), file=self._out, flush=True)
    os._exit(0)
