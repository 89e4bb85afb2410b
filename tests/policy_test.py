"""Losses of policies by hand, their gradients, and what is masked."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import policy, stage
from tpu_lm.errors import UserError
from tpu_lm.stage import Mean

ALL = np.ones((1, 4), bool)
OBJECTIVES = [
  policy.Objective(kind, level, beta=0.1, kl=policy.KLS[i % 3], sampler_cap=1.2)
  for i, (kind, level) in enumerate(
    itertools.product(policy.KINDS, policy.LEVELS)
  )
]


def label(objective):
  return f'{objective.kind}-{objective.level}-{objective.kl}'


def row(*numbers):
  return jnp.array([numbers], jnp.float32)


def value(mean: Mean) -> float:
  return float(mean.total) / float(mean.weight)


def rollout(rows: int = 8, length: int = 12):
  """(log-probabilities, columns, mask): prompts and answers are ragged."""
  rng = np.random.default_rng(5)
  slots = np.arange(length)
  first = rng.integers(0, 4, rows)[:, None]
  size = rng.integers(1, length - 4, rows)[:, None]
  mask = (slots >= first) & (slots < first + size)
  logps = -np.exp(rng.normal(size=(rows, length)))
  old, sampler, reference = (
    logps + s * rng.normal(size=logps.shape) for s in (0.2, 0.3, 0.5)
  )
  columns = {
    'advantages': rng.normal(size=rows),
    'old_logps': old,
    'sampler_logps': sampler,
    'reference_logps': reference,
  }
  columns = {k: v.astype(np.float32) for k, v in columns.items()}
  return logps.astype(np.float32), columns, mask


def test_ratios_of_tokens_and_of_answers_by_hand():
  logps = jnp.log(jnp.array([[0.5, 0.2, 0.9], [0.4, 0.7, 0.7]]))
  old = jnp.log(jnp.array([[0.25, 0.1, 0.1], [0.5, 0.1, 0.1]]))
  mask = jnp.array([[True, True, False], [True, False, False]])
  ratios = functools.partial(policy.ratios, logps, old, mask)
  np.testing.assert_allclose(ratios(), [[2, 2, 1], [0.8, 1, 1]], rtol=1e-6)
  other = old.at[0, 1].set(jnp.log(0.4))  # 2 * 0.5
  ratios = functools.partial(policy.ratios, logps, other, mask)
  np.testing.assert_allclose(ratios('answer')[0], [1, 1, 1], rtol=1e-6)
  other = old.at[0, 1].set(jnp.log(0.025))  # 2 * 8 = 4 ** 2
  for level, expected in (('sequence', 4), ('answer', 16)):
    found = policy.ratios(logps, other, mask, level)
    np.testing.assert_allclose(found[0], [expected, expected, 1], rtol=1e-5)
    np.testing.assert_allclose(found[1], [0.8, 1, 1], rtol=1e-6)


@pytest.mark.parametrize('level', policy.LEVELS)
def test_unchanged_weights_give_ratios_of_exactly_1(level):
  logps, _, mask = rollout()
  np.testing.assert_array_equal(policy.ratios(logps, logps, mask, level), 1)


def test_tokens_of_gspo_have_its_ratio_and_together_its_gradient():
  logps, columns, mask = rollout()

  def loss(level, advantages, logps):
    ratios = policy.ratios(logps, columns['old_logps'], mask, level)
    each = policy.surrogate('clip', logps, ratios, advantages, mask, 0.05, 0.05)
    return policy.aggregate(each, mask, 'sequence').total

  def both(level, advantages):
    return jax.value_and_grad(functools.partial(loss, level, advantages))(logps)

  same = columns['advantages']
  whole, tokens = both('sequence', same), both('sequence_token', same)
  np.testing.assert_allclose(tokens[0], whole[0], rtol=1e-5)
  np.testing.assert_allclose(tokens[1], whole[1], rtol=1e-5, atol=1e-7)
  # A token with another advantage of its own changes its own slope only.
  own = np.broadcast_to(same[:, None], mask.shape).copy()
  first = mask[0].argmax()
  own[0, first] += 0.5
  other = both('sequence_token', own)[1]
  (changed,) = np.nonzero(np.abs(other[0] - tokens[1][0]) > 1e-6)
  assert list(changed) == [first]


@pytest.mark.parametrize(
  ('ratio', 'advantage', 'loss', 'slope'),
  [
    (1.0, 2.0, -2.0, -2.0),
    (1.3, 2.0, -2.6, -2.0),  # clip_high is 0.4
    (1.5, 2.0, -2.8, 0.0),
    (1.5, -2.0, 3.0, 2.0),
    (0.9, -2.0, 1.8, 2.0),
    (0.7, -2.0, 1.6, 0.0),  # clip_low is 0.2
    (0.7, 2.0, -1.4, -2.0),
  ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, slope):
  def each(ratio):
    return policy.surrogate(
      'clip', row(0), row(ratio), row(advantage), ALL[:, :1], 0.2, 0.4
    )[0, 0]

  found = jax.value_and_grad(each)(ratio)
  np.testing.assert_allclose(found, (loss, slope), rtol=1e-6)


def test_dual_clip_bounds_what_a_bad_answer_costs():
  ratios = row(2.0, 4.0, 4.0, 0.5)
  advantages = row(-1.0, -1.0, 1.0, -1.0)

  def each(ratios):
    return policy.surrogate(
      'clip', ratios, ratios, advantages, ALL, 0.2, 0.2, dual_clip=3.0
    )

  np.testing.assert_allclose(each(ratios), row(2.0, 3.0, -1.2, 0.8), rtol=1e-6)
  slopes = jax.grad(lambda r: each(r).sum())(ratios)
  np.testing.assert_allclose(slopes, row(1, 0, 0, 0))


def test_clipped_tokens_of_cispo_still_learn():
  ratios, advantages = row(0.5, 1.0, 1.9, 1.9), row(1, 2, 2, -1)

  def total(kind, logps):
    args = logps, ratios, advantages, ALL
    return policy.surrogate(kind, *args, 1.0, 0.5).sum()

  slopes = jax.grad(lambda x: total('cispo', x))(row(-1, -1, -2, -3))
  np.testing.assert_allclose(slopes, -row(0.5, 2, 3, -1.5), rtol=1e-6)

  def through(logps):
    ratios = policy.ratios(logps, row(-1, -1, -2, -2), ALL)
    return policy.surrogate('cispo', logps, ratios, advantages, ALL).sum()

  slopes = jax.grad(through)(row(-1, -1, -2, -2))
  np.testing.assert_allclose(slopes, -advantages, rtol=1e-6)
  slopes = jax.grad(lambda x: total('reinforce', x))(row(-1, -1, -2, -3))
  np.testing.assert_allclose(slopes, -advantages)


def test_advantages_are_data():
  def total(advantages):
    return policy.surrogate('clip', row(0), row(1), advantages, ALL[:, :1])[
      0, 0
    ]

  assert total(jnp.array([3.0])) == -3
  assert jax.grad(total)(jnp.array([3.0])) == 0


@pytest.mark.parametrize('how', ['reinforce', 'answer'])
def test_gradient_is_that_of_the_expected_reward(how):
  """Over all answers of two tokens out of three; each weighs by its chance."""
  rng = np.random.default_rng(1)
  theta = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
  answers = np.array(list(itertools.product(range(3), repeat=2)))
  rewards = jnp.asarray(rng.normal(size=9), jnp.float32)
  mask = np.ones((9, 2), bool)

  def token_logps(theta):
    """The second token's distribution depends on the first."""
    logps = jax.nn.log_softmax(theta)
    second = logps[1 + answers[:, 0], answers[:, 1]]
    return jnp.stack([logps[0, answers[:, 0]], second], axis=1)

  def expected(theta):
    return (jnp.exp(token_logps(theta).sum(axis=1)) * rewards).sum()

  p = jnp.exp(token_logps(theta).sum(axis=1))

  def loss(theta):
    logps = token_logps(theta)
    old, level = jax.lax.stop_gradient(logps), 'answer'
    ratios = policy.ratios(logps, old, mask, level)
    kind = 'reinforce' if how == 'reinforce' else 'clip'
    each = policy.surrogate(kind, logps, ratios, 9 * p * rewards, mask)
    if kind == 'reinforce':
      return policy.aggregate(each, mask, 'constant', length=1)
    return policy.aggregate(each, mask, 'sequence')

  weight = loss(theta).weight
  assert weight == 9
  found = -jax.grad(lambda x: loss(x).total)(theta) / weight
  np.testing.assert_allclose(found, jax.grad(expected)(theta), atol=1e-6)


