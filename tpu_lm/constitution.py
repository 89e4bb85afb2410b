"""Data to train on out of principles: a model revises and prefers by them.

Constitutional AI (Bai et al., arXiv 2212.08073). Section 3.1: a model answers,
criticises its answer by a drawn principle and revises it; what it said last is
a conversation to fine-tune on (`sft.jsonl`). Section 4.1: of two answers a
judge chooses one by a drawn principle (`pairs.jsonl`). Differs from the paper:
the judge is asked in both orders and says its choice in words (only choices
that agree are written), and no examples stand before the requests.

Everything is drawn by (seed, prompt), so that neither the order of the prompts
nor a resumed run changes a byte.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tpu_lm.data import files, records, sources
from tpu_lm.errors import UserError
from tpu_lm.judging import asking, backends, prompts, verdict
from tpu_lm.judging import principles as constitutions
from tpu_lm.judging.asked import Messages, Request, Sampling
from tpu_lm.judging.backends import Backend
from tpu_lm.judging.cache import Reply, key
from tpu_lm.judging.principles import Principle

KINDS = ('sft', 'pairs', 'both')
_ALONE = 'Write the new answer alone, without a word about the change.'


class Options(NamedTuple):
  """How the data are made."""

  rounds: int = 1  # of critique and revision
  seed: int = 0
  kind: str = 'sft'  # sft, pairs or both
  temperature: float = 1.0  # of answers, critiques and revisions
  max_new_tokens: int = 512  # of each, and of what the judge says
  retries: int = 2  # of a judge's replies that cannot be read
  max_bad_share: float = 0.5  # of the prompts, whose answers are refused

  def check(self) -> None:
    """Refuses what cannot be."""
    if self.kind not in KINDS:
      raise UserError(f'kind={self.kind!r}: must be {", ".join(KINDS)}')
    for name, least in (
      ('rounds', 1),
      ('temperature', 0),
      ('max_new_tokens', 1),
      ('retries', 0),
      ('max_bad_share', 0),
    ):
      value = getattr(self, name)
      if not value >= least:
        raise UserError(f'{name}={value!r}: must be at least {least}')
    if self.kind != 'sft' and not self.temperature:
      raise UserError(
        'temperature=0.0: two answers would be the same; preferences need it '
        'above 0'
      )


class _Step:
  """A prompt, and all that was said about it."""

  def __init__(self, id_: str, messages: Messages):
    self.id, self.messages = id_, messages
    self.answers: list[str] = []
    self.rounds: list[dict[str, str]] = []
    self.choice: dict[str, Any] = {}
    self.refused: dict[str, str] = {}  # sft or pairs: why

  def lines(self) -> dict[str, Any]:
    """For steps.jsonl."""
    return {
      'id': self.id,
      'prompt': self.messages,
      'answers': self.answers,
      'rounds': self.rounds,
      'choice': self.choice,
      'refused': self.refused,
    }


def write(
  backend: Backend,
  principles: str | pathlib.Path,
  source: str,
  to: str | pathlib.Path,
  *,
  judge: Backend | None = None,
  limit: int = 0,
  report: Callable[[str], None] = print,
  **options: Any,
) -> dict[str, int]:
  """Writes a folder of data, whole or not at all.

  It holds sft.jsonl ({"messages"}), pairs.jsonl ({"prompt", "chosen",
  "rejected"}), steps.jsonl (every answer, principle, critique, revision and
  word of the judge, what was refused as well) and summary.json.

  Args:
    backend: the model that answers, criticises and revises.
    principles: a file of them, see judging/principles.py.
    source: of prompts, as `data.source`; answers in it are left out.
    to: a folder that is not there yet.
    judge: the model that prefers; None: the same.
    limit: prompts, drawn by their hash; 0: all.
    report: is told how far it is, and what it cost.
    **options: those of `Options`.

  Returns:
    Counts: prompts, and of each kind written, refused, …

  Raises:
    UserError: a mistake in these, a limit is reached, or more answers than
      max_bad_share are empty or cut off. Replies stay in the backend's cache.
  """
  how, to = Options(**options), pathlib.Path(to).expanduser()
  how.check()
  if limit < 0:
    raise UserError(f'limit={limit}: must be 0 (all prompts) or more')
  if to.exists():
    raise UserError(f'--to={to}: is there already; name a new folder')
  drawn = constitutions.read(principles)
  steps, left_out = _steps(source, limit)
  report(f'{len(steps):,} prompts, {len(drawn)} principles')
  sampling = Sampling(how.temperature, how.max_new_tokens, how.seed)
  backends_ = (backend, judge or backend)

  def told(what: str) -> None:
    prices = dict.fromkeys(str(one.price) for one in backends_)
    report(f'{what}: {"; ".join(prices)}')

  counts = {'prompts': len(steps), **left_out}
  _answer(backend, steps, how, sampling)
  told('answers')
  if how.kind != 'pairs':
    for number in range(how.rounds):
      _revise(backend, steps, drawn, how, sampling, number)
      told(f'revisions {number + 1} of {how.rounds}')
  if how.kind != 'sft':
    _prefer(backends_[1], steps, drawn, how)
    told('preferences')
  written = {}
  if how.kind != 'pairs':
    written['sft.jsonl'] = _conversations(steps, counts)
  if how.kind != 'sft':
    written['pairs.jsonl'] = _pairs(steps, counts)
  _check(counts, how)
  written['steps.jsonl'] = [step.lines() for step in steps]
  summary = {
    'source': source,
    'principles': [one._asdict() for one in drawn],
    'options': how._asdict() | {'limit': limit},
    'counts': counts,
  }
  _write(to, written, summary)
  report(f'{to}: ' + ', '.join(f'{n:,} {name}' for name, n in counts.items()))
  return counts


def _steps(source: str, limit: int) -> tuple[list[_Step], dict[str, int]]:
  """The prompts by their hash, each once, and how many were left out."""
  found: dict[str, _Step] = {}
  counts = {'repeated': 0, 'with_tools': 0}
  for origin, record in sources.open(source, '').records(files.Reading()):
    try:
      question = records.question(record)
    except ValueError as error:
      raise UserError(f'{origin}: {error}') from error
    if question.tools or any('tool_calls' in m for m in question.messages):
      counts['with_tools'] += 1
      continue
    id_ = key(question.messages)[:16]
    counts['repeated'] += id_ in found
    found.setdefault(id_, _Step(id_, question.messages))
  if not found:
    raise UserError(f'--source={source}: holds no prompts')
  return [found[id_] for id_ in sorted(found)][: limit or None], counts


def _answer(
  backend: Backend, steps: Sequence[_Step], how: Options, sampling: Sampling
) -> None:
  copies = range(1 if how.kind == 'sft' else 2)
  replies = _replies(
    backend,
    [Request(step.messages, number) for step in steps for number in copies],
    sampling,
  )
  found = iter(replies)
  for step in steps:
    for number in copies:
      reply = next(found)
      step.answers.append(reply.text)
      why = _fault(reply)
      if why and number == 0 and how.kind != 'pairs':
        step.refused['sft'] = f'the answer {why}'
      if why and how.kind != 'sft':
        step.refused['pairs'] = f'answer {number + 1} {why}'


def _revise(
  backend: Backend,
  steps: Sequence[_Step],
  drawn: Sequence[Principle],
  how: Options,
  sampling: Sampling,
  number: int,
) -> None:
  """One round: a critique of what was said last, and a revision."""
  live = [step for step in steps if 'sft' not in step.refused]
  chosen = [_drawn(drawn, 'revision', how.seed, s.id, number) for s in live]
  talks = [
    [
      *step.messages,
      {'role': 'assistant', 'content': _last(step)},
      {'role': 'user', 'content': one.critique},
    ]
    for step, one in zip(live, chosen, strict=True)
  ]
  critiques = _replies(backend, [Request(talk) for talk in talks], sampling)
  further = [
    Request(
      [
        *talk,
        {'role': 'assistant', 'content': critique.text},
        {'role': 'user', 'content': f'{one.revision}\n\n{_ALONE}'},
      ]
    )
    for talk, critique, one in zip(talks, critiques, chosen, strict=True)
    if critique.text.strip()
  ]
  revisions = iter(_replies(backend, further, sampling))
  for step, critique, one in zip(live, critiques, chosen, strict=True):
    said = {'principle': one.critique, 'critique': critique.text}
    step.rounds.append(said)
    # One that was cut off still says something; it is not trained on.
    if not critique.text.strip():
      step.refused['sft'] = f'critique {number + 1} is empty'
      continue
    revision = next(revisions)
    said |= {'request': one.revision, 'revision': revision.text}
    if why := _fault(revision):
      step.refused['sft'] = f'revision {number + 1} {why}'


def _prefer(
  judge: Backend,
  steps: Sequence[_Step],
  drawn: Sequence[Principle],
  how: Options,
) -> None:
  """Two answers to each prompt; the judge chooses one by a principle."""
  live = [step for step in steps if 'pairs' not in step.refused]
  chosen = [_drawn(drawn, 'choice', how.seed, step.id) for step in live]
  cases = [
    asking.Case(step.messages, tuple(step.answers), one.choice)
    for step, one in zip(live, chosen, strict=True)
  ]
  told = prompts.load('', 'pairwise')
  greedy = Sampling(0.0, how.max_new_tokens, how.seed)
  rulings = asking.choices(
    asking.Judge(judge, told, greedy, how.retries), cases
  )
  for step, one, ruling in zip(live, chosen, rulings, strict=True):
    step.choice = {
      'principle': one.choice,
      'better': ruling.value,
      'replies': list(ruling.replies),
      'note': ruling.note,
    }


def _conversations(
  steps: Sequence[_Step], counts: dict[str, int]
) -> list[dict[str, Any]]:
  kept = [step for step in steps if 'sft' not in step.refused]
  counts['sft'] = len(kept)
  counts['sft_refused'] = len(steps) - len(kept)
  counts['sft_unchanged'] = sum(_last(s) == s.answers[0] for s in kept)
  return [
    {
      'messages': [
        *step.messages,
        {'role': 'assistant', 'content': _last(step)},
      ]
    }
    for step in kept
  ]


def _pairs(
  steps: Sequence[_Step], counts: dict[str, int]
) -> list[dict[str, Any]]:
  found, kept = [], [step for step in steps if 'pairs' not in step.refused]
  for step in kept:
    if step.choice['better'] in ('first', 'second'):
      order = 1 if step.choice['better'] == 'first' else -1
      chosen, rejected = step.answers[::order]
      found.append(
        {'prompt': step.messages, 'chosen': chosen, 'rejected': rejected}
      )
  better = [step.choice['better'] for step in kept]
  counts['pairs'] = len(found)
  counts['pairs_refused'] = len(steps) - len(kept)
  counts['pairs_tied'] = better.count('tie')
  counts['pairs_not_read'] = better.count(None)
  return found


def _check(counts: dict[str, int], how: Options) -> None:
  """Refuses data of a model that does not answer, or is not understood."""
  for name in ('sft', 'pairs'):
    if name not in counts:
      continue
    refused, total = counts[f'{name}_refused'], counts['prompts']
    if refused > how.max_bad_share * total:
      raise UserError(
        f'{name}: the answers to {refused} of {total} prompts are empty or cut '
        f'off at {how.max_new_tokens} tokens, more than '
        f'max_bad_share={how.max_bad_share:g}; is the model fine-tuned on '
        'conversations? Raise max_new_tokens or max_bad_share otherwise'
      )
    if not counts[name]:
      tied = counts.get('pairs_tied', 0) if name == 'pairs' else 0
      raise UserError(
        f'{name}: nothing is left to write of {total} prompts ({refused} '
        f'refused, {tied} tied); give more prompts, or a better judge'
      )


def _replies(
  backend: Backend, requests: Sequence[Request], sampling: Sampling
) -> list[Reply]:
  """What the model says, without what it thinks aloud."""
  found = backend.ask(requests, sampling)
  errors = [reply.error for reply in found if reply.error]
  if errors:
    raise UserError(
      f'backend={backend.origin}: {len(errors)} of {len(found)} requests '
      f'failed ({errors[-1]}); run again, what was answered is kept where a '
      'cache is given'
    )
  return [
    reply._replace(text=verdict.without_thoughts(reply.text)) for reply in found
  ]


def _fault(reply: Reply) -> str:
  """What is wrong with an answer, or ''."""
  if not reply.text.strip():
    return 'is empty'
  return '' if reply.finished else 'is cut off'


def _last(step: _Step) -> str:
  return step.rounds[-1]['revision'] if step.rounds else step.answers[0]


def _drawn(drawn: Sequence[Principle], *of: Any) -> Principle:
  return drawn[int(key(*of)[:15], 16) % len(drawn)]


def _write(
  to: pathlib.Path, written: dict[str, list[dict]], summary: dict
) -> None:
  """The folder, by one renaming."""
  partial = to.with_name(f'{to.name}.tmp')
  try:
    if partial.exists():  # of a run that was ended
      shutil.rmtree(partial)
    partial.mkdir(parents=True)
    for name, lines in written.items():
      text = ''.join(json.dumps(x, ensure_ascii=False) + '\n' for x in lines)
      (partial / name).write_text(text, encoding='utf-8')
    text = json.dumps(summary, ensure_ascii=False, indent=2) + '\n'
    (partial / 'summary.json').write_text(text, encoding='utf-8')
    os.rename(partial, to)
  except OSError as error:
    raise UserError(
      f'--to={to}: cannot be written ({error.strerror or error})'
    ) from error


def prepare(
  to: str | pathlib.Path,
  *,
  backend: str,
  principles: str,
  source: str,
  model: str = '',
  key_env: str = '',
  judge: str = '',
  judge_model: str = '',
  judge_key_env: str = '',
  cache: str = '',
  max_calls: int = 0,
  max_tokens: int = 0,
  limit: int = 0,
  report: Callable[[str], None] = print,
  **options: Any,
) -> dict[str, int]:
  """`write`, by the names of what is asked; for the command line.

  Args:
    to: a folder that is not there yet.
    backend: a working directory, or the address of an endpoint.
    principles: a file of them.
    source: of prompts.
    model: its name at the endpoint.
    key_env: the environment variable that holds the endpoint's key.
    judge: what prefers, as `backend`; '': the same.
    judge_model: its name at its endpoint.
    judge_key_env: the variable of its key.
    cache: a file of replies; '': TO.replies.jsonl, beside the folder.
    max_calls: of both, in all; 0: any number.
    max_tokens: of both, in all; 0: any number.
    limit: prompts; 0: all.
    report: is told how far it is.
    **options: those of `Options`.
  """
  to = pathlib.Path(to).expanduser()
  if to.exists():
    raise UserError(f'--to={to}: is there already; name a new folder')
  cache = cache or str(to.with_name(f'{to.name}.replies.jsonl'))
  limits = {'max_calls': max_calls, 'max_tokens': max_tokens}
  with backends.make(backend, model, key_env, cache=cache, **limits) as asked:
    arguments = (asked, principles, source, to)
    if not judge:
      return write(*arguments, limit=limit, report=report, **options)
    with backends.make(
      judge, judge_model, judge_key_env, cache=cache, ledger=asked.ledger
    ) as other:
      return write(
        *arguments, judge=other, limit=limit, report=report, **options
      )
