"""Proves on the user's own configuration that a killed run loses nothing.

One run goes undisturbed to its end. Another, of the same configuration, is
ended by SIGKILL over and over, at random moments and once at each named point
(between and within the stages of a step, a save, a commit, an evaluation),
and started again each time. At the end every array of the checkpoints and
every line of the metrics (the clock apart) must be equal, bit for bit.

WORKDIR/undisturbed, WORKDIR/drilled   the two working directories
WORKDIR/data                           the rows both read
WORKDIR/logs                           what each start printed
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from tpu_lm import metrics, phases, stored_step
from tpu_lm import workdir as workdirs
from tpu_lm.checkpoint import Checkpoints
from tpu_lm.errors import UserError

POINTS = ('data', 'step', 'save', 'commit', 'evaluate')
SAMPLING = ('generate', 'reward', 'score')  # of stages that sample

_POLL = 0.005  # seconds
_PATIENCE = 10  # how many times longer than undisturbed a start may take
_EARLY = 0.2  # share of the random kills that fall before the first step


class Kill(NamedTuple):
  """When to end a process; one of the three forms."""

  point: str = ''  # at a named point ...
  count: int = 1  # ... when it comes to it for the nth time
  after_step: int = -1  # once the metrics have come to this step ...
  seconds: float = 0.0  # ... and so long after, or after the start if -1

  def __str__(self) -> str:
    if self.point:
      return f'at {self.point} {self.count}'
    if self.after_step < 0:
      return f'{self.seconds:.2f} s after the start'
    return f'{self.seconds:.2f} s after step {self.after_step}'


class Pace(NamedTuple):
  """How the undisturbed run went."""

  seconds: float  # in all
  start_seconds: float  # until the first line of metrics
  step_seconds: float
  last_step: int
  line_steps: int  # between two lines of metrics


def drill(
  config_args: Sequence[str],
  kills: int,
  workdir: str | os.PathLike,
  report: Callable[[str], None] = print,
  command: Sequence[str] | None = None,
  seed: int = 0,
  points: Sequence[str] = POINTS,
) -> bool:
  """Kills and resumes a run; returns whether its end is bit-identical.

  Args:
    config_args: `--config=…` and its overrides, as `tpu_lm train` takes them.
    kills: how many at random moments, besides one at each named point.
    workdir: an empty folder, or one of an earlier drill, which is overwritten.
    report: prints one line.
    command: what is run, by default `python -m tpu_lm train`.
    seed: of the random moments.
    points: the named ones.

  Raises:
    UserError: the folder holds something else, or the configuration does not
      even run undisturbed.
  """
  if kills < 0:
    raise UserError(f'--kills={kills}: give 0 or more')
  folder = _make_folder(pathlib.Path(workdir).absolute())
  command = [*(command or (sys.executable, '-m', 'tpu_lm', 'train'))]
  command += config_args
  if not any(arg.startswith('--config.data.dir=') for arg in config_args):
    command.append(f'--config.data.dir={folder / "data"}')

  report('undisturbed run')
  pace = _run_undisturbed(_Start(command, folder, 'undisturbed'))
  report(
    f'undisturbed run: {pace.last_step} steps in {pace.seconds:.1f} s,'
    f' {pace.start_seconds:.1f} s of them until the first line of metrics'
  )
  report(f'{"kill":>5}  {"when":<28}{"resumed":>10}{"reached":>10}')
  done = 0
  plan = [*_plan(kills, pace, random.Random(seed), points), None]
  for k, kill in enumerate(plan, 1):
    start = _Start(command, folder, 'drilled', f'drilled-{k:03d}', kill)
    resumed = start.resumes_at()
    status = start.finish(_PATIENCE * pace.seconds + 60)
    if start.timed_out:
      report(f'FAILED: start {k} came to no end: {start.tail()}')
      return False
    if status not in ((0, -signal.SIGKILL) if kill else (0,)):
      report(f'FAILED: start {k} ended with status {status}: {start.tail()}')
      return False
    if status == 0:
      report(f'{"end":>5}  {"":<28}{resumed:>10}{start.reached():>10}')
      break
    done += 1
    report(f'{done:>5}  {kill!s:<28}{resumed:>10}{start.reached():>10}')
  if done < kills + len(points):
    report(
      f'the run ended after {done} of {kills + len(points)} kills: too short'
      ' for more; give more steps'
    )
  return _verdict(folder, done, report)


def _make_folder(folder: pathlib.Path) -> pathlib.Path:
  workdirs.make(folder)
  marker = folder / 'drill.json'
  mine = [folder / name for name in ('undisturbed', 'drilled', 'logs')]
  if not marker.exists() and any(path.exists() for path in mine):
    raise UserError(
      f'--workdir={folder}: holds {"/, ".join(p.name for p in mine)}/ that no'
      ' drill has made; give another folder'
    )
  workdirs.write_json(marker, {'made_by': 'tpu_lm drill'})
  for path in mine:
    shutil.rmtree(path, ignore_errors=True)
  mine[-1].mkdir()
  return folder


def _plan(
  kills: int,
  pace: Pace,
  rng: random.Random,
  points: Sequence[str] = POINTS,
) -> list[Kill]:
  """Returns random kills across the run, the named ones strewn in between.

  A named kill comes soon after a resume, so it brings the run no nearer to its
  end than the random ones around it; none is left to the last tenth, where the
  run may be over before.
  """
  early = [rng.random() < _EARLY for _ in range(kills)]
  steps = sorted(rng.randrange(int(pace.last_step * 0.9) + 1) for _ in early)
  plan = [
    Kill(seconds=rng.uniform(0, pace.start_seconds))
    if is_early
    else Kill(
      after_step=step,
      seconds=rng.uniform(0, pace.step_seconds * pace.line_steps),
    )
    for is_early, step in zip(early, steps, strict=True)
  ]
  for point in rng.sample(points, len(points)):
    count = rng.randint(1, 5) if point in ('data', 'step') else 1
    plan.insert(rng.randint(0, max(0, len(plan) - 1)), Kill(point, count))
  return plan


class _Start:
  """One start of the command, its log and the directory it writes."""

  def __init__(
    self,
    command: list[str],
    folder: pathlib.Path,
    name: str,
    log: str = '',
    kill: Kill | None = None,
  ):
    self.workdir = folder / name
    self.seconds = 0.0  # it ran
    self.start_seconds = 0.0  # until it wrote a line of metrics
    self.timed_out = False
    self._log = folder / 'logs' / f'{log or name}.log'
    self._metrics = self.workdir / 'metrics.jsonl'
    self._before = self._stamp()
    self._kill = kill
    self._command = [*command, f'--workdir={self.workdir}']

  def finish(self, timeout: float) -> int:
    """Runs until it ends, is killed or times out; returns the exit status."""
    kill = self._kill
    environment = dict(os.environ)
    environment.pop(phases.KILL_AT, None)
    if kill and kill.point:
      environment[phases.KILL_AT] = f'{kill.point}:{kill.count}'
    begin = time.monotonic()
    due = begin + timeout
    waits = kill is not None and not kill.point  # for the moment to kill
    if waits and kill.after_step < 0:
      due, waits = begin + kill.seconds, False
    with self._log.open('wb') as log:
      process = subprocess.Popen(
        self._command, stdout=log, stderr=subprocess.STDOUT, env=environment
      )
    try:
      while process.poll() is None and time.monotonic() < due:
        time.sleep(_POLL)
        # Before it has written anew, the lines are of the process before it.
        if (waits or not self.start_seconds) and self._stamp() != self._before:
          reached = self.reached()
          if reached and not self.start_seconds:
            self.start_seconds = time.monotonic() - begin
          if waits and reached >= kill.after_step:
            due, waits = time.monotonic() + kill.seconds, False
      self.timed_out = process.poll() is None and due == begin + timeout
    finally:
      process.kill()
      status = process.wait()
      self.seconds = time.monotonic() - begin
    return status

  def reached(self) -> int:
    """Returns the step of the last line of metrics, 0 before the first."""
    lines = self.lines()
    return lines[-1]['step'] if lines else 0

  def lines(self) -> list[dict[str, Any]]:
    try:
      return metrics.read(self._metrics)
    except FileNotFoundError:
      return []

  def resumes_at(self) -> int:
    """Returns the newest step that is committed, 0 without one."""
    return max(
      Checkpoints(self.workdir / 'checkpoints', read_only=True).steps(),
      default=0,
    )

  def tail(self) -> str:
    """Returns the last line that it printed, and where the rest is."""
    lines = self._log.read_text(errors='replace').strip().splitlines()
    return f'{lines[-1] if lines else "no output"} (see {self._log})'

  def _stamp(self) -> tuple:
    try:
      stat = self._metrics.stat()
    except FileNotFoundError:
      return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _run_undisturbed(start: _Start) -> Pace:
  status = start.finish(timeout=float('inf'))
  lines = start.lines()
  if status != 0 or not lines:
    raise UserError(
      f'{start.workdir}: the undisturbed run ended with status {status} after'
      f' {len(lines)} lines of metrics: {start.tail()}'
    )
  trained = sorted({line['step'] for line in lines})
  return Pace(
    start.seconds,
    start.start_seconds,
    (start.seconds - start.start_seconds) / trained[-1],
    trained[-1],
    max(1, trained[-1] // len(trained)),
  )


# The verdict.


def _verdict(
  folder: pathlib.Path, done: int, report: Callable[[str], None]
) -> bool:
  """Reports every difference between the two runs; whether there is none."""
  one, two = folder / 'undisturbed', folder / 'drilled'
  differences = [
    *_metric_differences(one / 'metrics.jsonl', two / 'metrics.jsonl'),
    *_array_differences(one / 'checkpoints', two / 'checkpoints'),
  ]
  for difference in differences[:20]:
    report(f'FAILED: {difference}')
  if differences:
    report(f'FAILED: {len(differences)} differences after {done} kills')
    return False
  steps = Checkpoints(two / 'checkpoints', read_only=True).steps()
  lines = metrics.read(two / 'metrics.jsonl')
  report(
    f'passed: after {done} kills, {len(lines)} lines of metrics and every'
    f' array of the checkpoints {", ".join(map(str, steps))} are bit-identical'
  )
  return True


def _metric_differences(one: pathlib.Path, two: pathlib.Path) -> Iterator[str]:
  pair = [
    [metrics.comparable(line) for line in metrics.read(path)]
    for path in (one, two)
  ]
  if len(pair[0]) != len(pair[1]):
    yield f'metrics.jsonl: {len(pair[1])} lines instead of {len(pair[0])}'
  for number, (a, b) in enumerate(zip(*pair, strict=False), 1):
    for key in sorted(a.keys() | b.keys()):
      # As text: it tells 1 from 1.0 and finds NaN equal to itself.
      has = [repr(x[key]) if key in x else 'missing' for x in (a, b)]
      if has[0] != has[1]:
        yield (f'metrics.jsonl:{number}: {key} is {has[1]} instead of {has[0]}')


def _array_differences(one: pathlib.Path, two: pathlib.Path) -> Iterator[str]:
  pair = [Checkpoints(path, read_only=True).steps() for path in (one, two)]
  if pair[0] != pair[1]:
    yield f'checkpoints: the steps are {pair[1]} instead of {pair[0]}'
  if not pair[0]:
    yield 'checkpoints: the undisturbed run has saved none'
  for step in sorted(set(pair[0]) & set(pair[1])):
    arrays = [
      stored_step.arrays(epath.Path(path / str(step))) for path in (one, two)
    ]
    for name in sorted(arrays[0].keys() | arrays[1].keys()):
      a, b = (x.get(name) for x in arrays)
      if a is None or b is None:
        yield f'checkpoint {step}: {name} is in one of the runs only'
      elif a != b:
        yield f'checkpoint {step}: {name} differs'
