"""Keeps a bad step from touching parameters and optimizer state.

A step is bad when its loss or gradient norm is not finite, or when its loss
is a spike: more than `spike_factor` standard deviations above the mean of the
last `window` accepted losses. What a bad step would have written is dropped
by selecting the old values, never by multiplying with zero (0 * NaN is NaN).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpu_lm.errors import UserError


class Guard(NamedTuple):
  """Counters, kept with the training state and checkpointed with it."""

  losses: jax.Array  # float32 [window], the last accepted losses; all finite
  accepted: jax.Array  # int32 [], how many steps were accepted
  skipped: jax.Array  # int32 [], how many were not
  in_a_row: jax.Array  # int32 [], how many were not since the last one


def init(window: int) -> Guard:
  """A guard that has seen nothing; `window` steps must pass before spikes."""
  if window < 2:
    raise UserError(f'guard.window={window}: must be at least 2')
  zero = jnp.zeros((), jnp.int32)
  return Guard(jnp.zeros(window, jnp.float32), zero, zero, zero)


def judge(
  guard: Guard, loss: jax.Array, norm: jax.Array, spike_factor: float
) -> tuple[jax.Array, Guard]:
  """Returns (whether the step may be applied, the guard after it)."""
  ok = jnp.isfinite(loss) & jnp.isfinite(norm)
  if spike_factor:
    limit = guard.losses.mean() + spike_factor * guard.losses.std()
    full = guard.accepted >= guard.losses.size
    ok = ok & ~(full & (loss > limit))
  slot = guard.accepted % guard.losses.size
  written = guard.losses.at[slot].set(jnp.where(ok, loss, 0.0))
  one = jnp.where(ok, 0, 1)
  return ok, Guard(
    losses=jnp.where(ok, written, guard.losses),
    accepted=guard.accepted + 1 - one,
    skipped=guard.skipped + one,
    in_a_row=(guard.in_a_row + 1) * one,
  )


def select(ok: jax.Array, new: Any, old: Any) -> Any:
  """`new` where `ok`, else `old`, bit for bit."""
  return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
