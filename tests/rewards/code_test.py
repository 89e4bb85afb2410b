"""Answers with code: what is read of them, their worth, real data."""

import ast
import gzip
import json
import math
import pathlib

import pytest

from tpu_lm import sandbox
from tpu_lm.errors import UserError
from tpu_lm.rewards import code
from tpu_lm.scoring import Sample

DATA = pathlib.Path(__file__).parents[2] / '../shared/data/verifiable'
ADD = {
  'id': 'add',
  'entry_point': 'add',
  'tests': [
    {'input': [1, 2], 'output': 3},
    {'input': [0, 0], 'output': 0},
    {'input': ['a', 'b'], 'output': 'ab'},
    {'input': [[1], []], 'output': [1]},
  ],
}
DOUBLE = {
  'id': 'double',
  'tests': [
    {'stdin': '2\n', 'stdout': '4\n'},
    {'stdin': '5\n', 'stdout': '10'},
  ],
}
STUB = {
  'id': 'stub',
  'entry_point': 'root',
  'prompt': 'import math\nfrom typing import List\n\n\n'
  'def root(x: int) -> float:\n    """The root."""\n',
  'test': 'def check(candidate):\n  assert candidate(4) == 2.0\n',
}


@pytest.fixture(scope='module', autouse=True)
def safe():
  """Skips where this machine bounds answers by rlimits only."""
  try:
    if sandbox.strongest().letter == 'C':
      pytest.skip('the sandbox is of grade C here')
  except sandbox.SandboxError as error:
    pytest.skip(f'no sandbox: {error}')


@pytest.fixture(scope='module')
def reward(safe):
  found = code.make(processes=2, timeout=0.7)
  yield found
  found.close()


def scores(reward, record, *texts):
  return reward([Sample([], text, record) for text in texts])


def fenced(text, name='python'):
  return f'I think so:\n\n```{name}\n{text}\n```\nThat is it.'


def test_the_worth_of_answers_in_their_order(reward):
  found = scores(
    reward,
    ADD,
    fenced('def add(a, b):\n  return a + b'),
    fenced('def add(a, b):\n  return 3'),
    'def add(a, b): return a + b',
    'I do not know.',
    '',
    fenced('add = lambda a, b: a.__add__(b)', 'py'),
    fenced('def add(a, b):\n  while True: pass'),
    fenced('def sub(a, b):\n  return a + b'),
  )
  assert [score.value for score in found] == [1, 0, 1, 0, 0, 1, 0, 0]
  assert [score.parsed for score in found] == [
    *(True, True, True, False, True, True, True, True)
  ]
  assert found[0].note == '4 of 4 tests, ended'
  assert found[1].note == ('1 of 4 tests, ended; add, test 2, is 0: got 3')
  assert found[6].note.startswith('0 of 4 tests, late; ')


def test_partial_is_the_share_of_tests():
  found = code.make(processes=1, partial=True)
  three, none = scores(
    found,
    ADD,
    fenced('def add(a, b):\n  return a + b if a else 1'),
    fenced('def add(a, b):\n  return None'),
  )
  half, all_of_it = scores(found, DOUBLE, 'print(4)', 'print(2 * int(input()))')
  found.close()
  assert [three.value, none.value] == [0.75, 0]
  assert [half.value, all_of_it.value] == [0.5, 1]


def test_programs_are_judged_by_what_they_print(reward):
  found = scores(
    reward,
    DOUBLE,
    fenced('print(int(input()) * 2)'),
    fenced('print(4)'),
    fenced('import sys\nsys.exit(0)'),
    fenced('print(int(input()) * 2)\nwhile True: pass'),
    fenced('while True: print(4)'),
  )
  assert [score.value for score in found] == [1, 0, 0, 0, 0]
  assert found[1].note == "1 of 2 tests, ended; printed b'4\\n'"


@pytest.mark.parametrize(
  'text',
  [
    '    return math.sqrt(x)',
    '\n    return math.sqrt(x)\n',
    fenced('    return math.sqrt(x)'),
    fenced('def root(x: int) -> float:\n  return math.sqrt(x)'),
    fenced('def root(x: List) -> float:\n  return math.sqrt(x)', ''),
    fenced('async def root2(): pass\nroot = math.sqrt'),
    'def root(x):\n  return x ** 0.5',
    '<think>```python\nroot = 1\n```</think>\n' + fenced('root = math.sqrt'),
    fenced('root = None') + fenced('root = math.sqrt'),
    fenced('root = math.sqrt') + fenced('$ pip install x', 'sh'),
    '```python\nroot = math.sqrt',  # cut off
  ],
)
def test_code_is_found_and_continues_the_stub(reward, text):
  (score,) = scores(reward, STUB, text)
  assert score.value == 1, score


def test_a_method_of_a_class(reward):
  record = ADD | {'entry_point': 'Solution().add'}
  good = 'class Solution:\n  def add(self, a, b): return a + b'
  found = scores(reward, record, fenced(good), 'def add(a, b): return a + b')
  assert [score.value for score in found] == [1, 0]


