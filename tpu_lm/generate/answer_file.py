"""A model's answers to a file of prompts, as conversations to train on.

Fine-tuning on them (stage sft) is distillation at the level of sequences
(Kim & Rush, arXiv 1606.07947, section 3.2, with the likeliest answer of
greedy decoding in place of beam search).
"""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tpu_lm import scoring, start
from tpu_lm.data import chat, files, records, sources
from tpu_lm.errors import UserError
from tpu_lm.generate import answers
from tpu_lm.generate.sampler import Sampler


class Best(NamedTuple):
  """Which of several answers is written; see `scoring` for the reward."""

  count: int = 1
  reward: str = ''
  least: float = 0.0  # what is not above it is left out


def questions(source: str) -> Iterator[tuple[records.Question, Any]]:
  """What the records of `source` ask, and the records.

  Raises:
    UserError: a record asks nothing; file and line are named.
  """
  found = sources.open(source, '').records(files.Reading())
  for origin, record in found:
    try:
      yield records.question(record), record
    except ValueError as error:
      raise UserError(f'{origin}: {error}') from error


def write(
  workdir: pathlib.Path,
  source: str,
  to: pathlib.Path,
  *,
  sampler: Sampler,
  max_new_tokens: int,
  seed: int,
  base: str = '',
  best: Best = Best(),  # noqa: B008
) -> None:
  """Writes {"messages": […]} lines; answers that were cut off are left out.

  With a reward the best of several answers is written if it is good enough:
  rejection sampling (RFT, arXiv 2308.01825, section 3.3, which keeps all).

  Args:
    workdir: of the model that answers.
    source: as `data.source`; any form of record, answers in it are ignored.
    to: a file that is not there yet.
    sampler: how tokens are drawn.
    max_new_tokens: of an answer.
    seed: of the drawing.
    base: where the base of an adapter lies now.
    best: of how many answers, and by what.

  Raises:
    UserError: the source cannot be read, `to` is there, or no answer ended.
  """
  if to.exists():
    raise UserError(f'--to={to}: is there already; name a new file')
  _check(best, sampler)
  asked = list(questions(source))
  if not asked:
    raise UserError(f'--source={source}: holds no records')
  loaded = start.load(workdir, base=base)
  template = chat.load('', loaded.tokenizer, workdir / 'tokenizer')
  found = answers.answers(
    loaded,
    template,
    [question.messages for question, _ in asked],
    tools=[question.tools for question, _ in asked],
    max_new_tokens=max_new_tokens,
    sampler=sampler,
    seed=seed,
    copies=best.count,
  )
  repeated = [one for one in asked for _ in range(best.count)]
  chosen = _chosen(repeated, found, best)
  lines = [_line(repeated[i][0], found[i].text) for i in chosen]
  if not lines:
    why = (
      f'is better than --least={best.least:g}'
      if any(one.finished for one in found)
      else f'ended within {max_new_tokens} tokens; is it fine-tuned on '
      'conversations? Raise --max_new_tokens otherwise'
    )
    raise UserError(f'{workdir}: none of its {len(found)} answers {why}')
  partial = to.with_name(f'{to.name}.tmp')
  partial.write_text(''.join(lines), encoding='utf-8')
  os.replace(partial, to)
  left_out = f'cut off at {max_new_tokens} tokens or empty'
  if best.reward:
    left_out += f', or not better than {best.least:g}'
  without = len(asked) - len(lines)
  print(
    f'{to}: {len(lines):,} answers; of {without:,} prompts they were '
    f'{left_out}, and are left out'
  )


def _check(best: Best, sampler: Sampler) -> None:
  if best.count > 1 and not best.reward:
    raise UserError(f'--best_of={best.count}: needs a --reward to choose by')
  if best.count > 1 and not sampler.temperature:
    raise UserError(
      f'--best_of={best.count}: at --temperature=0 all answers are the same'
    )


def _chosen(
  asked: list[tuple], found: list[answers.Answer], best: Best
) -> list[int]:
  """The number of the answer that is written, for each prompt that has one."""
  usable = np.array([one.finished and bool(one.text.strip()) for one in found])
  rewards = np.where(usable, np.inf, -np.inf)
  if best.reward:
    samples = [
      scoring.Sample(
        question.messages, one.text, record, len(one.tokens), one.finished
      )
      for (question, record), one in zip(asked, found, strict=True)
    ]
    with scoring.parse(best.reward, '--reward') as judge:
      rewards = np.where(usable, judge(samples).total, -np.inf)
    rewards = np.where(rewards > best.least, rewards, -np.inf)  # nor NaN
  groups = rewards.reshape(-1, best.count)
  firsts = np.arange(len(groups)) * best.count + groups.argmax(axis=1)
  return firsts[groups.max(axis=1) > -np.inf].tolist()


def _line(question: records.Question, text: str) -> str:
  messages = [*question.messages, {'role': 'assistant', 'content': text}]
  record: dict[str, Any] = {'messages': messages}
  if question.tools:
    record['tools'] = question.tools
  return json.dumps(record, ensure_ascii=False) + '\n'
