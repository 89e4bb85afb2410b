import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import stage
from tpu_lm.stages import orpo


def test_ratio_loss_by_hand():
  # Odds of 0.5 are 1, those of 0.2 a quarter: sigmoid(log 4) = 0.8.
  found = orpo.ratio_losses(jnp.log(0.5), jnp.log(0.2))
  np.testing.assert_allclose(found, -math.log(0.8), rtol=1e-5)


@pytest.mark.parametrize('logp', [-1e-7, -0.01, -0.6931, -0.6932, -3.0, -200.0])
def test_log_odds_are_stable(logp):
  # log p - log(1 - p) in float64; the slope is 1 / (1 - p).
  expected = logp - math.log(-math.expm1(logp))
  value, slope = jax.value_and_grad(orpo.log_odds)(jnp.float32(logp))
  np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(slope, -1 / math.expm1(logp), rtol=1e-5)


def test_a_certain_answer_gives_no_nan():
  value, slope = jax.value_and_grad(orpo.log_odds)(jnp.float32(0.0))
  assert np.isfinite(value)
  assert np.isfinite(slope)


def test_the_two_terms_add_up():
  model = tiny.model()
  params, batch = tiny.params(model), tiny.pairs()
  mean, metrics = stage.make('orpo', model, None, {'weight': 0.3}).loss(
    params, batch, None
  )
  expected = metrics['nll'].total + 0.3 * metrics['ratio_loss'].total
  np.testing.assert_allclose(mean.total, expected, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['nll'].total, -metrics['chosen_reward'].total, rtol=1e-6
  )
