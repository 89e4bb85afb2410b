"""A grammar whose probabilities are exact: choices, tellers, templates.

Everything random goes through `Teller.choose`, which draws an option and adds
its -log2 probability to `bits`; so the bits cannot drift from the sampling.
`derivations` finds all ways in which a grammar can tell a text, by trying
every choice and dropping those that leave the text.

  def tell(teller):
    teller.write('It is ')
    teller.write(teller.choose(Choice(['cold.', 'warm.'], [3, 1])))

  teller = Teller(random.random)
  tell(teller)  # teller.text is 'It is warm.' and teller.bits is 2.0, or so
"""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


class Choice:
  """Options and their probabilities: weights over the sum of weights."""

  __slots__ = ('bits', 'cumulative', 'options')

  def __init__(
    self, options: Sequence[Any], weights: Sequence[float] | None = None
  ):
    if not options:
      raise ValueError('a choice needs options')
    weights = [1] * len(options) if weights is None else weights
    total = sum(weights)
    self.options = tuple(options)
    self.bits = tuple(math.log2(total / w) for w in weights)
    self.cumulative = [
      sum(weights[: i + 1]) / total for i in range(len(weights) - 1)
    ]


class Teller:
  """Draws choices, keeps the text told so far and what it cost in bits."""

  def __init__(self, uniform: Callable[[], float]):
    self.uniform = uniform
    self.parts: list[str] = []
    self.write = self.parts.append
    self.bits = 0.0

  def choose(self, choice: Choice) -> Any:
    i = bisect_right(choice.cumulative, self.uniform())
    self.bits += choice.bits[i]
    return choice.options[i]

  def tell(self, choice: Choice) -> str:
    """Draws one of several texts, and writes it."""
    text = self.choose(choice)
    self.write(text)
    return text

  @property
  def text(self) -> str:
    return ''.join(self.parts)


class _Astray(Exception):
  """The replayed choices have left the text that is looked for."""


class _Replay(Teller):
  """Takes given choices, then the first of every further one."""

  def __init__(self, path: Sequence[int], text: str | None):
    super().__init__(uniform=lambda: 0.0)
    self.target = text
    self.told = 0
    self.path = list(path)
    self.num_options: list[int] = []
    self.write = self._write

  def choose(self, choice: Choice) -> Any:
    depth = len(self.num_options)
    if depth == len(self.path):
      self.path.append(0)
    i = self.path[depth]
    self.num_options.append(len(choice.options))
    self.bits += choice.bits[i]
    return choice.options[i]

  def tell(self, choice: Choice) -> str:
    """Skips at once what the text does not go on with."""
    depth = len(self.num_options)
    if self.target is not None:
      found = [
        i
        for i, x in enumerate(choice.options)
        if self.target.startswith(x, self.told)
      ]
      i = self.path[depth] if depth < len(self.path) else 0
      following = [x for x in found if x >= i]
      if not following:
        raise _Astray
      self.path[depth:] = [following[0], *self.path[depth + 1 :]]
    return super().tell(choice)

  def _write(self, text: str):
    if self.target is not None and not self.target.startswith(text, self.told):
      raise _Astray
    self.told += len(text)
    self.parts.append(text)


def derivations(
  tell: Callable[[Teller], None], text: str | None = None
) -> Iterator[tuple[str, float]]:
  """Yields (text, bits) of every derivation that `tell` has of `text`.

  Args:
    tell: a grammar: makes its choices through the teller it is given.
    text: what is to be derived; None for all that the grammar can say (only
      for small grammars: their number is the product of all choices).
  """
  path: list[int] = []
  while True:
    teller = _Replay(path, text)
    try:
      tell(teller)
      if text is None or teller.told == len(text):
        yield teller.text, teller.bits
    except _Astray:
      pass
    path = teller.path[: len(teller.num_options)]
    while path and path[-1] + 1 == teller.num_options[len(path) - 1]:
      path.pop()
    if not path:
      return
    path[-1] += 1


class Template(NamedTuple):
  """A sentence with slots: `{P} lives in {P.home}.`

  Pieces of literal text and the slot that follows it ('' for none); a slot is
  bound when what stands before its dot is: `P.home` with P.
  """

  pieces: tuple[tuple[str, str, str], ...]  # literal, slot, what binds it

  @staticmethod
  def parse(line: str) -> 'Template':
    split = [*re.split(r'\{([A-Za-z.]+)\}', line), '']
    pairs = zip(split[::2], split[1::2], strict=True)
    return Template(tuple((a, b, b.split('.')[0]) for a, b in pairs))


def forms(lines: str) -> Choice:
  """Reads lines of `WEIGHT TEMPLATE` as a choice of templates."""
  pairs = [x.strip().split(' ', 1) for x in lines.strip().splitlines()]
  weights = [int(w) for w, _ in pairs]
  return Choice([Template.parse(line) for _, line in pairs], weights)


def _go_on(left: int) -> Choice:
  return Choice([True, False], [left, 1])


GO_ON = [Choice([True])] + [_go_on(left) for left in range(1, 64)]


def more(teller: Teller, told: int, low: int, high: int) -> bool:
  """Chooses whether to go on, so that the count is uniform in low..high."""
  if told < low or told == high:
    return told < low
  return teller.choose(GO_ON[high - told])
