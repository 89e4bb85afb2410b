r"""What a short answer says: a number, several, words, or an expression.

Numbers are exact fractions: 0.5, 1/2, \frac12, 5e-1; 3 1/2; 1,200;
3.2 \times 10^5; 3 million; ½. They may have a sign, a currency, a percent
sign, a unit and words around them, and stand behind an equation (48 + 24 = 72,
x = 5). Words that unsay a number or make another of it (not 5, 5 or 6, at
least 5, root of 16, 5 squared) leave nothing that can be read. Digits are
those of ASCII. A decimal comma is read as a list.
"""

import functools
import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 300  # characters of a final answer; more is not one


# What a final answer may be, short of an expression.


class Number(NamedTuple):
  """An exact number as it was written."""

  value: Fraction
  exact: bool  # an integer or a fraction of integers
  percent: bool = False
  unit: str = ''  # of `_UNITS`


class Group(NamedTuple):
  """Several numbers; `kind`: '' of a list, ':' of a ratio, or brackets."""

  kind: str
  members: tuple[Number, ...]


class Words(NamedTuple):
  """An answer without numbers."""

  text: str


class Expression(NamedTuple):
  """What only the library can read, as LaTeX."""

  text: str


Answer = Number | Group | Words | Expression

_UNITS = {
  alias: names.split()[0]
  for names in (
    '$ dollar usd buck', '€ euro eur', '£ gbp', '¥ yen', 'cent',
    'mm millimeter millimetre', 'cm centimeter centimetre', 'm meter metre',
    'km kilometer kilometre', 'inch inche', 'ft foot feet', 'yd yard', 'mile',
    'mg milligram', 'g gram', 'kg kilogram', 'oz ounce', 'lb pound',
    'ml milliliter millilitre', 'l liter litre', 'gallon', 'quart', 'pint',
    'second sec', 'minute min', 'hour hr', 'day', 'week', 'month', 'year',
    'degree', 'radian', 'km/h kph', 'mph',
  )
  for alias in names.split()
}  # fmt: skip
_SCALES = {
  'hundred': 10**2, 'thousand': 10**3, 'million': 10**6, 'billion': 10**9,
  'trillion': 10**12,
}  # fmt: skip
_VULGAR = {
  '½': '1/2', '⅓': '1/3', '⅔': '2/3', '¼': '1/4', '¾': '3/4', '⅕': '1/5',
  '⅙': '1/6', '⅛': '1/8', '⅜': '3/8', '⅝': '5/8', '⅞': '7/8',
}  # fmt: skip
_SIGNS = str.maketrans(
  {
    '−': '-', '–': '-', '—': ' - ', '×': '*', '·': '*', '⋅': '*', '÷': '/',
    '⁄': '/', '²': '^2', '³': '^3', '°': ' degrees ', '’': "'", '\n': ' ',
    'π': r'\pi ', '√': r'\sqrt ', '∞': r'\infty ', '≤': r'\le ', '≥': r'\ge ',
    '±': r'\pm ', '∪': r'\cup ', '\u00a0': r'\,', '\u2009': r'\,',
    '\u202f': r'\,', '`': '', '"': '', '“': '', '”': '',
  }
  | {sign: f' {fraction}' for sign, fraction in _VULGAR.items()}
)  # fmt: skip
_CLEANING = tuple(
  (re.compile(pattern), new)
  for pattern, new in (
    (r'(?<=[0-9])(?:\\,|\\ |\{,\}|,\\!)(?=[0-9]{3}(?![0-9]))', ','),
    (r'(?<!\\)\$([^$]*)(?<!\\)\$', r'\1'),
    (r'\\[\[\]()]|\\(?:left|right|displaystyle)(?![a-zA-Z])', ''),
    (r'(?<!\\)\\[,;:! ]|\\q?quad(?![a-zA-Z])|~', ' '),
    (r'\\[dtc]frac', r'\\frac'),
    (r'\\(?:text|textbf|textit|mathrm|mathbf|mbox|underline|operatorname)\s*'
     r'\{([^{}]*)\}', r' \1 '),
    (r'\\([%$])', r'\1'),
    (r'\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree', ' degrees '),
    (r'\\(?:times|cdot)(?![a-zA-Z])', '*'),
    # Bold, not a power.
    (r'(?<![\w)}])\*\*|\*\*(?![\w({\\])', ''),
    (r'\*\*', '^'),
    (r'\\frac\s*([0-9])\s*([0-9])', r'\\frac{\1}{\2}'),
    (r'([0-9])?\s*\\frac\s*\{\s*(-?[0-9.]+)\s*\}\s*\{\s*([0-9.]+)\s*\}',
     r'\1 \2/\3'),
    (r'\s+', ' '),
  )
)  # fmt: skip


