"""Rows of answers behind their prompts, made while a program runs.

A row is a prompt and one answer, one segment; or a prompt and several answers.
Then the prompt up to its last token is a segment that all others see
(attention.SHARED), and segment 1, 2, … is the prompt's last token and an answer
to it, so that each answer is read as if it stood alone behind the prompt, and
the prompt is computed once.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tpu_lm.buckets import room_for
from tpu_lm.models.attention import SHARED

_SMALLEST = 32  # tokens of a row; shorter ones are not worth a program


class _Piece(NamedTuple):
  """Of a row."""

  ids: list[int]
  segment: int
  position: int  # of the first
  num_given: int  # so many are not the answer's


def rows(
  prompts: Sequence[Sequence[int]],
  answers: Sequence[Sequence[int]],
  pad_id: int = 0,
  together: int = 1,
  most: int = 0,
) -> dict[str, np.ndarray]:
  """The columns tokens, loss_mask, segment_ids and positions, [B, L+1].

  The mask is on the answers. L is rounded up to an eighth of a power of two, so
  that few shapes are compiled.

  Args:
    prompts: ids of the prompt of each answer, at least one.
    answers: ids of each answer, its stop token included.
    pad_id: stands behind them.
    together: so many answers, which stand side by side and have one prompt,
      make a row, G. If it is not 1, there is one column more: `answer_at`,
      int32 [B, G, A], where among the targets the answers' tokens are.
    most: tokens an answer may have; A is not less.
  """
  made = [
    list(_pieces(prompts[first], answers[first : first + together], together))
    for first in range(0, len(answers), together)
  ]
  sizes = [sum(len(piece.ids) for piece in row) for row in made]
  # A slot stays empty: what is read at the last token is read before it.
  shape = len(made), room_for(max(sizes), _SMALLEST) + 1
  columns = {
    'tokens': np.full(shape, pad_id, np.int32),
    'loss_mask': np.zeros(shape, bool),
    'segment_ids': np.zeros(shape, np.int32),
    'positions': np.zeros(shape, np.int32),
  }
  if together > 1:
    # Where an answer has no token, the last target: never in the mask.
    longest = max(most, *map(len, answers))
    at = np.full((len(made), together, longest), shape[1] - 2, np.int32)
    columns['answer_at'] = at
  for row, pieces in enumerate(made):
    begin = 0
    for piece in pieces:
      end, first = begin + len(piece.ids), begin + piece.num_given
      columns['tokens'][row, begin:end] = piece.ids
      columns['loss_mask'][row, first:end] = True
      columns['segment_ids'][row, begin:end] = piece.segment
      columns['positions'][row, begin:end] = piece.position + np.arange(
        end - begin
      )
      if together > 1 and piece.segment != SHARED:
        at[row, piece.segment - 1, : end - first] = np.arange(first, end) - 1
      begin = end
  return columns


def _pieces(prompt, answers, together: int) -> Iterator[_Piece]:
  *before, last = prompt
  if together == 1:
    yield _Piece([*prompt, *answers[0]], 1, 0, len(prompt))
    return
  yield _Piece(before, SHARED, 0, len(before))
  for n, answer in enumerate(answers, 1):
    yield _Piece([last, *answer], n, len(before), 1)


def keep(columns: dict[str, np.ndarray], kept_N: np.ndarray) -> None:
  """Takes answers out of the mask, but for those (of N) that are True."""
  kept_BG = kept_N.reshape(len(columns['tokens']), -1)
  number = np.maximum(columns['segment_ids'], 1) - 1
  columns['loss_mask'] &= np.take_along_axis(kept_BG, number, axis=1)


def beside(
  columns: dict[str, np.ndarray], values: Sequence[Sequence[float]]
) -> np.ndarray:
  """Float32 [B, L]: a number for each token of the answers, at its target."""
  found = np.zeros(columns['loss_mask'][:, 1:].shape, np.float32)
  found[columns['loss_mask'][:, 1:]] = np.concatenate(values)
  return found
