"""What is sent of a test, what stays, what is refused, and by which line."""

import pytest

from tpu_lm.errors import UserError
from tpu_lm.sandbox import cases, values
from tpu_lm.sandbox.protocol import Outcome


def read(text, entry='f', **options):
  record = {'name': 'r', 'entry_point': entry, 'tests': text}
  return cases.read(record, **options)


def sent(tests):
  return [step.get('give') or step['do'] for step in tests.steps]


def verdicts(tests, *given):
  """The verdicts where the steps give these values, in order."""
  outcomes = iter(given)
  found = [
    Outcome(True, next(outcomes)) if 'give' in step else Outcome(False)
    for step in tests.steps
  ]
  return [held for held, _ in cases.passed(tests, found)]


@pytest.mark.parametrize(
  ('text', 'inside', 'right', 'wrong'),
  [
    ('assert f(1, b=[2]) == 3', 'f(1, b=[2])', 3, 4),
    ('assert f(*[1, 2]) == 3', 'f(*[1, 2])', 3, True),
    ('assert 3 == f(1)', 'f(1)', 3, 4),
    ('assert f(1) == True', 'f(1)', True, 1),
    ('assert f(1) == 3', 'f(1)', 3.0, 3.5),
    ('assert f(1) == [1, {2: (3, None)}]', 'f(1)', [1, {2: (3, None)}], [1]),
    ('assert f(1) != 3', 'f(1)', 4, 3),
    ('assert f(1) is None', 'f(1)', None, 0),
    ('assert f(1) is True', 'f(1)', True, 1),
    ('assert f(1) is not None', 'f(1)', 0, None),
    ('assert f(1)', 'f(1)', True, False),
    ('assert not f(1)', 'f(1)', None, 1),
    ('assert 1 < f(1) <= 2.5', 'f(1)', 2, 1),
    ('assert f(1) in (1, 2)', 'f(1)', 2, True),
    ('assert f(1) == [0] * 3', 'f(1)', [0, 0, 0], [0]),
    ('assert f(1) == "-" * 9', 'f(1)', '-' * 9, '-'),
    ('assert f(1) == 2 ** 100 - 1', 'f(1)', 2**100 - 1, 2**100),
    ('assert f(1) == "%d!" % 3', 'f(1)', '3!', '3'),
    ('assert f(1) + [1] == [0, 1]', 'f(1)', [0], (0,)),
    ('assert "b" in f(1)', 'f(1)', ['a', 'b'], ['ab']),
    ('assert "bc" in f(1)', 'f(1)', 'abc', 'ac'),
    ('assert f(1) not in "abc"', 'f(1)', 'ac', 'bc'),
    ('assert len(f(1)) == 2', 'f(1)', (1, 2), values.Opaque('A', 0)),
    ('assert isinstance(f(1), list)', 'f(1)', [], values.Items([])),
    ('assert sum(f(1)) == 3', 'f(1)', values.Items([1, 2]), values.Items([1])),
    ('assert f(1) not in (1, 2)', 'f(1)', 3, 2),
    ('assert abs(f(1) - 1.5) < 1e-3', 'f(1)', 1.5004, 'x'),
    ('assert -f(1) == 2', 'f(1)', -2, 2),
    (
      'import math\nassert math.isclose(f(2), 0.5, rel_tol=1e-2)',
      'f(2)',
      0.501,
      1,
    ),
    ('assert set(f(1)) == {1, 2}', 'f(1)', [2, 1, 1], [1]),
    ('assert sorted(f(1)) == [1, 2]', 'f(1)', [2, 1], [2, 2]),
    ('assert list(f(1)) == [1, 2]', 'f(1)', (1, 2), (1,)),
    ('assert len(f(1)) == 2 and max(f(1)) == 6', 'f(1)', [5, 6], [6]),
    ('assert f(1)[0] == 5', 'f(1)[0]', 5, 6),
    ('assert f(1) == list(range(3))', 'f(1)', [0, 1, 2], [0, 1]),
    ('assert isinstance(f(1), int)', 'f(1)', 3, 'a'),
    ('assert round(f(1), 2) == 0.33', 'f(1)', 1 / 3, 0.4),
    ('assert f(1) == float("inf")', 'f(1)', float('inf'), 1.0),
    ('assert f(1).name == "x"', 'f(1).name', 'x', 'y'),
    ('assert f(lambda x: x > 2) == 3', 'f(lambda x: x > 2)', 3, 4),
    ('assert f(1) == 3, "said"', 'f(1)', 3, 4),
    ('def check(candidate):\n  assert candidate(1) == 3', 'f(1)', 3, 4),
    ('def check(g):\n  assert g(1) == 3\ncheck(f)', 'f(1)', 3, 4),
    (
      'def test_a():\n  """Says."""\n  assert f(1) == 3\ntest_a()',
      'f(1)',
      3,
      4,
    ),
  ],
)
def test_an_assertion_is_taken_apart(text, inside, right, wrong):
  tests = read(text)
  leaves = [step['give'] for step in tests.steps if 'give' in step]
  assert leaves[0] == inside
  count = len(leaves)
  assert all(verdicts(tests, *[right] * count))
  assert not all(verdicts(tests, *[wrong] * count))