def clean(text: str) -> str:
  """The text without marks of layout; LaTeX's fractions of numbers as a/b."""
  text = text.translate(_SIGNS)
  if not text.isalnum():
    for pattern, new in _CLEANING:
      text = pattern.sub(new, text)
  text = re.sub(r'- (?=[0-9]+/[0-9])', '-', text)
  return text.lstrip(' ,;:').rstrip(' .,;:')


_THOUSANDS = re.compile(r'(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])')


def without_commas(text: str) -> str:
  """The text with 1,200 as 1200."""
  return _THOUSANDS.sub(lambda found: found[0].replace(',', ''), text)


DECIMAL = r'(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)'
_QUANTITY = (
  rf'(?:(?P<whole>[0-9]+) (?P<over>[0-9]+)/(?P<under>[0-9]+)'
  rf'|(?P<top>{DECIMAL}) ?/ ?(?P<bottom>-?{DECIMAL})'
  rf'|(?P<decimal>{DECIMAL})'
  r'(?:[eE](?P<e>[-+]?[0-9]{1,3})(?![0-9])'
  r'| ?[*xX] ?10 ?\^ ?\{?(?P<power>[-+]?[0-9]{1,3})\}?(?![0-9]))?)'
)
_UNIT = r"[A-Za-z][A-Za-z'/.-]*(?: ?\^ ?\{?[23]\}?)?"
_NUMBER = re.compile(
  r"(?P<before>(?:[A-Za-z][A-Za-z'-]*[ :,]+)*)"
  r'(?P<sign>[-+]?) ?(?P<currency>[$€£¥]?) ?(?P<inner>-?)'
  rf'{_QUANTITY}'
  r'(?P<percent> ?%| percents?\b)?'
  rf'(?P<after>(?:[ -]?{_UNIT})?(?:,? {_UNIT})*)'
)
# Words that make another number of the one beside them, or unsay it.
_UNSURE = re.compile(
  r"\b(?:not|no|never|wrong|incorrect|false|neither|nor|or|either|\w+n't|"
  r'than|least|most|between|plus|minus|half|sin|cos|tan|log|ln|exp|sqrt)\b',
  re.IGNORECASE,
)
_UNSURE_BEFORE = re.compile(
  r'\b(?:root|square|cube|twice|double|triple|times|third|quarter|over|under|'
  r'power|hundred|thousand|million|billion|trillion)\b|\b[A-Za-z] $',
  re.IGNORECASE,
)
_UNSURE_AFTER = re.compile(
  r'\b(?:squared|cubed|factorial|choose|mod|modulo|over|e|i|pi|[n-z])\b',
  re.IGNORECASE,
)
_NEGATIVE = re.compile(r'\b(?:minus|negative) $', re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z][\w' ]*(?:\([A-Za-z]\))? ?|[0-9+*/().,$% ^-]+")


def _after_name(text: str) -> str:
  """72 of 48 + 24 = 72 and of x = 72; 2x = 72 stays what it is."""
  left, equals, right = text.rpartition('=')
  parts = left.split('=') if equals else []
  if all(_NAME.fullmatch(part.strip()) for part in parts):
    return right.strip()
  return text


def _number(text: str) -> Number | None:
  """One number with its sign, currency, percent sign, unit, words around."""
  found = _NUMBER.fullmatch(_after_name(text))
  if not found:
    return None
  before, after = found['before'], found['after'].strip(' ,.')
  negative = bool(_NEGATIVE.search(before))
  before = _NEGATIVE.sub('', before)
  if _UNSURE.search(f'{before} {after}'):
    return None
  if _UNSURE_BEFORE.search(before) or _UNSURE_AFTER.search(after):
    return None
  value = _value(found)
  if value is None:
    return None
  negative ^= (found['sign'] == '-') ^ (found['inner'] == '-')
  first, _, rest = after.partition(' ')
  if first.lower() in _SCALES:
    value, after = value * _SCALES[first.lower()], rest
  shape = found['decimal'] or (found['top'] or '') + (found['bottom'] or '')
  return Number(
    -value if negative else value,
    '.' not in shape and not found['e'],
    bool(found['percent']),
    found['currency'] or _unit(after),
  )


def _value(found: re.Match) -> Fraction | None:
  """The number that `_QUANTITY` has matched; None for a division by 0."""
  if found['whole']:
    top, under = int(found['over']), int(found['under'])
    return Fraction(top, under) + int(found['whole']) if under else None
  if found['top']:
    bottom = Fraction(found['bottom'])
    return Fraction(found['top']) / bottom if bottom else None
  power = int(found['e'] or found['power'] or 0)
  return Fraction(found['decimal']) * Fraction(10) ** power


def _unit(words: str) -> str:
  """The measure that the words after a number begin with, or ''."""
  words = re.sub(r' ?\^ ?', '^', words.lower().lstrip('-'))
  word = re.split(r'[ ,]', words, maxsplit=1)[0].strip('.')
  word, caret, power = word.partition('^')
  name = _UNITS.get(word) or _UNITS.get(word.removesuffix('s'), '')
  return name and name + caret + power.strip('{}')


_BRACKETS = re.compile(r'(\\?[({\[])(.*?)(\\?[)}\]])')
_COMMAS = re.compile(r' ?[,;] ?(?:and |or )?| (?:and|or|&) ')
_COLON = re.compile(r' ?: ?')
_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z' -]*\)?")
_MATH = re.compile(r'[A-Za-z0-9\s\\{}()\[\]|+\-*/^_=<>.,!&]*')
_SPOKEN = re.compile(r'(?<!\\)(?<![A-Za-z])[A-Za-z]{3,}(?![A-Za-z])')
_FUNCTIONS = {
  'sin', 'cos', 'tan', 'cot', 'sec', 'csc', 'log', 'exp', 'sqrt', 'pmatrix',
  'bmatrix', 'matrix',
}  # fmt: skip
# The library passes over a command that it does not know.
_COMMANDS = _FUNCTIONS | {
  'frac', 'pi', 'infty', 'pm', 'cup', 'cap', 'in', 'le', 'leq', 'ge', 'geq',
  'lt', 'gt', 'ne', 'neq', 'ln', 'arcsin', 'arccos', 'arctan', 'sinh', 'cosh',
  'tanh', 'binom', 'emptyset', 'setminus', 'begin', 'end', 'alpha', 'beta',
  'gamma', 'delta', 'epsilon', 'theta', 'lambda', 'mu', 'rho', 'sigma', 'tau',
  'phi', 'omega', 'sum', 'prod', 'int', 'lim', 'to', 'lfloor', 'rfloor',
  'lceil', 'rceil', 'overline', '{', '}', '\\',
}  # fmt: skip
# Towers of powers and long exponents: no answer, and sympy would not end.
_TOWER = re.compile(r'\^[^+\-*/=,)]*\^|\^ ?\{?[-+]? ?[0-9]{4,}|[0-9]{4,} ?!|!!')


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Answer | None:
  """What a final answer says; None: nothing that can be compared."""
  if len(text) > LONGEST:
    return None
  text = clean(text)
  bracketed = _BRACKETS.fullmatch(text)
  if bracketed:
    opening, inner, closing = (x.replace('\\', '') for x in bracketed.groups())
    parts = [part.strip() for part in inner.split(',')]
    members = [_number(part) for part in parts]
    if len(members) == 1 and members[0]:
      return members[0]
    if all(members):
      return Group(opening + closing, tuple(members))
  text = without_commas(text)
  if one := _number(text):
    return one
  for kind, separator in (('', _COMMAS), (':', _COLON)):
    members = [_number(part) for part in separator.split(text) if part]
    if len(members) > 1 and all(members):
      return Group(kind, tuple(members))
  if _WORDS.fullmatch(text) and text != 'pi':
    return Words(text.strip('()').strip())
  return _expression(text)


def _expression(text: str) -> Expression | None:
  """LaTeX that the library reads as a whole, and does not work on for ever."""
  text = _after_name(text).rstrip('%').strip()
  spoken = set(_SPOKEN.findall(re.sub(r'\\[A-Za-z]+', ' ', text)))
  commands = set(re.findall(r'\\([A-Za-z]+|.)', text))
  if not text or not _MATH.fullmatch(text) or spoken - _FUNCTIONS:
    return None
  if commands - _COMMANDS or text.count('{') != text.count('}'):
    return None
  if _TOWER.search(text) or re.search(r'[0-9] +[0-9]|\.(?![0-9])', text):
    return None
  text = re.sub(r'(?<!\\)sqrt\s*\(([^()]*)\)', r'\\sqrt{\1}', text)
  return Expression(re.sub(r'(?<![\\A-Za-z])(?=pi\b)', r'\\', text))


# Comparing.


def equal(answer: Answer, reference: Answer, tolerance: float) -> bool:
  """Whether two answers without expressions are the same."""
  if isinstance(answer, Number) and isinstance(reference, Number):
    return _same(answer, reference, tolerance)
  if isinstance(answer, Words) and isinstance(reference, Words):
    return answer.text.casefold() == reference.text.casefold()
  if not (isinstance(answer, Group) and isinstance(reference, Group)):
    return False
  ours, theirs = list(answer.members), list(reference.members)
  if {answer.kind, reference.kind} <= {'', '{}'}:
    ours, theirs = (sorted(set(x)) for x in (ours, theirs))
  elif answer.kind != reference.kind:
    return False
  return len(ours) == len(theirs) and all(
    _same(one, other, tolerance)
    for one, other in zip(ours, theirs, strict=True)
  )


def _same(answer: Number, reference: Number, tolerance: float) -> bool:
  if answer.unit and reference.unit and answer.unit != reference.unit:
    return False
  pairs = [(answer.value, reference.value)]
  if answer.percent and not reference.percent:
    pairs.append((answer.value / 100, reference.value))
  if reference.percent and not answer.percent:
    pairs.append((answer.value, reference.value / 100))
  slack = Fraction(0 if answer.exact and reference.exact else tolerance)
  return any(abs(a - r) <= slack * max(abs(a), abs(r)) for a, r in pairs)


def is_left_undone(answer: Answer, asked: Answer) -> bool:
  """Whether it is 48 + 24 where 72 is asked for, or 2x = 10 where 10 is."""
  if not isinstance(answer, Expression):
    return False
  if isinstance(asked, Number) and re.fullmatch(r'[-0-9+*/ ().]+', answer.text):
    return True
  return '=' in answer.text and '=' not in latex(asked)


def latex(answer: Answer) -> str:
  """What the library is given."""
  if isinstance(answer, Number):
    return _latex_of(answer.value, answer.exact)
  if isinstance(answer, Group):
    separator = ':' if answer.kind == ':' else ', '
    inner = separator.join(map(latex, answer.members))
    opening, closing = answer.kind if len(answer.kind) == 2 else ('', '')
    escape = '\\' if opening == '{' else ''
    return f'{escape}{opening}{inner}{escape}{closing}'
  return answer.text


def _latex_of(value: Fraction, exact: bool) -> str:
  top, bottom = value.as_integer_ratio()
  if bottom == 1:
    return str(top)
  # The library takes a decimal for rounded.
  if not exact and 'e' not in (decimal := repr(float(value))):
    return decimal
  return f'{"-" * (top < 0)}\\frac{{{abs(top)}}}{{{bottom}}}'
