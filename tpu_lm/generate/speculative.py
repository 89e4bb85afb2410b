"""Speculative decoding: several tokens are guessed, and checked at once.

Leviathan et al., arXiv 2211.17192, algorithm 1, and Chen et al., arXiv
2302.01318, algorithm 2: a guess d drawn from q stays with probability
min(1, p(d) / q(d)), p being what the sampler makes of the model's logits; the
first that does not stay is drawn again from max(p - q, 0), scaled to 1, and
where all stay one more is drawn from p. What comes out follows p exactly.

Guesses come from a smaller model of the same vocabulary, drawn with the same
sampler, or from the text itself: what followed the last place where its newest
tokens stood before ("prompt lookup"); then q is 1 at the guess.

A sequence's tokens depend on its prompt, the seed and its own id alone, but
they are not those of plain sampling, only as likely; greedy ones are the same.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpu_lm.buckets import bucket, room_for
from tpu_lm.errors import UserError
from tpu_lm.generate import cache as caches
from tpu_lm.generate import engine
from tpu_lm.generate import sampler as samplers
from tpu_lm.generate.engine import Completion, Rows
from tpu_lm.generate.packed import packed
from tpu_lm.generate.sampler import Sampler
from tpu_lm.models import ring, transformer
from tpu_lm.models.transformer import Transformer

_SMALLEST = 16  # tokens
_LONGEST_MATCH = 3  # tokens that lookup compares


class Draft(NamedTuple):
  """A model that guesses."""

  model: Transformer
  params: Any


class Guessing(NamedTuple):
  """How tokens are guessed."""

  draft: Draft | None = None  # None: by the text itself
  ahead: int = 4  # tokens at once

  @property
  def draft_model(self) -> Transformer | None:
    return self.draft and self.draft.model

  def check(self, model: Transformer, sampler: Sampler) -> None:
    """Refuses what cannot be.

    Raises:
      UserError: of `ahead`, the sampler, or the draft's vocabulary.
    """
    if self.ahead < 1:
      raise UserError(f'ahead={self.ahead}: guess at least 1 token')
    if sampler.penalises:
      raise UserError(
        f'repetition_penalty={sampler.repetition_penalty}: cannot be had with '
        'speculative decoding; set it to 1'
      )
    mine, own = self.draft_model, model.config.vocab_size
    if mine and mine.config.vocab_size != own:
      raise UserError(
        f'draft: its vocabulary has {mine.config.vocab_size} tokens, the '
        f"model's {own}; take a draft of the same tokenizer"
      )


class Speculated(NamedTuple):
  """What was generated."""

  completions: list[Completion]
  tokens_a_step: float  # 1: no guess was right; at most ahead + 1


class State(NamedTuple):
  """Sequences under way. T: prompt and completion, C: completion."""

  cache: ring.Cache
  draft_cache: Any
  rows: Rows
  text_BT: jax.Array  # all tokens so far
  length_B: jax.Array  # how many; the newest is not yet in the caches
  done_B: jax.Array
  stopped_B: jax.Array
  count_B: jax.Array
  logps_BC: jax.Array
  sampled_logps_BC: jax.Array
  num_steps_B: jax.Array
  weights: Any = None  # of the model and the draft; never used up


def generate(
  model: Transformer,
  params: Any,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int | Sequence[int],
  sampler: Sampler = Sampler(),  # noqa: B008
  stop_ids: Sequence[int] | Sequence[Sequence[int]] = (),
  seed: int = 0,
  sequence_ids: Sequence[int] | None = None,
  *,
  guessing: Guessing = Guessing(),  # noqa: B008
) -> Speculated:
  """Continues every prompt as `engine.generate` does, in fewer steps.

  Args:
    model: and all before `guessing`: see `engine.generate`.
    sampler: without a repetition penalty.
    guessing: how.

  Raises:
    UserError: something cannot be generated, or not so.
  """
  if not prompts:
    return Speculated([], 1.0)
  state = start(
    model, params, prompts, max_new_tokens, sampler, stop_ids, seed,
    sequence_ids, guessing=guessing,
  )  # fmt: skip
  limit = int(np.max(max_new_tokens))
  state = advance(model, state, limit, sampler, guessing)
  return speculated(state, list(map(len, prompts)))


def start(
  model: Transformer,
  params: Any,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int | Sequence[int],
  sampler: Sampler,
  stop_ids: Sequence[int] | Sequence[Sequence[int]] = (),
  seed: int = 0,
  sequence_ids: Sequence[int] | None = None,
  *,
  guessing: Guessing,
) -> State:
  """Runs the prompts and draws the first tokens; see `generate`."""
  guessing.check(model, sampler)
  draft, ahead = guessing
  sequences = engine.asked(
    model, prompts, max_new_tokens, sampler, stop_ids, seed, sequence_ids, 1
  )
  num_rows = bucket(len(prompts))
  longest, most = max(map(len, prompts)), max(one.most for one in sequences)
  length = bucket(longest, _SMALLEST)
  tokens_BL, length_B = engine.padded(prompts, num_rows, length)
  state = _start(
    params,
    draft.params if draft else None,
    tokens_BL,
    length_B,
    engine.rows_of(model, sequences, sampler, num_rows),
    slots=max(room_for(longest + most + ahead + 1), length),
    room=bucket(most + ahead + 1, _SMALLEST),
    model=model,
    draft_model=guessing.draft_model,
    sampler=sampler,
    ahead=ahead,
  )
  weights = packed(params, num_rows * (ahead + 1))
  return state._replace(
    weights=(weights, draft and packed(draft.params, num_rows))
  )


def advance(
  model: Transformer,
  state: State,
  limit: int,
  sampler: Sampler,
  guessing: Guessing,
) -> State:
  """Decodes until each sequence is done or has `limit` tokens, or some more.

  Uses `state` up.
  """
  weights = state.weights
  state = _run(
    *weights,
    state._replace(weights=None),
    np.int32(limit),
    model=model,
    draft_model=guessing.draft_model,
    sampler=sampler,
    ahead=guessing.ahead,
  )
  return state._replace(weights=weights)


def speculated(state: State, lengths: Sequence[int]) -> Speculated:
  """Fetches what has been generated after prompts of these lengths."""
  state = jax.device_get(
    state._replace(cache=None, draft_cache=None, rows=None, weights=None)
  )
  found = []
  for row, length in enumerate(lengths):
    count = state.count_B[row]
    tokens = state.text_BT[row, length : length + count]
    found.append(
      Completion(
        tokens.tolist(),
        state.logps_BC[row, :count].tolist(),
        bool(state.stopped_B[row]),
        state.sampled_logps_BC[row, :count].tolist(),
      )
    )
  rows = slice(len(lengths))
  num_steps = np.maximum(state.num_steps_B[rows].sum(), 1)
  num_tokens = (state.count_B[rows] - 1).sum()  # the prefill draws the first
  return Speculated(found, float(num_tokens / num_steps) if num_tokens else 1.0)


@functools.partial(
  jax.jit,
  static_argnames=('model', 'draft_model', 'sampler', 'ahead', 'slots', 'room'),
)
def _start(
  params, draft_params, tokens_BL, length_B, rows: Rows,
  *, model, draft_model, sampler, ahead, slots, room,
) -> State:  # fmt: skip
  def cache_of(model, kept):
    return caches.filled(
      model.config, kept, length_B, slots, None, at_once=ahead + 1
    )

  num_rows, length = tokens_BL.shape
  hidden_BD, kept = engine.prefilled(model, params, tokens_BL, length_B)
  draft_cache = None
  if draft_model:
    _, draft_kept = engine.prefilled(
      draft_model, draft_params, tokens_BL, length_B
    )
    draft_cache = cache_of(draft_model, draft_kept)
  state = State(
    cache=cache_of(model, kept),
    draft_cache=draft_cache,
    rows=rows,
    text_BT=jnp.pad(tokens_BL, ((0, 0), (0, slots - length))),
    length_B=length_B,
    done_B=rows.left_B == 0,
    stopped_B=jnp.zeros(num_rows, bool),
    count_B=jnp.zeros(num_rows, jnp.int32),
    logps_BC=jnp.zeros((num_rows, room), jnp.float32),
    sampled_logps_BC=jnp.zeros((num_rows, room), jnp.float32),
    num_steps_B=jnp.zeros(num_rows, jnp.int32),
  )
  logits_B1V = transformer.logits(model.config, params, hidden_BD)[:, None]
  nothing = jnp.zeros((num_rows, 0), jnp.int32)
  return _checked(state, logits_B1V, nothing, None, sampler)


@functools.partial(
  jax.jit,
  static_argnames=('model', 'draft_model', 'sampler', 'ahead'),
  donate_argnames='state',
)
def _run(
  weights, draft_weights, state: State, limit,
  *, model, draft_model, sampler, ahead,
) -> State:  # fmt: skip
  def goes_on(state: State):
    return (~state.done_B & (state.count_B < limit)).any()

  def step(state: State) -> State:
    q_BAV = None
    if draft_model:
      state, guess_BA, q_BAV = _drafted(
        draft_model, draft_weights, state, sampler, ahead
      )
    else:
      guess_BA = looked_up(state.text_BT, state.length_B, ahead)
    newest_B1 = _at(state.text_BT, state.length_B - 1)[:, None]
    tokens_BL = jnp.concatenate([newest_B1, guess_BA], axis=1)
    positions_BL = state.length_B[:, None] - 1 + jnp.arange(ahead + 1)
    hidden_BLD, cache = model.apply(
      {'params': weights}, tokens_BL, positions_BL, cache=state.cache
    )
    logits_BLV = transformer.logits(model.config, weights, hidden_BLD)
    state = state._replace(
      cache=cache, num_steps_B=state.num_steps_B + ~state.done_B
    )
    return _checked(state, logits_BLV, guess_BA, q_BAV, sampler)

  return jax.lax.while_loop(goes_on, step, state)


def looked_up(text_BT, length_B, ahead: int) -> jax.Array:
  """What followed the newest tokens where they stood before, int32 [B, A].

  The longest match counts, of equally long ones the last.
  """
  length = text_BT.shape[1]
  spots_T = jnp.arange(length)
  goes_on_BT = jnp.ones(text_BT.shape, bool)
  matched_BT = jnp.zeros(text_BT.shape, jnp.int32)
  for back in range(_LONGEST_MATCH):
    token_B1 = _at(text_BT, jnp.maximum(length_B - 1 - back, 0))[:, None]
    earlier_BT = jnp.roll(text_BT, back, axis=1)
    goes_on_BT &= (earlier_BT == token_B1) & (spots_T >= back)
    matched_BT += goes_on_BT
  before_BT = spots_T < length_B[:, None] - 1
  score_BT = jnp.where(before_BT, matched_BT * length + spots_T, -1)
  found_B1 = jnp.argmax(score_BT, axis=1)[:, None]
  # Beyond the text its last tokens are taken to repeat.
  period_B1 = length_B[:, None] - 1 - found_B1
  steps_A = jnp.arange(ahead)
  from_BA = found_B1 + 1 + steps_A % jnp.maximum(period_B1, 1)
  return jnp.take_along_axis(text_BT, from_BA, axis=1)


def _drafted(model, weights, state: State, sampler: Sampler, ahead: int):
  """(state, guesses [B, A], their distributions as logs [B, A, V])."""
  cache, token_B = state.draft_cache, _at(state.text_BT, state.length_B - 1)
  guesses, logqs = [], []
  for i in range(ahead + 1):  # the last only writes its cache
    position_B = state.length_B - 1 + i
    hidden_B1D, cache = model.apply(
      {'params': weights}, token_B[:, None], position_B[:, None], cache=cache
    )
    if i == ahead:
      break
    logits_BV = transformer.logits(model.config, weights, hidden_B1D[:, 0])
    logqs.append(samplers.log_probabilities(logits_BV, sampler))
    key_B = _keys(state.rows, position_B[:, None] + 1, 1)[:, 0]
    token_B = samplers.sample(logits_BV, key_B, sampler)
    guesses.append(token_B)
  state = state._replace(draft_cache=cache)
  return state, jnp.stack(guesses, 1), jnp.stack(logqs, 1)


def _checked(
  state: State, logits_BLV, guess_BA, logq_BAV, sampler: Sampler
) -> State:
  """Takes the guesses that stay, and draws the token after them.

  Args:
    state: under way.
    logits_BLV: after the newest token and after each guess.
    guess_BA: A = L - 1 guesses.
    logq_BAV: what they were drawn with; None: they are certain.
    sampler: how tokens are drawn.
  """
  _, length, vocab_size = logits_BLV.shape
  flat = logits_BLV.reshape(-1, vocab_size)
  logp_BLV = samplers.log_probabilities(flat, sampler)
  logp_BLV = logp_BLV.reshape(logits_BLV.shape)
  positions_BL = state.length_B[:, None] + jnp.arange(length)
  stays_BA = _stay(
    state.rows, positions_BL[:, :-1], guess_BA, logp_BLV[:, :-1], logq_BAV
  )
  num_stay_B = jnp.cumprod(stays_BA, axis=1).sum(axis=1).astype(jnp.int32)
  # What is drawn where a guess did not stay, or after the last.
  p_BLV, left_BLV = jnp.exp(logp_BLV), None
  if length > 1:
    if logq_BAV is None:
      q_BAV = jax.nn.one_hot(guess_BA, vocab_size)
    else:
      q_BAV = jnp.exp(logq_BAV)
    q_BLV = jnp.pad(q_BAV, ((0, 0), (0, 1), (0, 0)))
    left_BLV = jnp.maximum(p_BLV - q_BLV, 0.0)
    # By rounding nothing may be left where p and q are equal.
    empty_BL1 = left_BLV.sum(axis=-1, keepdims=True) == 0
    left_BLV = jnp.where(empty_BL1, p_BLV, left_BLV)
  left_BV = _at(p_BLV if left_BLV is None else left_BLV, num_stay_B)
  key_B = _keys(state.rows, _at(positions_BL, num_stay_B)[:, None], 0)[:, 0]
  last_B = samplers.draw(
    jnp.log(left_BV), samplers.uniforms(key_B), Sampler()
  ).token_B
  tokens_BL = jnp.pad(guess_BA, ((0, 0), (0, 1)))
  is_last_BL = jnp.arange(length) == num_stay_B[:, None]
  tokens_BL = jnp.where(is_last_BL, last_B[:, None], tokens_BL)
  model_logp_BLV = jax.nn.log_softmax(logits_BLV)
  logps = (_of(model_logp_BLV, tokens_BL), _of(logp_BLV, tokens_BL))
  return _extended(state, tokens_BL, num_stay_B + 1, *logps)


def _stay(rows, positions_BA, guess_BA, logp_BAV, logq_BAV) -> jax.Array:
  """Which guesses stay, bool [B, A], each looked at alone."""
  if not guess_BA.shape[1]:
    return jnp.zeros(guess_BA.shape, bool)
  key_BA = _keys(rows, positions_BA, 2)
  uniform_BA = samplers.uniforms(key_BA.reshape(-1))[:, 0]
  uniform_BA = uniform_BA.reshape(guess_BA.shape)
  ratio_BA = _of(logp_BAV, guess_BA)
  if logq_BAV is not None:
    ratio_BA = ratio_BA - _of(logq_BAV, guess_BA)
  return uniform_BA < jnp.exp(ratio_BA)


def _extended(
  state: State, tokens_BL, num_new_B, logps_BL, sampled_logps_BL
) -> State:
  """Adds the first `num_new_B` tokens, up to a stop token or the most."""
  steps_L = jnp.arange(tokens_BL.shape[1])
  stop_ids_B1X = state.rows.stop_ids_BX[:, None]
  is_stop_BL = (tokens_BL[:, :, None] == stop_ids_B1X).any(axis=2)
  first_stop_B = jnp.where(
    is_stop_BL.any(axis=1), jnp.argmax(is_stop_BL, axis=1), len(steps_L)
  )
  num_new_B = jnp.minimum(num_new_B, first_stop_B + 1)
  num_new_B = jnp.minimum(num_new_B, state.rows.left_B)
  num_new_B = jnp.where(state.done_B, 0, num_new_B).astype(jnp.int32)
  counts_BL = steps_L < num_new_B[:, None]
  row_B1 = jnp.arange(len(tokens_BL))[:, None]

  def put(into, begin_B, values):
    at_BL = begin_B[:, None] + steps_L
    at_BL = jnp.where(counts_BL, at_BL, into.shape[1])
    return into.at[row_B1, at_BL].set(values, mode='drop')

  left_B = state.rows.left_B - num_new_B
  stopped_B = state.stopped_B | (first_stop_B < num_new_B)
  return state._replace(
    rows=state.rows._replace(left_B=left_B),
    text_BT=put(state.text_BT, state.length_B, tokens_BL),
    length_B=state.length_B + num_new_B,
    done_B=stopped_B | (left_B <= 0),
    stopped_B=stopped_B,
    count_B=state.count_B + num_new_B,
    logps_BC=put(state.logps_BC, state.count_B, logps_BL),
    sampled_logps_BC=put(
      state.sampled_logps_BC, state.count_B, sampled_logps_BL
    ),
  )


def _keys(rows: Rows, positions_BL, use: int) -> jax.Array:
  """A key for each position and use of it."""

  def of(key, position):
    return jax.random.fold_in(jax.random.fold_in(key, position), use)

  return jax.vmap(jax.vmap(of, (None, 0)))(rows.key_B, positions_BL)


def _at(x_BL, index_B) -> jax.Array:
  """x[b, index[b]] of each row."""
  index = index_B.reshape(-1, *(1,) * (x_BL.ndim - 1))
  return jnp.take_along_axis(x_BL, index, axis=1)[:, 0]


def _of(x_BLV, ids_BL) -> jax.Array:
  """x[b, l, ids[b, l]]."""
  return jnp.take_along_axis(x_BLV, ids_BL[..., None], axis=2)[..., 0]
