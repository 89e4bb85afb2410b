"""What a language model says of an answer (RLAIF, arXiv 2309.00267).

The judge is a model of ours or any endpoint of the chat-completions kind. It
grades each answer by a rubric, or it compares the answers to one prompt in
pairs, in both orders (Zheng et al., arXiv 2306.05685, section 3.4): a win
counts only if both orders agree. What it says is kept by a hash of the whole
question, and what cannot be read is NaN, never 0. Differs from Lee et al. in
that verdicts are read as text, not as probabilities of tokens.
"""

import contextlib
import math
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence

from tpu_lm.errors import UserError
from tpu_lm.judging import asking, backends
from tpu_lm.judging import cache as caches
from tpu_lm.judging import prompts as prompting
from tpu_lm.judging.asked import Sampling
from tpu_lm.scoring import RewardFn, Sample, Score

RUBRIC = (
  'The answer does what was asked. It is correct first, then complete, clear, '
  'and no longer than it needs to be.'
)
_TYPES = {'rubric': 'single', 'pairwise': 'pairwise'}


def make(
  *,
  backend: str = '',
  model: str = '',
  key_env: str = '',
  prompts: str = '',
  prompt: str = '',
  kind: str = 'rubric',
  rubric: str = RUBRIC,
  scale: float = 10.0,
  opponents: int = 0,
  key: str = 'reference',
  retries: int = 2,
  cache: str = '',
  max_calls: int = 0,
  max_tokens: int = 0,
  max_new_tokens: int = 512,
  temperature: float = 0.0,
  seed: int = 0,
  concurrency: int = 8,
  attempts: int = 5,
  timeout: float = 120.0,
  pause: float = 0.5,
  options: str = '',
) -> RewardFn:
  """Makes the reward, from 0 to 1.

  Args:
    backend: a working directory, or http://HOST:PORT/v1 with `model`.
    model: its name at the endpoint.
    key_env: the environment variable that holds the endpoint's key.
    prompts: a JSONL file of prompts (judging/prompts.py); '': ours.
    prompt: the name of one of them; '': the first that fits.
    kind: rubric (grade / scale), or pairwise (the share of other answers to
      the prompt that it beats, ties half; a single answer is compared with the
      record's reference).
    rubric: what counts; a prompt shows it where it says {rubric}.
    scale: the best grade.
    opponents: of an answer in pairwise; 0: all others, else an even number.
    key: of the record, where an answer known to be good may stand.
    retries: of replies that cannot be read.
    cache: a file of replies, so that nothing is asked twice; '': they are
      forgotten at the end.
    max_calls: in all; 0: any number.
    max_tokens: in all; 0: any number.
    max_new_tokens: of the judge's reply.
    temperature: of the judge.
    seed: of the judge.
    concurrency, attempts, timeout, pause, options: of the endpoint, see
      judging/backends.py.

  Raises:
    UserError: one of these cannot be.
  """
  _check(
    kind,
    scale=(scale, 1e-6),
    retries=(retries, 0),
    max_new_tokens=(max_new_tokens, 1),
    temperature=(temperature, 0),
    opponents=(opponents, 0),
  )
  with _named():
    told = prompting.load(prompts, _TYPES[kind], prompt)
    opened = backends.make(
      backend,
      model,
      key_env,
      cache=cache,
      max_calls=max_calls,
      max_tokens=max_tokens,
      concurrency=concurrency,
      attempts=attempts,
      timeout=timeout,
      pause=pause,
      options=options,
    )
  sampling = Sampling(temperature, max_new_tokens, seed)
  judge = asking.Judge(opened, told, sampling, retries, scale)
  return Judge(judge, kind, rubric, key, opponents)


def _check(kind: str, **numbers: tuple[float, float]) -> None:
  """Refuses what cannot be; numbers come with the least that they may be."""
  if kind not in _TYPES:
    raise UserError(f'rewards: judge.kind={kind!r}: must be rubric or pairwise')
  for name, (value, least) in numbers.items():
    if not least <= value < math.inf:
      raise UserError(
        f'rewards: judge.{name}={value!r}: must be at least {least}'
      )
  opponents = numbers['opponents'][0]
  if opponents % 2:
    raise UserError(
      f'rewards: judge.opponents={opponents}: must be even, so that every '
      'answer has as many; 0: all others'
    )


@contextlib.contextmanager
def _named() -> Iterator[None]:
  """Says in messages which reward they are about."""
  try:
    yield
  except UserError as error:
    raise UserError(f'rewards: judge: {error}') from error


