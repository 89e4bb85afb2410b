import functools
import math

import jax
import numpy as np
import pytest
import tiny

from tpu_lm import stage
from tpu_lm.errors import UserError
from tpu_lm.stages import dpo

NAMES = ('reference_chosen_logps', 'reference_rejected_logps')


@functools.cache
def model_and_params():
  model = tiny.model()
  return model, tiny.params(model)


def made(**hparams):
  model, params = model_and_params()
  return stage.make('dpo', model, lambda: params, hparams)


@pytest.mark.parametrize(
  ('loss_type', 'smoothing', 'expected'),
  [
    # d = 3, beta = 0.5: sigmoid of 1.5 and of -1.5.
    ('sigmoid', 0.0, math.log(1 + math.exp(-1.5))),
    ('sigmoid', 0.1, math.log(1 + math.exp(-1.5)) + 0.1 * 1.5),
    ('robust', 0.1, math.log(1 + math.exp(-1.5)) - 0.1 * 1.5 / 0.8),
    ('ipo', 0.0, (3 - 1) ** 2),
    ('hinge', 0.0, 0.0),
  ],
)
def test_losses_by_hand(loss_type, smoothing, expected):
  found = dpo.losses(np.float32(3.0), loss_type, 0.5, smoothing)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_hinge_of_the_wrong_order():
  assert dpo.losses(np.float32(-3.0), 'hinge', 0.5) == 2.5


@pytest.mark.parametrize('hparams', [{}, {'on_the_fly': True}], ids=str)
def test_the_first_loss_is_ln_2(hparams):
  _, params = model_and_params()
  stage_ = made(beta=0.5, **hparams)
  assert stage_.kept == (() if hparams else NAMES)
  (batch,) = stage_.prepare(params, tiny.pairs(16), jax.random.key(0))
  mean, metrics = tiny.jit(stage_.loss)(params, batch, None)
  assert float(mean.total / mean.weight) == pytest.approx(
    math.log(2), rel=0, abs=1e-6
  )
  for name in ('margin', 'chosen_reward', 'chosen_logratio'):
    assert abs(metrics[name].total / metrics[name].weight) < 1e-5


def test_each_first_loss_is_that_of_no_difference():
  _, params = model_and_params()
  for hparams, expected in (
    ({'loss_type': 'robust', 'label_smoothing': 0.2}, math.log(2)),
    ({'loss_type': 'ipo', 'beta': 0.5}, 1.0),
    ({'loss_type': 'hinge'}, 1.0),
    ({'length_normalised': True}, math.log(2)),
  ):
    stage_ = made(**hparams)
    (batch,) = stage_.prepare(params, tiny.pairs(), jax.random.key(0))
    mean, _ = stage_.loss(params, batch, None)
    np.testing.assert_allclose(mean.total / mean.weight, expected, rtol=1e-5)


def test_the_columns_are_the_references_own():
  model, params = model_and_params()
  batch = tiny.pairs()
  (part,) = made().prepare(None, batch, None)
  half = {
    name.removeprefix('rejected_'): column
    for name, column in batch.items()
    if name.startswith('rejected_')
  }
  expected, counts = stage.sequence_logps(model, params, half, 4)
  np.testing.assert_allclose(part[NAMES[1]], expected, rtol=1e-5, atol=1e-5)
  assert (part[NAMES[1]] < 0).sum() == (counts > 0).sum()


def test_kept_columns_are_not_computed_again():
  model, _ = model_and_params()

  def start():
    raise AssertionError('the reference is not needed')

  stage_ = stage.make('dpo', model, start, {})
  batch = tiny.pairs() | {name: np.zeros((8, 4)) for name in NAMES}
  (part,) = stage_.prepare(None, batch, None)
  assert part is batch


def test_lengths_are_divided_out():
  """Of length-normalised rewards; the chosen answer has 2 tokens more."""
  _, params = model_and_params()
  batch = tiny.pairs()
  zeros = {name: np.zeros((8, 4), np.float32) for name in NAMES}
  plain, normed = (
    made(length_normalised=n, beta=1.0).loss(params, batch | zeros, None)[1]
    for n in (False, True)
  )
  # With a reference of 0 the reward is the log-probability, here of a token.
  mean = normed['chosen_reward']
  assert -6 < mean.total / mean.weight < -3
  token = plain['chosen_logratio']
  np.testing.assert_allclose(
    token.total / token.weight, mean.total / mean.weight, rtol=0.1
  )
  summed = plain['chosen_reward']
  assert summed.total / summed.weight < 1.5 * mean.total / mean.weight


@pytest.mark.parametrize(
  ('hparams', 'message'),
  [
    ({'loss_type': 'sigmod'}, r"stage\.loss_type='sigmod': sigmoid, robust"),
    ({'beta': 0.0}, r'stage\.beta=0\.0: must be above 0'),
    ({'label_smoothing': 0.5}, r'stage\.label_smoothing=0\.5: from 0 to'),
    ({'label_smoothing': 0.1, 'loss_type': 'ipo'}, 'but for loss_type=sigmoid'),
  ],
)
def test_mistakes_are_named(hparams, message):
  with pytest.raises(UserError, match=message):
    made(**hparams)
