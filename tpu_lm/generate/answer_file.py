"""A model's answers to a file of prompts, as conversations to train on.

Fine-tuning on them (stage sft) is distillation at the level of sequences
(Kim & Rush, arXiv 1606.07947, section 3.2, with the likeliest answer of
greedy decoding in place of beam search).
"""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from tpu_lm import start
from tpu_lm.data import chat, files, records, sources
from tpu_lm.errors import UserError
from tpu_lm.generate import answers
from tpu_lm.generate.sampler import Sampler


def questions(source: str) -> Iterator[records.Question]:
  """What the records of `source` ask.

  Raises:
    UserError: a record asks nothing; file and line are named.
  """
  found = sources.open(source, '').records(files.Reading())
  for origin, record in found:
    try:
      yield records.question(record)
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
) -> None:
  """Writes {"messages": […]} lines; answers that were cut off are left out.

  Args:
    workdir: of the model that answers.
    source: as `data.source`; any form of record, answers in it are ignored.
    to: a file that is not there yet.
    sampler: how tokens are drawn.
    max_new_tokens: of an answer.
    seed: of the drawing.
    base: where the base of an adapter lies now.

  Raises:
    UserError: the source cannot be read, `to` is there, or no answer ended.
  """
  if to.exists():
    raise UserError(f'--to={to}: is there already; name a new file')
  asked = list(questions(source))
  if not asked:
    raise UserError(f'--source={source}: holds no records')
  loaded = start.load(workdir, base=base)
  template = chat.load('', loaded.tokenizer, workdir / 'tokenizer')
  found = answers.answers(
    loaded,
    template,
    [question.messages for question in asked],
    tools=[question.tools for question in asked],
    max_new_tokens=max_new_tokens,
    sampler=sampler,
    seed=seed,
  )
  lines = [
    _line(question, one.text)
    for question, one in zip(asked, found, strict=True)
    if one.finished and one.text.strip()
  ]
  if not lines:
    raise UserError(
      f'{workdir}: none of its {len(asked)} answers ended within '
      f'{max_new_tokens} tokens; is it fine-tuned on conversations? Raise '
      '--max_new_tokens otherwise'
    )
  partial = to.with_name(f'{to.name}.tmp')
  partial.write_text(''.join(lines), encoding='utf-8')
  os.replace(partial, to)
  print(
    f'{to}: {len(lines):,} answers; {len(asked) - len(lines):,} were cut off '
    f'at {max_new_tokens} tokens or empty, and are left out'
  )


def _line(question: records.Question, text: str) -> str:
  messages = [*question.messages, {'role': 'assistant', 'content': text}]
  record: dict[str, Any] = {'messages': messages}
  if question.tools:
    record['tools'] = question.tools
  return json.dumps(record, ensure_ascii=False) + '\n'
