"""Speculative decoding against plain sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from engine_test import GREEDY, full_logps, make, prompts

from tpu_lm.errors import UserError
from tpu_lm.generate import engine, speculative
from tpu_lm.generate.sampler import Sampler, log_probabilities
from tpu_lm.generate.speculative import Draft, Guessing
from tpu_lm.models import transformer


@functools.cache
def draft():
  """A smaller model that agrees with 'plain' now and then."""
  config = transformer.Config(
    vocab_size=37, num_layers=1, dim=16, num_heads=2, hidden_dim=16, window=4
  )
  model = transformer.Transformer(config)
  return Draft(model, jax.device_put(tiny.params(model, 0.2)))


def guessers(shape):
  return {'lookup': None, 'draft': draft(), 'itself': Draft(*make(shape))}


@pytest.mark.parametrize(
  ('shape', 'guesser'),
  [('windows', 'lookup'), ('grouped', 'draft'), ('windows', 'itself')],
)
def test_greedy_tokens_are_the_same(shape, guesser):
  model, params = make(shape)
  asked, most = prompts(4, 11, 1), [20, 7, 15]
  free = engine.generate(model, params, asked, most, GREEDY)
  stops = [[free[0].tokens[9]], [], []]
  expected = engine.generate(model, params, asked, most, GREEDY, stops)
  found = speculative.generate(
    model,
    params,
    asked,
    most,
    GREEDY,
    stops,
    guessing=Guessing(guessers(shape)[guesser], 3),
  )
  for a, b in zip(found.completions, expected, strict=True):
    assert a.tokens == b.tokens
    assert a.finished == b.finished
    np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)
    assert a.sampled_logps == b.sampled_logps
  if guesser == 'itself':  # every guess stays, but for what is cut off
    assert found.tokens_a_step > 2.5
  assert 1 <= found.tokens_a_step <= 4


def joint(model, params, prompt, sampler):
  """The probabilities of all continuations of three tokens."""
  size = model.config.vocab_size

  @jax.jit
  def after(tokens_BL):
    hidden_BLD = model.apply({'params': params}, tokens_BL)
    logits = transformer.logits(model.config, params, hidden_BLD[:, -1])
    return jnp.exp(log_probabilities(logits, sampler))

  found = np.ones(())
  texts = np.array([prompt])
  for _ in range(3):
    p = np.asarray(after(texts)).reshape(*found.shape, size)
    found = found[..., None] * p
    texts = np.repeat(texts, size, axis=0)
    new = np.tile(np.arange(size), len(texts) // size)[:, None]
    texts = np.concatenate([texts, new], axis=1)
  return found


@pytest.mark.parametrize('guesser', ['lookup', 'draft'])
def test_samples_follow_the_sampler(guesser):
  """All 125 continuations of three tokens are as frequent as they should."""
  config = transformer.Config(
    vocab_size=5, num_layers=1, dim=16, num_heads=2, hidden_dim=16
  )
  model = transformer.Transformer(config)
  params = jax.device_put(tiny.params(model, 0.3))
  other = jax.device_put(tiny.params(model, 0.2))
  sampler, count = Sampler(0.8, top_k=4), 8192
  prompt = [1, 2, 0, 1, 2, 3, 1, 2]  # lookup finds its newest tokens
  found = speculative.generate(
    model,
    params,
    [prompt] * count,
    3,
    sampler,
    guessing=Guessing(Draft(model, other) if guesser == 'draft' else None, 2),
  )
  counts = np.zeros((5, 5, 5))
  np.add.at(counts, tuple(np.array([c.tokens for c in found.completions]).T), 1)
  mean = count * joint(model, params, prompt, sampler)
  assert not counts[mean == 0].any()
  assert (np.abs(counts - mean) <= 5 * np.sqrt(mean) + 1).all()
  assert 1.01 < found.tokens_a_step < 1.99  # guesses are both kept and not


def test_log_probabilities_are_those_of_the_tokens():
  model, params = make('windows')
  sampler, asked = Sampler(0.7, top_p=0.9), prompts(3, 14)
  found = speculative.generate(
    model, params, asked, 12, sampler, seed=4, guessing=Guessing(draft(), 2)
  )
  for prompt, one in zip(asked, found.completions, strict=True):
    whole = full_logps(model, params, prompt + one.tokens)
    rows = whole[len(prompt) - 1 : -1]
    at = np.arange(12), one.tokens
    np.testing.assert_allclose(one.logps, rows[at], atol=1e-4)
    sampled = np.asarray(log_probabilities(jnp.array(rows), sampler))
    np.testing.assert_allclose(one.sampled_logps, sampled[at], atol=1e-4)


def test_a_sequence_does_not_depend_on_its_neighbours():
  model, params = make('windows')
  asked = prompts(4, 15, 9)
  run = functools.partial(speculative.generate, model, params, seed=3)
  together = run(asked, 12).completions
  for i, prompt in enumerate(asked):
    (alone,) = run([prompt], 12, sequence_ids=[i]).completions
    assert alone.tokens == together[i].tokens


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ([7, 1, 2, 3, 9, 1, 2, 3], [9, 1, 2, 3]),  # three tokens match
    ([1, 2, 8, 3, 2, 5, 4, 2], [5, 4, 2, 5]),  # one: the last place counts
    ([4, 6, 6], [6, 6, 6, 6]),  # the text ends: what is left repeats
  ],
)
def test_lookup_finds_what_followed(text, expected):
  row = np.zeros((1, 16), np.int32)
  row[0, : len(text)] = text
  length = np.array([len(text)], np.int32)
  assert speculative.looked_up(row, length, 4)[0].tolist() == expected


def test_lookup_pays_on_text_that_repeats():
  model, params = make('all sliding')
  # Greedy decoding of a model that sees little falls into a cycle.
  found = speculative.generate(model, params, prompts(9, 5), 120, GREEDY)
  assert found.tokens_a_step > 1.5


def test_users_mistakes_are_named():
  model, params = make('plain')
  small = Draft(transformer.Transformer(transformer.Config(vocab_size=9)), {})
  for options, message in (
    ({'guessing': Guessing(ahead=0)}, 'ahead=0'),
    ({'guessing': Guessing(small)}, 'vocabulary has 9 tokens'),
    ({'sampler': Sampler(repetition_penalty=1.2)}, 'repetition_penalty=1.2'),
  ):
    with pytest.raises(UserError, match=message):
      speculative.generate(model, params, [[1]], 3, **options)
  assert speculative.generate(model, params, [], 3).completions == []
