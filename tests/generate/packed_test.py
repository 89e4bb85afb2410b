"""Packed weights: the same network, packed once."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import weights
from tpu_lm.generate import packed
from tpu_lm.models import ring

PRESETS = ('llama', 'qwen2', 'qwen3', 'gemma2', 'gemma3')


@pytest.fixture(autouse=True)
def only_on_cpus():
  if jax.default_backend() != 'cpu':
    pytest.skip('accelerators get the tree as it is')


def decoded(model, params, tokens):
  """Hidden states, token by token."""

  @tiny.jit
  def step(params, tokens_B1, positions_B1, cache):
    return model.apply({'params': params}, tokens_B1, positions_B1, None, cache)

  rows, length = tokens.shape
  cache, found = ring.init_cache(model.config, rows, length), []
  for i in range(length):
    at = np.full((rows, 1), i, np.int32)
    hidden, cache = step(params, tokens[:, i : i + 1], at, cache)
    found.append(hidden[:, 0])
  return np.stack(found, axis=1)


@pytest.mark.parametrize('name', PRESETS)
@pytest.mark.parametrize('rows', [1, 8])
def test_the_network_is_the_same(name, rows):
  model = tiny.model(name)
  params = jax.device_put(tiny.params(model, 0.15))
  tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (rows, 5))
  expected = model.apply({'params': params}, tokens)
  held = packed.packed(params, rows)
  assert isinstance(held['layers'], tuple)
  found = decoded(model, held, tokens)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_adapters_are_added_and_quantised_weights_left():
  model = tiny.model('llama')
  params = jax.device_put(tiny.params(model, 0.15))
  adapted = weights.transform(params, 'lora(rank=2)', jax.random.key(0))
  adapted = jax.tree.map(lambda x: x + 0.01, adapted)  # no factor is 0
  tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (1, 5))
  held = packed.packed(adapted, 1)
  assert not weights.is_held(held)
  expected = model.apply({'params': adapted}, tokens)
  np.testing.assert_allclose(decoded(model, held, tokens), expected, atol=1e-5)
  quantised = weights.transform(params, 'int8, lora', jax.random.key(0))
  assert packed.packed(quantised, 1) is quantised


def test_weights_are_packed_once_and_not_kept_for_ever():
  model = tiny.model('llama')
  params = jax.device_put(tiny.params(model, 0.15))
  first = packed.packed(params, 1)
  assert packed.packed(dict(params), 1) is first
  assert packed.packed(params, 8) is not first
  other = dict(params, embedding=jnp.zeros_like(params['embedding']))
  assert packed.packed(other, 8)['embedding'] is other['embedding']
  assert packed._last is not None
  del params, other, first
  gc.collect()
  assert packed._last is None