def test_aggregation_by_hand():
  values = jnp.array([[1.0, 3.0, jnp.nan], [5.0, jnp.nan, jnp.nan], [9.0] * 3])
  mask = jnp.array([[True, True, False], [True, False, False], [False] * 3])
  aggregate = functools.partial(policy.aggregate, values, mask)
  assert aggregate('token') == (9, 3)
  assert aggregate('sequence') == (2 + 5, 2)
  assert aggregate('constant', 8) == (9, 16)
  rows = jnp.ones(3, bool)  # TRL's count
  assert aggregate('sequence', sequences_B=rows) == (7, 3)
  assert aggregate('constant', 8, rows) == (9, 24)


@pytest.mark.parametrize('how', policy.AGGREGATIONS)
def test_microbatches_add_up_to_the_whole_batch(how):
  """To the bit, with numbers whose sums are exact; and a mean of means not."""
  rng = np.random.default_rng(0)
  values = rng.integers(-64, 64, (8, 8)).astype(np.float32) / 8
  mask = np.arange(8) < 2 ** rng.integers(0, 4, 8)[:, None]
  mask[3] = False
  aggregate = jax.jit(
    functools.partial(policy.aggregate, how=how, length=8 * (how == 'constant'))
  )
  whole = aggregate(values, mask)
  for parts in (2, 4, 8):
    each = [aggregate(values[i::parts], mask[i::parts]) for i in range(parts)]
    assert Mean(*map(sum, zip(*each, strict=True))) == whole
  halves = [value(aggregate(values[i::2], mask[i::2])) for i in range(2)]
  assert abs(np.mean(halves) - value(whole)) > 0.005


