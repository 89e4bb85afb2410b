"""Attention of decoding: keys and values that are kept, and queries to them.

What is seen is as in attention.py: all earlier tokens of a row, or those of a
window. A row's tokens stand in a ring of slots, one for each key-value head;
in a sliding layer the ring need not be longer than its window. What several
rows begin with may be kept once for all of them, as a prefix.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpu_lm import target

_MASKED = -1e30  # finite: rows that see nothing must not become NaN


class Slots(NamedTuple):
  """Kept keys and values of one layer: a ring of S slots, maybe a prefix.

  On a CPU rows and groups are one axis (`slot_shape`). Keys have their slots
  last: so XLA:CPU's product with a query was twice as fast. In 8 bits each key
  and each value has a scale of its own.
  """

  k: jax.Array  # [B, G, K, S]
  v: jax.Array  # [B, G, S, K]
  k_scale: jax.Array | None = None  # [B, G, 1, S]; None: not quantised
  v_scale: jax.Array | None = None  # [B, G, S, 1]
  # What the rows of a group have in common; its last token stands last.
  prefix_k: jax.Array | None = None  # [groups, G, K, P]
  prefix_v: jax.Array | None = None  # [groups, G, P, K]


class Cache(NamedTuple):
  """What is kept of earlier tokens."""

  layers: tuple[Slots, ...]
  # int32 []: tokens written by now where all rows write into one slot, which
  # costs least; None: a row's position says its slot.
  clock: jax.Array | None = None
  prefix_B: jax.Array | None = None  # int32: tokens of each row's prefix


def init_cache(
  config: Any,
  batch: int,
  length: int,
  at_once: int = 0,
  quantised: bool = False,
) -> Cache:
  """An empty cache, of which positions say the slots.

  Args:
    config: of the network.
    batch: rows.
    length: the most tokens a row will have.
    at_once: the most tokens that are written at once; a sliding layer then
      has slots for its window and these only. 0: any number.
    quantised: keys and values in 8 bits.
  """
  heads, size = config.kv_heads, config.head_size
  dtype = jnp.int8 if quantised else jnp.dtype(config.dtype)
  layers = []
  for window in config.windows:
    rolls = window and at_once
    slots = min(window + at_once - 1, length) if rolls else length
    scales = {}
    shape = functools.partial(slot_shape, batch, heads)
    if quantised:
      scales['k_scale'] = jnp.ones(shape(1, slots), jnp.float32)
      scales['v_scale'] = jnp.ones(shape(slots, 1), jnp.float32)
    k = jnp.zeros(shape(size, slots), dtype)
    v = jnp.zeros(shape(slots, size), dtype)
    layers.append(Slots(k, v, **scales))
  return Cache(tuple(layers))


def slot_shape(rows: int, groups: int, *rest: int) -> tuple[int, ...]:
  """[B, G, …], or [B * G, …] on a CPU.

  XLA:CPU multiplies over one axis of matrices; where it had to merge two, it
  copied the whole cache at each step.
  """
  if target.platform() == 'cpu':
    return (rows * groups, *rest)
  return (rows, groups, *rest)


def quantised(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  """(int8, float32 scales), symmetric, one scale along `axis`."""
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(axis, keepdims=True) / 127.0
  scale = jnp.where(scale == 0.0, 1.0, scale)
  return jnp.round(x / scale).astype(jnp.int8), scale


def write(
  slots: Slots, k_BLGK: jax.Array, v_BLGK: jax.Array, at: jax.Array
) -> Slots:
  """Writes the keys and values of L tokens a row into the ring.

  Args:
    slots: of the rows.
    k_BLGK: keys.
    v_BLGK: values.
    at: int, where the first token stands in a ring without an end: [B], or []
      where all rows stand alike and L is 1. Token i goes to slot i mod S.
  """
  rows, length, groups = k_BLGK.shape[:3]
  new = {'k': jnp.transpose(k_BLGK, (0, 2, 3, 1)), 'v': v_BLGK.swapaxes(1, 2)}
  if slots.k_scale is not None:
    new['k'], new['k_scale'] = quantised(new['k'], 2)
    new['v'], new['v_scale'] = quantised(new['v'], 3)

  def put(name: str, x: jax.Array) -> jax.Array:
    kept = getattr(slots, name)
    axis = kept.ndim - (1 if name.startswith('k') else 2)
    size = kept.shape[axis]
    x = x.astype(kept.dtype)
    if not at.ndim:
      x = x.reshape(*kept.shape[:-2], *x.shape[-2:])
      return jax.lax.dynamic_update_slice_in_dim(kept, x, at % size, axis)
    flat = kept.reshape(rows * groups, *kept.shape[-2:])
    x = x.reshape(rows * groups, *x.shape[-2:])
    at_RL = jnp.repeat((at[:, None] + jnp.arange(length)) % size, groups, 0)
    row_R1 = jnp.arange(rows * groups)[:, None]
    if name.startswith('k'):  # what is indexed comes first
      flat = flat.at[row_R1, :, at_RL].set(x.swapaxes(1, 2))
    else:
      flat = flat.at[row_R1, at_RL].set(x)
    return flat.reshape(kept.shape)

  return slots._replace(**{name: put(name, x) for name, x in new.items()})


def read(
  q_BLHK: jax.Array,
  slots: Slots,
  positions_BL: jax.Array,
  at: jax.Array,
  *,
  prefix_B: jax.Array | None = None,
  window: int | None = None,
  soft_cap: float = 0.0,
  scale: float,
) -> jax.Array:
  """Attends from the tokens that `write` wrote last to all that are kept.

  Args:
    q_BLHK: queries.
    slots: of the rows.
    positions_BL: of the queries: consecutive.
    at: as given to `write`.
    prefix_B: how many positions of its group's prefix a row has; None: there
      is no prefix.
    window: how many positions a query sees, its own included; None: all.
    soft_cap: see attention.py.
    scale: factor on the logits, before the cap.

  Returns:
    out_BLHK, of the queries' dtype.
  """
  num_rows, length, _, size = q_BLHK.shape
  num_groups = math.prod(slots.k.shape[:-2]) // num_rows
  num_slots = slots.k.shape[-1]
  q_BGMLK = jnp.moveaxis(
    q_BLHK.reshape(num_rows, length, num_groups, -1, size), 1, 3
  )
  lead = q_BGMLK.shape[:4]
  q_BGQK = q_BGMLK.reshape(*lead[:2], -1, size)
  rule = positions_BL, window, soft_cap, scale
  ages = ((at + length - 1)[..., None] - jnp.arange(num_slots)) % num_slots
  keys_BS = positions_BL[:, -1:] - ages
  begin = 0 if prefix_B is None else prefix_B[:, None]
  scores = _scores(q_BGQK, slots.k, slots.k_scale).reshape(*lead, -1)
  logits = [_masked(scores, keys_BS, keys_BS >= begin, rule)]
  if prefix_B is not None:
    count = math.prod(slots.prefix_k.shape[:-2]) // num_groups
    scores = _scores(_joined(q_BGQK, count), slots.prefix_k, None)
    keys_BS = begin + jnp.arange(-scores.shape[-1], 0)
    scores = _parted(scores, num_rows).reshape(*lead, -1)
    logits.append(_masked(scores, keys_BS, keys_BS >= 0, rule))
  top = functools.reduce(
    jnp.maximum, [x.max(-1, keepdims=True) for x in logits]
  )
  ps = [jnp.exp(x - top) for x in logits]
  norm = functools.reduce(jnp.add, [p.sum(-1, keepdims=True) for p in ps])
  ps = [p.reshape(*lead[:2], -1, p.shape[-1]) for p in ps]
  out_BGQK = _mixed(ps[0], slots.v, slots.v_scale)
  if prefix_B is not None:
    out = _mixed(_joined(ps[1], count), slots.prefix_v, None)
    out_BGQK += _parted(out, num_rows)
  out_BGMLK = out_BGQK.reshape(q_BGMLK.shape) / norm
  out_BLHK = jnp.moveaxis(out_BGMLK, 3, 1).reshape(q_BLHK.shape)
  return out_BLHK.astype(q_BLHK.dtype)


def _masked(scores_BGMLS, keys_BS, exists_BS, rule) -> jax.Array:
  """Logits; those of what a query does not see are `_MASKED`."""
  positions_BL, window, soft_cap, scale = rule
  logits = scale * scores_BGMLS
  if soft_cap:
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  gap_BLS = positions_BL[:, :, None] - keys_BS[:, None]
  seen_BLS = exists_BS[:, None] & (gap_BLS >= 0)
  if window is not None:
    seen_BLS &= gap_BLS < window
  return jnp.where(seen_BLS[:, None, None], logits, _MASKED)


def _scores(q_BGQK, k, scale) -> jax.Array:
  """[B, G, Q, S] of keys as slots hold them."""
  q = q_BGQK.reshape(*k.shape[:-2], *q_BGQK.shape[-2:])
  scores = _matmul('...QK,...KS->...QS', q, k.astype(q.dtype))
  scores = scores if scale is None else scores * scale
  return scores.reshape(*q_BGQK.shape[:-1], -1)


def _mixed(p_BGQS, v, scale) -> jax.Array:
  """[B, G, Q, K] of values as slots hold them."""
  p = p_BGQS.reshape(*v.shape[:-2], *p_BGQS.shape[-2:])
  dtype = v.dtype
  if scale is not None:
    p, dtype = p * jnp.swapaxes(scale, -1, -2), p.dtype
  out = _matmul('...QS,...SK->...QK', p.astype(dtype), v.astype(dtype))
  return out.reshape(*p_BGQS.shape[:-1], -1)


def _joined(x_BGQK, count: int) -> jax.Array:
  """Queries of the rows of each of `count` groups of rows side by side."""
  x = x_BGQK.reshape(count, -1, *x_BGQK.shape[1:])
  x = jnp.swapaxes(x, 1, 2)
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _parted(x, num_rows: int) -> jax.Array:
  """Undoes `_joined`."""
  count, groups, _, size = x.shape
  x = x.reshape(count, groups, num_rows // count, -1, size)
  return jnp.swapaxes(x, 1, 2).reshape(num_rows, groups, -1, size)


def _matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
