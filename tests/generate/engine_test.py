import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import sharding
from tpu_lm.errors import UserError
from tpu_lm.generate import engine
from tpu_lm.generate.sampler import Sampler, log_probabilities
from tpu_lm.models import transformer

SHAPES = {
  'plain': {},
  'grouped': {
    'num_kv_heads': 1,
    'qk_norm': True,
    'tied': False,
    'logit_soft_cap': 5.0,
    'attention_soft_cap': 8.0,
  },
  'windows': {'window': 5, 'window_pattern': (1, 0), 'num_kv_heads': 2},
  'all sliding': {'window': 3},
}
GREEDY = Sampler(temperature=0)


@functools.cache
def make(shape='plain'):
  config = transformer.Config(
    vocab_size=37,
    num_layers=2,
    dim=32,
    num_heads=4,
    hidden_dim=48,
    **SHAPES[shape],
  )
  model = transformer.Transformer(config)
  return model, jax.device_put(tiny.params(model, 0.3))


def prompts(*lengths, seed=0):
  draw = np.random.default_rng(seed)
  return [draw.integers(0, 37, size=n).tolist() for n in lengths]


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens_BL):
  hidden_BLD = model.apply({'params': params}, tokens_BL)
  logits_BLV = transformer.logits(model.config, params, hidden_BLD)
  return jax.nn.log_softmax(logits_BLV)


def full_logps(model, params, tokens):
  """Log-probabilities [L, V] of one row by the plain forward pass."""
  # What stands after a token does not reach it: one shape, one program.
  padded = np.zeros((1, 48), np.int32)
  padded[0, : len(tokens)] = tokens
  return np.asarray(forward(model, params, padded))[0, : len(tokens)]


def check_logps(model, params, asked, found, sampler=Sampler(), atol=1e-4):  # noqa: B008
  """Compares log-probabilities of tokens with those of the full pass."""
  for prompt, completion in zip(asked, found, strict=True):
    count = len(completion.tokens)
    whole = full_logps(model, params, prompt + completion.tokens)
    rows = whole[len(prompt) - 1 : len(prompt) - 1 + count]
    at = np.arange(count), completion.tokens
    np.testing.assert_allclose(completion.logps, rows[at], atol=atol)
    sampled = np.asarray(log_probabilities(jnp.array(rows), sampler))
    np.testing.assert_allclose(completion.sampled_logps, sampled[at], atol=atol)


@pytest.mark.parametrize(
  ('shape', 'copies'),
  [*((shape, 1) for shape in SHAPES), ('grouped', 3), ('windows', 3)],
)
def test_decoding_agrees_with_the_full_pass(shape, copies):
  model, params = make(shape)
  asked = prompts(1, 7, 16, 3)
  found = engine.generate(model, params, asked, 14, copies=copies)
  assert all(len(c.tokens) == 14 and not c.finished for c in found)
  asked = [prompt for prompt in asked for _ in range(copies)]
  check_logps(model, params, asked, found)


def test_log_probabilities_are_those_of_what_was_drawn_from():
  model, params = make('windows')
  sampler, asked = Sampler(0.6, top_k=20, top_p=0.9, min_p=0.01), prompts(3, 9)
  found = engine.generate(model, params, asked, 12, sampler)
  check_logps(model, params, asked, found, sampler)
  assert found[0].sampled_logps != found[0].logps
  (greedy,) = engine.generate(model, params, asked[:1], 5, GREEDY)
  assert greedy.sampled_logps == [0.0] * 5


@pytest.mark.parametrize('shape', ['grouped', 'windows'])
def test_samples_of_a_prompt_are_those_of_separate_prompts(shape):
  model, params = make(shape)
  asked = prompts(4, 11, 6)
  apart = engine.generate(
    model, params, [p for p in asked for _ in range(4)], 12, seed=1
  )
  shared = engine.generate(model, params, asked, 12, seed=1, copies=4)
  assert [c.tokens for c in shared] == [c.tokens for c in apart]
  state = engine.start(model, params, asked, 12, Sampler(), copies=4)
  slots = state.cache.layers[1]
  # Four prompts of 16 tokens are kept once, and 16 rows have 16 slots.
  assert slots.prefix_k.size == slots.k.size / 4
  if shape == 'windows':  # of 5 tokens, in the first layer
    first = state.cache.layers[0].prefix_k
    assert first.size == slots.prefix_k.size * 5 / 16


