"""Values survive the way; equality is strict; forged messages are errors."""

import collections
import fractions
import itertools
import json
import math
import time

import pytest

from tpu_lm.sandbox import values


def sent(x):
  """What comes out at the other side."""
  return values.decode(json.loads(json.dumps(values.encode(x))))


PLAIN = [
  None,
  True,
  False,
  0,
  -(2**70),
  10**5000,
  1.0,
  -0.5,
  1e308,
  math.inf,
  -math.inf,
  1 + 2j,
  '',
  'ü\ud800\n',
  b'\x00\xff',
  bytearray(b'ab'),
  [],
  [1, [2.0, ['x']]],
  (),
  (1, (2,), [3]),
  set(),
  {1, 'a', (2, 3)},
  frozenset({1, 2}),
  {frozenset({1}): {2}},
  {},
  {1: 'a', '1': 'b', (1, 2): None, None: {}},
]


@pytest.mark.parametrize('x', PLAIN, ids=lambda x: type(x).__name__)
def test_values_survive_with_their_types(x):
  found = sent(x)
  assert type(found) is type(x)
  assert found == x
  assert values.same(x, found)


def test_nan_survives_and_is_itself():
  assert values.same([math.nan], sent([math.nan]))
  assert not values.same(math.nan, 0.0)
  assert not values.same(0.0, math.nan)


@pytest.mark.parametrize(
  ('x', 'held'),
  [
    (collections.defaultdict(int, a=1), {'a': 1}),
    (collections.OrderedDict(a=1), {'a': 1}),
    (collections.Counter('aab'), {'a': 2, 'b': 1}),
  ],
)
def test_dicts_of_the_standard_library_are_dicts(x, held):
  assert values.same(held, sent(x))


DIFFERENT = [
  (1, True),
  (True, 1),
  (0, False),
  (0, None),
  (1, 1.0),
  (1, '1'),
  ('a', b'a'),
  ([1], (1,)),
  ((1,), [1]),
  ({1}, frozenset({1})),
  ({1}, [1]),
  ([1, 2], [2, 1]),
  ([1], [1, 1]),
  ({1: 2}, {1: 3}),
  ({1: 2}, {True: 2}),
  ({1}, {True}),
  ({1: 2}, {1: 2, 3: 4}),
  ([True], [1]),
  (0.3, 0.30001),
  (1.0, True),
  (1j, 2j),
  ({'a': [1, (2,)]}, {'a': [1, [2]]}),
]


@pytest.mark.parametrize(('expected', 'got'), DIFFERENT)
def test_what_is_not_the_same(expected, got):
  assert not values.same(expected, got)
  assert not values.same([expected], [got])


def test_where_a_float_is_expected_an_equal_int_will_do():
  assert values.same(2.0, 2)
  assert values.same([2.0], [2])
  assert not values.same(2.5, 2)
  assert values.same(0.3, 0.1 + 0.2)  # another order of summing
  assert not values.same(2, 2.0)
  assert values.same(2, 2.0, strict=False)
  assert not values.same(2, 2.5, strict=False)
  assert not values.same(1, True, strict=False)
  assert values.same({'a': (2,)}, {'a': (2.0,)}, strict=False)


class AlwaysEqual:
  def __eq__(self, other):
    return True

  __hash__ = object.__hash__


class Int(int):
  def __eq__(self, other):
    return True

  __hash__ = int.__hash__


class Text(str):
  __slots__ = ()

  def __eq__(self, other):
    return True

  __hash__ = str.__hash__


@pytest.mark.parametrize(
  'x', [AlwaysEqual(), Int(1), Text('a'), fractions.Fraction(1), object]
)
def test_what_imitates_a_value_is_none(x):
  for expected in (1, 'a', ['a'], None, 1.0, True):
    assert not values.same(expected, sent(x))


def test_identity_is_told_of_objects():
  one, other = AlwaysEqual(), AlwaysEqual()
  found = sent([one, other, one])
  assert values.same(found[0], found[2])
  assert not values.same(found[0], found[1])


def test_what_is_iterated_gives_items_and_equals_nothing():
  found = sent(x * x for x in range(3))
  assert list(found) == [0, 1, 4]
  assert not values.same([0, 1, 4], found)
  assert list(sent({1: 2}.items())) == [(1, 2)]
  assert list(sent(range(3))) == [0, 1, 2]
  with pytest.raises(ValueError, match='more than'):
    values.encode(itertools.count())


def test_a_cycle_is_an_error():
  x = []
  x.append(x)
  with pytest.raises(RecursionError):
    values.encode(x)


@pytest.mark.parametrize(
  'forged',
  [
    '{}',
    '{"int": "1", "set": []}',
    '{"int": 5}',
    '{"int": "zz"}',
    '{"set": [1, 1]}',
    '{"set": [1, true]}',
    '{"set": [[1]]}',
    '{"dict": [[1, 2], [1, 3]]}',
    '{"dict": [1]}',
    '{"bytes": "x"}',
    '{"complex": [1]}',
    '{"complex": [{}, 1]}',
    '{"other": 1}',
    '{"passed": true}',
    '{"tuple": 5}',
  ],
)
def test_forged_messages_are_errors(forged):
  with pytest.raises((ValueError, TypeError)):
    values.decode(json.loads(forged))


def test_keys_of_one_hash_are_refused_at_once():
  many = [{'int': hex((2**61 - 1) * i)} for i in range(1, 30_000)]
  began = time.monotonic()
  with pytest.raises(ValueError, match='equal hash'):
    values.decode({'set': many})
  assert time.monotonic() - began < 2
