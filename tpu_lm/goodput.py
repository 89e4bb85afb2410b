"""Where the wall time of a run went, over all its processes in turn.

The parts add up to the wall time: what no phase (phases.py) was charged with
is `start_up` before the loop begins, and `other` within it. What XLA compiles,
wherever that is, is `compile`. `lost` is what a killed process had computed
beyond the checkpoint that the next one went on from.

A line of the split `goodput` stands in metrics.jsonl for each save, and one
for the end of a process:

  step, stage, split, seconds, goodput, parts     parts: {name: seconds}

all of them sums since the run began. So that a killed process is accounted
for too, the same parts are kept in WORKDIR/goodput.json, written over by a
thread again and again. It is as old as 0.4 % of the wall time at most, 0.1
seconds in the first half minute. What a process spends before there is a
config.json is not known if it is killed there. Process 0 alone keeps it.
"""

import contextlib
import json
import os
import pathlib
import threading
import time
from typing import Any

import jax

from tpu_lm import metrics
from tpu_lm.phases import Phases

USEFUL = ('step', 'generate', 'reward', 'score')
# What is done again where a process goes on from an earlier step.
_REPEATED = (*USEFUL, 'data_wait', 'evaluation')
# Phases that are called otherwise here; unknown ones are `other`.
_PARTS = {
  'prepare': 'start_up',
  'init': 'start_up',
  'keep': 'start_up',
  'compile': 'compile',
  'data': 'data_wait',
  'wait': 'step',
  'save': 'checkpoint',
  'evaluate': 'evaluation',
} | {name: name for name in USEFUL}
_SHARE, _LEAST, _MOST = 0.004, 0.1, 30.0  # of the wall time; seconds

_COMPILED = '/jax/core/compile/backend_compile_duration'

Parts = dict[str, float]
_phases: list[Phases] = []  # that are charged for what is compiled


def _charge_compile(event: str, seconds: float, **_: Any) -> None:
  if event == _COMPILED and _phases:
    _phases[-1].move(seconds, 'compile')


jax.monitoring.register_event_duration_secs_listener(_charge_compile)


def goodput(parts: Parts) -> float:
  """The share of the wall time that trained, from 0 to 1."""
  useful = sum(parts.get(name, 0.0) for name in USEFUL)
  return useful / max(sum(parts.values()), 1e-9)


def told(parts: Parts) -> str:
  """'goodput 93.1 % of 62.5 s: step 58.2 s, compile 3.1 s, …'"""
  shown = sorted(parts.items(), key=lambda part: -part[1])
  listed = [f'{spoken(name)} {s:.1f} s' for name, s in shown if s >= 0.05]
  return (
    f'goodput {100 * goodput(parts):.1f} % of {sum(parts.values()):.1f} s: '
    f'{", ".join(listed)}'
  )


def spoken(name: str) -> str:
  """Of a part, as a reader is told it."""
  return 'start-up' if name == 'start_up' else name.replace('_', ' ')


def process_start() -> float:
  """When this process was started, by the monotonic clock; else now."""
  now = time.monotonic()
  try:
    # The fields behind the name, which may hold anything; the 22nd of all.
    fields = pathlib.Path('/proc/self/stat').read_text().rpartition(')')[2]
    started = int(fields.split()[19]) / os.sysconf('SC_CLK_TCK')
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return now - max(age, 0.0)
  except (OSError, ValueError, IndexError, AttributeError):
    return now