@pytest.mark.parametrize('how', policy.AGGREGATIONS)
def test_devices_change_nothing(how):
  logps, columns, mask = rollout()
  length = 9 * (how == 'constant')
  objective = policy.Objective(
    level='sequence', aggregation=how, length=length, beta=0.1
  )

  @jax.jit
  def computed(logps, columns, mask):
    def total(logps):
      each, metrics = objective.losses(logps, columns, mask)
      mean = objective.mean(each, mask)
      return mean.total, (mean.weight, metrics)

    return jax.value_and_grad(total, has_aux=True)(logps)

  expected = computed(logps, columns, mask)
  spread = jax.sharding.PartitionSpec('data')
  put = jax.device_put(
    (logps, columns, mask), jax.NamedSharding(tiny.mesh(data=8), spread)
  )
  found = computed(*put)
  assert len(found[1].sharding.device_set) == 8
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    found,
    expected,
  )


@pytest.mark.parametrize('objective', OBJECTIVES, ids=label)
def test_what_is_masked_changes_not_one_bit(objective):
  logps, columns, mask = rollout()
  values, returns = logps * 0.5, columns['old_logps'] * 0.7

  @jax.jit
  def computed(logps, values, columns, mask):
    def total(logps, values):
      each, metrics = objective.losses(logps, columns, mask)
      each += policy.value_losses(
        values, columns['old_logps'], columns['returns'], mask, 0.1
      )
      return objective.mean(each, mask).total, (each, metrics)

    return jax.value_and_grad(total, (0, 1), has_aux=True)(logps, values)

  columns['returns'] = returns
  wide = np.broadcast_to(columns['advantages'][:, None], mask.shape)
  columns['advantages'] = wide
  expected = computed(logps, values, columns, mask)
  (loss, (each, _)), slopes = expected
  assert np.isfinite(loss)
  assert not np.asarray(each)[~mask].any()
  for slope in slopes:
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() > 0
    assert not np.asarray(slope)[~mask].any()
  for garbage in (np.nan, np.inf, -np.inf, 3e38):
    dirty = [
      np.where(mask, x, garbage).astype(np.float32)
      for x in (logps, values, *columns.values())
    ]
    given = dict(zip(columns, dirty[2:], strict=True))
    found = computed(dirty[0], dirty[1], given, mask)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize('level', policy.LEVELS)
