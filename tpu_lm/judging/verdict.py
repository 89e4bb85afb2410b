"""Reading what a judge has decided, and nothing that an answer has forged.

A verdict stands in double square brackets, [[7]] or [[A]]; the last one of a
reply counts. Without brackets 'Rating: 7' and 'Verdict: A' are read as well.
What is judged may hold such words, too, and the judge may quote them. So
brackets are broken before a text is shown (`defused`); words without brackets
do not count where a text holds some; and where a reply holds different
verdicts, one of which stands in a text, it is not read at all.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Forged(NamedTuple):
  """Verdicts that stand in texts to be judged."""

  values: frozenset[str] = frozenset()  # what they would say
  plain: bool = False  # one of them stands without brackets
  thinks: bool = False  # a mark of a thought stands in one of the texts


_BRACKETS = re.compile(r'\[\[\s{0,4}([^\[\]\n]{1,16}?)\s{0,4}\]\]')
# Also of what was broken, or shall look broken.
_LIKE_BRACKETS = re.compile(
  r'\[[^\w\[\]]{0,8}\[\W{0,8}([\w./+-]{1,16})(?: out of \d+)?'
  r'\W{0,8}\]\W{0,8}?\]'
)
_NUMBER = r'[-+]?\d+(?:\.\d+)?'
_GRADE = re.compile(rf'({_NUMBER})(?:\s*(?:/|out of)\s*(\d+))?')
_VERDICT = re.compile(
  rf'\[\[(\s*(?:[ABC]|tie|{_NUMBER}(?:\s*(?:/|out of)\s*\d+)?)\s*)\]\]', re.I
)
_SAID_GRADE = re.compile(
  rf'\b(?:rating|score|grade)\W{{0,4}}[:=]\W{{0,4}}?({_NUMBER}'
  r'(?:\s*(?:/|out of)\s*\d+)?)(?!\w|[.,]\d|\s*[-–]\s*\d)',
  re.I,
)
_SAID_CHOICE = re.compile(
  r'\b(?:verdict|winner|choice)\W{0,4}[:=]\W{0,4}?(A|B|C|tie)(?!\w)', re.I
)
_NOTHING = Forged()
_THOUGHT = re.compile(r'<think>.*?(?:</think>|\Z)', re.S)


def without_thoughts(text: str) -> str:
  """What a model says beside what it thinks aloud; '' if it still thinks."""
  # Templates may have begun the thought in the prompt.
  return _THOUGHT.sub('', text).rpartition('</think>')[2]


def defused(text: str) -> str:
  """The text with each [[7]] as [ [7] ], which cannot be read as a verdict."""
  while _VERDICT.search(text):
    text = _VERDICT.sub(r'[ [\1] ]', text)
  return text


def forged(texts: Iterable[str]) -> Forged:
  """What the texts say that could be taken for a verdict."""
  values, plain, thinks = set(), False, False
  for text in texts:
    values.update(map(_same, _LIKE_BRACKETS.findall(text)))
    said = _SAID_GRADE.findall(text) + _SAID_CHOICE.findall(text)
    values.update(map(_same, said))
    plain = plain or bool(said)
    thinks = thinks or 'think>' in text
  return Forged(frozenset(values), plain, thinks)


def grade(reply: str, scale: float, inside: Forged = _NOTHING) -> float | None:
  """The grade from 0 to `scale` that a reply gives; None: it cannot be read.

  Args:
    reply: of the judge.
    scale: the best grade; beyond it is no grade.
    inside: what stands in the texts that it has read.
  """
  said = _verdicts(reply, _SAID_GRADE, inside)
  found = [number for number in map(_GRADE.fullmatch, said) if number]
  names = [_same(number[1]) for number in found]
  if not found or _mixed(names, inside):
    return None
  value, out_of = float(found[-1][1]), found[-1][2]
  if not 0 <= value <= scale or (out_of and float(out_of) != scale):
    return None
  return value


def choice(reply: str, inside: Forged = _NOTHING) -> str | None:
  """'A', 'B' or 'tie', by a reply; None: it cannot be read."""
  found = [
    {'A': 'A', 'B': 'B', 'C': 'tie', 'TIE': 'tie'}[said.upper()]
    for said in _verdicts(reply, _SAID_CHOICE, inside)
    if said.upper() in ('A', 'B', 'C', 'TIE')
  ]
  if not found or _mixed(list(map(_same, found)), inside):
    return None
  return found[-1]


def _verdicts(reply: str, plain: re.Pattern, inside: Forged) -> list[str]:
  """What may be verdicts."""
  if not inside.thinks:  # else a quotation could hide the judge's own words
    reply = without_thoughts(reply)
  marked = _BRACKETS.findall(reply)
  if marked or inside.plain:
    return marked
  return plain.findall(reply)


def _mixed(names: list[str], inside: Forged) -> bool:
  """Whether verdicts differ and one may be a quotation."""
  return len(set(names)) > 1 and bool(inside.values.intersection(names))


def _same(said: str) -> str:
  """One name for what says the same: 7, 7.0 and 7/10; C and tie."""
  said = said.strip().lower()
  if number := re.match(_NUMBER, said):
    return f'{float(number[0]):g}'
  return 'tie' if said == 'c' else said
