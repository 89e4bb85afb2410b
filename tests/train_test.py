"""Golden steps: one update's numbers as plain constants.

They change when the arithmetic changes. If that is meant, run this file as a
program (`PYTHONPATH=.:tests python tests/train_test.py`) and take over what it
prints.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import config as configs
from tpu_lm import optim, sharding, stage, train
from tpu_lm.stage import Mean

GOLDEN = {
  'adamw': {
    'loss': 4.375277,
    'gradient_norm': 2.751444,
    'embedding': 4.363343,
    'final_norm': 0.06796277,
    'layers/attention/k': 2.166948,
    'layers/attention/k_norm': 0.02787012,
    'layers/attention/norm': 0.1494773,
    'layers/attention/o': 4.736341,
    'layers/attention/q': 3.856865,
    'layers/attention/q_norm': 0.02898961,
    'layers/attention/v': 2.560734,
    'layers/mlp/down': 5.159317,
    'layers/mlp/gate': 5.20611,
    'layers/mlp/norm': 0.1282851,
    'layers/mlp/up': 5.177121,
  },
  'muon': {
    'loss': 4.375277,
    'gradient_norm': 2.751444,
    'embedding': 6.421695,
    'final_norm': 0.1001559,
    'layers/attention/k': 0.3791485,
    'layers/attention/k_norm': 0.04107171,
    'layers/attention/norm': 0.2202829,
    'layers/attention/o': 0.7796003,
    'layers/attention/q': 0.7672267,
    'layers/attention/q_norm': 0.04272139,
    'layers/attention/v': 0.4001762,
    'layers/mlp/down': 0.9549902,
    'layers/mlp/gate': 1.153852,
    'layers/mlp/norm': 0.1890515,
    'layers/mlp/up': 1.159861,
  },
}


@functools.cache
def updated(name: str, microbatches: int = 1):
  """(state before, state after, metrics) of one update of a fixed model."""
  options = configs.base().optimizer
  options.name, options.schedule, options.warmup = name, 'constant', 0
  options.eps = 1e-3  # far from the sign function, which any noise flips
  tx, schedule = optim.make(options, 100)
  model = tiny.model('qwen3')
  params = tiny.params(model)
  update = tiny.jit(
    train.make_update(
      stage.make('pretrain', model, params, {}).loss, tx, schedule,
      microbatches=microbatches, clip=options.clip, spike_factor=0.0,
    )
  )  # fmt: skip
  before = train.init(params, tx, 4)
  frozen = jax.tree.map(lambda _: None, params)
  after, metrics = update(before, frozen, tiny.batch(8), jax.random.key(0))
  return before, after, jax.device_get(metrics)


def numbers(name: str) -> dict[str, float]:
  """What the golden step pins: loss, norm, and how far each leaf moved."""
  before, after, metrics = updated(name)
  found = {key: float(metrics[key]) for key in ('loss', 'gradient_norm')}
  moved = jax.tree.map(lambda a, b: a - b, after.params, before.params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
    path = sharding.path_name(path)
    found[path] = float(np.abs(np.asarray(leaf, np.float64)).sum())
  return found


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_step(name):
  # Norms are near 1: how far they moved is known to a rounding of 1.
  assert numbers(name) == pytest.approx(GOLDEN[name], rel=1e-5, abs=5e-6)


def test_what_a_step_reports():
  _, after, metrics = updated('adamw')
  batch = tiny.batch(8)
  segments, mask = batch['segment_ids'], batch['loss_mask']
  targets = 0
  for r in range(8):
    for t in range(tiny.LENGTH):
      same = segments[r, t] == segments[r, t + 1] != 0
      targets += bool(same and mask[r, t + 1])
  assert metrics['targets'] == targets
  assert metrics['learning_rate'] == np.float32(3e-3)
  assert metrics['skipped'] == metrics['bad_in_a_row'] == 0
  assert int(after.step) == 1
  assert int(after.guard.accepted) == 1


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_accumulation_takes_the_same_step(name):
  _, once, a = updated(name)
  _, twice, b = updated(name, microbatches=2)
  np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-6)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5),
    once.params,
    twice.params,
  )


def test_uneven_microbatches_are_summed_and_not_averaged():
  """Rows that count 1 and 3: the mean of means would be another number."""

  def loss(params, batch, key):
    del key
    total = (batch['x'] * params['w'] * batch['weight']).sum()
    return Mean(total, batch['weight'].sum()), {'x': Mean(total, 1.0)}

  # Row r goes to microbatch r % 2.
  batch = {
    'x': jnp.array([1.0, 10.0, 1.0, 20.0]),
    'weight': jnp.array([1.0, 3.0, 0.0, 0.0]),
  }
  grads, mean, metrics = train.summed_gradients(
    loss, {'w': jnp.array(2.0)}, {'w': None}, batch, jax.random.key(0), 2
  )
  assert float(mean.weight) == 4
  assert float(mean.total) == 2 * (1 + 30)
  assert float(grads['w']) == 31
  assert float(metrics['x'].weight) == 2


def test_each_microbatch_has_its_own_key():
  def loss(params, batch, key):
    noise = jax.random.normal(key, batch['x'].shape)
    return Mean((params['w'] * noise).sum(), jnp.float32(noise.size)), {}

  def total(microbatches):
    _, mean, _ = train.summed_gradients(
      loss, {'w': jnp.array(1.0)}, {'w': None}, {'x': jnp.zeros(4)},
      jax.random.key(0), microbatches,
    )  # fmt: skip
    return float(mean.total)

  first = float(jax.random.normal(jax.random.key(0), (2,)).sum())
  keys = [jax.random.fold_in(jax.random.key(0), i) for i in (0, 1)]
  expected = sum(float(jax.random.normal(k, (2,)).sum()) for k in keys)
  assert total(2) == pytest.approx(expected, rel=1e-5)
  assert abs(total(2) - 2 * first) > 1e-3


def test_what_is_frozen_has_no_gradient_and_no_optimizer_state():
  def loss(params, batch, key):
    del key
    value = (params['a'] * params['b'] * batch['x']).sum()
    return Mean(value, jnp.float32(1)), {}

  tx, _ = optim.make(configs.base().optimizer, 100)
  trainable, frozen = {'a': jnp.array(3.0), 'b': None}, {
    'a': None, 'b': jnp.array(5.0),
  }  # fmt: skip
  grads, _, _ = train.summed_gradients(
    loss, trainable, frozen, {'x': jnp.ones(1)}, jax.random.key(0), 1
  )
  assert float(grads['a']) == 5
  assert grads['b'] is None
  state = train.init(trainable, tx, 4)
  paths = [
    sharding.path_name(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer)
  ]
  assert any(path.endswith('a') for path in paths)
  assert not any(path.endswith('/b') for path in paths)


if __name__ == '__main__':
  for name in ('adamw', 'muon'):
    print(f'  {name!r}: {{')
    for key, value in numbers(name).items():
      print(f'    {key!r}: {value:.7g},')
    print('  },')
