"""Continuous batching against plain generation."""

import contextlib
import logging

import jax
import numpy as np
import pytest
from engine_test import GREEDY, make, prompts

from tpu_lm.errors import UserError
from tpu_lm.generate import batching, engine
from tpu_lm.generate.sampler import Sampler


@contextlib.contextmanager
def counted_compilations():
  """A list that a line is added to for each program that is compiled."""
  lines = []

  class Handler(logging.Handler):
    def emit(self, record):
      text = record.getMessage()
      if text.startswith('Compiling '):
        lines.append(text)

  handler, logger = Handler(), logging.getLogger('jax')
  logger.addHandler(handler)
  try:
    with jax.log_compiles():
      yield lines
  finally:
    logger.removeHandler(handler)


def same(found, expected):
  assert [c.tokens for c in found] == [c.tokens for c in expected]
  assert [c.finished for c in found] == [c.finished for c in expected]
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)
    np.testing.assert_allclose(a.sampled_logps, b.sampled_logps, atol=1e-5)


def collected(count, found):
  completions = [None] * count
  for index, completion in found:
    assert completions[index] is None
    completions[index] = completion
  return completions


@pytest.mark.parametrize(
  ('shape', 'slots', 'copies'),
  [('plain', 4, 1), ('windows', 8, 3), ('grouped', 64, 4)],
)
def test_completions_are_those_of_plain_generation(shape, slots, copies):
  model, params = make(shape)
  asked = prompts(4, 15, 9, 3, 12, 1, 7, 16)
  most = [3, 20, 9, 1, 17, 12, 5, 30] * copies
  stops = [[i % 5] for i in range(8 * copies)]
  options = {'sampler': Sampler(0.9, top_k=12), 'seed': 3, 'copies': copies}
  expected = engine.generate(
    model, params, asked, most, stop_ids=stops, **options
  )
  found = batching.completed(
    model, params, asked, most, stop_ids=stops, slots=slots, **options
  )
  same(collected(8 * copies, found), expected)


@pytest.mark.parametrize('copies', [1, 4])
def test_slots_are_given_up_as_they_become_free(monkeypatch, copies):
  """The one long completion ends in a small batch, and nothing changes."""
  model, params = make('windows')
  asked = prompts(*[5, 9, 3, 14] * (4 // copies))
  most = np.full(16, 3)
  most[[3, 6]] = 40, 17
  sizes = []
  decode = engine.advance

  def advance(model, params, state, *args):
    sizes.append(len(state.done_B))
    return decode(model, params, state, *args)

  options = {'seed': 4, 'copies': copies, 'quantised_cache': copies > 1}
  expected = engine.generate(model, params, asked, most, **options)
  monkeypatch.setattr(engine, 'advance', advance)
  found = batching.completed(model, params, asked, most, **options)
  same(collected(16, found), expected)
  assert (sizes[0], sizes[-1]) == (16, 4)


def test_seeds_say_the_tokens_whatever_the_batch():
  """Alone, in batches of several sizes and in several slots: one sequence."""
  model, params = make('plain')
  asked = prompts(4, 15, 9, 3, 12, 7)
  whole = engine.generate(model, params, asked, 12, seed=5)
  for order in ([2], [5, 2], [4, 2, 0, 5, 3, 1]):
    ids = {'sequence_ids': order, 'seed': 5}
    chosen = [asked[i] for i in order]
    expected = [whole[i] for i in order]
    same(engine.generate(model, params, chosen, 12, **ids), expected)
    found = batching.completed(model, params, chosen, 12, slots=2, **ids)
    same(collected(len(order), found), expected)


def test_slots_are_refilled_while_the_rest_go_on():
  model, params = make('plain')
  most = [40, 2, 3, 2, 4, 3, 2, 3]
  found = batching.completed(
    model, params, prompts(*[5] * 8), most, GREEDY, slots=2
  )
  order = [index for index, _ in found]
  assert sorted(order) == list(range(8))
  assert order[-1] == 0  # the long one held one slot for all of the time


def test_nothing_is_compiled_on_the_way():
  model, params = make('windows')
  lengths = (4, 15, 9, 3, 12, 1, 7, 16, 2, 5)

  def run(seed, most):
    return batching.completed(
      model, params, prompts(*lengths, seed=seed), most, seed=seed, slots=4
    )

  with counted_compilations() as lines:
    list(run(0, 20))
    assert any('_decode' in line for line in lines)
  with counted_compilations() as lines:
    list(run(1, 24))  # other prompts, keys and lengths of the same buckets
  assert lines == []
  running = run(2, 30)
  next(running)
  with counted_compilations() as lines:
    list(running)
  assert lines == []


def test_a_prompt_of_several_samples_is_run_once(monkeypatch):
  model, params = make('plain')
  ran = []
  run = batching._prefill
  monkeypatch.setattr(
    batching, '_prefill', lambda *a, **k: ran.append(1) or run(*a, **k)
  )
  found = batching.completed(
    model, params, prompts(4, 8, 5), 6, slots=4, copies=4
  )
  assert len(collected(12, found)) == 12
  assert len(ran) == 3


def test_users_mistakes_are_named_before_anything_runs():
  model, params = make('plain')
  with pytest.raises(UserError, match='max_new_tokens=0'):
    batching.completed(model, params, [[1]], 0)
  assert list(batching.completed(model, params, [], 3)) == []
