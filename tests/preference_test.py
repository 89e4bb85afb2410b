"""Halves and slots, by hand; where rewards are read; who counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import preference, stage, weights


@functools.cache
def made():
  model = tiny.model(scalar_head=True)
  return model, tiny.params(model)


@functools.cache
def compiled(what):
  model, _ = made()
  return tiny.jit(lambda params, rows: what(model, params, rows, 4))


def rows(tokens: dict[int, int] | None = None, slots: int = 1):
  """Segments at slots 0-3 and 4-8 of a row; some tokens set otherwise."""
  found = tiny.packed(np.random.default_rng(7), [[(2, 2), (1, 4)]] * slots, 16)
  for slot, token in (tokens or {}).items():
    found['tokens'][:, slot] = token
  return found


def test_halves_are_interleaved_and_come_apart_again():
  batch = tiny.pairs(4)
  both = preference.interleaved(batch)
  assert both['tokens'].shape == (8, tiny.LENGTH + 1)
  np.testing.assert_array_equal(both['tokens'][0], batch['chosen_tokens'][0])
  np.testing.assert_array_equal(both['tokens'][1], batch['rejected_tokens'][0])
  for name, column in both.items():
    chosen, rejected = preference.halves(column)
    np.testing.assert_array_equal(chosen, batch['chosen_' + name])
    np.testing.assert_array_equal(rejected, batch['rejected_' + name])


def test_log_probabilities_of_segments_by_hand():
  model, params = made()
  row = rows()
  sums, counts = compiled(stage.sequence_logps)(params, row)
  x = model.apply(
    {'params': params},
    *(row[k][:, :-1] for k in ('tokens', 'positions', 'segment_ids')),
  )
  logps = jax.nn.log_softmax(x @ params['embedding'].T)[0]
  each = [
    float(logps[slot - 1, row['tokens'][0, slot]]) for slot in range(1, 9)
  ]
  # Slots 2 and 3 are the first completion; 5 to 8 the second.
  expected = [each[1] + each[2], sum(each[4:8]), 0, 0]
  np.testing.assert_allclose(sums, [expected], rtol=1e-5)
  np.testing.assert_array_equal(counts, [[2, 4, 0, 0]])


def test_a_pair_counts_if_both_halves_have_targets():
  model, params = made()
  batch = tiny.pairs(3)
  assert (batch['rejected_segment_ids'][2] == 3).any()
  batch['rejected_loss_mask'][2, batch['rejected_segment_ids'][2] == 2] = False
  found = preference.logps(model, params, batch, 4)
  expected = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]
  np.testing.assert_array_equal(found.counted_BS, expected)
  for half in (0, 1):
    assert not found.logps_BS[half][2, 1]
    assert not found.counts_BS[half][2, 1]
  unseen = jnp.where(jnp.array(expected) > 0, 0.0, jnp.nan)
  ratios = found.over((unseen, unseen))
  assert np.isfinite(ratios.logps_BS).all()


def test_rewards_are_read_at_the_last_token_of_each_segment():
  """Slots 3 and 8: a token more, or one less, would be another number."""
  model, params = made()
  row = rows()
  rewards, counted = compiled(preference.rewards)(params, row)
  x = model.apply(
    {'params': params},
    *(row[k] for k in ('tokens', 'positions', 'segment_ids')),
  )
  every = np.asarray(x[0] @ params['scalar_head'])
  np.testing.assert_allclose(rewards[0], [every[3], every[8], 0, 0], rtol=1e-4)
  np.testing.assert_array_equal(counted, [[True, True, False, False]])
  assert np.abs(np.diff(every[[2, 3, 4, 7, 8, 9]])).min() > 1e-3
  # The stop token itself is read, and nothing behind it.
  for slot, changes in (
    (3, [True, False]),
    (8, [False, True]),
    (9, [False] * 2),
  ):
    other = rows({slot: (row['tokens'][0, slot] + 1) % tiny.VOCAB})
    again, _ = compiled(preference.rewards)(params, other)
    np.testing.assert_array_equal((again != rewards)[0, :2], changes)


def test_a_record_that_fills_the_row_is_read_at_its_end():
  model, params = made()
  row = tiny.packed(np.random.default_rng(1), [[(4, 12)]], 16)
  rewards, counted = compiled(preference.rewards)(params, row)
  x = model.apply({'params': params}, row['tokens'], row['positions'])
  np.testing.assert_allclose(
    rewards[0, 0], x[0, 15] @ params['scalar_head'], rtol=1e-4
  )
  assert counted[0, 0]


@pytest.mark.parametrize(
  'what', [stage.sequence_logps, preference.rewards], ids=['logps', 'rewards']
)
def test_a_packed_neighbour_does_not_leak_in(what):
  _, params = made()
  row, other = rows(), rows({4: 11, 5: 12, 6: 13, 7: 14, 8: 15})
  values, _ = compiled(what)(params, row)
  again, _ = compiled(what)(params, other)
  assert values[0, 0] == again[0, 0]
  assert values[0, 1] != again[0, 1]
  other = rows({0: 11, 1: 12, 2: 13, 3: 14})
  again, _ = compiled(what)(params, other)
  assert values[0, 0] != again[0, 0]
  assert values[0, 1] == again[0, 1]


def test_metrics_by_hand():
  chosen = jnp.array([[1.0, -1.0, jnp.nan]])
  rejected = jnp.array([[0.0, 1.0, 3.0]])
  counted = jnp.array([[True, True, False]])
  found = preference.metrics(chosen, rejected, counted, 2.0)
  found |= preference.calibration(chosen, rejected, counted)
  p, q = 1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(2.0))
  expected = {
    'accuracy': 0.5,
    'margin': (2 - 4) / 2,
    'chosen_reward': 0.0,
    'rejected_reward': 1.0,
    'brier': ((1 - p) ** 2 + (1 - q) ** 2) / 2,
    'confidence': (p + 1 - q) / 2,
  }
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(
      found[name].total / found[name].weight, value, atol=1e-6, err_msg=name
    )


def test_a_reference_is_fetched_only_if_its_columns_are_missing():
  _, params = made()
  fetched = []

  def start():
    fetched.append(1)
    return params

  def logps(reference, batch):
    return (batch['margins'] + reference['final_norm'][0],)

  prepare = preference.referring(start, logps, ('kept',), on_the_fly=False)
  batch = tiny.pairs(2)
  kept = batch | {'kept': np.zeros((2, 4))}
  (part,) = prepare(None, kept, None)
  assert part is kept
  assert not fetched
  for _ in range(2):
    (part,) = prepare(None, batch, None)
    assert part.keys() == kept.keys()
  assert len(fetched) == 1
  # Else it must be had before the first update.
  preference.referring(start, logps, ('kept',), on_the_fly=True)
  assert len(fetched) == 2


def test_the_reference_of_adapted_weights_is_their_base():
  model = tiny.model()
  base = tiny.params(model)
  params = weights.transform(base, 'lora(rank=2)', jax.random.key(0))
  params = jax.tree.map(lambda x: x + 0.1, params)
  moved = jax.tree.map(lambda x: x + 0.1, base)
  batch = tiny.pairs(4)

  def columns(start):
    made = stage.make('dpo', model, lambda: start, {})
    (part,) = made.prepare(None, batch, None)
    return [np.asarray(part[name]) for name in made.kept]

  for found, expected in zip(columns(params), columns(moved), strict=True):
    np.testing.assert_array_equal(found, expected)
