"""Rows of answers behind their prompts, made while a program runs."""

from collections.abc import Sequence

import numpy as np

from tpu_lm.data import loader

_SMALLEST = 32  # tokens of a row; shorter ones are not worth a program


def rows(
  prompts: Sequence[Sequence[int]],
  answers: Sequence[Sequence[int]],
  pad_id: int = 0,
) -> dict[str, np.ndarray]:
  """The columns tokens, loss_mask, segment_ids and positions, [N, L+1].

  The mask is on the answers. L is rounded up to a quarter of a power of two, so
  that few shapes are compiled.

  Args:
    prompts: ids of each prompt, at least one.
    answers: ids of each answer, its stop token included.
    pad_id: stands behind them.
  """
  sizes = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
  # A slot stays empty: what is read at the last token is read before it.
  step = max(_SMALLEST, (1 << (max(sizes) - 1).bit_length()) // 4)
  length = -(-max(sizes) // step) * step
  shape = len(sizes), length + 1
  columns = {
    'tokens': np.full(shape, pad_id, np.int32),
    'loss_mask': np.zeros(shape, bool),
    'segment_ids': np.zeros(shape, np.int32),
  }
  for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    columns['tokens'][row, : sizes[row]] = [*prompt, *answer]
    columns['loss_mask'][row, len(prompt) : sizes[row]] = True
    columns['segment_ids'][row, : sizes[row]] = 1
  columns['positions'] = loader.positions(columns['segment_ids'])
  return columns


def beside(
  columns: dict[str, np.ndarray], values: Sequence[Sequence[float]]
) -> np.ndarray:
  """Float32 [N, L]: a number for each token of the answers, at its target."""
  found = np.zeros(columns['loss_mask'][:, 1:].shape, np.float32)
  found[columns['loss_mask'][:, 1:]] = np.concatenate(values)
  return found
