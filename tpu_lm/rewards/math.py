r"""1 where a text's final answer equals `record['answer']`, else 0.

The final answer is what stands in the last `\boxed{…}`; else after the last
`####`; else after the last "answer is" or "answer:"; else the whole text, if
that is one number or expression; else (`last_number`) the last number, unless
it is part of a list or of an expression, or its sentence repeats the question.
What comes before `</think>` does not count. The reference may itself be a
solution that ends in `#### 42` or `\boxed{42}`.

Rules of comparison:
  Numbers compare as exact fractions: 0.5, 1/2, \frac12, 5e-1; 3 1/2; 1,200;
    3.2 \times 10^5; 3 million. A decimal point allows a relative `tolerance`;
    integers compare exactly. A decimal comma is read as a list.
  Percent: p% equals r where p = r or p / 100 = r (the sign is a unit where
    the question asked for percents, and a hundredth elsewhere).
  Units and currencies are not converted and need not be there; two measures
    that differ (5 m, 5 cm; 5 dollars, 5 cents) are not equal.
  Lists (`1, 2`, `1 or 2`) and sets have no order, tuples and intervals have
    one, and their brackets must be the same. A list is never one number.
  What is left undone is no answer: 48 + 24 to 72, or 2x = 10 to 10. A fraction
    (48/2) and a power are.
  Words (`Monday`, `(A)`) compare without case and brackets.
  All else goes to math-verify (Apache-2.0), which knows LaTeX and compares
    by sympy, decimals to six places.

The library runs in processes of its own (verifier.py), for at most `timeout`
seconds; an answer that it cannot finish counts as one that cannot be read.
Numbers are compared in this process.
"""

import functools
import math
import os
import re
from collections.abc import Sequence

from tpu_lm import quantities
from tpu_lm.errors import UserError
from tpu_lm.quantities import Answer, Expression, Words
from tpu_lm.scoring import Sample, Score
from tpu_lm.verifier import Verifier

# Where the final answer stands.

_ASIDE = re.compile(r'<<[^<>]*>>')  # GSM8K's calculator
_BOXED = re.compile(r'\\f?box(?:ed)?\s*\{')
_HASHES = re.compile(r'####[ \t]*+((?![A-Za-z])[^\n]+)')
_ANSWER_IS = re.compile(
  r'\banswer(?: to [^.\n]{1,80}?)?\W{0,3}(?:\bis\b|\bare\b|[:=])[\s:*_]*',
  re.IGNORECASE,
)
_SENTENCE = re.compile(r'[.?](?:[\s*]+|$)|!\s*$|(?<![0-9)}])!\s|\n+')
_REASON = re.compile(r',?\s+(?:because|since|which|where|so)\b.*')


def final_answer(
  text: str, question: str = '', last_number: bool = True
) -> str | None:
  """Returns the words of the final answer; None: there is none."""
  text = _ASIDE.sub('', text.rpartition('</think>')[2])
  if starts := [found.end() for found in _BOXED.finditer(text)]:
    return _braced(text, starts[-1])
  if found := _HASHES.findall(text):
    return _first_sentence(found[-1])
  if starts := [found.end() for found in _ANSWER_IS.finditer(text)]:
    return _first_sentence(text[starts[-1] :].partition('\n')[0])
  bare = text.strip()
  if _is_one(bare):
    return None if _echoes(bare, question) else bare
  return _last_number(text, question) if last_number else None


def _is_one(text: str) -> bool:
  """Whether a whole text can be read as one thing."""
  if len(text) > quantities.LONGEST:
    return False
  found = quantities.read(text)
  if isinstance(found, Expression):  # of letters, not of words
    return not re.search(r'(?<![\\A-Za-z])[A-Za-z]{2}', found.text)
  return found is not None


def _braced(text: str, start: int) -> str | None:
  """What stands between `start` and the brace that closes it."""
  depth = 1
  for found in re.finditer(r'\\.|[{}]', text[start:], re.DOTALL):
    depth += {'{': 1, '}': -1}.get(found[0], 0)
    if not depth:
      return text[start : start + found.start()]
  return None


def _first_sentence(text: str) -> str:
  return _REASON.sub('', _SENTENCE.split(text.strip(), maxsplit=1)[0])


_TOKEN = re.compile(
  rf'(?<![A-Za-z0-9.])-?[$€£¥]?(?:[0-9]+ [0-9]+/[0-9]+|{quantities.DECIMAL}'
  rf'(?:/{quantities.DECIMAL})?)(?:[eE][-+]?[0-9]{{1,3}})? ?%?'
)
_LISTED = re.compile(
  r'[0-9][^A-Za-z0-9=:]*$|[0-9][^=:]*\bor\b[^0-9]*$|[0-9]\W*\b(?:and|to)\W*$'
  r'|[0-9]:$|[-\\^_{*+/]$|[A-Za-z]\($|\\[A-Za-z]+\s*$|\bnot\b[^0-9]*$'
  r'|\b(?:sin|cos|tan|log|ln|exp|sqrt|root of|than|least|most|over|'
  r'under|times|twice|half|minus|negative)\W*$'
)
_CONTINUED = re.compile(
  r'\s*(?:[\^_!({*+=\\0-9]|[n-z]\b|/\s*[^A-Za-z])|[a-fijk]\b'
)


