"""The forms of tests, and what is compared."""

import pytest

from tpu_lm.errors import UserError
from tpu_lm.sandbox import cases
from tpu_lm.sandbox.protocol import Outcome


def record(tests, **more):
  return {'task_id': 'T/1', 'entry_point': 'f', 'tests': tests} | more


def test_inputs_are_sent_and_outputs_kept():
  tests = cases.read(
    record(
      [
        {'input': [1, [2.0]], 'output': 3},
        {'input': {'args': [1], 'kwargs': {'k': (2,)}}, 'output': [4]},
        {'input': {'kwargs': {'k': 2}}, 'output': None},
      ]
    )
  )
  assert tests.steps == [
    {'call': 'f', 'args': [1, [2.0]], 'named': {}},
    {'call': 'f', 'args': [1], 'named': {'k': {'tuple': [2]}}},
    {'call': 'f', 'args': [], 'named': {'k': 2}},
  ]
  assert tests.count == 3
  good = [Outcome(True, 3), Outcome(True, [4]), Outcome(True, None)]
  assert all(held for held, _ in cases.passed(tests, good))
  bad = [
    Outcome(True, 3.0),
    Outcome(True, (4,)),
    Outcome(False, note='raised X'),
  ]
  found = cases.passed(tests, bad)
  assert not any(held for held, _ in found)
  assert found[0][1] == 'f, test 1, is 3: got 3.0'
  assert found[2][1].endswith('raised X')


def test_a_value_that_cannot_be_written_out_is_only_wrong():
  tests = cases.read(record([{'input': [1], 'output': 3}]))
  ((held, note),) = cases.passed(tests, [Outcome(True, 10**5000)])
  assert not held
  assert note.endswith('got <int: ValueError>')


def test_programs_are_read_apart():
  tests = cases.read(record([{'stdin': '1\n', 'stdout': '2\n'}]))
  assert tests.programs == [('1\n', '2\n')]
  assert tests.count == 1


@pytest.mark.parametrize(
  ('output', 'same'),
  [
    (b'1 2\n3\n', True),
    (b'1 2  \n3', True),
    (b'1 2\r\n3\r\n\r\n', True),
    (b' 1 2\n3\n', False),
    (b'1 2\n\n3\n', False),
    (b'1 2\n', False),
    (b'1 2\n3\n4\n', False),
    (b'\xff', False),
  ],
)
def test_what_is_printed_is_compared_but_for_trailing_space(output, same):
  assert cases.printed('1 2\n3\n', output) == same


@pytest.mark.parametrize(
  ('tests', 'what'),
  [
    (None, 'it has no tests'),
    ([], 'it has no tests'),
    ([{'input': [1]}], 'test 1 is neither'),
    ([{'input': 1, 'output': 1}], 'the input of test 1'),
    ([{'input': {'x': 1}, 'output': 1}], 'the input of test 1'),
    (
      [{'input': [1], 'output': 1}, {'stdin': '', 'stdout': ''}],
      'of a function and of a program',
    ),
  ],
)
def test_other_forms_are_refused_by_name(tests, what):
  with pytest.raises(UserError, match=what) as caught:
    cases.read(record(tests))
  assert 'record T/1' in str(caught.value)


def test_texts_of_asserts_under_the_names_that_data_have():
  texts = ['assert f(1) == 2', 'assert f(2) == 3']
  for key, value in (
    ('tests', texts),
    ('test_list', texts),
    ('test', '\n'.join(texts)),
  ):
    tests = cases.read({'name': 'f', key: value})
    assert [step['give'] for step in tests.steps] == ['f(1)', 'f(2)']


@pytest.mark.parametrize('entry', ['add two', '', 'f(1)', 'f; g', 3])
def test_an_entry_point_is_a_name(entry):
  with pytest.raises(UserError, match='no name of a function'):
    cases.read(record([{'input': [1], 'output': 1}], entry_point=entry))
  tests = cases.read(
    record([{'input': [1], 'output': 1}], entry_point='Solution().f')
  )
  assert tests.steps[0]['call'] == 'Solution().f'


def test_a_function_needs_its_name():
  with pytest.raises(UserError, match='entry_point'):
    cases.read({'id': 3, 'tests': [{'input': [1], 'output': 1}]})
