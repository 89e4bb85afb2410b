"""Attention to what is kept against attention to the whole rows."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm.models import attention, ring

ROWS, LENGTH, HEADS, GROUPS, SIZE = 2, 12, 4, 2, 8
RULE = {'scale': 0.4, 'soft_cap': 3.0}


class Shape:
  """What `init_cache` asks of a configuration."""

  kv_heads, head_size, dtype = GROUPS, SIZE, 'float32'

  def __init__(self, window):
    self.windows = (window,)


def inputs():
  draw = np.random.default_rng(0)
  return [
    draw.normal(size=(ROWS, LENGTH, heads, SIZE)).astype(np.float32)
    for heads in (HEADS, GROUPS, GROUPS)
  ]


def decoded(at_once, window, clock_begins=None, quantised=False):
  """Attention of all tokens, written and read `at_once` at a time."""
  q, k, v = inputs()
  cache = ring.init_cache(Shape(window), ROWS, LENGTH, at_once, quantised)
  (slots,) = cache.layers

  @tiny.jit
  def step(slots, q, k, v, positions, at):
    slots = ring.write(slots, k, v, at)
    out = ring.read(q, slots, positions, at, window=window or None, **RULE)
    return slots, out

  found = []
  for i in range(0, LENGTH, at_once):
    now = (slice(None), slice(i, i + at_once))
    positions = np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH))[now]
    at = positions[:, 0]
    if clock_begins is not None:
      at = jnp.int32(clock_begins + i)
    slots, out = step(slots, q[now], k[now], v[now], positions, at)
    found.append(out)
  return slots, np.concatenate(found, axis=1)


@pytest.mark.parametrize('window', [0, 3, 5])
@pytest.mark.parametrize(
  ('at_once', 'clock_begins'), [(1, None), (3, None), (1, 0), (1, 7)]
)
def test_it_is_attention_to_the_whole_row(window, at_once, clock_begins):
  """Rings that are run through several times; a clock that is ahead."""
  slots, found = decoded(at_once, window, clock_begins)
  expected = attention.attend(*inputs(), window=window or None, **RULE)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert slots.k.shape[-1] == (window + at_once - 1 if window else LENGTH)


def test_8_bits_are_off_by_half_a_step():
  x = jnp.array([[0.0, 1.27, -0.333], [0.0, 0.0, 0.0]])
  values, scales = ring.quantised(x, 1)
  assert values.tolist() == [[0, 127, -33], [0, 0, 0]]
  np.testing.assert_allclose(scales, [[0.01], [1.0]], rtol=1e-6)
  _, found = decoded(1, 0, quantised=True)
  expected = attention.attend(*inputs(), **RULE)
  assert 1e-4 < np.abs(found - expected).max() < 0.05


def test_a_prefix_is_seen_by_the_rows_of_its_group():
  """Two groups of two rows; a group sees as much of its prefix as it has."""
  draw = np.random.default_rng(1)
  kept = draw.normal(size=(2, 2, 5, GROUPS, SIZE)).astype(np.float32)
  new = draw.normal(size=(2, 4, 1, GROUPS, SIZE)).astype(np.float32)
  q = draw.normal(size=(4, 1, HEADS, SIZE)).astype(np.float32)
  lengths = np.array([3, 3, 5, 5], np.int32)
  (slots,) = ring.init_cache(Shape(0), 4, 2, 1).layers
  slots = slots._replace(
    prefix_k=jnp.array(kept[0].transpose(0, 2, 3, 1)).reshape(
      ring.slot_shape(2, GROUPS, SIZE, 5)
    ),
    prefix_v=jnp.array(kept[1].swapaxes(1, 2)).reshape(
      ring.slot_shape(2, GROUPS, 5, SIZE)
    ),
  )
  at = jnp.int32(0)
  slots = ring.write(slots, new[0], new[1], at)
  found = ring.read(q, slots, lengths[:, None], at, prefix_B=lengths, **RULE)
  for row, length in enumerate(lengths):
    k, v = (
      np.concatenate([kept[i, row // 2, 5 - length :], new[i, row]])[None]
      for i in range(2)
    )
    expected = attention.attend(
      q[row : row + 1],
      k,
      v,
      positions=(lengths[row : row + 1, None], np.arange(length + 1)[None]),
      **RULE,
    )
    np.testing.assert_allclose(found[row], expected[0], atol=1e-5)