def _last_number(text: str, question: str) -> str | None:
  """The last number, if it stands by itself and is no echo of the question."""
  said = [part for part in _SENTENCE.split(text) if re.search('[0-9]', part)]
  if not said or _echoes(said[-1], question):
    return None
  sentence = said[-1]
  if len(sentence) > quantities.LONGEST:
    sentence = sentence[-quantities.LONGEST :].partition(' ')[2]
  sentence = quantities.without_commas(quantities.clean(sentence))
  tokens = list(_TOKEN.finditer(sentence))
  if not tokens:
    return None
  before = sentence[: tokens[-1].start()].rstrip()
  after = sentence[tokens[-1].end() :]
  if _LISTED.search(before) or _CONTINUED.match(after):
    return None
  return tokens[-1][0]


def _echoes(sentence: str, question: str) -> bool:
  """Whether a sentence of three words or more stands in the question."""
  said = re.findall(r'\w+', sentence.lower())
  asked = re.findall(r'\w+', question.lower())
  return len(said) > 2 and f' {" ".join(said)} ' in f' {" ".join(asked)} '


# The reward.


@functools.lru_cache(maxsize=4096)
def reference(said: str) -> Answer | None:
  """What the data say; a whole solution ends in its answer."""
  return quantities.read(final_answer(said, last_number=False) or said)


class Math:
  """The reward; see the module."""

  def __init__(
    self, timeout: float, processes: int, tolerance: float, last_number: bool
  ):
    self._tolerance = tolerance
    self._last_number = last_number
    self._verifier = Verifier(processes or os.cpu_count() or 1, timeout)

  def __call__(self, samples: Sequence[Sample]) -> list[Score]:
    scores, hard = [], {}
    for i, sample in enumerate(samples):
      score, pair = self._first_look(sample)
      scores.append(score)
      if pair:
        hard[i] = pair
    pairs = list(dict.fromkeys(hard.values()))  # a group often agrees
    found = dict(zip(pairs, self._verifier.verdicts(pairs), strict=True))
    for i, pair in hard.items():
      verdict = found[pair]
      note = scores[i].note
      if verdict is None or not verdict.reference:
        scores[i] = Score(math.nan, False, f'{note}: not compared')
      else:
        scores[i] = Score(float(verdict.equal), verdict.answer, note)
    return scores

  def _first_look(self, sample: Sample) -> tuple[Score, tuple[str, str] | None]:
    """What numbers and words are worth, or a pair for the library."""
    if 'answer' not in sample.record:
      raise UserError(
        "rewards: math: the record has no 'answer', only "
        f'{", ".join(map(repr, sample.record)) or "nothing"}'
      )
    known = str(sample.record['answer'])
    wanted = reference(known)
    question = sample.prompt[-1]['content'] if sample.prompt else ''
    said = final_answer(sample.text, question, self._last_number)
    answer = None if said is None else quantities.read(said)
    note = f'{_shown(said)} for {_shown(known)}'
    value, parsed, pair = 0.0, True, None
    if wanted is None:
      value, parsed, note = math.nan, False, f'{note}: cannot be read itself'
    elif answer is None or _is_talk(answer, wanted):
      parsed = False
    elif _is_talk(wanted, answer) or quantities.is_left_undone(answer, wanted):
      value = 0.0
    elif isinstance(answer, Expression) or isinstance(wanted, Expression):
      pair = (quantities.latex(wanted), quantities.latex(answer))
      value = float(pair[0] == pair[1])
    else:
      value = float(quantities.equal(answer, wanted, self._tolerance))
    return Score(value, parsed, note), None if value else pair

  def close(self) -> None:
    self._verifier.close()


def _is_talk(one: Answer, other: Answer) -> bool:
  """Whether `one` is words beside mathematics; a letter may be a variable."""
  if not isinstance(one, Words) or isinstance(other, Words):
    return False
  return len(one.text) > 1 or not isinstance(other, Expression)


def _shown(said: object) -> str:
  return 'nothing' if said is None else ' '.join(str(said).split())[-60:]


def make(
  *,
  timeout: float = 5.0,
  processes: int = 0,
  tolerance: float = 1e-9,
  last_number: bool = True,
) -> Math:
  """Makes the reward.

  Args:
    timeout: of one comparison by the library, in seconds.
    processes: of the library; 0: one for each core.
    tolerance: relative, between numbers of which one has a decimal point.
    last_number: whether the last number counts where nothing else says which
      is the answer.
  """
  if timeout <= 0 or processes < 0 or not 0 <= tolerance < 1:
    raise UserError(
      f'rewards: math: timeout={timeout}, processes={processes}, '
      f'tolerance={tolerance}: must be above 0, at least 0, and in [0, 1)'
    )
  return Math(timeout, processes, tolerance, last_number)
