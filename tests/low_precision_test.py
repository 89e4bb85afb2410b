"""Products in 8 bits: by the equation, and whether a network learns by them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import config as configs
from tpu_lm import low_precision, optim, stage, train

RNG = np.random.default_rng(0)
# Tokens of very different sizes, and a row of zeros.
X = RNG.normal(size=(12, 6)).astype(np.float32)
X *= 10.0 ** np.arange(-6, 6)[:, None]
X[3] = 0
W = RNG.normal(size=(6, 4, 5)).astype(np.float32)
W[:, 2] *= 1e-3
Y_GRAD = RNG.normal(size=(12, 4, 5)).astype(np.float32)


def by_hand(a, b, axis_a, axis_b, spec):
  """The equation of the module for int8, in numpy."""

  def rounded(x, axis):
    peak = np.abs(x).max(axis, keepdims=True)
    scale = np.where(peak > 0, peak / np.float32(127), np.float32(1))
    return np.rint(x / scale) * scale

  return np.einsum(spec, rounded(a, axis_a), rounded(b, axis_b))


def test_int8_is_the_equation_forward_and_backward():
  product = functools.partial(low_precision.einsum, 'TD,DHK->THK', kind='int8')
  y, pull = jax.vjp(lambda x, w: product(x, w), X, W)
  expected = by_hand(X, W, 1, 0, 'TD,DHK->THK')
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
  x_grad, w_grad = pull(jnp.asarray(Y_GRAD))
  expected = by_hand(Y_GRAD, W, (1, 2), (1, 2), 'THK,DHK->TD')
  np.testing.assert_allclose(x_grad, expected, rtol=1e-4, atol=1e-6)
  exact = np.einsum('TD,THK->DHK', X, Y_GRAD)
  np.testing.assert_allclose(w_grad, exact, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(('kind', 'most'), [('int8', 0.01), ('fp8', 0.04)])
def test_each_token_and_output_has_a_scale_of_its_own(kind, most):
  y = low_precision.einsum('TD,DHK->THK', X, W, kind)
  exact = np.einsum('TD,DHK->THK', X, W)
  assert not np.asarray(y[3]).any()
  # A bound for one scale for all would let the small ones vanish.
  sizes = np.linalg.norm(X, axis=1)[:, None, None] * np.linalg.norm(W, axis=0)
  off = np.abs(y - exact) / np.maximum(sizes, 1e-30)
  assert 1e-5 < off.max() < most


def losses(kind, steps=60):
  """Of a small network on rows that repeat a few sentences."""
  model = tiny.model('llama', dim=64, hidden_dim=128, matmul=kind)
  params = tiny.params(model)
  config = configs.base()
  config.optimizer.learning_rate = 3e-3
  tx, schedule = optim.make(config.optimizer, steps)
  loss = stage.make('pretrain', model, lambda: params, {}).loss
  update = tiny.jit(
    train.make_update(
      loss, tx, schedule, microbatches=1, clip=1.0, spike_factor=0.0
    )
  )
  state = train.init(params, tx, 4)
  frozen = jax.tree.map(lambda _: None, params)
  found = []
  for step in range(steps):
    batch = tiny.batch(8, seed=step % 4)
    state, metrics = update(state, frozen, batch, jax.random.key(step))
    found.append(float(metrics['loss']))
  return np.array(found)


def test_a_network_learns_as_with_whole_numbers():
  whole = losses('')
  assert whole[-4:].mean() < 0.7 * whole[:4].mean()
  for kind in ('int8', 'fp8'):
    found = losses(kind)
    assert not np.array_equal(found, whole)
    assert found[-4:].mean() == pytest.approx(whole[-4:].mean(), rel=0.02)
