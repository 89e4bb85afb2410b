"""What stages that compare sequences share: two halves, slots, a reference.

A row holds several records, one a segment; segment s of all halves of a row
(chosen and rejected; a completion and its mismatch) is one record, and stands
in slot s - 1 of arrays [B, S]. A slot counts if each half has targets in it.

Both halves go through the network at once. They are interleaved along the row
axis, [B, 2, …] to [2B, …], so that each device keeps its own rows.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpu_lm import weights
from tpu_lm.stage import (
  Batch,
  Mean,
  Params,
  PrepareFn,
  adding,
  hidden_states,
  segment_sums,
  sequence_logps,
  target_weights,
)

PAIR = ('chosen_', 'rejected_')
_COLUMNS = ('tokens', 'loss_mask', 'segment_ids', 'positions')


class Logps(NamedTuple):
  """What whole sequences come to, a half; 0 in slots that do not count."""

  logps_BS: tuple[jax.Array, jax.Array]  # float32, log-probabilities or ratios
  counts_BS: tuple[jax.Array, jax.Array]  # float32, how many targets
  counted_BS: jax.Array  # bool

  @property
  def means_BS(self) -> tuple[jax.Array, jax.Array]:
    """The same a target."""
    pairs = zip(self.logps_BS, self.counts_BS, strict=True)
    return tuple(x / jnp.maximum(count, 1) for x, count in pairs)

  def over(self, reference_BS: Iterable[jax.Array]) -> 'Logps':
    """Log-ratios to the reference's log-probabilities, a half."""
    pairs = zip(self.logps_BS, reference_BS, strict=True)
    return self._replace(
      logps_BS=tuple(x - jnp.where(self.counted_BS, r, 0) for x, r in pairs)
    )

  def a_token(self, half: int) -> Mean:
    """The mean over all targets of a half."""
    return Mean(self.logps_BS[half].sum(), self.counts_BS[half].sum())


def rows_of(batch: Batch, prefix: str) -> Batch:
  """The rows of one half."""
  return {name: batch[prefix + name] for name in _COLUMNS}


def interleaved(batch: Batch, prefixes: tuple[str, str] = PAIR) -> Batch:
  """The two halves as rows [2B, L+1]: both of row 0, both of row 1, …"""
  return {
    name: jnp.stack([batch[p + name] for p in prefixes], axis=1).reshape(
      -1, *batch[prefixes[0] + name].shape[1:]
    )
    for name in _COLUMNS
  }


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Undoes `interleaved` for one array [2B, …]."""
  x = x.reshape(-1, 2, *x.shape[1:])
  return x[:, 0], x[:, 1]


def logps(
  model: Any,
  params: Params,
  batch: Batch,
  num_segments: int,
  prefixes: tuple[str, str] = PAIR,
) -> Logps:
  """The log-probabilities of both halves, by one program."""
  found, counts = (
    halves(x)
    for x in sequence_logps(
      model, params, interleaved(batch, prefixes), num_segments
    )
  )
  counted_BS = (counts[0] > 0) & (counts[1] > 0)
  found, counts = (
    tuple(jnp.where(counted_BS, x, 0) for x in pair) for pair in (found, counts)
  )
  return Logps(found, counts, counted_BS)


def rewards(
  model: Any, params: Params, rows: Batch, num_segments: int
) -> tuple[jax.Array, jax.Array]:
  """What the scalar head reads at the last token of each segment.

  Args:
    model: a network with `config.scalar_head`.
    params: its parameters.
    rows: columns [B, L+1] as in stage.py; slot L is padding, so that the
      network, which runs on the slots before it, sees all tokens.
    num_segments: S.

  Returns:
    (rewards_BS, counted_BS): float32, and bool: which segments have targets.
  """
  hidden_BLD = hidden_states(model, params, rows)
  here_BL, next_BL = rows['segment_ids'][:, :-1], rows['segment_ids'][:, 1:]
  last_BL = (here_BL != next_BL) & (here_BL != 0)
  hidden_BLD = jnp.where(last_BL[..., None], hidden_BLD, 0)
  # Not a matmul: TPUs would round its operands to bfloat16.
  read_BL = (hidden_BLD.astype(jnp.float32) * params['scalar_head']).sum(-1)
  seen_BS = segment_sums(last_BL, here_BL, num_segments) > 0
  targets_BS = segment_sums(target_weights(rows), next_BL, num_segments)
  rewards_BS = segment_sums(read_BL, here_BL, num_segments)
  return rewards_BS, seen_BS & (targets_BS > 0)


def mean(values_BS: jax.Array, counted_BS: jax.Array) -> Mean:
  """The mean over the slots that count; the others may hold anything."""
  counted_BS = jnp.broadcast_to(counted_BS, values_BS.shape)
  return Mean(
    jnp.where(counted_BS, values_BS, 0).sum(dtype=jnp.float32),
    counted_BS.sum(dtype=jnp.float32),
  )


def metrics(
  chosen_BS: jax.Array,
  rejected_BS: jax.Array,
  counted_BS: jax.Array,
  beta: float = 1.0,
) -> dict[str, Mean]:
  """How two halves compare; a reward is `beta` times what is given."""
  chosen_BS, rejected_BS = beta * chosen_BS, beta * rejected_BS
  values = {
    'accuracy': chosen_BS > rejected_BS,
    'margin': chosen_BS - rejected_BS,
    'chosen_reward': chosen_BS,
    'rejected_reward': rejected_BS,
  }
  return {name: mean(value, counted_BS) for name, value in values.items()}


def calibration(
  chosen_BS: jax.Array, rejected_BS: jax.Array, counted_BS: jax.Array
) -> dict[str, Mean]:
  """Whether sigmoid(r_c - r_r) is the share of pairs that it gets right.

  The Brier score is the mean of (1 - p)^2 (0.25 for a coin); the confidence,
  a mean of max(p, 1 - p), would equal the accuracy.
  """
  p_BS = jax.nn.sigmoid(chosen_BS - rejected_BS)
  return {
    'brier': mean(jnp.square(1 - p_BS), counted_BS),
    'confidence': mean(jnp.maximum(p_BS, 1 - p_BS), counted_BS),
  }


def referring(
  start: Callable[[], Params],
  logps: Callable[[Params, Batch], Iterable[jax.Array]],
  names: tuple[str, ...],
  on_the_fly: bool,
) -> PrepareFn:
  """A `prepare` that adds what the reference makes of a batch.

  The reference is what the stage starts from, without adapters. Where its
  columns are kept by the run, it is fetched only if they are missing, so that
  it takes no memory in the steps.

  Args:
    start: as a stage's `make` has it.
    logps: (reference, batch) -> the columns; it is jitted.
    names: of these columns.
    on_the_fly: whether they are computed in every step.
  """
  reference = weights.reference(start)
  if on_the_fly:
    reference()  # `start` may be called before the first update only

  @jax.jit
  def columns(reference, batch):
    return dict(zip(names, logps(reference, batch), strict=True))

  return adding(names, lambda batch: columns(reference(), batch))
