"""Answers to prompts, and what they are worth, on the host."""

import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpu_lm import scoring
from tpu_lm.data import prompts
from tpu_lm.generate import engine


class Answers(NamedTuple):
  """N answers, those to one prompt side by side."""

  prompts: list[prompts.Prompt]  # one an answer
  ids: list[list[int]]  # of the prompt
  found: list[engine.Completion]
  scored: scoring.Scored | None

  def taken(self, order: Sequence[int]) -> 'Answers':
    """The answers of these numbers, in this order."""
    lists = ([column[i] for i in order] for column in self[:3])
    return Answers(*lists, self.scored and _taken(self.scored, order))

  def replaced(self, other: 'Answers', where_N: np.ndarray) -> 'Answers':
    """With the answers of `other` where the mask says."""
    order = np.arange(len(where_N))
    order[where_N] = len(order) + np.arange(len(other.found))
    scored = joined([self.scored, other.scored])
    lists = (a + b for a, b in zip(self[:3], other[:3], strict=True))
    return Answers(*lists, scored).taken(order)

  def evened(self, group: int, together: int) -> 'Answers':
    """In an order that gives rows of `together` answers like lengths.

    The answers to a prompt, longest first, are dealt out to its rows, forth
    and back.
    """
    num_rows = group // together
    dealt = np.arange(group).reshape(together, num_rows)
    dealt[1::2] = dealt[1::2, ::-1]
    lengths_PG = np.array([len(one.tokens) for one in self.found])
    by_length_PG = np.argsort(-lengths_PG.reshape(-1, group), kind='stable')
    order_PG = by_length_PG[:, dealt.T.reshape(-1)]
    firsts_P1 = np.arange(len(order_PG))[:, None] * group
    return self.taken((firsts_P1 + order_PG).reshape(-1))

  def write(self, path: pathlib.Path, step: int, decode: Callable) -> None:
    """Writes one answer a line, as JSON."""
    partial = path.with_suffix('.tmp')
    with open(partial, 'w', encoding='utf-8') as file:
      for line in self._lines(step, decode):
        file.write(json.dumps(line, ensure_ascii=False) + '\n')
    partial.replace(path)

  def _lines(self, step: int, decode: Callable) -> Iterator[dict[str, Any]]:
    scored = self.scored
    for i, one in enumerate(self.found):
      line = {
        'step': step,
        'prompt': self.prompts[i].messages,
        'text': decode(one.tokens),
        'tokens': one.tokens,
        'finished': one.finished,
      }
      if scored:
        line['reward'] = _number(scored.total[i])
        line['rewards'] = {k: _number(v[i]) for k, v in scored.values.items()}
        line['notes'] = {k: v[i] for k, v in scored.notes.items() if v[i]}
      yield line


class Started(NamedTuple):
  """Answers that are being scored."""

  numbers: list[int]
  futures: list[Any]  # of the reward, and of the true one


def gathered(parts: list[Started]) -> scoring.Scored:
  """Waits for all that has been started; in the order of the answers."""
  order = np.argsort(np.concatenate([part.numbers for part in parts]))
  whole = joined([part.futures[0].result() for part in parts])
  true = [f.result().total for part in parts for f in part.futures[1:]]
  if true:
    whole.values['true'] = np.concatenate(true)
  return _taken(whole, order)


def _taken(scored: scoring.Scored, order: Sequence[int]) -> scoring.Scored:
  return scoring.Scored(
    scored.total[order],
    {name: column[order] for name, column in scored.values.items()},
    {name: column[order] for name, column in scored.parsed.items()},
    {name: [notes[i] for i in order] for name, notes in scored.notes.items()},
  )


def joined(parts: Sequence[scoring.Scored]) -> scoring.Scored | None:
  """What has been scored in parts, one behind the other; None of nothing."""
  if len(parts) < 2:
    return parts[0] if parts else None

  def each(get: Callable) -> dict[str, np.ndarray]:
    columns = [get(one) for one in parts]
    return {
      name: np.concatenate([column[name] for column in columns])
      for name in columns[0]
    }

  return scoring.Scored(
    np.concatenate([one.total for one in parts]),
    each(lambda one: one.values),
    each(lambda one: one.parsed),
    {k: v.tolist() for k, v in each(lambda one: one.notes).items()},
  )


def _number(value: float) -> float | None:
  return None if np.isnan(value) else float(value)
