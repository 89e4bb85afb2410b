import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from optax import contrib

from tpu_lm import config as configs
from tpu_lm import models, optim, sharding, weights
from tpu_lm.errors import UserError

FAMILIES = models.families()
NAMES = ('adamw', 'adafactor', 'lion', 'muon')


def options(**changes):
  section = configs.base().optimizer
  section.update(changes)
  return section


def rates(steps, **changes):
  """The learning rate of each step, the first one first."""
  chosen = options(learning_rate=1.0, **changes)
  schedule = optim.make_schedule(chosen, steps, 1.0)
  return [float(schedule(i)) for i in range(steps)]


def named(tree, is_leaf=None):
  """{path: leaf}."""
  return {
    sharding.path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf)
  }


# Schedules: 4 steps of warm-up, then 8; the values are computed by hand.


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'constant', 'wsd'])
def test_warm_up_moves_at_once_and_ends_at_the_peak(schedule):
  found = rates(12, schedule=schedule, warmup=4, final=0.2)
  np.testing.assert_allclose(found[:5], [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'constant', 'wsd'])
@pytest.mark.parametrize('warmup', [0, 1])
def test_without_warm_up_the_first_step_has_the_peak(schedule, warmup):
  assert rates(12, schedule=schedule, warmup=warmup)[0] == 1


def test_cosine():
  found = rates(12, schedule='cosine', warmup=4, final=0.2)
  # Half way: cos(pi / 2) = 0. Last: one eighth before the end of the curve.
  assert found[8] == pytest.approx(0.2 + 0.8 * 0.5)
  last = 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * 7 / 8))
  assert found[11] == pytest.approx(last)


def test_linear():
  found = rates(12, schedule='linear', warmup=4, final=0.2)
  assert found[8] == pytest.approx(0.6)
  assert found[11] == pytest.approx(0.3)  # and 0.2 one step later
  # A schedule to zero wastes no step: the last one still moves.
  assert rates(12, schedule='linear', warmup=4, final=0.0)[-1] > 0


def test_constant():
  assert rates(12, schedule='constant', warmup=4)[4:] == [1.0] * 8


def test_wsd_stays_and_then_falls():
  found = rates(12, schedule='wsd', warmup=4, final=0.2, decay=1 / 3)
  np.testing.assert_allclose(found[4:9], 1.0)
  np.testing.assert_allclose(found[9:], [0.8, 0.6, 0.4], rtol=1e-6)


def test_wsd_that_falls_from_the_warm_up_on_still_ends_low():
  found = rates(12, schedule='wsd', warmup=4, final=0.2, decay=1.0)
  assert found[11] == pytest.approx(0.3)


# Optimizers.


def quadratic(name, **changes):
  """Losses of 60 updates on a least-squares problem with every kind of leaf."""
  rng = np.random.default_rng(0)
  shapes = {
    'embedding': (6, 4),
    'final_norm': (4,),
    'layers': {'mlp': {'gate': (2, 4, 6)}, 'attention': {'q': (2, 4, 2, 3)}},
  }
  target = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )  # fmt: skip
  params = jax.tree.map(jnp.zeros_like, target)
  tx, _ = optim.make(options(name=name, warmup=0, **changes), 60)

  def loss(params):
    apart = jax.tree.map(lambda p, t: ((p - t) ** 2).sum(), params, target)
    return sum(jax.tree.leaves(apart))

  @jax.jit
  def update(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  state, values = tx.init(params), []
  for _ in range(60):
    params, state, value = update(params, state)
    values.append(float(value))
  return values, params, target


@pytest.mark.parametrize('name', NAMES)
def test_each_optimizer_lowers_a_loss(name):
  rate = 0.3 if name == 'muon' else 0.05
  values, params, target = quadratic(
    name, learning_rate=rate, rest_learning_rate=0.05, weight_decay=0.0
  )
  assert values[-1] < 0.2 * values[0]
  # Every leaf has come nearer.
  for path, leaf in named(params).items():
    goal = named(target)[path]
    assert float(((leaf - goal) ** 2).sum()) < float((goal**2).sum()), path


def decayed(name, **changes):
  """{path: leaf / leaf before} after a step without any gradient."""
  model = tiny.model('qwen2', tied=False, qk_norm=True, post_norms=True)
  params = tiny.params(model)
  changes = {'learning_rate': 0.5, 'rest_learning_rate': 0.25} | changes
  chosen = options(name=name, warmup=0, weight_decay=0.1, **changes)
  tx, _ = optim.make(chosen, 10)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  after = named(optax.apply_updates(params, updates))
  return {
    path: float(np.abs(after[path]).sum() / np.abs(leaf).sum())
    for path, leaf in named(params).items()
  }


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'lion'])
def test_all_but_norms_and_biases_decay_by_the_learning_rate(name):
  for path, ratio in decayed(name).items():
    kept = 'norm' in path or 'bias' in path
    # 1 - learning rate x weight decay
    assert ratio == pytest.approx(1.0 if kept else 0.95, rel=1e-6), path