def test_a_policy_that_ran_away_still_has_finite_gradients(level):
  mask, old = np.ones((2, 3), bool), jnp.full((2, 3), -300.0)
  advantages = jnp.array([1.0, -1.0])

  def total(logps):
    ratios = policy.ratios(logps, old, mask, level)
    return policy.surrogate('clip', logps, ratios, advantages, mask).sum()

  for logps in (-1.0, -600.0):
    loss, slope = jax.value_and_grad(total)(jnp.full((2, 3), logps))
    assert np.isfinite(loss)
    assert np.isfinite(slope).all()


def test_kl_estimators_in_the_mean():
  """Over all tokens of a distribution; `kl` says what these should be."""
  rng = np.random.default_rng(3)
  theta, other = jnp.asarray(rng.normal(size=(2, 1, 6)), jnp.float32)
  reference = jax.nn.log_softmax(other)
  p = jax.nn.softmax(theta)  # of the tokens, as they were sampled
  mask = np.ones((1, 6), bool)

  def true(theta, reverse):
    a, b = jax.nn.log_softmax(theta), reference
    a, b = (b, a) if reverse else (a, b)
    return (jnp.exp(a) * (a - b)).sum()

  def mean(kind, theta):
    logps = jax.nn.log_softmax(theta)
    return (p * policy.kl(kind, logps, reference, mask)).sum()

  for kind in ('k1', 'k3'):
    np.testing.assert_allclose(mean(kind, theta), true(theta, False), rtol=1e-5)
  assert abs(mean('k2', theta) - true(theta, False)) > 0.01
  k1, k2, k3 = (jax.grad(lambda x, k=k: mean(k, x))(theta) for k in policy.KLS)
  np.testing.assert_allclose(k1, 0, atol=1e-6)
  slopes = [jax.grad(lambda x, r=r: true(x, r))(theta) for r in (False, True)]
  np.testing.assert_allclose(k2, slopes[0], atol=1e-6)
  np.testing.assert_allclose(k3, slopes[1], atol=1e-6)
  assert np.abs(slopes[0] - slopes[1]).max() > 0.01
  # Times the ratio, which is 1 but has a gradient.
  for kind in ('k1', 'k3'):

    def corrected(theta, kind=kind):
      logps = jax.nn.log_softmax(theta)
      ratios = policy.ratios(logps, jnp.log(p), mask)
      return (p * ratios * policy.kl(kind, logps, reference, mask)).sum()

    found = jax.grad(corrected)(theta)
    np.testing.assert_allclose(found, slopes[0], atol=1e-6)

  def distilled(theta):
    logps = jax.nn.log_softmax(theta)
    better = -policy.kl('k1', logps, reference, mask)
    return (p * policy.surrogate('reinforce', logps, p, better, mask)).sum()

  np.testing.assert_allclose(jax.grad(distilled)(theta), slopes[0], atol=1e-6)
  assert policy.kl('k3', reference, reference + 1e-4, mask).min() > 0


