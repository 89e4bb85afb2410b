"""The TPU kernel, interpreted on the CPU, beside the portable one."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask_info as mask_info,
)

from tpu_lm.models import attention, splash

LENGTH, SIZE = 256, 64


def tensors(heads: int = 4, groups: int = 2):
  rng = np.random.default_rng(0)
  shapes = [(2, LENGTH, n, SIZE) for n in (heads, groups, groups)]
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def segments():
  """Two documents and padding in the first row, one in the second."""
  ids = np.ones((2, LENGTH), np.int32)
  ids[0, 100:200], ids[0, 200:] = 2, 0
  return jnp.asarray(ids)


def both(implementation: str, window, soft_cap, ids, q, k, v):
  """(output, gradients) of a sum that weighs every output differently."""
  weights = jnp.linspace(-1, 1, q.size).reshape(q.shape)

  def total(q, k, v):
    out = attention.attend(
      q,
      k,
      v,
      segment_ids=None if ids is None else (ids, ids),
      window=window,
      soft_cap=soft_cap,
      scale=SIZE**-0.5,
      implementation=implementation,
    )
    return (out * weights).sum(), out

  gradient = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
  return jax.jit(gradient)(q, k, v)


def assert_alike(found, expected, atol=2e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-5, atol), found, expected
  )


@pytest.mark.parametrize(
  ('window', 'soft_cap', 'packed', 'parts'),
  [
    (None, 0.0, True, 4),
    (None, 0.0, False, 0),  # a kernel for dq alone
    (70, 0.0, True, 4),
    (None, 3.0, True, 0),
  ],
)
def test_output_and_gradients_are_those_of_the_portable_kernel(
  window, soft_cap, packed, parts, monkeypatch
):
  monkeypatch.setattr(splash, '_PARTS', parts)
  given = window, soft_cap, segments() if packed else None, *tensors()
  assert_alike(both('splash', *given), both('chunked', *given))


def test_each_device_of_a_mesh_has_its_rows_and_heads():
  given = None, 0.0, segments(), *tensors()
  expected = both('chunked', *given)
  with jax.set_mesh(tiny.mesh(data=2, tensor=2)):
    assert_alike(both('splash', *given), expected)


@pytest.mark.parametrize('implementation', ['splash', 'chunked'])
def test_a_mesh_that_divides_positions_divides_heads_instead(implementation):
  given = None, 0.0, segments(), *tensors(groups=1)
  expected = both('chunked', *given)
  with jax.set_mesh(tiny.mesh(sequence=4)):
    assert_alike(both(implementation, *given), expected)


def test_rows_of_broken_lanes_are_left_to_the_portable_kernel():
  q, k, v = (x[:, :200] for x in tensors())
  with pytest.raises(ValueError, match='splash: cannot do this'):
    both('splash', None, 0.0, None, q, k, v)


def test_blocks_divide_the_length():
  assert splash._divisor(8192, 1024) == 1024
  assert splash._divisor(384, 1024) == 384
  assert splash._divisor(1408, 1024) == 128


@pytest.mark.parametrize(
  ('thin', 'whole', 'more'),
  [
    (splash.Causal, masks.CausalMask, ()),
    (splash.Local, masks.LocalMask, ((0, 0), 0)),
    (splash.Local, masks.LocalMask, ((99, 0), 0)),
    (splash.Local, masks.LocalMask, ((300, 0), 0)),
  ],
)
def test_distances_tell_which_blocks_are_seen(thin, whole, more):
  shape = 1024, 1024
  given = {'block_shape': (128, 256), 'downcast_smem_data': True}
  for process in (mask_info.process_mask, mask_info.process_mask_dkv):
    found, expected = (
      process(masks.MultiHeadMask([kind(shape, *more)] * 2), **given)[0]
      for kind in (thin, whole)
    )
    for name, array in expected._asdict().items():
      np.testing.assert_array_equal(getattr(found, name), array, name)


def test_a_very_long_row_is_looked_through_in_seconds():
  begun = time.process_time()
  mask = masks.MultiHeadMask([splash.Causal((2**17, 2**17))])
  mask_info.process_mask(mask, (1024, 1024), downcast_smem_data=True)
  assert time.process_time() - begun < 10  # element by element: 30 s
