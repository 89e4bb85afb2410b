"""What a run reports: metrics.jsonl, a progress line and TensorBoard.

One JSON object a line, in the order of training. A line of the split `train`:

  step, stage, split, loss, …, gradient_norm, learning_rate   values of the step
  tokens               training positions seen since step 0
  steps_per_second     as the next, of a stage that answers prompts
  tokens_per_second    since the line before, without evaluation and saving
  utilisation          model FLOPs utilisation, 0 to 1; null if the device's
                       peak is unknown (see flops.py)
  seconds              wall time of the run, over all its processes in turn
  time_left            seconds, at the recent speed

Lines of other splits hold step, stage, split, the values and seconds; those of
the split `goodput` tell where the time went (goodput.py), and are read by
`ledger` alone, since they depend on the clock. Numbers
are written in full, so that runs compare bit for bit; those that depend on the
clock are named in TIMING_KEYS. A value that is not finite is written as null
and its name is listed under `nonfinite`: the file is strict JSON.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import numpy as np

from tpu_lm import flops
from tpu_lm.errors import UserError
from tpu_lm.progress import Progress, duration

TIMING_KEYS = frozenset(
  {
    'steps_per_second',
    'tokens_per_second',
    'utilisation',
    'seconds',
    'time_left',
  }
)
LEDGER = 'goodput'  # the split of the lines that tell where time went
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def comparable(line: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a line without what depends on the clock."""
  return {k: v for k, v in line.items() if k not in TIMING_KEYS}


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the lines of a metrics.jsonl but those of `ledger`, oldest first.

  A last line torn by a kill is left out.

  Raises:
    UserError: another line is no JSON object with a step and a split.
  """
  return [line for line in _lines(path) if line['split'] != LEDGER]


def ledger(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the lines that tell where time went; none where no file is.

  Raises:
    UserError: as `read`.
  """
  if not pathlib.Path(path).is_file():
    return []
  return [
    line
    for line in _lines(path)
    if line['split'] == LEDGER and isinstance(line.get('parts'), dict)
  ]


def _lines(path: str | os.PathLike) -> list[dict[str, Any]]:
  parts = pathlib.Path(path).read_bytes().split(b'\n')
  lines = []
  for number, text in enumerate(parts, 1):
    line = _parse(text)
    if line is not None:
      lines.append(line)
    elif number < len(parts) and text.strip():
      raise UserError(
        f'{path}:{number}: not a line of metrics (a JSON object with step and '
        'split); delete the line or move the file away'
      )
  return lines


def _parse(text: bytes) -> dict[str, Any] | None:
  try:
    line = json.loads(text)
  except ValueError:
    return None
  is_line = isinstance(line, dict) and {'step', 'split'} <= line.keys()
  return line if is_line else None


_SPOKEN = (  # of a held-out line; the file has all
  'loss', 'perplexity', 'bits_per_byte', 'accuracy', 'margin', 'brier',
  'well_formed', 'reward',
)  # fmt: skip


