import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from tpu_lm import quantize

# Appendix E of arXiv 2305.14314, in the single precision of its authors.
PUBLISHED = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
  0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
)  # fmt: skip


def weight(*shape, seed=0):
  drawn = np.random.default_rng(seed).normal(size=shape) * 0.05
  return drawn.astype(np.float32)


def test_the_table_is_that_of_the_paper():
  np.testing.assert_allclose(quantize.TABLE, PUBLISHED, atol=2e-7)
  # Its construction, as the authors' code spells it.
  end = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
  above = norm.ppf(np.linspace(end, 0.5, 9)[:-1])
  below = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
  made = np.sort([*above, 0.0, *below])
  np.testing.assert_allclose(quantize.TABLE, made / made.max(), atol=1e-12)


def reference(w, block=64, group=256):
  """NF4 with double quantisation, block after block in plain numpy."""
  table = np.array(quantize.TABLE)
  flat = w.reshape(-1).astype(np.float64)
  blocks = [flat[i : i + block] for i in range(0, flat.size, block)]
  peaks = np.array([np.abs(b).max() for b in blocks])
  mean = peaks.mean()
  kept = np.empty_like(peaks)
  for i in range(0, len(peaks), group):
    part = peaks[i : i + group] - mean
    step = np.abs(part).max() / 127 or 1 / 127
    kept[i : i + group] = np.round(part / step) * step + mean
  out = []
  for b, peak, scale in zip(blocks, peaks, kept, strict=True):
    unit = b / (peak or 1.0)
    nearest = np.abs(unit[:, None] - table).argmin(axis=1)
    out.append(table[nearest] * scale)
  return np.concatenate(out).reshape(w.shape)


@pytest.mark.parametrize('shape', [(8, 8), (16, 3, 5), (300, 67), (7,)])
def test_nf4_is_that_of_a_plain_reference(shape):
  w = weight(*shape)
  leaf = jax.jit(quantize.nf4)(w)
  found = jax.jit(quantize.dense)(leaf)
  np.testing.assert_allclose(found, reference(w), atol=1e-6)
  assert quantize.count(leaf) == w.size
  assert leaf.codes.dtype == jnp.uint8
  assert leaf.codes.shape == (-(-w.size // 64), 32)


def test_nf4_of_normal_weights_is_as_near_as_the_paper_says():
  """Table 2's data type: the error of normal weights is a tenth of them."""
  w = weight(512, 512)
  error = quantize.dense(quantize.nf4(w)) - w
  assert np.sqrt(np.mean(error**2) / np.mean(w**2)) < 0.1
  held = quantize.nf4(w)
  held_bits = 8 * sum(x.nbytes for x in jax.tree.leaves(held)) / w.size
  assert held_bits < 4.14  # section 3: 4.127


def test_nf4_of_zeros_and_of_one_number():
  zeros = quantize.dense(quantize.nf4(jnp.zeros((4, 64))))
  np.testing.assert_array_equal(zeros, 0)
  same = quantize.dense(quantize.nf4(jnp.full((4, 64), -0.25)))
  np.testing.assert_allclose(same, -0.25, rtol=1e-6)


def test_two_codes_share_a_byte():
  """By hand: weight 0 is the largest, weight 32 the smallest of a block."""
  w = np.zeros(64, np.float32)
  w[0], w[32], w[63] = 2.0, -2.0, 2.0 * quantize.TABLE[9]
  leaf = quantize.nf4(w)
  assert leaf.codes[0, 0] == 15 + 16 * 0
  assert leaf.codes[0, 31] == 7 + 16 * 9
  assert leaf.codes[0, 1] == 7 + 16 * 7
  np.testing.assert_allclose(quantize.dense(leaf), w, rtol=1e-6)


def test_int8_by_hand():
  w = jnp.array([[1.27, 0.0], [-0.5, 0.0]])
  leaf = quantize.int8(w, 0)
  np.testing.assert_array_equal(leaf.values, [[127, 0], [-50, 0]])
  np.testing.assert_allclose(leaf.scales, [[0.01, 1 / 127]], rtol=1e-6)
  np.testing.assert_allclose(quantize.dense(leaf), w, atol=1e-7)


def test_int8_is_off_by_half_a_step_at_most():
  w = weight(3, 64, 4, 16)
  leaf = quantize.int8(w, (1,))
  assert leaf.scales.shape == (3, 1, 4, 16)
  off = np.abs(quantize.dense(leaf) - w) / leaf.scales
  assert 0.4 < off.max() <= 0.5 + 1e-4


PRODUCTS = [
  ('TD,DHK->THK', (5, 32), (32, 4, 6)),
  ('TJK,JKD->TD', (5, 4, 6), (4, 6, 32)),
  ('BLD,DF->BLF', (2, 3, 32), (32, 24)),
]


@pytest.mark.parametrize('kind', ['int8', 'nf4'])
@pytest.mark.parametrize(('spec', 'x', 'w'), PRODUCTS)
def test_a_product_and_its_gradient(kind, spec, x, w):
  w = weight(*w)
  inputs = 2 if spec.startswith('TJK') else 1
  leaf = (
    quantize.nf4(w) if kind == 'nf4' else quantize.int8(w, tuple(range(inputs)))
  )
  x = weight(*x, seed=1)

  def found(x):
    return jnp.sin(quantize.product(spec, x, leaf)).sum()

  def expected(x):
    return jnp.sin(jnp.einsum(spec, x, quantize.dense(leaf))).sum()

  for a, b in zip(
    jax.value_and_grad(found)(x), jax.value_and_grad(expected)(x), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_the_backward_pass_keeps_codes_only(kind):
  w = weight(64, 128)
  leaf = quantize.nf4(w) if kind == 'nf4' else quantize.int8(w, 0)
  x = weight(4, 64, seed=1)
  _, pullback = jax.vjp(lambda x: quantize.product('TD,DF->TF', x, leaf), x)
  kept = sum(x.nbytes for x in jax.tree.leaves(pullback))
  assert kept == sum(x.nbytes for x in jax.tree.leaves(leaf))
  _, pullback = jax.vjp(
    lambda x: jnp.einsum('TD,DF->TF', x, quantize.dense(leaf)), x
  )
  assert sum(x.nbytes for x in jax.tree.leaves(pullback)) >= w.nbytes
