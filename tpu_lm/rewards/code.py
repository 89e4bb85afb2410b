"""1 where an answer's code passes all hidden tests of its record, else 0.

The code is the last fence marked as Python (```python … ```; one that is cut
off goes to the end), or else the last fence, or else the whole text, without
what comes before `</think>`. Where the record has a stub (`stub`, or a
`prompt` that is text) and the code does not define `entry_point` itself, the
code continues the stub; where it does, it is given the stub's imports.

The tests are the record's `tests` (sandbox/cases.py has their forms). The code
runs in the sandbox, which is given the inputs and not what is expected; it has
the standard library of Python. Wrong values, exceptions, crashes, too much
time, memory or output are worth 0. Where the sandbox fails, or a test cannot
be read, the value is NaN.
"""

import collections
import concurrent.futures
import math
import os
import re
import threading
from collections.abc import Sequence

from tpu_lm import sandbox as sandboxes
from tpu_lm.errors import UserError
from tpu_lm.sandbox import cases
from tpu_lm.scoring import Sample, Score

_FENCE = re.compile(
  r'^[ \t]*```[ \t]*([\w+.-]*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)',
  re.MULTILINE | re.DOTALL,
)
_PYTHON = ('python', 'py', 'python3')
_IMPORT = re.compile(r'^(?:from[ \t]+\S+[ \t]+)?import[ \t].+$', re.MULTILINE)


def make(
  *,
  timeout: float = 2.0,
  memory: int = 512,
  unsafe: bool = False,
  partial: bool = False,
  strict: bool = False,
  processes: int = 0,
) -> 'Code':
  """Makes the reward.

  Args:
    timeout: seconds of processor time for all tests of a function together,
      or for each program; twice as much by the clock.
    memory: MiB of address space; the interpreter itself takes about 40.
    unsafe: whether rlimits alone will do (grade C, sandbox/strength.py).
    partial: whether the value is the share of tests that pass.
    strict: whether a text of asserts tells 7.0 from 7; lists of tests always
      do. True is never 1.
    processes: answers that run at once; 0: one for every core.

  Raises:
    UserError: for such an argument, or at grade C.
  """
  for name, value, least in (
    ('timeout', timeout, 0.01),
    ('memory', memory, 64),
    ('processes', processes, 0),
  ):
    if not value >= least:
      raise UserError(
        f'rewards: code.{name}={value!r}: must be at least {least}'
      )
  processes = processes or os.cpu_count() or 1
  pool = sandboxes.sandbox(processes, unsafe=unsafe)
  return Code(pool, processes, timeout, memory, partial, strict)


class Code:
  """The reward; `counts` says what became of all answers so far.

  Of counts: passed, wrong, late, flood, crashed; failed, by the sandbox, and
  refused, for tests that cannot be read.
  """

  def __init__(
    self,
    pool: sandboxes.Sandbox,
    processes: int,
    timeout: float,
    memory: int,
    partial: bool,
    strict: bool,
  ):
    self._pool, self._partial, self._strict = pool, partial, strict
    self._limits = {'seconds': timeout, 'memory': memory}
    self._threads = concurrent.futures.ThreadPoolExecutor(processes, 'code')
    self._counting = threading.Lock()
    self.counts: collections.Counter[str] = collections.Counter()

  def __call__(self, samples: Sequence[Sample]) -> list[Score]:
    read: dict[int, cases.Tests | UserError] = {}  # a group shares its record
    for sample in samples:
      if id(sample.record) not in read:
        read[id(sample.record)] = self._read(sample.record)
    running = [
      self._threads.submit(self._score, sample, read[id(sample.record)])
      for sample in samples
    ]
    return [found.result() for found in running]

  def close(self) -> None:
    """Ends the sandbox."""
    self._threads.shutdown(cancel_futures=True)
    self._pool.close()

  def _read(self, record: dict) -> cases.Tests | UserError:
    try:
      return cases.read(record, strict=self._strict)
    except UserError as error:
      return error

  def _score(self, sample: Sample, tests: cases.Tests | UserError) -> Score:
    if isinstance(tests, UserError):
      self._count('refused')
      return Score(math.nan, True, str(tests))
    source = code(sample.text, sample.record)
    judge = self._function if tests.checks else self._programs
    status, held, note, parsed = judge(source, tests)
    if status == 'failed':
      self._count('failed')
      return Score(math.nan, True, f'the sandbox failed: {note}')
    # A program that never runs to its end is no solution, whatever it gave.
    passes = status == 'ended' and len(held) == tests.count and all(held)
    wrong = 'wrong' if status == 'ended' else status
    self._count('passed' if passes else wrong)
    share = sum(held) / tests.count
    line = f'{sum(held)} of {tests.count} tests, {status}; {note}'
    line = ' '.join(line.split())[:200].rstrip('; ')
    return Score(share if self._partial else float(passes), parsed, line)

  def _count(self, what: str) -> None:
    with self._counting:
      self.counts[what] += 1

  def _function(
    self, source: str, tests: cases.Tests
  ) -> tuple[str, list[bool], str, bool]:
    """The status, what held, the first complaint, whether it was code."""
    run = self._pool.run(source, steps=tests.steps, **self._limits)
    if run.status == 'failed':
      return 'failed', [], run.note, True
    found = cases.passed(tests, run.outcomes)
    complaints = [note for held, note in found if not held]
    broken = [not x.ok and x.note.endswith(_NO_CODE) for x in run.outcomes]
    return (
      run.status,
      [held for held, _ in found],
      complaints[0] if complaints else '',
      not all(broken),
    )

  def _programs(
    self, source: str, tests: cases.Tests
  ) -> tuple[str, list[bool], str, bool]:
    """The same of programs; after a failure the others are not run."""
    held, status, note = [], 'ended', ''
    for stdin, expected in tests.programs:
      run = self._pool.run(source, stdin=stdin, **self._limits)
      if run.status == 'failed':
        return 'failed', [], run.note, True
      held.append(run.status == 'ended' and cases.printed(expected, run.output))
      if not held[-1]:
        status, note = run.status, f'printed {run.output[:60]!r}'
        if not self._partial:
          break
    return status, held, note, bool(source.strip())


_NO_CODE = ('SyntaxError', 'IndentationError', 'TabError')


def code(text: str, record: dict) -> str:
  """The program that an answer stands for."""
  text = text.rpartition('</think>')[2]
  fences = _FENCE.findall(text)
  marked = [body for name, body in fences if name.lower() in _PYTHON]
  bodies = marked or [body for _, body in fences]
  found = bodies[-1] if bodies else text
  stub = record.get('stub', record.get('prompt'))
  entry = record.get('entry_point')
  if not isinstance(stub, str) or not isinstance(entry, str):
    return found
  name = re.escape(re.split(r'\W', entry.strip(), maxsplit=1)[0])
  if re.search(
    rf'^(?:(?:async )?def|class)\s+{name}\b|^{name}\s*=', found, re.M
  ):
    return '\n'.join([*_IMPORT.findall(stub), found])
  # A reply often repeats the line breaks that end the stub.
  return stub + found if found[:1] in (' ', '\t') else stub + found.lstrip('\n')