def test_sampler_weights_by_hand():
  old, sampler = jnp.log(row(0.5, 0.5, 0.5)), jnp.log(row(0.4, 0.1, 1.0))
  mask = np.array([[True, True, False]])
  weights = functools.partial(policy.sampler_weights, old, sampler, mask)
  np.testing.assert_allclose(weights(cap=2.0), row(1.25, 2, 0), rtol=1e-6)
  found = weights(cap=2.0, drop=True)
  np.testing.assert_allclose(found, row(1.25, 0, 0), rtol=1e-6)
  found = weights(cap=9.0, level='answer')
  np.testing.assert_allclose(found, row(6.25, 6.25, 0), rtol=1e-6)
  slope = jax.grad(
    lambda x: policy.sampler_weights(x, sampler, mask, 9.0).sum()
  )(old)
  assert not slope.any()


def test_value_loss_by_hand():
  values, old, returns = (
    row(1.0, 1.0, 0.0, 2.0),
    row(0, 0, 0, 0),
    row(2, -1, 0, 1.9),
  )
  each = functools.partial(
    policy.value_losses, old_values_BL=old, returns_BL=returns, mask_BL=ALL
  )
  # Clipped to 0.5: further from 2, nearer to -1 (so that the worse counts),
  # and further from 1.9.
  expected = row(1.5**2, 2**2, 0, 1.4**2) / 2
  np.testing.assert_allclose(each(values, clip=0.5), expected, rtol=1e-5)
  slopes = jax.grad(lambda v: each(v, clip=0.5).sum())(values)
  np.testing.assert_allclose(slopes, row(0, 2, 0, 0), atol=1e-6)
  total = jax.grad(lambda *x: policy.value_losses(*x).sum(), (1, 2))
  for slope in total(values, old, returns, ALL):
    assert not slope.any()  # they are data
  expected = row(1, 2**2, 0, 0.1**2) / 2
  np.testing.assert_allclose(each(values, clip=0.0), expected, rtol=1e-4)


def test_value_meters_by_hand():
  values, old, returns = row(1, 1, 0, 9), row(0, 0, 0, 9), row(2, -1, 0, np.nan)
  mask = np.array([[True] * 3 + [False]])
  found = policy.value_meters(values, old, returns, mask, 0.5)
  expected = {
    'value': 2 / 3, 'value_error': 5 / 3, 'value_clip': 1 / 3, 'return': 1 / 3,
  }  # fmt: skip
  assert found.keys() == expected.keys()
  for name, number in expected.items():
    np.testing.assert_allclose(value(found[name]), number, rtol=1e-6)


def test_meters_by_hand():
  ratios = row(0.7, 0.7, 1.3, 1.3, 1.0, 9.0)
  advantages = row(-1, 1, 1, -1, 1, 1)
  mask = np.array([[True] * 5 + [False]])
  found = policy.meters(
    jnp.log(ratios), jnp.zeros((1, 6)), ratios, advantages, mask, 0.2, 0.25
  )
  x = np.array([0.7, 0.7, 1.3, 1.3, 1.0])
  expected = {
    'clip_low': 1 / 5,
    'clip_high': 1 / 5,
    'ratio': 1.0,
    'ratio_max': 1.3,
    'approximate_kl': (x - 1 - np.log(x)).mean(),
  }
  assert found.keys() == expected.keys()
  for name, number in expected.items():
    np.testing.assert_allclose(
      value(found[name]), number, rtol=1e-5, err_msg=name
    )


def test_the_gap_of_sampler_and_trainer():
  found = policy.gap(
    row(-1, -2, -3, 5),
    row(-1.5, -1, -3, np.nan),
    np.array([[True] * 3 + [False]]),
  )
  assert found['sampler_gap'] == (1.5, 3)
  assert found['sampler_gap_max'].total == 1.0
  unseen = policy.gap(row(-1), row(np.nan), np.array([[True]]))
  # So that no threshold lets it pass.
  assert np.isnan(unseen['sampler_gap_max'].total)