def test_sliding_layers_keep_only_their_window():
  model, params = make('windows')
  state = engine.start(model, params, prompts(15, 9), 40, Sampler())
  assert [s.k.shape[-1] for s in state.cache.layers] == [5, 64]


@pytest.mark.parametrize(
  ('shape', 'copies'), [('grouped', 1), ('windows', 1), ('plain', 2)]
)
def test_a_cache_in_8_bits_is_close(shape, copies):
  model, params = make(shape)
  asked = prompts(12, 5)
  found = engine.generate(
    model, params, asked, 14, copies=copies, quantised_cache=True
  )
  asked = [prompt for prompt in asked for _ in range(copies)]
  check_logps(model, params, asked, found, atol=0.15)
  state = engine.start(
    model, params, asked, 14, Sampler(), quantised_cache=True
  )
  assert (
    state.cache.layers[0].k.dtype == state.cache.layers[0].v.dtype == 'int8'
  )


def test_each_sequence_has_its_length_and_its_stop_tokens():
  model, params = make()
  asked = prompts(4, 11, 6, 2)
  free = engine.generate(model, params, asked, 16, seed=5)
  stops = [[], [free[1].tokens[4]], [free[2].tokens[2], 36], []]
  most = [16, 16, 1, 5]
  found = engine.generate(model, params, asked, most, stop_ids=stops, seed=5)
  for i, (whole, cut) in enumerate(zip(free, found, strict=True)):
    ends = [j for j, token in enumerate(whole.tokens) if token in stops[i]]
    count = min([ends[0] + 1 if ends else 16, most[i]])
    assert cut.tokens == whole.tokens[:count]
    assert cut.finished == (bool(ends) and ends[0] < most[i])
    assert len(cut.logps) == len(cut.sampled_logps) == count


def test_repeated_tokens_are_penalised():
  model, params = make()
  (prompt,) = prompts(6)
  sampler = Sampler(temperature=0, repetition_penalty=1e6)
  (found,) = engine.generate(model, params, [prompt], 20, sampler)
  # Nothing comes again: neither of the prompt nor of what was generated.
  assert len({*prompt, *found.tokens}) == len({*prompt}) + 20
  raw = full_logps(model, params, prompt + found.tokens)
  np.testing.assert_allclose(
    found.logps, raw[np.arange(5, 25), found.tokens], atol=1e-4
  )


def test_greedy_takes_the_likeliest_token():
  model, params = make()
  asked = prompts(5, 16, 2)
  for prompt, completion in zip(
    asked, engine.generate(model, params, asked, 10, GREEDY), strict=True
  ):
    for token in completion.tokens:
      assert token == full_logps(model, params, prompt)[-1].argmax()
      prompt = [*prompt, token]


def test_a_sequence_does_not_depend_on_its_neighbours():
  model, params = make()
  asked = prompts(4, 15, 9)
  together = engine.generate(model, params, asked, 12, seed=3)
  for i, prompt in enumerate(asked):
    (alone,) = engine.generate(
      model, params, [prompt], 12, seed=3, sequence_ids=[i]
    )
    assert alone.tokens == together[i].tokens
    np.testing.assert_allclose(alone.logps, together[i].logps, atol=1e-5)


def test_seeds_and_sequence_ids_tell_samples_apart():
  model, params = make()
  (prompt,) = prompts(6)
  group = engine.generate(model, params, [prompt] * 4, 12, seed=1)
  again = engine.generate(model, params, [prompt] * 4, 12, seed=1)
  other = engine.generate(model, params, [prompt] * 4, 12, seed=2)
  assert group == again
  assert len({tuple(c.tokens) for c in group + other}) == 8


