import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tpu_lm import config as configs
from tpu_lm import guard, optim, train
from tpu_lm.errors import UserError
from tpu_lm.stage import Mean

WINDOW = 4


def loss(params, batch, key):
  """Least squares with a column of weights; `poison` is added to the loss."""
  del key
  apart = (batch['x'] @ params['w'] - batch['y']) ** 2
  total = jnp.where(batch['weight'] > 0, apart, 0.0) * batch['weight']
  return Mean(
    total.sum() + (params['w'].sum() * batch['poison']).sum(),
    batch['weight'].sum(),
  ), {}


def make_batch(poison=0.0, weight=1.0, size=1.0):
  rng = np.random.default_rng(0)
  return {
    'x': rng.normal(size=(8, 3)).astype(np.float32),
    'y': np.full(8, size, np.float32),
    'weight': np.full(8, weight, np.float32),
    'poison': np.full(8, poison, np.float32),
  }


@functools.cache
def made(name='adamw', microbatches=1, spike_factor=0.0):
  options = configs.base().optimizer
  options.name, options.warmup, options.schedule = name, 0, 'constant'
  options.learning_rate = 0.01
  tx, schedule = optim.make(options, 100)
  update = jax.jit(
    train.make_update(
      loss, tx, schedule,
      microbatches=microbatches, clip=1.0, spike_factor=spike_factor,
    )
  )  # fmt: skip
  params = {'w': jnp.array([0.1, -0.2, 0.3])}
  return update, train.init(params, tx, WINDOW)


def run(batches, **options):
  """The states after each batch, the first one included, and the reports."""
  update, state = made(**options)
  states, reports = [state], []
  for batch in batches:
    state, report = update(state, {'w': None}, batch, jax.random.key(0))
    states.append(state)
    reports.append(jax.device_get(report))
  return states, reports


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'lion', 'muon'])
@pytest.mark.parametrize('poison', [np.nan, np.inf, -np.inf])
def test_a_bad_step_leaves_everything_as_if_it_had_not_been(name, poison):
  good, bad = make_batch(), make_batch(poison=poison)
  with_bad, _ = run([good, bad, good], name=name)
  without, _ = run([good, good], name=name)
  assert_same(with_bad[2][1:3], with_bad[1][1:3])  # params and optimizer
  assert_same(with_bad[3].params, without[2].params)
  assert_same(with_bad[3].optimizer, without[2].optimizer)
  assert not np.array_equal(without[2].params['w'], without[1].params['w'])
  assert int(with_bad[3].step) == 3
  assert int(with_bad[3].guard.skipped) == 1


@pytest.mark.parametrize('microbatches', [1, 2])
def test_one_bad_microbatch_is_enough(microbatches):
  bad = make_batch()
  bad['poison'][3] = np.nan
  states, _ = run([bad], microbatches=microbatches)
  assert_same(states[1][1:3], states[0][1:3])
  assert int(states[1].guard.skipped) == 1


def test_bad_steps_are_counted_and_a_good_one_ends_the_row():
  good, bad = make_batch(), make_batch(poison=np.nan)
  states, reports = run([good, bad, bad, good, bad])
  assert [int(r['bad_in_a_row']) for r in reports] == [0, 1, 2, 0, 1]
  assert [int(r['skipped']) for r in reports] == [0, 1, 2, 2, 3]
  assert [int(s.guard.accepted) for s in states[1:]] == [1, 1, 1, 2, 2]


def test_a_batch_without_targets_changes_nothing_and_is_counted():
  states, reports = run([make_batch(), make_batch(weight=0.0)])
  assert_same(states[2][1:3], states[1][1:3])
  assert int(reports[1]['skipped']) == 1
  assert float(reports[1]['targets']) == 0


def test_the_learning_rate_counts_accepted_steps_only():
  options = configs.base().optimizer
  options.warmup, options.learning_rate = 4, 0.4
  tx, schedule = optim.make(options, 100)
  update = jax.jit(
    train.make_update(
      loss, tx, schedule, microbatches=1, clip=0.0, spike_factor=0.0
    )
  )
  state = train.init({'w': jnp.ones(3)}, tx, WINDOW)
  rates = []
  for poison in (0.0, np.nan, 0.0):
    state, report = update(
      state, {'w': None}, make_batch(poison), jax.random.key(0)
    )
    rates.append(float(report['learning_rate']))
  np.testing.assert_allclose(rates, [0.1, 0.2, 0.2], rtol=1e-6)
  # What is reported is what moves: Adam's first two steps have size one.
  clean = train.init({'w': jnp.ones(3)}, tx, WINDOW)
  for _ in range(2):
    clean, _ = update(clean, {'w': None}, make_batch(), jax.random.key(0))
  assert_same(clean.params, state.params)


def test_a_spike_is_skipped_once_the_window_is_full():
  good, spike = make_batch(), make_batch(size=30.0)
  states, reports = run([spike] + [good] * 4, spike_factor=3.0)
  # Nothing was known at the first step, so the spike was applied.
  assert [int(r['skipped']) for r in reports] == [0] * 5
  states, reports = run([good] * 6 + [spike, good, spike], spike_factor=3.0)
  assert [int(r['skipped']) for r in reports] == [0] * 6 + [1, 1, 2]
  assert_same(states[7][1:3], states[6][1:3])
  assert float(reports[6]['loss']) > 100
  assert float(states[-1].guard.losses.max()) < 10
  # Without the guard it is applied.
  _, reports = run([good] * 6 + [spike])
  assert [int(r['skipped']) for r in reports] == [0] * 7


def test_the_window_holds_the_last_accepted_losses_and_nothing_else():
  good = make_batch()
  states, reports = run(
    [good, make_batch(np.nan), good, make_batch(np.inf), good, good, good]
  )
  for state in states:
    assert np.isfinite(state.guard.losses).all()
  accepted = [float(reports[i]['loss']) for i in (0, 2, 4, 5, 6)]
  assert sorted(states[-1].guard.losses.tolist()) == sorted(accepted[-WINDOW:])


def test_a_window_that_has_no_deviation_is_refused():
  with pytest.raises(UserError, match=r'guard\.window=1'):
    guard.init(1)


def test_clipping_scales_the_gradient_to_the_norm():
  update = {}
  for clip in (0.0, 0.2):
    tx = optax.sgd(1.0)
    update[clip] = jax.jit(
      train.make_update(
        loss, tx, optax.constant_schedule(1.0),
        microbatches=1, clip=clip, spike_factor=0.0,
      )
    )  # fmt: skip
  state = train.init({'w': jnp.zeros(3)}, optax.sgd(1.0), WINDOW)
  batch, key = make_batch(), jax.random.key(0)
  free, report = update[0.0](state, {'w': None}, batch, key)
  clipped, same = update[0.2](state, {'w': None}, batch, key)
  norm = float(report['gradient_norm'])
  assert norm > 0.3
  assert float(same['gradient_norm']) == norm  # of the gradient as it came
  x, y = batch['x'], batch['y']
  expected = 2 * x.T @ y / 8  # minus the gradient at 0
  np.testing.assert_allclose(free.params['w'], expected, rtol=1e-5)
  np.testing.assert_allclose(
    clipped.params['w'], expected * 0.2 / norm, rtol=1e-5
  )
