import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import stage
from tpu_lm.errors import UserError
from tpu_lm.stages import reward


def test_loss_by_hand():
  # r_c - r_r - m is 2 - 1 - 0.5 and -1 - 1 - 0; the sums are 3 and 0.
  found = reward.losses(
    jnp.array([2.0, -1.0]), jnp.array([1.0, 1.0]), jnp.array([0.5, 0.0]), 0.1
  )
  expected = [
    math.log(1 + math.exp(-0.5)) + 0.1 * 9,
    math.log(1 + math.exp(2.0)),
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_head_of_zeros_prefers_none():
  model = tiny.model(scalar_head=True)
  params = model.init_params(jax.random.key(0))
  batch = tiny.pairs()
  batch['margins'] *= 0
  mean, metrics = stage.make('reward', model, None, {}).loss(
    params, batch, None
  )
  np.testing.assert_allclose(mean.total / mean.weight, math.log(2), rtol=1e-6)
  assert metrics['brier'].total / metrics['brier'].weight == 0.25
  assert metrics['confidence'].total / metrics['confidence'].weight == 0.5


def test_margins_of_pairs_that_are_there_count():
  model = tiny.model(scalar_head=True)
  params, batch = tiny.params(model), tiny.pairs()
  made = stage.make('reward', model, None, {})
  before = made.loss(params, batch, None)[0]
  batch['margins'] = batch['margins'] + 1.0
  after = made.loss(params, batch, None)[0]
  assert after.total > before.total + 1e-3
  assert after.weight == before.weight


def test_scores_by_squared_error():
  model = tiny.model(scalar_head=True)
  params = jax.tree.map(jnp.asarray, tiny.params(model))
  params['scalar_head'] = jnp.zeros_like(params['scalar_head'])
  batch = tiny.scored()
  made = stage.make('reward', model, None, {'loss_type': 'mse'})
  mean, metrics = made.loss(params, batch, None)
  # Of a model that says 0; slots without a record hold 0.
  np.testing.assert_allclose(
    mean.total, np.square(batch['scores']).sum(), rtol=1e-5
  )
  assert mean.weight == (batch['scores'] != 0).sum()
  np.testing.assert_allclose(
    metrics['absolute_error'].total, np.abs(batch['scores']).sum(), rtol=1e-5
  )


def test_mistakes_are_named():
  with pytest.raises(UserError, match=r'--config\.model\.scalar_head=true'):
    stage.make('reward', tiny.model(), None, {})
  model = tiny.model(scalar_head=True)
  with pytest.raises(UserError, match=r"stage\.loss_type='bt': give|bradley"):
    stage.make('reward', model, None, {'loss_type': 'bt'})
  for loss_type, batch in (('bradley_terry', tiny.scored), ('mse', tiny.pairs)):
    made = stage.make('reward', model, None, {'loss_type': loss_type})
    with pytest.raises(UserError, match=r'data\.rows'):
      made.loss(tiny.params(model), batch(), None)
