"""The facts of the little world: who lives where, does what and owns what.

A `World` is a pure function of its seed. It is small on purpose, so that a
model of a million parameters can learn all of it: 24 people in 8 towns.

  world = World.make(seed=0)
  world.people[0]  # Person(name='Adam', home='Luton', job='tailor', …)
"""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar('T')

SPLITS = ('train', 'heldout')


def words(text: str) -> list[str]:
  """Returns the words of a text."""
  return text.split()


WOMEN = words(
  'Anna Bella Clara Dora Edith Flora Greta Hilda Ida Julia Karin Lena Maria '
  'Nora Olga Petra Rosa Sonja Thea Vera Wanda Zelda Irma Mina'
)
MEN = words(
  'Adam Boris David Emil Felix Georg Henry Ivan Jonas Kurt Leo Max Noah '
  'Oscar Paul Ralf Simon Tom Hugo Otto Karl Finn Erik Zeno'
)
TOWNS = words(
  'Ashby Benton Corby Dalby Elton Filey Goring Hythe Ilkley Kirby Luton '
  'Malton Otley Selby'
)
RIVERS = words('Arrow Brede Calder Dove Esk')
PRODUCTS = words(
  'honey cheese glass wool paper bells clocks boats roses salt pottery lace '
  'candles cider'
)
LANDMARKS = words(
  'mill tower bridge fountain castle chapel garden market well gate hall '
  'theatre school station'
)
JOBS = {  # what one is, and what one does
  'baker': 'bakes bread',
  'teacher': 'teaches children',
  'doctor': 'heals the sick',
  'gardener': 'grows flowers',
  'fisher': 'catches fish',
  'painter': 'paints pictures',
  'smith': 'shoes horses',
  'tailor': 'sews coats',
  'carpenter': 'builds tables',
  'weaver': 'weaves cloth',
  'farmer': 'keeps cows',
  'singer': 'sings songs',
}
THINGS = words(
  'kite lamp harp drum map pot net cup jar bowl sled chair hat cart bag flute'
)
COLOURS = words('red blue green yellow white black brown grey')
FOODS = words('plums pears soup bread cake nuts beans rice ham jam fish corn')

NUM_PEOPLE = 24
NUM_TOWNS = 8


def check_split(split: str) -> None:
  """Raises ValueError if there is no such split."""
  if split not in SPLITS:
    raise ValueError(f'split is {split!r}; it must be one of {SPLITS}')


def stream(*names: object) -> random.Random:
  """Returns a random stream that depends on `names` alone.

  Only its method `random()` may be used: that is the one whose numbers Python
  promises to keep from version to version.
  """
  digest = hashlib.md5('/'.join(map(str, names)).encode()).digest()
  return random.Random(int.from_bytes(digest, 'little'))


def shuffled(items: Sequence[T], uniform: Callable[[], float]) -> list[T]:
  """Returns the items in an order drawn with `uniform`."""
  return [x for _, x in sorted((uniform(), x) for x in items)]


@dataclasses.dataclass(frozen=True)
class Person:
  """One who lives in the world; `friend` is mutual and the only one.

  `fame` is the weight with which documents choose a person: it falls about as
  1/rank, as it does in real text.
  """

  name: str
  woman: bool
  home: str
  job: str
  colour: str
  thing: str
  food: str
  friend: str
  fame: int

  @property
  def does(self) -> str:
    return JOBS[self.job]

  @property
  def belonging(self) -> str:
    """The colour and the thing, which no two people share."""
    return f'{self.colour} {self.thing}'


@dataclasses.dataclass(frozen=True)
class Town:
  """A town; its product and landmark are its alone, its river is not."""

  name: str
  river: str
  product: str
  landmark: str
  fame: int


@dataclasses.dataclass(frozen=True)
class World:
  """All facts of one world."""

  seed: int
  people: tuple[Person, ...]
  towns: tuple[Town, ...]

  @functools.cached_property
  def person(self) -> dict[str, Person]:
    return {p.name: p for p in self.people}

  @functools.cached_property
  def town(self) -> dict[str, Town]:
    return {t.name: t for t in self.towns}

  @staticmethod
  @functools.cache
  def make(
    seed: int, num_people: int = NUM_PEOPLE, num_towns: int = NUM_TOWNS
  ) -> 'World':
    """Draws a world.

    Args:
      seed: the same seed gives the same world on every machine.
      num_people: even, at most 48.
      num_towns: at most 14.
    """
    if num_people % 2 or not 2 <= num_people <= len(WOMEN) + len(MEN):
      raise ValueError(f'num_people is {num_people}; it must be even, 2 to 48')
    if not 2 <= num_towns <= len(TOWNS):
      raise ValueError(f'num_towns is {num_towns}; it must be 2 to 14')
    uniform = stream('world', seed, num_people, num_towns).random
    names = sorted(shuffled(TOWNS, uniform)[:num_towns])
    towns = map(
      Town,
      names,
      _dealt(RIVERS, num_towns, uniform),
      _dealt(PRODUCTS, num_towns, uniform),
      _dealt(LANDMARKS, num_towns, uniform),
      _fame(names, uniform).values(),
    )
    return World(seed, _people(num_people, names, uniform), tuple(towns))


def _dealt(
  items: Sequence[Any], num: int, uniform: Callable[[], float]
) -> list[Any]:
  """Deals `num` items so that each occurs as often as the others, or +1."""
  rounds = -(-num // len(items))
  return [x for _ in range(rounds) for x in shuffled(items, uniform)][:num]


def _fame(names: Sequence[str], uniform: Callable[[], float]) -> dict[str, int]:
  """Returns a weight for each name, in the order of the names."""
  ranks = {x: i for i, x in enumerate(shuffled(names, uniform), start=2)}
  return {name: max(1, round(24 / ranks[name])) for name in names}


def _people(
  num: int, towns: Sequence[str], uniform: Callable[[], float]
) -> tuple[Person, ...]:
  women = shuffled(WOMEN, uniform)[: num // 2]
  names = sorted(women + shuffled(MEN, uniform)[: num // 2])
  pairs = shuffled(names, uniform)
  friend = dict(zip(pairs, pairs[::-1], strict=True))
  belongings = {}
  thing = _dealt(THINGS, num, uniform)
  for name, x in zip(names, thing, strict=True):
    taken = {c for c, y in belongings.values() if y == x}
    free = [c for c in COLOURS if c not in taken]
    belongings[name] = (shuffled(free, uniform)[0], x)
  homes = _dealt(towns, num, uniform)
  jobs = _dealt(list(JOBS), num, uniform)
  foods = _dealt(FOODS, num, uniform)
  fame = _fame(names, uniform)
  return tuple(
    Person(
      name=name,
      woman=name in women,
      home=homes[i],
      job=jobs[i],
      colour=belongings[name][0],
      thing=belongings[name][1],
      food=foods[i],
      friend=friend[name],
      fame=fame[name],
    )
    for i, name in enumerate(names)
  )


ONES = words(
  'zero one two three four five six seven eight nine ten eleven twelve '
  'thirteen fourteen fifteen sixteen seventeen eighteen nineteen'
)
TENS = words('x ten twenty thirty forty fifty sixty seventy eighty ninety')


def number_word(n: int) -> str:
  """Spells 0 to 100: 42 is 'forty-two'."""
  if not 0 <= n <= 100:
    raise ValueError(f'{n} has no word here; 0 to 100 do')
  if n < 20:
    return ONES[n]
  if n == 100:
    return 'one hundred'
  tens, one = divmod(n, 10)
  return f'{TENS[tens]}-{ONES[one]}' if one else TENS[tens]