def test_under_muon_the_hidden_matrices_decay():
  hidden = re.compile(r'(attention/[qkvo]|mlp/(gate|up|down))$')
  for path, ratio in decayed('muon').items():
    decays = hidden.search(path) is not None
    assert ratio == pytest.approx(0.95 if decays else 1.0, rel=1e-6), path


@pytest.mark.parametrize('name', NAMES)
def test_no_decay_names_what_does_not_decay(name):
  for path, ratio in decayed(name, no_decay='mlp|norm|bias').items():
    if 'mlp' in path:
      assert ratio == 1.0, path
    if path.endswith('attention/q'):
      assert ratio == pytest.approx(0.95, rel=1e-6)


def test_an_empty_no_decay_lets_all_decay():
  for path, ratio in decayed('adamw', no_decay='').items():
    assert ratio == pytest.approx(0.95, rel=1e-6), path


# Muon.


@pytest.mark.parametrize('name', FAMILIES)
def test_muon_takes_the_hidden_matrices_and_nothing_else(name):
  model = tiny.model(name)
  shapes = jax.eval_shape(model.init_params, jax.random.key(0))
  found = named(
    optim.muon_axes(shapes),
    lambda x: x is None or isinstance(x, contrib.MuonDimensionNumbers),
  )
  assert found.keys() == named(shapes).keys()
  expected = {
    'layers/attention/q': ((1,), (2, 3)),
    'layers/attention/k': ((1,), (2, 3)),
    'layers/attention/v': ((1,), (2, 3)),
    'layers/attention/o': ((1, 2), (3,)),
    'layers/mlp/gate': ((1,), (2,)),
    'layers/mlp/up': ((1,), (2,)),
    'layers/mlp/down': ((1,), (2,)),
    'layers/moe/gate': ((2,), (3,)),  # a matrix an expert
    'layers/moe/up': ((2,), (3,)),
    'layers/moe/down': ((2,), (3,)),
  }
  expected = {path: axes for path, axes in expected.items() if path in found}
  assert len(expected) == 7
  for path, axes in found.items():
    assert axes == expected.get(path), path
  # And that is how optax labels them: Muon's state holds momenta of these.
  tx, _ = optim.make(options(name='muon', warmup=0), 10)
  state = jax.eval_shape(tx.init, shapes)
  momenta = named(state.inner_states['muon'].inner_state[0].mu)
  assert momenta.keys() == expected.keys()
  moments = named(state.inner_states['adam'].inner_state[0].mu)
  assert moments.keys() == named(shapes).keys() - expected.keys()


@pytest.mark.parametrize('spec', ['lora(dora=True)', 'nf4, lora'])
def test_muon_leaves_factors_to_adamw(spec):
  model = tiny.model()
  shapes = jax.eval_shape(
    lambda key: weights.transform(model.init_params(key), spec, key),
    jax.random.key(0),
  )
  trainable, _ = weights.partition(shapes, '')
  tx, _ = optim.make(options(name='muon', warmup=0), 10)
  state = jax.eval_shape(tx.init, trainable)
  assert not named(state.inner_states['muon'].inner_state[0].mu)
  moments = named(state.inner_states['adam'].inner_state[0].mu)
  assert moments.keys() == named(trainable).keys()
  updates, _ = jax.eval_shape(tx.update, trainable, state, trainable)
  assert named(updates).keys() == moments.keys()


def test_muon_takes_a_base_that_is_trained_beside_its_factors():
  model = tiny.model()
  shapes = jax.eval_shape(
    lambda key: weights.transform(model.init_params(key), 'lora', key),
    jax.random.key(0),
  )
  found = named(
    optim.muon_axes(shapes),
    lambda x: x is None or isinstance(x, contrib.MuonDimensionNumbers),
  )
  taken = {name for name, axes in found.items() if axes is not None}
  assert len(taken) == 7
  assert all(name.endswith('/base') for name in taken)
  assert found['layers/attention/o/base'] == ((1, 2), (3,))