class Judge:
  """The reward. `close` ends its threads, and says what it has cost."""

  def __init__(
    self,
    judge: asking.Judge,
    kind: str,
    rubric: str,
    key: str,
    opponents: int,
  ):
    self._judge, self._rubric, self._key = judge, rubric, key
    self._opponents = opponents
    self._score = {'rubric': self._graded, 'pairwise': self._compared}[kind]
    self._counting = threading.Lock()
    self._asked = self._unread = 0
    # Also where nobody closes it, at the end of the program.
    self._end = weakref.finalize(self, _ended, judge.backend)

  def __call__(self, samples: Sequence[Sample]) -> list[Score]:
    with _named():
      return self._score(samples)

  def close(self) -> None:
    """Ends threads and cache; prints the price to standard error."""
    self._end()

  @property
  def figures(self) -> dict[str, float]:
    """Of all so far: calls, tokens, and the share that could not be read."""
    with self._counting:
      unread = self._unread / max(self._asked, 1)
    price = self._judge.backend.price
    return price._asdict() | {'unread_share': unread}

  def _case(self, sample: Sample, *others: str, known: bool = True):
    reference = self._reference(sample) if known else ''
    answers = (sample.text, *others)
    return asking.Case(sample.prompt, answers, self._rubric, reference)

  def _reference(self, sample: Sample) -> str:
    found = sample.record.get(self._key)
    return str(found) if isinstance(found, str | int | float) else ''

  def _count(self, rulings: Sequence[asking.Ruling]) -> None:
    with self._counting:
      self._asked += len(rulings)
      self._unread += sum(one.value is None for one in rulings)

  def _graded(self, samples: Sequence[Sample]) -> list[Score]:
    said = [sample for sample in samples if sample.text.strip()]
    rulings = asking.grades(self._judge, [self._case(one) for one in said])
    self._count(rulings)
    found = iter(rulings)
    return [
      self._grade(next(found)) if sample.text.strip() else _EMPTY
      for sample in samples
    ]

  def _grade(self, ruling: asking.Ruling) -> Score:
    if ruling.value is None:
      return Score(math.nan, True, ruling.note)
    scale = self._judge.scale
    words = ' '.join(ruling.replies[0].split())[:120]
    note = f'{ruling.value:g} of {scale:g}: {words}'
    return Score(ruling.value / scale, True, note)

  def _compared(self, samples: Sequence[Sample]) -> list[Score]:
    pairs: list[tuple[int, int | None]] = []
    for places in _groups(samples).values():
      pairs += self._pairs(places)
    rulings = self._rulings(samples, pairs)
    self._count([ruling for _, ruling in rulings.values()])
    held: list[list[float | None]] = [[] for _ in samples]
    for (one, other), (shares, _) in rulings.items():
      held[one].append(shares and shares[0])
      if other is not None:
        held[other].append(shares and shares[1])
    return [_share(*both) for both in zip(samples, held, strict=True)]

  def _pairs(self, places: list[int]) -> list[tuple[int, int | None]]:
    """Who meets whom in a group; None: the reference."""
    count = len(places)
    if count == 1:
      return [(places[0], None)]
    # Around a ring, every answer meets as many before it as after it.
    apart = self._opponents // 2 or count
    return [
      (places[i], places[j])
      for i in range(count)
      for j in range(i + 1, count)
      if min(j - i, count - (j - i)) <= apart
    ]

  def _rulings(self, samples, pairs):
    """Of each pair (the shares of both, None: not read) and the ruling."""
    cases = {}
    for one, other in pairs:
      sample = samples[one]
      if other is None:
        against = self._reference(sample)
        if not against.strip():
          raise UserError(
            'a prompt has one answer alone, and its record no '
            f'{self._key!r} to compare it with; sample several answers '
            '(stage.group), or name the field (key=…)'
          )
      else:
        against = samples[other].text
      cases[one, other] = self._case(sample, against, known=other is not None)
    asked = {
      pair: case
      for pair, case in cases.items()
      if all(text.strip() for text in case.answers)
    }
    found = asking.choices(self._judge, list(asked.values()))
    rulings = dict(zip(asked, found, strict=True))
    for pair, case in cases.items():
      if pair not in rulings:  # an empty answer wins against none
        there = [bool(text.strip()) for text in case.answers]
        value = {(True, False): 'first', (False, True): 'second'}.get(
          tuple(there), 'tie'
        )
        rulings[pair] = asking.Ruling(value, ())
    return {pair: (_SHARES.get(x.value), x) for pair, x in rulings.items()}


_EMPTY = Score(0.0, False, 'an empty answer')
_SHARES = {'first': (1.0, 0.0), 'second': (0.0, 1.0), 'tie': (0.5, 0.5)}


def _groups(samples: Sequence[Sample]) -> dict[str, list[int]]:
  """Places of the samples of each prompt."""
  groups: dict[str, list[int]] = {}
  for place, sample in enumerate(samples):
    groups.setdefault(caches.key(sample.prompt), []).append(place)
  return groups


def _share(sample: Sample, held: Sequence[float | None]) -> Score:
  """The share of wins, ties half, of the comparisons that were read."""
  read = [share for share in held if share is not None]
  note = (
    f'won {read.count(1.0)}, tied {read.count(0.5)}, lost {read.count(0.0)}'
  )
  if len(read) < len(held):
    note += f', not read {len(held) - len(read)}'
  value = sum(read) / len(read) if read else math.nan
  return Score(value, bool(sample.text.strip()), note)


def _ended(backend: backends.Backend) -> None:
  backend.close()
  price = backend.price
  if price.calls or price.kept:
    print(f'judge {backend.origin}: {price}', file=sys.stderr)
