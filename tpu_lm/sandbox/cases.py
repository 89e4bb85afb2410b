"""The hidden tests of a record: what is sent inside, and what stays here.

A test is read into steps, which the sandbox executes and which hold inputs
only, and checks, which are evaluated here over the values that come back.
Three forms are read:

- a list of `{"input": [x, …] or {"args": [x, …], "kwargs": {…}}, "output": y}`
  for the function `entry_point`;
- a list of `{"stdin": "…", "stdout": "…"}`, for programs. What is printed is
  compared without the space at the ends of lines and of the whole;
- a text of asserts, or a list of such texts, which asserts.py takes apart.

What cannot be read so is a UserError that names record and line. A test that
holds nothing to compare with is refused as well.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tpu_lm.errors import UserError
from tpu_lm.sandbox import values
from tpu_lm.sandbox.asserts import Check, Reading
from tpu_lm.sandbox.protocol import Outcome


class Tests(NamedTuple):
  """Either steps and checks of functions, or programs' (stdin, stdout)."""

  steps: list[dict]
  checks: list[Check]
  programs: list[tuple[str, str]]

  @property
  def count(self) -> int:
    return len(self.checks) + len(self.programs)


def passed(tests: Tests, outcomes: Sequence[Outcome]) -> list[tuple[bool, str]]:
  """Of every check, whether it holds, and a note if it does not."""
  found = []
  for check in tests.checks:
    read = [outcomes[place] for place in check.places]
    missing = [outcome.note for outcome in read if not outcome.ok]
    if missing:
      found.append((False, f'{check.note}: {missing[0]}'))
      continue
    try:
      held = bool(check.holds([outcome.value for outcome in read]))
    except Exception as error:  # the values are the answer's: anything goes
      found.append((False, f'{check.note}: {type(error).__name__}'))
      continue
    got = ', '.join(_shown(outcome.value) for outcome in read[:2])
    found.append((held, '' if held else f'{check.note}: got {got}'))
  return found


def _shown(value: Any) -> str:
  """The beginning of a value; it is the answer's, so anything may fail."""
  try:
    return repr(value)[:60]
  except Exception as error:
    return f'<{type(value).__name__}: {type(error).__name__}>'


def printed(expected: str, output: bytes) -> bool:
  """Whether a program printed this, but for trailing space."""

  def lines(text):
    return [line.rstrip() for line in text.rstrip().split('\n')]

  try:
    return lines(expected) == lines(output.decode().replace('\r\n', '\n'))
  except UnicodeDecodeError:
    return False


def read(record: dict, strict: bool = False) -> Tests:
  """The tests of a record: `tests`; some data call them `test`, `test_list`.

  strict: in a text of asserts too an int is no float. Their authors wrote `==`
  with answers in mind that give 7.0 for 7, so that is let pass by default;
  a bool is never an int.

  Errors: UserError, which names the record, for what cannot be read.
  """
  name = next(
    (str(record[k]) for k in ('task_id', 'id', 'name') if k in record), '?'
  )
  keys = [key for key in ('tests', 'test', 'test_list') if key in record]
  given = record[keys[0]] if keys else None
  entry = _entry(name, record)
  if isinstance(given, list) and given and isinstance(given[0], str):
    given = '\n'.join(map(str, given))
  if isinstance(given, str):
    called = record.get('name') if entry is None else entry
    steps, checks = Reading(name, called, given, strict).tests()
    return Tests(steps, checks, [])
  if not isinstance(given, list) or not given:
    raise UserError(
      f'record {name}: it has no tests; give `tests`, a list or a text of '
      'asserts'
    )
  steps, checks, programs = [], [], []
  for place, test in enumerate(given):
    if isinstance(test, dict) and test.keys() == {'stdin', 'stdout'}:
      programs.append((str(test['stdin']), str(test['stdout'])))
    elif isinstance(test, dict) and test.keys() == {'input', 'output'}:
      if entry is None:
        raise UserError(f'record {name}: `entry_point` is missing')
      steps.append(_call(name, place, entry, test['input']))
      expected = test['output']
      note = f'{entry}, test {place + 1}, is {expected!r}'[:120]
      holds = _is_the_same(expected)
      checks.append(Check((len(steps) - 1,), holds, note))
    else:
      raise UserError(
        f'record {name}: test {place + 1} is neither {{input, output}} nor '
        '{stdin, stdout}'
      )
  if programs and checks:
    raise UserError(
      f'record {name}: its tests are of a function and of a program; split it'
    )
  return Tests(steps, checks, programs)


def _entry(name: str, record: dict) -> str | None:
  """`entry_point`: f, or Solution().f; None where there is none."""
  entry = record.get('entry_point')
  if entry is None:
    return None
  if not isinstance(entry, str) or not re.fullmatch(
    r'[^\W\d]\w*(\(\))?(\.[^\W\d]\w*)*', entry
  ):
    raise UserError(
      f'record {name}: entry_point={entry!r} is no name of a function, '
      'like f or Solution().f'
    )
  return entry


def _is_the_same(expected: Any) -> Callable[[Sequence[Any]], bool]:
  return lambda found: values.same(expected, found[0])


def _call(name: str, place: int, entry: str, given: Any) -> dict:
  """The step of one {input, output}."""
  args, named = given, {}
  if isinstance(given, dict) and given.keys() <= {'args', 'kwargs'}:
    args, named = given.get('args', []), given.get('kwargs', {})
  if not isinstance(args, list | tuple) or not isinstance(named, dict):
    raise UserError(
      f'record {name}: the input of test {place + 1} is neither a list of '
      'arguments nor {args, kwargs}'
    )
  return {
    'call': entry,
    'args': [values.encode(x) for x in args],
    'named': {str(key): values.encode(x) for key, x in named.items()},
  }