class Ledger:
  """The parts of a run's wall time, with those of the processes before.

  Args:
    workdir: of the run.
    phases: of this process.
    began: when this process began to work on it, by the monotonic clock;
      None: now.
    writes: whether it keeps goodput.json and writes lines.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    phases: Phases,
    began: float | None = None,
    writes: bool = True,
  ):
    self._folder, self._phases = pathlib.Path(workdir), phases
    self._began = time.monotonic() if began is None else began
    self._writes = writes
    self._start_up: float | None = None  # in no phase, before the loop
    self._lock = threading.Lock()
    self._ended = threading.Event()
    self._step = 0  # of the last save
    self._former = ''  # what goodput.json held
    self._before = self._recorded()

  def parts(self) -> Parts:
    """Seconds of the run so far, by part; they add up to its wall time."""
    now = time.monotonic()
    spent = self._phases.spent(now)
    rest = now - self._began - sum(spent.values())
    start_up = rest if self._start_up is None else self._start_up
    mine = [(_PARTS.get(phase, 'other'), s) for phase, s in spent.items()]
    mine += [('start_up', start_up), ('other', rest - start_up)]
    found = dict(self._before)
    for name, seconds in mine:
      found[name] = found.get(name, 0.0) + seconds
    return found

  def resume(self, step: int) -> None:
    """Counts as lost what had been computed beyond a step.

    Call it before the lines of metrics beyond that step are dropped.
    """
    kept: Parts = {}
    for line in metrics.ledger(self._folder / 'metrics.jsonl'):
      # The first line of a step is that of its save.
      if 0 < line['step'] <= step and line['step'] > self._step:
        self._step, kept = line['step'], line['parts']
    before, lost = dict(self._before), 0.0
    for name in _REPEATED:
      again = max(before.get(name, 0.0) - kept.get(name, 0.0), 0.0)
      if again:
        before[name] -= again
        lost += again
    if lost:
      before['lost'] = before.get('lost', 0.0) + lost
    self._before = before

  def started(self) -> None:
    """The loop begins: from here on idle time is `other`."""
    with self._lock:
      now = time.monotonic()
      spent = sum(self._phases.spent(now).values())
      self._start_up = now - self._began - spent

  def mark(self, writer: metrics.Writer, step: int | None = None) -> None:
    """Writes the line of a save; without a step that of the end."""
    self._step = self._step if step is None else step
    parts = self.parts()
    writer.add(
      self._step,
      metrics.LEDGER,
      {
        'seconds': sum(parts.values()),
        'goodput': goodput(parts),
        'parts': parts,
      },
    )

  def __enter__(self) -> 'Ledger':
    _phases.append(self._phases)
    if self._writes:
      threading.Thread(target=self._keep, name='goodput', daemon=True).start()
    return self

  def __exit__(self, error: type | None, *_: Any) -> None:
    _phases.remove(self._phases)
    self._ended.set()
    # A start that was refused leaves all as it was.
    refused = error is not None and self._start_up is None
    self._write(self._former if refused else None, last=True)

  # The file.

  @property
  def _path(self) -> pathlib.Path:
    return self._folder / 'goodput.json'

  def _recorded(self) -> Parts:
    """What the processes before have spent."""
    lines = metrics.ledger(self._folder / 'metrics.jsonl')
    found = [line['parts'] for line in lines[-1:]]
    # There is none yet, or it was torn by the machine's end.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      self._former = self._path.read_text()
      found.append(json.loads(self._former)['parts'])
    return max(found, key=lambda parts: sum(parts.values()), default={})

  def _keep(self) -> None:
    wait = _LEAST
    while not self._ended.wait(wait):
      self._write()
      wall = sum(self.parts().values())
      wait = min(max(_SHARE * wall, _LEAST), _MOST)

  def _write(self, text: str | None = None, last: bool = False) -> None:
    """Writes goodput.json; a disk that fails is told of by others."""
    with self._lock:
      over = self._ended.is_set() and not last
      is_run = self._writes and (self._folder / 'config.json').exists()
      if over or not is_run:
        return
      if text is None:
        text = json.dumps({'parts': self.parts()})
      temporary = self._path.with_suffix('.json.tmp')
      with contextlib.suppress(OSError):
        temporary.write_text(text)
        temporary.replace(self._path)
        if not text:
          self._path.unlink()
