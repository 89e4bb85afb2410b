"""Judging by a backend: one grade an answer, or the better one of two."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tpu_lm.judging import prompts as prompting
from tpu_lm.judging import verdict
from tpu_lm.judging.asked import Messages, Request, Sampling
from tpu_lm.judging.backends import Backend
from tpu_lm.judging.prompts import Prompt

# At temperature 0 the same words would come again.
_AGAIN = 0.7


class Judge(NamedTuple):
  """Who judges, and how it is told to."""

  backend: Backend
  prompts: Sequence[Prompt]  # of one type; the first that fits is used
  sampling: Sampling = Sampling()
  retries: int = 2  # of replies that cannot be read
  scale: float = 10.0


class Case(NamedTuple):
  """What is to be judged."""

  messages: Messages  # the conversation, the user's last
  answers: tuple[str, ...]  # one to be graded, or two
  rubric: str
  reference: str = ''


class Ruling(NamedTuple):
  """What came of it."""

  value: Any  # a grade, or first, second or tie; None: it could not be read
  replies: tuple[str, ...]  # of the judge, the last one a question
  note: str = ''  # why there is no value


class _Question(NamedTuple):
  messages: Messages
  read: Callable[[str], Any]


class _Found(NamedTuple):
  value: Any
  reply: str
  note: str


def grades(judge: Judge, cases: Sequence[Case]) -> list[Ruling]:
  """The grade of each answer, from 0 to the judge's scale."""
  found = _read(judge, [_grading(judge, case) for case in cases])
  return [Ruling(one.value, (one.reply,), one.note) for one in found]


def choices(judge: Judge, cases: Sequence[Case]) -> list[Ruling]:
  """The better one of two answers, each pair asked in both orders.

  An answer wins if both orders say so; else it is a tie. Equal answers tie
  and cost nothing.
  """
  questions = []
  differ = [case.answers[0] != case.answers[1] for case in cases]
  for case, do_differ in zip(cases, differ, strict=True):
    if do_differ:
      first, second = case.answers
      swapped = case._replace(answers=(second, first))
      questions += [_choosing(judge, case), _choosing(judge, swapped)]
  found = iter(_read(judge, questions))
  return [
    _both(next(found), next(found)) if one else Ruling('tie', ())
    for one in differ
  ]


def _both(one: _Found, other: _Found) -> Ruling:
  """The ruling of both orders."""
  replies = (one.reply, other.reply)
  if one.value is None or other.value is None:
    return Ruling(None, replies, one.note or other.note)
  agreed = {('A', 'B'): 'first', ('B', 'A'): 'second'}
  return Ruling(agreed.get((one.value, other.value), 'tie'), replies)


def _grading(judge: Judge, case: Case) -> _Question:
  messages, inside = _filled(judge, case, ('answer',))
  return _Question(
    messages, lambda reply: verdict.grade(reply, judge.scale, inside)
  )


def _choosing(judge: Judge, case: Case) -> _Question:
  messages, inside = _filled(judge, case, ('answer_a', 'answer_b'))
  return _Question(messages, lambda reply: verdict.choice(reply, inside))


def _filled(
  judge: Judge, case: Case, names: tuple[str, ...]
) -> tuple[Messages, verdict.Forged]:
  answers = dict(zip(names, case.answers, strict=True))
  fields = prompting.fields(case.messages, answers, case.reference)
  known = fields | {'rubric': case.rubric, 'scale': f'{judge.scale:g}'}
  prompt = prompting.fitting(judge.prompts, known)
  return prompting.filled(prompt, fields, case.rubric, judge.scale)


def _read(judge: Judge, questions: Sequence[_Question]) -> list[_Found]:
  """Asks, and asks again what could not be read."""
  found: list[_Found] = [_Found(None, '', '')] * len(questions)
  open_ = list(range(len(questions)))
  sampling = judge.sampling
  for number in range(1 + judge.retries):
    if not open_:
      break
    replies = judge.backend.ask(
      [Request(questions[i].messages, number) for i in open_], sampling
    )
    for i, reply in zip(open_, replies, strict=True):
      value, note = None, reply.error
      if not reply.error:
        # The verdict comes last: what was cut off has none.
        value = questions[i].read(reply.text) if reply.finished else None
        said = ' '.join(reply.text.split())[-60:]
        note = '' if value is not None else f'no verdict in …{said!r}'
      found[i] = _Found(value, reply.text, note)
    open_ = [i for i in open_ if found[i].value is None]
    sampling = sampling._replace(temperature=max(sampling.temperature, _AGAIN))
  return found