def test_the_magnitudes_of_dora_do_not_decay():
  params = {'layers': {'mlp': {'up': {'m': jnp.ones(3), 'a': jnp.ones(3)}}}}
  tx, _ = optim.make(options(warmup=0, weight_decay=0.5), 10)
  updates, _ = tx.update(
    jax.tree.map(jnp.zeros_like, params), tx.init(params), params
  )
  updates = named(updates)
  assert not np.any(updates['layers/mlp/up/m'])
  assert np.all(updates['layers/mlp/up/a'] < 0)


def test_muon_of_a_stack_is_muon_of_each_layer_as_a_matrix():
  """Against optax's own two-dimensional rule, head axes flattened."""
  params = tiny.params(tiny.model())
  grads = jax.tree_util.tree_map_with_path(
    lambda path, p: tiny.seeded((*path, path[-1]), p.shape, 1.0), params
  )
  chosen = options(
    name='muon', warmup=0, schedule='constant', learning_rate=0.1,
    weight_decay=0.0,
  )  # fmt: skip
  tx, _ = optim.make(chosen, 10)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  flat = contrib.muon(0.1, beta=chosen.momentum, eps=chosen.eps)
  matrix = jax.jit(lambda g: flat.update(g, flat.init(g), g)[0])
  inputs = {'q': 32, 'k': 32, 'v': 32, 'o': 32, 'gate': 32, 'down': 48}
  for name, rows in inputs.items():
    part = 'attention' if len(name) == 1 else 'mlp'
    for layer in range(2):
      g = grads['layers'][part][name][layer].reshape(rows, -1)
      found = updates['layers'][part][name][layer].reshape(rows, -1)
      np.testing.assert_allclose(found, matrix(g), atol=1e-5, err_msg=name)


def test_the_rest_of_muon_has_its_own_learning_rate():
  params = tiny.params(tiny.model(tied=False))
  grads = jax.tree.map(jnp.ones_like, params)

  def step(**changes):
    tx, _ = optim.make(options(name='muon', warmup=0, **changes), 10)
    return named(tx.update(grads, tx.init(params), params)[0])

  rest = {'learning_rate': 0.1, 'rest_learning_rate': 0.02}
  for path in ('embedding', 'head', 'final_norm'):
    alone, both = step(learning_rate=0.1)[path], step(**rest)[path]
    np.testing.assert_allclose(both, alone * 0.2, rtol=1e-5)


# Mistakes.


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'name': 'adamv'}, r"optimizer\.name='adamv'.*did you mean 'adamw'"),
    ({'schedule': 'cosin'}, r"optimizer\.schedule='cosin'.*'cosine'"),
    ({'learning_rate': 0.0}, r'optimizer\.learning_rate=0\.0'),
    ({'learning_rate': -1.0}, r'optimizer\.learning_rate=-1\.0'),
    ({'learning_rate': float('inf')}, r'optimizer\.learning_rate=inf'),
    ({'learning_rate': float('nan')}, r'optimizer\.learning_rate=nan'),
    ({'weight_decay': -0.1}, r'optimizer\.weight_decay=-0\.1'),
    ({'weight_decay': float('inf')}, r'optimizer\.weight_decay=inf'),
    ({'clip': -1.0}, r'optimizer\.clip=-1\.0'),
    ({'eps': 0.0}, r'optimizer\.eps=0\.0'),
    ({'b1': 1.5}, r'optimizer\.b1=1\.5'),
    ({'b2': 1.0}, r'optimizer\.b2=1\.0'),
    ({'momentum': -0.5}, r'optimizer\.momentum=-0\.5'),
    ({'final': 2.0}, r'optimizer\.final=2\.0'),
    ({'decay': -0.1}, r'optimizer\.decay=-0\.1'),
    ({'warmup': -1}, r'optimizer\.warmup=-1'),
    ({'warmup': 10}, r'optimizer\.warmup=10: must be less than steps=10'),
    ({'rest_learning_rate': -1.0}, r'optimizer\.rest_learning_rate=-1\.0'),
    ({'no_decay': 'norm('}, r"optimizer\.no_decay='norm\('"),
  ],
)
def test_a_value_that_cannot_be_is_refused(change, message):
  with pytest.raises(UserError, match=message):
    optim.make(options(**({'warmup': 2} | change)), 10)


def test_models_of_every_family_can_be_made():
  assert FAMILIES  # else the parametrised tests above are none
  make = functools.partial(models.make, options={}, vocab_size=8, length=4)
  for name in FAMILIES:
    assert make(name).config.vocab_size == 8