def test_strict_tells_floats_from_ints():
  record = {'name': 'f', 'tests': 'assert f(1) == 3'}
  for strict, value in ((False, 1), (True, 0)):
    found = code.make(processes=1, strict=strict)
    (score,) = scores(found, record, 'def f(x): return 3.0')
    found.close()
    assert score.value == value


def test_tests_that_cannot_be_read_are_masked_and_counted():
  found = code.make(processes=1, timeout=0.3)
  record = ADD | {'tests': 'assert all(x for x in add(1, 2))'}
  (score,) = scores(found, record, 'def add(a, b): return 3')
  assert math.isnan(score.value)
  assert score.note.startswith('record add, test line 1: GeneratorExp')
  scores(found, ADD, 'def add(a, b): return a + b', 'x', 'while True: pass')
  found.close()
  assert found.counts == {'refused': 1, 'passed': 1, 'wrong': 1, 'late': 1}


def test_a_failure_of_the_sandbox_is_masked_and_counted():
  # No such limit of memory can be set.
  pool = sandbox.sandbox(1)
  found = code.Code(pool, 1, 1.0, 1 << 50, False, False)
  a, b = (
    scores(found, record, 'def add(a, b): return a + b')[0]
    for record in (ADD, DOUBLE)
  )
  found.close()
  assert math.isnan(a.value)
  assert math.isnan(b.value)
  assert a.note.startswith('the sandbox failed: ')
  assert found.counts == {'failed': 2}


@pytest.mark.parametrize(
  'options', [{'timeout': 0}, {'memory': 1}, {'processes': -1}]
)
def test_wrong_options_are_named(options):
  (name,) = options
  with pytest.raises(UserError, match=f'code.{name}='):
    code.make(**options)


def records(name):
  path = DATA / name
  if not path.exists():
    pytest.skip(f'{path.name} is not beside the checkout')
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    return [json.loads(line) for line in file]


# Seven references of MBPP fail their own asserts in plain Python 3.11: 601 and
# 927 name what is nowhere defined, 966 is not indented, 607 and 631 overwrite
# their arguments, 596 and 642 depend on the interpreter.
_DEFECTS = {596, 601, 607, 631, 642, 927, 966}
_ALTER = """

def _altered(value):
  if value is None or isinstance(value, bool): return not value
  if isinstance(value, (int, float, complex)): return value + 1
  if isinstance(value, str): return value + '!'
  if isinstance(value, tuple): return value + (0,)
  if isinstance(value, list): return value + [0]
  if isinstance(value, set): return value ^ {'altered'}
  if isinstance(value, dict): return {**value, 'altered': 0}
  return None

def _break(function):
  return lambda *args, **named: _altered(function(*args, **named))
"""


def broken(source, entry):
  return f'{source}\n{_ALTER}\n{entry} = _break({entry})\n'


@pytest.mark.slow
def test_all_of_mbpp(reward):
  found = records('mbpp.shared.jsonl.gz')
  right, wrong = (
    reward([Sample([], fenced(text), record) for text, record in pairs])
    for pairs in (
      [(r['prompt'] + r['canonical_solution'], r) for r in found],
      [
        (broken(r['prompt'] + r['canonical_solution'], r['entry_point']), r)
        for r in found
      ],
    )
  )
  passed = {
    int(r['task_id'][5:]) for r, s in zip(found, right, strict=True) if s.value
  }
  every = {int(r['task_id'][5:]) for r in found}
  assert every - passed == _DEFECTS & every
  assert [s for s in wrong if s.value != 0] == []


@pytest.mark.slow
def test_all_of_quixbugs():
  reward = code.make(timeout=4.0)  # levenshtein needs more than one
  found = records('quixbugs_python.jsonl.gz')
  right = reward([Sample([], fenced(r['solution']), r) for r in found])
  wrong = reward([Sample([], fenced(r['buggy_program']), r) for r in found])
  reward.close()
  assert [s for s in right if s.value != 1] == []
  assert [s for s in wrong if s.value != 0] == []


def test_some_of_mbpp_and_quixbugs(reward):
  found = [
    (r['prompt'] + r['canonical_solution'], r['entry_point'], r)
    for r in records('mbpp.shared.jsonl.gz')[:60]
  ]
  found += [
    (r['solution'], r['name'], r)
    for r in records('quixbugs_python.jsonl.gz')
    if r['name'] in ('detect_cycle', 'reverse_linked_list', 'flatten')
  ]
  for text, _, _ in found:
    ast.parse(text)
  right = reward([Sample([], fenced(text), r) for text, _, r in found])
  assert [s for s in right if s.value != 1] == []
  wrong = reward(
    [Sample([], fenced(broken(text, name)), r) for text, name, r in found]
  )
  assert [s for s in wrong if s.value != 0] == []