def test_expected_values_are_not_sent():
  tests = read(
    'METADATA = {"secret": 111}\n'
    'expected = [222]\n'
    'def test_1():\n'
    '  graph = {(0, 1): 3}\n'
    '  wanted = {(1, 2): 333}\n'
    '  result = f(graph)\n'
    '  assert result == wanted\n'
    'test_1()\n'
    'assert f(4) == expected\n'
    'for x, y in [(5, 555), (6, 666)]:\n'
    '  assert f(x) == y\n'
  )
  assert sent(tests) == [
    'graph = {(0, 1): 3}',
    'result = f(graph)',
    'result',
    'f(4)',
    'f(5)',
    'f(6)',
  ]
  assert verdicts(tests, {(1, 2): 333}, [222], 555, 666) == [True] * 4
  assert verdicts(tests, {(1, 2): 3}, [2], 666, 555) == [False] * 4


def test_objects_of_a_class_of_the_test_are_made_inside():
  tests = read(
    'class Node:\n'
    '  def __init__(self, value, next=None):\n'
    '    self.value = value\n'
    '    self.next = next\n'
    'a = Node(1)\n'
    'b = Node(2, a)\n'
    'def test():\n'
    '  found = f(b)\n'
    '  assert found == a\n'
    '  output = []\n'
    '  while found:\n'
    '    output.append(found.value)\n'
    '    found = found.next\n'
    '  assert output == [1, 2]\n'
    'test()\n'
  )
  assert sent(tests)[1:] == [
    'a = Node(1)',
    'b = Node(2, a)',
    'found = f(b)',
    'found',
    'a',
    'output = []',
    'while found:\n    output.append(found.value)\n    found = found.next',
    'output',
  ]


def test_a_function_that_is_named_check_itself():
  text = 'def check(candidate):\n  assert candidate(70) == False'
  assert sent(read(text, entry='check')) == ['check(70)']


def test_imports_of_the_answer_or_without_use_do_no_harm():
  text = 'import numpy as np, math\nfrom answer import f\nassert f(1) == 3'
  assert sent(read(text)) == ['f(1)']
  text = 'from math import pi\nimport os.path\nassert f(pi) == 3'
  assert sent(read(text)) == ['from math import pi', 'import os.path', 'f(pi)']


def test_strict_tells_floats_from_ints_in_asserts_too():
  text = 'assert f(1) == 3'
  assert verdicts(read(text), 3.0) == [True]
  assert verdicts(read(text, strict=True), 3.0) == [False]


@pytest.mark.parametrize(
  ('text', 'line', 'what'),
  [
    ('assert f(1) ==', 1, 'no Python'),
    ('x = 1', 0, 'asserts nothing'),
    ('assert 1 == 1', 1, 'without the answer'),
    ('assert g(f(1), 3)', 1, 'g('),
    ('import numpy as np\nassert np.allclose(f(1), 3)', 2, 'the truth of a'),
    ('import numpy as np\nassert f(np.ones(3)) == 3', 2, 'np, which is not of'),
    ('import numpy as np\nassert np.sum(f(1)) == 3', 2, 'np.sum(f(1)), which'),
    ('assert all(x > 3 for x in f(1))', 1, 'GeneratorExp'),
    ('assert [x == 1 for x in f(1)]', 1, 'ListComp'),
    ('assert f(1).equals(3)', 1, 'the truth of a method'),
    ('assert not f(1).equals(3)', 1, 'the truth of a method'),
    ('assert f(1).__eq__(3) == True', 1, '__eq__'),
    ('ok = f(1) == 3\nassert ok', 1, 'Compare'),
    ('import copy as m\nok = m.same(f(1), 3)\nassert ok', 3, 'the truth of ok'),
    ('def same(a, b):\n  assert a == b\nsame(f(1), 3)', 3, 'a function of the'),
    ('def g():\n  return 3\nassert f(1) == g()', 3, 'g(), which'),
    ('def g():\n  return 3\nassert f(g) == 3', 3, 'a use of the function g'),
    ('try:\n  f(1)\nexcept ValueError:\n  pass\nassert f(1) == 1', 1, 'Try'),
    ('if f(1) != 3:\n  raise ValueError', 1, 'If'),
    ('with f(1):\n  pass', 1, 'With'),
    ('for x in f(1):\n  assert x == 1', 1, 'a loop over'),
    ('while f(1):\n  assert f(2) == 3', 1, 'Assert'),
    ('def t():\n  t()\n  assert f(1) == 1\nt()', 2, 'recursion'),
    ('assert sum(range(f(1))) == 2', 1, 'a size'),
    ('assert max(*f(1)) == 2', 1, 'a starred argument'),
  ],
)
def test_what_cannot_be_read_is_refused_by_its_line(text, line, what):
  with pytest.raises(UserError) as caught:
    read(text)
  assert str(caught.value).startswith('record r')
  assert what in str(caught.value)
  if line:
    assert f'test line {line}: ' in str(caught.value)


def test_values_of_the_answer_cannot_exhaust_the_parent():
  tests = read('assert f(1) * 10 == 3\nassert 2 ** f(2) == 4')
  assert verdicts(tests, [0] * 10, 10**9) == [False, False]
  assert verdicts(tests, 0.3, 2) == [True, True]