def test_samples_follow_the_model():
  model, params = make()
  (prompt,) = prompts(6)
  sampler = Sampler(temperature=0.7)
  state = engine.start(model, params, [prompt] * 2048, 1, sampler)
  found = engine.completions(state, 2048)
  counts = np.bincount([c.tokens[0] for c in found], minlength=37)
  p = np.exp(full_logps(model, params, prompt)[-1] / 0.7)
  mean = 2048 * p / p.sum()
  assert (np.abs(counts - mean) <= 5 * np.sqrt(mean) + 1).all()


def test_a_sequence_ends_with_its_stop_token():
  model, params = make()
  asked = prompts(4, 11, 6)
  free = engine.generate(model, params, asked, 16, seed=5)
  stops = [free[0].tokens[3], free[1].tokens[9]]
  found = engine.generate(model, params, asked, 16, stop_ids=stops, seed=5)
  for whole, cut in zip(free, found, strict=True):
    ends = [i for i, token in enumerate(whole.tokens) if token in stops]
    count = ends[0] + 1 if ends else 16
    assert cut.tokens == whole.tokens[:count]
    assert cut.finished == bool(ends)
  assert len(found[0].tokens) <= 4


def test_decoding_ends_when_all_are_done():
  model, params = make()
  asked = prompts(4, 8, 5)
  free = engine.generate(model, params, asked, 16, seed=2)
  stops = [free[0].tokens[4], free[1].tokens[0], free[2].tokens[2]]
  state = engine.start(model, params, asked, 16, Sampler(), stops, seed=2)
  state = engine.advance(model, params, state, 16, Sampler())
  found = engine.completions(state, 3)
  assert all(completion.finished for completion in found)
  assert int(state.step) == max(len(c.tokens) for c in found) <= 5


def test_advancing_by_parts_gives_the_same_tokens():
  model, params = make('windows')
  asked = prompts(4, 8, 2)
  state = engine.start(model, params, asked, 16, Sampler(), seed=9)
  for limit in (3, 4, 12, 16):
    state = engine.advance(model, params, state, limit, Sampler())
  whole = engine.generate(model, params, asked, 16, seed=9)
  assert engine.completions(state, 3) == whole


def test_few_programs_are_compiled():
  model, params = make()
  num_programs = set()
  for lengths, new, stops in (
    ((3, 12, 4), 5, ()),
    ((16, 2, 2, 1), 16, (1, 2)),
    ((7, 11, 1), 9, (3,)),
  ):
    engine.generate(model, params, prompts(*lengths), new, GREEDY, stops)
    sizes = engine._prefill._cache_size(), engine._decode._cache_size()
    num_programs.add(sizes)
  assert len(num_programs) == 1


@pytest.mark.parametrize(('axes', 'copies'), [
  ({'data': 2, 'fsdp': 2, 'tensor': 2}, 1), ({'fsdp': 8}, 1),
  ({'fsdp': 2, 'tensor': 2}, 4),
], ids=str)  # fmt: skip
def test_a_sharded_model_generates_the_same(axes, copies):
  if jax.device_count() < 8:
    pytest.skip('too few devices')
  model, params = make('windows')
  asked = prompts(5, 9, 2)
  expected = engine.generate(model, params, asked, 8, seed=1, copies=copies)
  mesh = tiny.mesh(**axes)
  sharded = jax.device_put(params, sharding.shardings_of(params, mesh))
  with jax.set_mesh(mesh):
    found = engine.generate(model, sharded, asked, 8, seed=1, copies=copies)
  assert [c.tokens for c in found] == [c.tokens for c in expected]
  asked = [prompt for prompt in asked for _ in range(copies)]
  check_logps(model, params, asked, found)


def test_users_mistakes_are_named():
  model, params = make()
  with pytest.raises(UserError, match='max_new_tokens=0'):
    engine.generate(model, params, [[1]], 0)
  with pytest.raises(UserError, match='prompt: empty'):
    engine.generate(model, params, [[1], []], 3)
  with pytest.raises(UserError, match='top_k=40'):
    engine.generate(model, params, [[1]], 3, Sampler(top_k=40))
  assert engine.generate(model, params, [], 3) == []
