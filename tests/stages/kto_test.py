import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import stage
from tpu_lm.stages import kto


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def test_losses_by_hand():
  # r = 3 and -1, z = 1, beta = 0.5: sigmoid(-1) of a liked answer, sigmoid(-1)
  # of a disliked one.
  found = kto.losses(
    jnp.array([3.0, -1.0]), jnp.array([True, False]), 1.0, 0.5, (1.5, 2.0)
  )
  expected = [1.5 * sigmoid(-1), 2.0 * sigmoid(-1)]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def parts(scale, **hparams):
  """(stage, params, prepared batch) of a policy beside its reference."""
  model = tiny.model()
  params = tiny.params(model)
  other = jax.tree.map(lambda x: x * scale, params)
  made = stage.make('kto', model, lambda: other, hparams)
  (batch,) = made.prepare(params, tiny.rated(), jax.random.key(0))
  return made, params, batch


def test_the_first_loss_is_a_half():
  made, params, batch = parts(1.0)
  mean, metrics = made.loss(params, batch, None)
  np.testing.assert_allclose(mean.total / mean.weight, 0.5, rtol=1e-6)
  point = metrics['reference_point']
  assert 0 <= point.total / point.weight < 1e-5


@pytest.mark.parametrize('scale', [0.5, 2.0])
def test_the_reference_point_is_the_mean_over_the_batch_or_0(scale):
  _, params, batch = parts(scale)
  model = tiny.model()
  half = {
    name.removeprefix('mismatched_'): column
    for name, column in batch.items()
    if name.startswith('mismatched_')
  }
  logps, counts = stage.sequence_logps(model, params, half, 4)
  ratios = (logps - batch['reference_mismatched_logps'])[counts > 0]
  expected = max(float(ratios.mean()), 0.0)
  np.testing.assert_allclose(
    batch['reference_point'], np.full(8, expected), rtol=1e-4, atol=1e-6
  )


def test_one_scale_is_above_0_and_one_below():
  points = [float(parts(s)[2]['reference_point'][0]) for s in (0.5, 2.0)]
  assert min(points) == 0 < max(points)


def test_no_gradient_goes_through_the_reference_point():
  made, params, batch = parts(2.0)
  jumbled = dict(batch, mismatched_tokens=batch['mismatched_tokens'] * 0)
  mean, _ = made.loss(params, batch, None)
  assert made.loss(params, jumbled, None)[0].total == mean.total


def test_threshold_decides_who_is_liked():
  made, params, batch = parts(1.1, threshold=0.0)
  _, metrics = made.loss(params, batch, None)
  liked = (batch['scores'] > 0).sum()
  assert metrics['desirable_reward'].weight == liked
  total = metrics['undesirable_reward'].weight + liked
  assert total == (batch['scores'] != 0).sum()


def test_kept_columns_leave_the_reference_alone():
  made, params, batch = parts(1.1)
  kept = {name: batch[name] for name in made.kept}
  assert sorted(kept) == ['reference_logps', 'reference_mismatched_logps']

  def start():
    raise AssertionError('the reference is not needed')

  again = stage.make('kto', tiny.model(), start, {})
  (part,) = again.prepare(params, tiny.rated() | kept, None)
  np.testing.assert_allclose(
    part['reference_point'], batch['reference_point'], rtol=1e-5, atol=1e-6
  )