class Writer:
  """Appends to WORKDIR/metrics.jsonl and shows how far the run is.

  Every process of a run holds one; only process 0 writes and prints.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    resume_step: int,
    total_steps: int,
    tokens_per_step: int,
    flops_per_step: float,
    *,
    stage: str,
    tensorboard: bool = False,
    process_index: int = 0,
    out: TextIO | None = None,
  ):
    """Opens the file and drops what lies beyond the step resumed from.

    Args:
      workdir: the working directory, made if missing.
      resume_step: the step that training continues from, 0 at the start.
        Lines of later steps, left by a run that was killed, are dropped: they
        will be written again.
      total_steps: the last step of the run.
      tokens_per_step: positions of the global batch; 0 where steps differ.
      flops_per_step: model FLOPs of one step over the global batch, for the
        utilisation; 0 if unknown.
      stage: name of the stage.
      tensorboard: also write WORKDIR/tensorboard.
      process_index: jax.process_index().
      out: where progress is shown; standard output by default.

    Raises:
      UserError: the file cannot be read or written, or tensorboardX is asked
        for and missing.
    """
    self._path = pathlib.Path(workdir) / 'metrics.jsonl'
    self._stage = stage
    self._total_steps = total_steps
    self._tokens_per_step = tokens_per_step
    self._flops_per_step = flops_per_step
    self._writes = process_index == 0
    self._file = None
    self._board = None
    # Imports and measures before a step runs: later both would disturb it.
    if self._writes and tensorboard:
      self._board = _summary_writer(workdir, resume_step)
    self._peak = flops.total_peak() if self._writes and flops_per_step else None
    with _disk_errors(self._path):
      lines = self._keep(resume_step)
      if self._writes:
        self._file = open(self._path, 'ab', buffering=0)  # noqa: SIM115
    self._present = {(line['step'], line['split']) for line in lines}
    self._progress = Progress(out or sys.stdout) if self._writes else None
    self._seconds_before = max(
      (line['seconds'] for line in lines if 'seconds' in line), default=0.0
    )
    self._start = self._last_time = time.perf_counter()
    self._last_step = resume_step
    self._excluded = 0.0
    self._seconds_a_step = None

  def _keep(self, resume_step: int) -> list[dict[str, Any]]:
    """Returns the lines up to a step, rewriting the file to hold only them."""
    if self._writes:
      self._path.parent.mkdir(parents=True, exist_ok=True)
    if not self._path.exists():
      return []
    lines = [line for line in _lines(self._path) if line['step'] <= resume_step]
    text = b''.join(map(_encode, lines))
    if self._writes and text != self._path.read_bytes():
      temporary = self._path.with_suffix('.jsonl.tmp')
      with open(temporary, 'wb') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, self._path)
    return lines

  def has(self, step: int, split: str) -> bool:
    """Tells if the line of a step and split is written (by any process).

    After a resume each process reads the file: where the working directory is
    not shared between hosts, process 0 must tell the others.
    """
    return (step, split) in self._present

  def exclude(self, seconds: float) -> None:
    """Leaves time (evaluation, saving, compilation) out of the speed shown."""
    self._excluded += seconds

  def note(self, text: str) -> None:
    """Prints a line that stays, above the progress line."""
    if self._progress:
      self._progress.line(text)

  def update(
    self, step: int, split: str, values: Mapping[str, Any]
  ) -> dict[str, Any] | None:
    """Writes the line of a step, once: a line that is there stays as it is.

    Returns the line, if it was written.

    Args:
      step: the step that the values belong to.
      split: 'train', 'heldout', …
      values: name -> number (Python, numpy or a scalar array).

    Raises:
      UserError: the disk is full or read-only.
    """
    if self.has(step, split):
      return None
    self._present.add((step, split))
    if not self._writes:
      return None
    numbers = {name: _number(value) for name, value in values.items()}
    line = self.add(step, split, numbers | self._timing(step, split))
    if self._board:
      self._summarise(step, split, line)
    self._show(line)
    return line

  def add(self, step: int, split: str, values: dict[str, Any]) -> dict:
    """Appends a line, whatever is there already; returns it."""
    line = {'step': step, 'stage': self._stage, 'split': split, **values}
    nonfinite = [k for k, v in line.items() if _is_nonfinite(v)]
    if nonfinite:
      line |= dict.fromkeys(nonfinite)
      line['nonfinite'] = nonfinite
    if self._writes:
      self._append(_encode(line))
    return line

  def _timing(self, step: int, split: str) -> dict[str, Any]:
    now = time.perf_counter()
    seconds = {'seconds': self._seconds_before + now - self._start}
    if split != 'train':
      return seconds
    num_steps = step - self._last_step
    wall = max(now - self._last_time, 1e-9)
    training = max(wall - self._excluded, 1e-9)
    self._last_step, self._last_time, self._excluded = step, now, 0.0
    # The first line of a process holds the compilation: what follows is not
    # averaged with it.
    recent, first = wall / max(num_steps, 1), self._seconds_a_step is None
    self._seconds_a_step = (
      training / max(num_steps, 1)
      if first
      else 0.8 * self._seconds_a_step + 0.2 * recent
    )
    speed = num_steps / training
    known = {'steps_per_second': speed}
    if self._tokens_per_step:
      used = self._flops_per_step * speed / self._peak if self._peak else None
      known = {
        'tokens': step * self._tokens_per_step,
        'tokens_per_second': self._tokens_per_step * speed,
        'utilisation': used,
      }
    left = (self._total_steps - step) * self._seconds_a_step
    return {**known, **seconds, 'time_left': left}

  def _append(self, text: bytes) -> None:
    with _disk_errors(self._path):
      size = os.fstat(self._file.fileno()).st_size
      try:
        while text:
          text = text[self._file.write(text) :]
      except OSError:
        # Half a line would be read as a torn one; none is better.
        os.ftruncate(self._file.fileno(), size)
        raise

  def _summarise(self, step: int, split: str, line: dict[str, Any]) -> None:
    for name, value in line.items():
      if isinstance(value, int | float) and name != 'step':
        self._board.add_scalar(f'{split}/{name}', value, step)
    self._board.flush()

  def _show(self, line: dict[str, Any]) -> None:
    parts = [f'step {line["step"]:,}/{self._total_steps:,}']
    if line['split'] != 'train':
      parts += [line['split']] + [
        f'{name} {_short(line[name])}' for name in _SPOKEN if name in line
      ]
      self._progress.line(' · '.join(parts))
      return
    for name in ('loss', 'accuracy', 'reward'):
      if name in line:
        parts.append(f'{name} {_short(line[name])}')
    if 'tokens_per_second' in line:
      parts.append(f'{line["tokens_per_second"]:,.0f} tok/s')
    if line.get('utilisation') is not None:
      parts.append(f'{line["utilisation"]:.0%} of peak')
    parts.append(f'{duration(line["time_left"])} left')
    self._progress.update(' · '.join(parts), line['step'] / self._total_steps)

  def close(self) -> None:
    """Ends the progress line and closes the files."""
    if self._progress:
      self._progress.close()
    if self._file:
      self._file.close()
    if self._board:
      self._board.close()

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _encode(line: Mapping[str, Any]) -> bytes:
  return json.dumps(line, allow_nan=False).encode() + b'\n'


def _number(value: Any) -> int | float | str | bool | None:
  """Returns a Python number: of float32 exactly its value as a double."""
  if value is None or isinstance(value, str | bool | int | float):
    return value
  return np.asarray(value).item()


def _is_nonfinite(value: Any) -> bool:
  return isinstance(value, float) and not math.isfinite(value)


def _short(value: Any) -> str:
  return 'not finite' if value is None else f'{value:.4f}'


@contextlib.contextmanager
def _disk_errors(path: pathlib.Path) -> Iterator[None]:
  """Tells the user what an error of the disk means for the run."""
  try:
    yield
  except OSError as error:
    mend = (
      'free some space'
      if error.errno in FULL_DISK
      else 'make the directory writable or choose another --workdir'
    )
    raise UserError(
      f'{path}: cannot be written ({error.strerror}); {mend} and run the same '
      'command again: the lines and checkpoints written so far stay valid'
    ) from error


def _summary_writer(workdir: str | os.PathLike, resume_step: int):
  try:
    import tensorboardX
  except ImportError as error:
    raise UserError(
      'tensorboard: tensorboardX is not installed; '
      "pip install 'tpu_lm[tensorboard]', or leave tensorboard out"
    ) from error
  directory = str(pathlib.Path(workdir) / 'tensorboard')
  # Events of the steps that will be taken again are hidden by the purge.
  purge = resume_step + 1 if resume_step else None
  with _disk_errors(pathlib.Path(directory)):
    return tensorboardX.SummaryWriter(directory, purge_step=purge)
