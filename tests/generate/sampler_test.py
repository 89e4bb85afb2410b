import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_lm.errors import UserError
from tpu_lm.generate.sampler import Sampler, log_probabilities, sample

NUM_DRAWS = 20_000


def reference(logits, temperature=1.0, top_k=0, top_p=1.0):
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