@pytest.mark.parametrize('objective', OBJECTIVES, ids=label)
def test_every_objective_is_the_sum_of_its_parts(objective):
  logps, columns, mask = rollout()
  each, metrics = objective.losses(logps, columns, mask)
  old = columns['old_logps']
  ratios = policy.ratios(logps, old, mask, objective.level)
  parts = policy.surrogate(
    objective.kind, logps, ratios, columns['advantages'], mask
  )
  parts *= policy.sampler_weights(old, columns['sampler_logps'], mask, 1.2)
  kl = policy.kl(objective.kl, logps, columns['reference_logps'], mask)
  np.testing.assert_allclose(each, parts + 0.1 * kl, rtol=1e-6)
  np.testing.assert_allclose(value(metrics['kl']), kl.sum() / mask.sum(), 1e-5)


@pytest.mark.parametrize(
  ('wrong', 'said'),
  [
    ({'kind': 'ppo'}, "stage.kind='ppo': one of clip"),
    ({'level': 'group'}, 'stage.level='),
    ({'kl': 'k4'}, 'stage.kl='),
    ({'aggregation': 'mean'}, 'stage.aggregation='),
    ({'beta': -0.1}, 'stage.beta=-0.1'),
    ({'clip_high': -1.0}, 'stage.clip_high'),
    ({'dual_clip': 1.1}, 'above 1 + clip_high = 1.2'),
    ({'dual_clip': 3.0, 'kind': 'cispo'}, 'with kind=clip'),
    ({'sampler_cap': 0.5}, 'stage.sampler_cap=0.5'),
    ({'aggregation': 'constant'}, 'stage.length=0'),
    ({'length': 8}, 'stage.length=8'),
  ],
)
def test_what_cannot_be_is_refused(wrong, said):
  with pytest.raises(UserError) as error:
    policy.Objective(**wrong).check()
  assert said in str(error.value)
  assert '\n' not in str(error.value)


def test_what_can_be_is_not_refused():
  for objective in OBJECTIVES:
    objective.check()
  policy.Objective(dual_clip=3.0).check()
  policy.Objective(aggregation='constant', length=8).check()


@pytest.mark.parametrize(
  'call',
  [
    lambda x: policy.ratios(x, x, ALL, 'word'),
    lambda x: policy.surrogate('ppo', x, x, x, ALL),
    lambda x: policy.kl('k4', x, x, ALL),
    lambda x: policy.aggregate(x, ALL, 'mean'),
  ],
)
def test_unknown_names_are_named(call):
  with pytest.raises(ValueError, match='one of'):
    call(jnp.zeros((1, 4)))


def test_a_loss_of_a_network_is_finite_and_has_a_gradient():
  """`token_logps` of a stage, then an objective; ratio 1 at the start."""
  model = tiny.model()
  params, batch = tiny.params(model), tiny.batch(4)
  objective = policy.Objective(aggregation='sequence')

  def loss(params, old):
    logps, weights = stage.token_logps(model, params, batch)
    mask = weights > 0
    old = jax.lax.stop_gradient(logps) if old is None else old
    columns = {'advantages': jnp.arange(4.0) - 1, 'old_logps': old}
    each, metrics = objective.losses(logps, columns, mask)
    return objective.mean(each, mask).total, (metrics, logps)

  grads, (metrics, logps) = tiny.jit(
    jax.grad(lambda p: loss(p, None), has_aux=True)
  )(params)
  assert value(metrics['ratio']) == value(metrics['ratio_max']) == 1
  assert value(metrics['approximate_kl']) == 0
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  # A step downhill makes good answers likelier, and bad ones less so.
  moved = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
  total, (metrics, after) = tiny.jit(loss)(moved, logps)
  gain = np.asarray(after - logps).sum(axis=1)
  assert gain[3] > 0 > gain[0]
  assert value(metrics['approximate_kl']) > 0
  assert np.isfinite(total)
