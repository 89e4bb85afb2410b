import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_lm.errors import UserError
from tpu_lm.generate.sampler import (
  Sampler,
  draw,
  log_probabilities,
  sample,
  uniforms,
)

NUM_DRAWS = 20_000


def reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """The distribution in plain numpy, by sorting."""
  logits = np.asarray(logits, np.float64) / temperature
  order = np.lexsort((np.arange(len(logits)), -logits))
  if top_k:
    order = order[:top_k]
  p = np.exp(logits[order] - logits.max())
  p /= p.sum()
  count = 1
  while count < len(p) and p[:count].sum() < top_p:
    count += 1
  count = min(count, (p >= min_p * p[0]).sum())
  result = np.zeros(len(logits))
  result[order[:count]] = p[:count] / p[:count].sum()
  return result


CASES = [
  {},
  {'temperature': 0.6},
  {'temperature': 1.7},
  {'top_k': 1},
  {'top_k': 3},
  {'top_p': 0.7},
  {'top_p': 1e-6},
  {'temperature': 1.3, 'top_k': 6, 'top_p': 0.8},
  {'min_p': 0.2},
  {'min_p': 1.0},
  {'temperature': 1.5, 'top_p': 0.95, 'min_p': 0.1},
]


@pytest.mark.parametrize('case', CASES, ids=str)
def test_draws_follow_the_reference_distribution(case):
  logits = np.random.default_rng(0).normal(size=(2, 11)) * 2
  sampler = Sampler(**case)
  expected = np.stack([reference(row, **case) for row in logits])
  logps = log_probabilities(jnp.array(logits), sampler)
  np.testing.assert_allclose(np.exp(logps), expected, atol=1e-6)

  keys = jax.random.split(jax.random.key(1), NUM_DRAWS)
  rows = jnp.tile(jnp.array(logits), (NUM_DRAWS // 2, 1))
  tokens = np.asarray(jax.jit(sample, static_argnums=2)(rows, keys, sampler))
  for row in range(2):
    counts = np.bincount(tokens[row::2], minlength=11)
    assert not counts[expected[row] == 0].any()
    mean = expected[row] * NUM_DRAWS / 2
    # Five standard deviations of a binomial.
    assert (np.abs(counts - mean) <= 5 * np.sqrt(mean) + 1).all()


@pytest.mark.parametrize('size', [1, 2, 3, 17, 512, 8192])
def test_any_number_of_tokens_is_drawn_from(size):
  """Blocks of tokens: their borders and the last, shorter one."""
  logits = np.zeros((1, size), np.float32)
  chosen = sorted({0, size // 2, size - 1})
  logits[:, chosen] = 100.0  # the others are all but never drawn
  keys = jax.random.split(jax.random.key(0), 300)
  rows = jnp.tile(jnp.array(logits), (300, 1))
  found = np.asarray(sample(rows, keys, Sampler()))
  assert sorted(set(found.tolist())) == chosen


def test_random_numbers_at_their_ends_draw_what_can_be_drawn():
  logits = jnp.log(jnp.array([[0.0, 0.3, 0.0, 0.7, 0.0]]))
  for u, v, token in ((0, 0, 1), (1 - 2**-24, 1 - 2**-24, 3)):
    uniform = jnp.array([[u, v]], jnp.float32)
    assert draw(logits, uniform, Sampler()).token_B.tolist() == [token]


def test_a_penalty_is_that_of_hugging_face():
  """Logits above 0 are divided, others multiplied; then all the rest."""
  logits = jnp.array([[2.0, -1.0, 1.5, 0.5, -0.5]])
  seen = jnp.array([[True, True, False, False, True]])
  sampler = Sampler(temperature=0.5, top_k=3, repetition_penalty=2.0)
  found = np.exp(log_probabilities(logits, sampler, seen))[0]
  # 1, -2, 1.5, 0.5, -1; the three likeliest, divided by 0.5: 2, 3, 1.
  expected = np.exp([2.0, -np.inf, 3.0, 1.0, -np.inf])
  np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-6)
  greedy = Sampler(temperature=0, repetition_penalty=2.0)
  drawn = draw(logits, jnp.zeros((1, 2)), greedy, seen)
  assert drawn.token_B.tolist() == [2]


@pytest.mark.parametrize('case', [*CASES, {'temperature': 0.0}], ids=str)
def test_log_probabilities_of_what_was_drawn(case):
  logits = jnp.array(np.random.default_rng(0).normal(size=(64, 11)) * 2)
  keys = jax.random.split(jax.random.key(2), 64)
  sampler = Sampler(**case)
  drawn = draw(logits, uniforms(keys), sampler)
  at = np.arange(64), np.asarray(drawn.token_B)
  model = np.asarray(jax.nn.log_softmax(logits))[at]
  np.testing.assert_allclose(drawn.logp_B, model, atol=1e-5)
  sampled = np.asarray(log_probabilities(logits, sampler))[at]
  np.testing.assert_allclose(drawn.sampled_logp_B, sampled, atol=1e-5)


def test_temperature_0_is_greedy():
  logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 2.0, 3.0]])
  keys = jax.random.split(jax.random.key(0), 2)
  assert sample(logits, keys, Sampler(temperature=0)).tolist() == [1, 0]
  logps = log_probabilities(logits, Sampler(temperature=0))
  assert np.exp(logps).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_equally_likely_tokens_are_kept_by_id():
  logps = log_probabilities(jnp.zeros((1, 8)), Sampler(top_k=3))
  assert np.isfinite(logps[0]).tolist() == [True] * 3 + [False] * 5
  logps = log_probabilities(jnp.zeros((1, 8)), Sampler(top_p=0.5))
  assert np.isfinite(logps[0]).tolist() == [True] * 4 + [False] * 4


def test_a_row_does_not_depend_on_its_neighbours():
  logits = jax.random.normal(jax.random.key(0), (6, 50))
  keys = jax.random.split(jax.random.key(1), 6)
  for sampler in (Sampler(), Sampler(0.9, 7, 0.9)):
    together = sample(logits, keys, sampler)
    alone = [
      int(sample(logits[i : i + 1], keys[i : i + 1], sampler)[0])
      for i in range(6)
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize(
  'values',
  [
    {'temperature': -0.1},
    {'temperature': float('nan')},
    {'temperature': float('inf')},
    {'top_k': -1},
    {'top_p': 0.0},
    {'top_p': 1.1},
    {'top_p': float('nan')},
    {'min_p': -0.1},
    {'min_p': 1.5},
    {'repetition_penalty': 0.0},
    {'repetition_penalty': float('nan')},
  ],
  ids=str,
)
def test_values_out_of_range_are_named(values):
  ((name, value),) = values.items()
  with pytest.raises(UserError, match=f'^{name}={value}: must be'):
    Sampler(**values)


def test_more_than_the_vocabulary_is_refused():
  with pytest.raises(UserError, match='top_k=12: the vocabulary has only 11'):
    Sampler(top_k=12).check(11)
  Sampler(top_k=11).check(11)
