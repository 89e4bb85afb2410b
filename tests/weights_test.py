import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import sharding, weights


@pytest.mark.parametrize(
  ('spec', 'x', 'w'),
  [
    ('BLD,DHK->BLHK', (2, 6, 8), (8, 4, 3)),
    ('BLHK,HKD->BLD', (2, 6, 4, 3), (4, 3, 8)),
    ('BLD,DF->BLF', (2, 6, 8), (8, 5)),
  ],
)
@pytest.mark.parametrize('sequence', [1, 2])
def test_einsum_is_that_of_numpy_on_every_mesh(spec, x, w, sequence):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=x), rng.normal(size=w)
  with jax.set_mesh(tiny.mesh(data=2, sequence=sequence)):
    found = weights.einsum(
      spec, jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32),
      jnp.float32,
    )  # fmt: skip
  np.testing.assert_allclose(found, np.einsum(spec, x, w), atol=1e-5)


def test_einsum_computes_in_the_type_that_is_asked_for():
  x, w = jnp.ones((1, 2, 4)), jnp.ones((4, 3))
  found = weights.einsum('BLD,DF->BLF', x, w, jnp.bfloat16)
  assert found.dtype == jnp.bfloat16


def test_partition_and_combine_are_inverse():
  params = tiny.params(tiny.model())
  chosen, frozen = weights.partition(params, 'mlp/|final_norm')
  names = {
    sharding.path_name(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(chosen)
  }
  assert names == {
    'final_norm', 'layers/mlp/norm', 'layers/mlp/gate', 'layers/mlp/up',
    'layers/mlp/down',
  }  # fmt: skip
  whole = len(jax.tree.leaves(params))
  assert len(jax.tree.leaves(frozen)) == whole - len(names)
  jax.tree.map(
    np.testing.assert_array_equal, weights.combine(chosen, frozen), params
  )


def test_partition_refuses_a_pattern_that_matches_nothing():
  with pytest.raises(ValueError, match='no parameter path matches'):
    weights.partition(tiny.params(tiny.model()), 'atention')


def test_count():
  # V D + N (D + 2 D H K + 2 D G K + 2 K + D + 3 D F) + D, by hand.
  layer = 32 + 2 * 32 * 32 + 2 * 32 * 16 + 2 * 8 + 32 + 3 * 32 * 48
  expected = 64 * 32 + 2 * layer + 32
  assert weights.count(tiny.params(tiny.model('qwen3'))) == expected
