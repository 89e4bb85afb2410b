"""Values as tagged JSON, and the strict comparison of the parent.

JSON knows None, bool, int, float, str and list; the rest is an object of one
key, the tag. Exact types only: an instance of a class of the candidate's, a
subclass of int with another `__eq__` included, is never encoded as the value
that it imitates. Of the standard library, defaultdict, OrderedDict and Counter
are taken as the dict that they hold. Whatever else can be iterated (generators,
dict views, ranges, deques) is an `Items`, equal to nothing; a test that wraps
it in list(…) or sorted(…) reads it.

This file runs on both sides and imports nothing of this package.
"""

import collections
import dataclasses
import itertools
import math

MOST_ITEMS = 100_000  # of something that is iterated; more is an error
_MOST_DIGITS = 250_000  # hexadecimal, of an integer
_BIG = 1 << 63
_DICTS = (
  dict,
  collections.defaultdict,
  collections.OrderedDict,
  collections.Counter,
)


class Items:
  """What an iterable of no plain type gave; to be iterated, equal to nothing.

  It is no list: neither its length nor its type are told.
  """

  __hash__ = None

  def __init__(self, items):
    self._items = list(items)

  def __iter__(self):
    return iter(self._items)

  def __repr__(self):
    return f'<items {self._items!r}>'

  def __eq__(self, other):
    return False


@dataclasses.dataclass(frozen=True)
class Opaque:
  """An object that is not transported: its class's name, and which it is."""

  name: str
  number: int


_seen = []  # the opaque objects of this run; kept, so that ids stay theirs


def _number(x):
  """Its place among the opaque objects of this run."""
  for number, other in enumerate(_seen):
    if other is x:
      return number
  _seen.append(x)
  return len(_seen) - 1


def encode(x):
  """The JSON of a value. Errors: RecursionError for cycles, ValueError."""
  kind = type(x)
  if x is None or kind is bool or kind is float or kind is str:
    return x
  if kind is int:
    # Python refuses to write out integers of more than 4,300 digits.
    return x if -_BIG < x < _BIG else {'int': hex(x)}
  if kind is list:
    return [encode(item) for item in x]
  if kind in (tuple, set, frozenset):
    return {kind.__name__: [encode(item) for item in x]}
  if kind in _DICTS:
    return {'dict': [[encode(k), encode(v)] for k, v in dict.items(x)]}
  if kind is bytes or kind is bytearray:
    return {kind.__name__: x.hex()}
  if kind is complex:
    return {'complex': [x.real, x.imag]}
  try:
    items = iter(x)
  except Exception:
    return {'other': [str(kind.__name__)[:100], _number(x)]}
  found = list(itertools.islice(items, MOST_ITEMS + 1))
  if len(found) > MOST_ITEMS:
    raise ValueError(f'more than {MOST_ITEMS} items')
  return {'items': [encode(item) for item in found]}


def decode(x):
  """Undoes `encode`. Errors: ValueError or TypeError for what it never gives.

  The message may be forged: only values of the types above come out, or an
  error.
  """
  if not isinstance(x, (list, dict)):
    return x
  if isinstance(x, list):
    return [decode(item) for item in x]
  ((tag, body),) = x.items()
  if tag == 'int':
    if len(body) > _MOST_DIGITS:  # a division of the parent would take long
      raise ValueError('too large an integer')
    return int(body, 16)
  if tag == 'tuple':
    return tuple(decode(item) for item in body)
  if tag in ('set', 'frozenset'):
    items = distinct([decode(item) for item in body])
    return set(items) if tag == 'set' else frozenset(items)
  if tag == 'dict':
    keys = distinct([decode(key) for key, _ in body])
    return dict(zip(keys, [decode(value) for _, value in body]))  # noqa: B905
  if tag in ('bytes', 'bytearray'):
    body = bytes.fromhex(body)
    return body if tag == 'bytes' else bytearray(body)
  if tag == 'complex':
    real, imaginary = body
    return complex(float(real), float(imaginary))
  if tag == 'items':
    return Items(decode(item) for item in body)
  if tag == 'other':
    name, number = body
    return Opaque(str(name), int(number))
  raise ValueError(f'no such tag: {tag}')


def distinct(items):
  """The items, of which none is equal to another. Errors: ValueError.

  Integers of one hash are easily made, and a set of them takes quadratic
  time: they are refused before it is built.
  """
  if 2 * len({hash(item) for item in items}) < len(items):
    raise ValueError('items of equal hash')
  if len(set(items)) != len(items):
    raise ValueError('an item occurs twice')
  return items


def same(expected, got, tolerance=1e-9, strict=True):
  """Whether `got` is the expected value, of the expected type.

  A bool is no int, an int no float; where a float is expected an equal int
  will do, and a float within the relative tolerance (two orders of summing
  differ by so much). NaN is NaN here. Lists are no tuples, sets no frozensets;
  the keys of dicts and the items of sets are exact. Dicts are equal in any
  order. Without `strict` a float will do where an equal int is expected.
  """
  kind = type(expected)
  if kind is float:
    if type(got) is int:
      return expected == got
    if type(got) is not float:
      return False
    if math.isnan(expected):
      return math.isnan(got)
    return math.isclose(expected, got, rel_tol=tolerance)
  if kind is int and type(got) is float and not strict:
    return expected == got
  if kind is not type(got):
    return False
  if kind in (list, tuple):
    return len(expected) == len(got) and all(
      same(a, b, tolerance, strict)
      for a, b in zip(expected, got)  # noqa: B905
    )
  if kind in (set, frozenset):
    found = {item: item for item in got}
    return len(expected) == len(got) and all(
      item in found and same(item, found[item], 0.0, strict)
      for item in expected
    )
  if kind is dict:
    found = {key: key for key in got}
    return len(expected) == len(got) and all(
      key in found
      and same(key, found[key], 0.0, strict)
      and same(value, got[key], tolerance, strict)
      for key, value in expected.items()
    )
  if kind is complex:
    return same(expected.real, got.real, tolerance) and same(
      expected.imag, got.imag, tolerance
    )
  return expected == got
