"""Held-out loss, perplexity and bits per byte of a language model.

Bits per byte, comparable across tokenizers: the code length of the text in
bits (nats / ln 2, ends of documents included) over its UTF-8 bytes. Every
token of the held-out rows is scored exactly once (rows overlap by a token).

Batch columns (numpy, [B, L+1]): tokens, loss_mask, segment_ids. A target
counts where loss_mask is set and the token before it is of the same document.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from tpu_lm import processes, reading, sharding
from tpu_lm.errors import UserError
from tpu_lm.stages import pretrain

Batch = Mapping[str, np.ndarray]


def counted(batch: Batch) -> np.ndarray:
  """Returns bool [B, L]: which of the targets tokens[:, 1:] are scored."""
  segment_ids = np.asarray(batch['segment_ids'])
  within = segment_ids[:, 1:] == segment_ids[:, :-1]
  inputs = segment_ids[:, :-1] != 0
  return np.asarray(batch['loss_mask'])[:, 1:].astype(bool) & within & inputs


def num_bytes(batch: Batch, token_bytes: np.ndarray) -> int:
  """Returns the UTF-8 bytes of the scored targets.

  Args:
    batch: the columns.
    token_bytes: int [V], bytes that each id stands for; 0 for specials.
  """
  targets = np.asarray(batch['tokens'])[:, 1:][counted(batch)]
  return int(token_bytes[targets].sum(dtype=np.int64))


def evaluate(
  totals: Callable[[Batch], tuple[jax.Array, jax.Array]],
  batches: Iterable[Batch],
  token_bytes: np.ndarray,
  stop: Callable[[], bool] = lambda: False,
  part: tuple[int, int] = (0, 1),
) -> dict[str, float] | None:
  """Scores held-out rows.

  Batches are summed in float32 on the device and together in float64 here. A
  batch is dispatched before the result of the one before it is read.

  Args:
    totals: a batch of this process -> (nats, targets) summed over the rows of
      all processes; jitted and sharded by the caller.
    batches: this process's rows, each once.
    token_bytes: see `num_bytes`.
    stop: asked after each batch; if it says so the evaluation is given up.
      Processes must agree on it.
    part: of the rows, that these batches are; see `processes.share`.

  Returns:
    loss (nats a token), perplexity, bits_per_byte, tokens and bytes; or None
    if it was stopped.

  Raises:
    UserError: the rows hold no text to score.
  """
  nats, tokens, size = 0.0, 0.0, 0
  pending = None
  for batch in batches:
    size += num_bytes(batch, token_bytes)
    dispatched = totals(batch)
    if pending:
      nats, tokens = nats + float(pending[0]), tokens + float(pending[1])
    pending = dispatched
    if stop():
      return None
  if pending:
    nats, tokens = nats + float(pending[0]), tokens + float(pending[1])
  size = sum(dict(processes.gathered((part, size))).values())
  if not tokens or not size:
    raise UserError(
      f'held-out data: {tokens:.0f} tokens and {size} bytes to score; make '
      'data.heldout_share larger or give a data.heldout_source with text'
    )
  return result(nats, tokens, size)


def result(nats: float, tokens: float, size: int) -> dict[str, float]:
  """Returns the figures of `evaluate` from the sums over all the text."""
  loss = nats / tokens
  try:
    perplexity = math.exp(loss)
  except OverflowError:
    perplexity = math.inf
  return {
    'loss': loss,
    'perplexity': perplexity,
    'bits_per_byte': nats / math.log(2) / size,
    'tokens': int(tokens),
    'bytes': size,
  }


def totals_of(model: Any, mesh: Any) -> Callable[..., tuple]:
  """Returns (params, batch of this process) -> (nats, targets), sharded."""
  loss = pretrain.make(model, None).loss
  jitted = jax.jit(lambda params, batch: loss(params, batch, None)[0])

  def totals(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    with jax.set_mesh(mesh):
      return jitted(params, sharding.put_batch(batch, mesh))

  return totals


def make(run: Any, rows: pathlib.Path) -> Callable[[Any], dict | None]:
  """The evaluation that a run does: params -> figures of its held-out rows."""
  loader, num_batches = reading.heldout(run, rows)
  totals = totals_of(run.model, run.mesh)

  def evaluate_params(params: Any) -> dict[str, float] | None:
    return evaluate(
      functools.partial(totals, params),
      loader.prefetch(0, num_batches - 1),
      run.tokenizer.token_bytes,
      stop=run.stop_evaluation,
      part=loader.part,
    )

  return evaluate_params
