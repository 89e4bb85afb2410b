"""Advantages against plain loops, and what was not judged or is masked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import advantages
from tpu_lm.errors import UserError

NAN = np.nan


def judged_rewards(prompts=6, answers=8):
  rng = np.random.default_rng(2)
  rewards = rng.normal(size=(prompts, answers)).round(1) + 0.1
  rewards[rng.random(rewards.shape) < 0.15] = NAN
  rewards[1] = 0.1
  rewards[4, 1:] = NAN
  return rewards


def plain(rewards, ids, scale, leave_one_out, ddof, epsilon):
  """Group by group, and answer by answer."""
  found = np.zeros(len(rewards))
  everything = [r for r in rewards if not np.isnan(r)]
  for group in set(ids.tolist()):
    rows = [
      i for i in range(len(ids)) if ids[i] == group and not np.isnan(rewards[i])
    ]
    mine = [rewards[i] for i in rows]
    if len(mine) < 2 or min(mine) == max(mine):
      continue
    for i in rows:
      others = [rewards[j] for j in rows if j != i]
      found[i] = rewards[i] - np.mean(others if leave_one_out else mine)
      if scale == 'group':
        found[i] /= np.std(mine, ddof=ddof) + epsilon
      if scale == 'batch':
        found[i] /= np.std(everything, ddof=ddof) + epsilon
  return found


@pytest.mark.parametrize('scale', advantages.SCALES)
@pytest.mark.parametrize('leave_one_out', [False, True])
@pytest.mark.parametrize(('ddof', 'epsilon'), [(0, 0.0), (1, 1e-4)])
def test_groups_against_a_plain_group_by(scale, leave_one_out, ddof, epsilon):
  options = {
    'scale': scale, 'leave_one_out': leave_one_out, 'ddof': ddof,
    'epsilon': epsilon,
  }  # fmt: skip
  rewards = judged_rewards()
  ids = np.repeat(np.arange(len(rewards)), rewards.shape[1])
  expected = plain(rewards.reshape(-1), ids, **options)
  found = advantages.grouped(rewards, **options)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found.reshape(-1), expected, rtol=1e-6)
  # Whatever the order, and so however a group is split: not one bit.
  order = np.random.default_rng(0).permutation(ids.size)
  names = np.array(list('fbacde'))[ids]
  mixed = advantages.grouped(
    rewards.reshape(-1)[order], names[order], **options
  )
  np.testing.assert_array_equal(mixed, found.reshape(-1)[order])


def test_no_order_of_answers_matters_to_the_bit():
  """Of numbers whose sum depends on the order in which they are added."""
  rewards = np.array([1e12, 1.0, -1e12, 0.3, 1e-3, -2e11, 7.7, 2e11])
  ids = np.zeros(8)
  expected = advantages.grouped(rewards, ids, scale='none')
  rng = np.random.default_rng(0)
  sums = set()
  for _ in range(20):
    order = rng.permutation(8)
    sums.add(sum(rewards[order].tolist()))
    found = advantages.grouped(rewards[order], ids, scale='none')
    np.testing.assert_array_equal(found, expected[order])
  assert len(sums) > 5


def test_grpo_and_rloo_by_hand():
  rewards = [[1.0, 0.0, 0.0, 0.0], [3.0, NAN, 1.0, 2.0]]
  third = np.sqrt(1 / 3)
  np.testing.assert_allclose(
    advantages.grouped(rewards),
    [[3 * third, -third, -third, -third], [1.5**0.5, 0, -(1.5**0.5), 0]],
    rtol=1e-6, atol=1e-7,
  )  # fmt: skip
  np.testing.assert_allclose(
    advantages.grouped(rewards, scale='none', leave_one_out=True),
    [[1, -1 / 3, -1 / 3, -1 / 3], [1.5, 0, -1.5, 0]],
    rtol=1e-6,
  )


@pytest.mark.parametrize('scale', advantages.SCALES)
@pytest.mark.parametrize('leave_one_out', [False, True])
@pytest.mark.parametrize('equal', [0.1, 1 / 3, 1e30, -7.7, 0.0])
def test_a_group_of_equal_rewards_gives_exactly_0(scale, leave_one_out, equal):
  """Though the mean of three times 0.1 is not 0.1."""
  rewards = np.full((2, 3), equal)
  rewards[1] = [1.0, 2.0, 4.0]
  found = advantages.grouped(rewards, scale=scale, leave_one_out=leave_one_out)
  assert not found[0].any()
  assert found[1].all()


def test_rounding_is_no_reason_to_prefer_an_answer():
  rewards = np.float32([[0.7, 0.7 * (1 + 2e-7), 0.7], [0.7, 0.7001, 0.7]])
  found = advantages.grouped(rewards)
  assert not found[0].any()
  assert found[1, 1] > 1
  # Nor does a great reward elsewhere hide a small difference.
  found = advantages.grouped([[0.1, 0.2], [1e9, 2e9]])
  np.testing.assert_allclose(found[0], [-1, 1])


def test_what_was_not_judged_is_left_out():
  rewards = np.array([[1.0, 2.0, 6.0, NAN], [NAN] * 4, [NAN, 5.0, NAN, NAN]])
  for scale in advantages.SCALES:
    found = advantages.grouped(rewards, scale=scale)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(
      found == 0, [[False] * 3 + [True], *[[True] * 4] * 2]
    )
    assert abs(found[0].sum()) < 1e-6
  alone = advantages.grouped(rewards[:1, :3])
  np.testing.assert_array_equal(advantages.grouped(rewards)[0, :3], alone[0])
  nothing = advantages.grouped(np.full((2, 2), NAN), scale='batch')
  assert not nothing.any()


def test_dead_groups():
  rewards = [[1, 1, NAN], [0, 1, NAN], [NAN, NAN, NAN], [1, NAN, NAN]]
  rewards.append([0, 0, 0])
  equal = advantages.equal_groups(rewards)
  np.testing.assert_array_equal(equal, [True, False, True, True, True])
  assert advantages.dead_groups(rewards) == (4, 5)
  by_id = advantages.equal_groups(
    np.array([1.0, 5, 2, 5]), np.array([9, 3, 9, 3])
  )
  np.testing.assert_array_equal(by_id, [True, False])  # 3, 9


def test_what_no_reward_can_be_is_refused():
  with pytest.raises(ValueError, match='infinite'):
    advantages.grouped([[1.0, np.inf]])
  with pytest.raises(ValueError, match='group a row'):
    advantages.grouped(np.ones(4))
  with pytest.raises(ValueError, match='not one a reward'):
    advantages.grouped(np.ones(4), np.ones(3))
  with pytest.raises(ValueError, match='one of group'):
    advantages.grouped(np.ones((2, 2)), scale='std')


def ragged(rows=6, length=11, seed=0):
  """(rewards, values, mask): prompts before answers, padding behind."""
  rng = np.random.default_rng(seed)
  slots = np.arange(length)
  first = rng.integers(0, 4, rows)[:, None]
  size = rng.integers(1, 8, rows)[:, None]
  mask = (slots >= first) & (slots < first + size)
  mask[2] = False
  shape = rows, length
  rewards, values = rng.normal(size=(2, *shape)).astype(np.float32)
  return rewards, values, mask


def plain_gae(rewards, values, mask, gamma, lam, bootstrap):
  """Equation 16 of the paper as it stands: sums of discounted residuals."""
  found = np.zeros(rewards.shape)
  for b in range(len(rewards)):
    at = np.flatnonzero(mask[b])
    v = [*values[b, at], bootstrap[b]]
    deltas = [rewards[b, t] + gamma * v[i + 1] - v[i] for i, t in enumerate(at)]
    for i, t in enumerate(at):
      rest = deltas[i:]
      found[b, t] = sum((gamma * lam) ** n * d for n, d in enumerate(rest))
  return found


@pytest.mark.parametrize('cut_off', [False, True])
@pytest.mark.parametrize('holes', [False, True])
@pytest.mark.parametrize(
  ('gamma', 'lam'), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)]
)
def test_gae_against_a_plain_loop(gamma, lam, holes, cut_off):
  rewards, values, mask = ragged()
  if holes:  # another's tokens within an answer
    mask[:, 4] = False
  bootstrap = np.linspace(-1, 1, len(mask)) * cut_off
  found, returns = jax.jit(advantages.gae)(
    rewards, values, mask, gamma, lam, jnp.asarray(bootstrap)
  )
  if not cut_off:
    same, _ = advantages.gae(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(same, found, atol=1e-6)
  expected = plain_gae(rewards, values, mask, gamma, lam, bootstrap)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  wanted = np.where(mask, expected + values, 0)
  np.testing.assert_allclose(returns, wanted, rtol=1e-5, atol=1e-5)


def test_returns_are_what_is_still_to_come():
  """gamma = lam = 1: whatever the values, the rewards from here on."""
  rewards, values, mask = ragged()
  _, returns = advantages.gae(rewards, values, mask, 1.0, 1.0)
  kept = np.where(mask, rewards, 0)
  expected = np.where(mask, kept[:, ::-1].cumsum(1)[:, ::-1], 0)
  np.testing.assert_allclose(returns, expected, atol=1e-5)


def test_whitening():
  x, _, mask = ragged()
  x = 3 * x + 5
  for ddof in (0, 1):
    found = np.asarray(advantages.whiten(x, mask, ddof=ddof))
    assert abs(found[mask].mean()) < 1e-6
    np.testing.assert_allclose(found[mask].std(ddof=ddof), 1, rtol=1e-5)
    kept = np.asarray(advantages.whiten(x, mask, shift_mean=False, ddof=ddof))
    np.testing.assert_allclose(
      kept[mask], found[mask] + x[mask].mean(), rtol=1e-5
    )
  first = np.zeros_like(mask)
  first[0, mask[0].argmax()] = True
  for few in (np.zeros_like(mask), first):
    assert not np.asarray(advantages.whiten(x, few, ddof=1)).any()


def test_whitening_is_of_the_whole_batch_on_any_number_of_devices():
  x, _, mask = ragged(rows=16)
  expected = advantages.whiten(x, mask)
  spread = jax.NamedSharding(
    tiny.mesh(data=8), jax.sharding.PartitionSpec('data')
  )
  found = jax.jit(advantages.whiten)(*jax.device_put((x, mask), spread))
  assert len(found.sharding.device_set) == 8
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  halves = [advantages.whiten(x[i::2], mask[i::2]) for i in (0, 1)]
  assert np.abs(halves[0] - expected[::2]).max() > 0.01


def test_rewards_of_tokens_by_hand():
  logps = jnp.array([[-9.0, -1, -2, -9], [-1, -1, -1, -1], [-1, -1, -1, -1]])
  reference = jnp.array([[0.0, -2, -1.5, 0], [-1, -1, -1, -3], [0, 0, 0, 0]])
  mask = np.zeros((3, 4), bool)
  mask[0, 1:3] = mask[1, 3:] = True
  scores = jnp.array([5.0, -2.0, NAN])
  reward = functools.partial(
    advantages.token_rewards, scores, logps, reference, mask
  )
  np.testing.assert_allclose(
    reward(0.1), [[0, -0.1, 5.05, 0], [0, 0, 0, -2.2], [0] * 4], atol=1e-6
  )
  np.testing.assert_allclose(
    reward(0.1, 'k2')[0], [0, -0.05, 5 - 0.0125, 0], atol=1e-6
  )


def test_what_is_masked_changes_not_one_bit():
  rewards, values, mask = ragged()
  scores = jnp.where(mask.any(1), jnp.arange(6.0), NAN)

  @jax.jit
  def computed(rewards, values, scores, mask):
    given = advantages.token_rewards(scores, rewards, values, mask, 0.1)
    found, returns = advantages.gae(given, values, mask, 0.99, 0.9)
    white = advantages.whiten(found, mask, shift_mean=False)
    return given, found, returns, white

  expected = computed(rewards, values, scores, mask)
  for x in expected:
    assert np.isfinite(x).all()
    assert not np.asarray(x)[~mask].any()
  for garbage in (NAN, np.inf, 3e38):
    dirty = [
      np.where(mask, x, garbage).astype(np.float32) for x in (rewards, values)
    ]
    other = jnp.where(mask.any(1), scores, garbage)
    found = computed(*dirty, other, mask)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  # gae and whiten by themselves, too.
  white = advantages.whiten(dirty[0], mask)
  np.testing.assert_array_equal(white, advantages.whiten(rewards, mask))
  for found, wanted in zip(
    advantages.gae(*dirty, mask), advantages.gae(rewards, values, mask),
    strict=True,
  ):  # fmt: skip
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('whiten_rewards', [False, True])
@pytest.mark.parametrize('whiten_advantages', [False, True])
def test_columns_of_ppo(whiten_rewards, whiten_advantages):
  rewards, values, mask = ragged()
  dirty = (np.where(mask, x, NAN) for x in (rewards, values))
  made = advantages.Returns(0.9, 0.8, whiten_rewards, whiten_advantages)
  made.check()
  columns = made.columns(*dirty, mask)
  assert columns.keys() == {'advantages', 'returns', 'old_values'}
  for x in columns.values():
    assert type(x) is np.ndarray
    assert x.dtype == np.float32
    assert not x[~mask].any()
  np.testing.assert_array_equal(columns['old_values'][mask], values[mask])
  if whiten_rewards:
    rewards = np.asarray(advantages.whiten(rewards, mask, shift_mean=False))
  expected = plain_gae(rewards, values, mask, 0.9, 0.8, np.zeros(len(mask)))
  np.testing.assert_allclose(
    columns['returns'][mask], (expected + values)[mask], atol=1e-5
  )
  if whiten_advantages:
    some = expected[mask]
    expected = (expected - some.mean()) / some.std()
  np.testing.assert_allclose(
    columns['advantages'][mask], expected[mask], atol=1e-5
  )


def test_every_step_of_a_run_is_one_program():
  before = advantages.gae._cache_size()
  for seed in range(3):
    advantages.Returns(0.9, 0.8).columns(*ragged(rows=5, length=17, seed=seed))
  assert advantages.gae._cache_size() == before + 1


def test_returns_that_cannot_be_are_refused():
  for wrong in ({'gamma': 1.1}, {'lam': -0.1}):
    with pytest.raises(UserError, match='stage'):
      advantages.Returns(**wrong).check()
