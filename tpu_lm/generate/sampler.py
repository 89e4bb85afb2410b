"""From logits to tokens: penalty, temperature, top-k, top-p and min-p.

Top-p: Holtzman et al., arXiv 1904.09751. Min-p: Nguyen et al., arXiv
2407.01082, equations 1-2. Repetition penalty: Keskar et al., arXiv 1909.05858,
section 4.1, as Hugging Face has it (a negative logit is multiplied), over the
prompt and what was generated. The order is that of the field: the penalty,
logits divided by the temperature, of these the k likeliest tokens, of those the
smallest set whose probability reaches p, and of that the tokens that are at
least min_p times as likely as the likeliest, which always stays. Equally likely
tokens rank by id, so that exactly k are kept.

A token is drawn with two uniform numbers, the first of which chooses a block of
tokens and the second one of them: exact like Gumbel's way, which takes a random
number a token of the vocabulary, and that was most of a step on a CPU.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tpu_lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How a token is drawn.

  Attributes:
    temperature: 0 is greedy, 1 the model's distribution.
    top_k: only the k likeliest tokens are drawn; 0 means all.
    top_p: only the smallest set of likeliest tokens of this probability.
    min_p: only tokens of at least this share of the likeliest's probability.
    repetition_penalty: positive logits of tokens that are there already are
      divided by it, negative ones multiplied; 1 changes nothing.

  Raises:
    UserError: a value out of range.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise UserError(
        f'temperature={self.temperature}: must be 0 (greedy) or more, such as '
        '0.8'
      )
    if self.top_k < 0:
      raise UserError(f'top_k={self.top_k}: must be 0 (all tokens) or more')
    if not 0 < self.top_p <= 1:
      raise UserError(
        f'top_p={self.top_p}: must be above 0 and at most 1 (all tokens)'
      )
    if not 0 <= self.min_p <= 1:
      raise UserError(f'min_p={self.min_p}: must be from 0 (all tokens) to 1')
    if not 0 < self.repetition_penalty < math.inf:
      raise UserError(
        f'repetition_penalty={self.repetition_penalty}: must be above 0; 1 '
        'changes nothing'
      )

  def check(self, vocab_size: int) -> None:
    """Raises UserError if more tokens are asked for than there are."""
    if self.top_k > vocab_size:
      raise UserError(
        f'top_k={self.top_k}: the vocabulary has only {vocab_size} tokens; '
        'give at most that, or 0 for all'
      )

  @property
  def penalises(self) -> bool:
    """Whether it must be told which tokens are there already."""
    return self.repetition_penalty != 1


class Drawn(NamedTuple):
  """Tokens, and how likely they were."""

  token_B: jax.Array  # int32
  logp_B: jax.Array  # under the model: temperature 1, all tokens; in nats
  sampled_logp_B: jax.Array  # under what they were drawn from


def uniforms(key_B: jax.Array) -> jax.Array:
  """The random numbers [B, 2] in [0, 1) that `draw` takes of each key."""
  return jax.vmap(lambda key: jax.random.uniform(key, (2,)))(key_B)


def sample(
  logits_BV: jax.Array, key_B: jax.Array, sampler: Sampler
) -> jax.Array:
  """Draws a token a row, int32 [B], each row with its own key.

  Args:
    logits_BV: of the next token.
    key_B: typed random keys; unused when greedy.
    sampler: static.
  """
  return draw(logits_BV, uniforms(key_B), sampler).token_B


def draw(
  logits_BV: jax.Array,
  uniform_B2: jax.Array,
  sampler: Sampler,
  seen_BV: jax.Array | None = None,
) -> Drawn:
  """Draws a token a row.

  Args:
    logits_BV: of the next token.
    uniform_B2: `uniforms`; unused when greedy.
    sampler: static.
    seen_BV: bool, the tokens that are there already; None where nothing is
      penalised.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  top_B1 = logits_BV.max(axis=-1, keepdims=True)
  p_BV = jnp.exp(logits_BV - top_B1)
  norm_B1 = p_BV.sum(axis=-1, keepdims=True)
  plain = sampler.temperature == 1 and not sampler.penalises
  plain = plain and _keeps_all(logits_BV, sampler)
  chances_BR, ids_BR = p_BV, None
  if not plain and sampler.temperature:
    chances_BR, ids_BR = _chances(
      _changed(logits_BV, sampler, seen_BV), sampler
    )
  if sampler.temperature:
    rank_B1 = _pick(chances_BR, uniform_B2)[:, None]
    token_B1 = rank_B1
    if ids_BR is not None:
      token_B1 = jnp.take_along_axis(ids_BR, rank_B1, axis=1)
  else:
    changed_BV = _changed(logits_BV, sampler, seen_BV)
    token_B1 = jnp.argmax(changed_BV, axis=-1, keepdims=True)
  token_B1 = token_B1.astype(jnp.int32)
  logit_B1 = jnp.take_along_axis(logits_BV, token_B1, axis=1)
  logp_B1 = logit_B1 - top_B1 - jnp.log(norm_B1)
  if plain:
    sampled_B1 = logp_B1
  elif not sampler.temperature:
    sampled_B1 = jnp.zeros_like(logp_B1)
  else:
    chance_B1 = jnp.take_along_axis(chances_BR, rank_B1, axis=1)
    total_B1 = chances_BR.sum(axis=-1, keepdims=True)
    sampled_B1 = jnp.log(chance_B1) - jnp.log(total_B1)
  return Drawn(token_B1[:, 0], logp_B1[:, 0], sampled_B1[:, 0])


def log_probabilities(
  logits_BV: jax.Array, sampler: Sampler, seen_BV: jax.Array | None = None
) -> jax.Array:
  """Returns the log-probabilities [B, V] that `draw` draws from.

  Tokens that are never drawn have -inf; a greedy row has one 0.
  """
  changed_BV = _changed(logits_BV.astype(jnp.float32), sampler, seen_BV)
  if sampler.temperature == 0:
    chosen_BV = jax.nn.one_hot(
      jnp.argmax(changed_BV, axis=-1), changed_BV.shape[-1], dtype=bool
    )
    return jnp.where(chosen_BV, 0.0, -jnp.inf)
  chances_BV, ids_BR = _chances(changed_BV, sampler)
  if ids_BR is not None:
    rows_B1 = jnp.arange(len(logits_BV))[:, None]
    ranked_BR, chances_BV = chances_BV, jnp.zeros_like(changed_BV)
    chances_BV = chances_BV.at[rows_B1, ids_BR].set(ranked_BR)
  total_B1 = chances_BV.sum(axis=-1, keepdims=True)
  return jnp.log(chances_BV) - jnp.log(total_B1)


def _changed(logits_BV, sampler: Sampler, seen_BV) -> jax.Array:
  """Logits after the penalty."""
  if not sampler.penalises:
    return logits_BV
  penalty = sampler.repetition_penalty
  lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  return jnp.where(seen_BV, lower_BV, logits_BV)


def _keeps_all(logits_BV: jax.Array, sampler: Sampler) -> bool:
  sampler.check(logits_BV.shape[-1])
  return (
    sampler.top_k in (0, logits_BV.shape[-1])
    and sampler.top_p == 1
    and sampler.min_p == 0
  )


def _chances(
  logits_BV: jax.Array, sampler: Sampler
) -> tuple[jax.Array, jax.Array | None]:
  """(what is proportional to probabilities, 0 if never drawn; their ids).

  No ids: all tokens, in their order.
  """
  vocab_size = logits_BV.shape[-1]
  sampler.check(vocab_size)
  top_k = sampler.top_k or vocab_size
  ids_BR = None
  if top_k < vocab_size or sampler.top_p < 1:
    logits_BV, ids_BR = jax.lax.top_k(logits_BV, top_k)
  top_B1 = logits_BV.max(axis=-1, keepdims=True)
  chances_BR = jnp.exp((logits_BV - top_B1) / sampler.temperature)
  if sampler.top_p < 1:
    p_BR = chances_BR / chances_BR.sum(axis=-1, keepdims=True)
    # A token stays while those before it do not reach p: the first always.
    before_BR = jnp.cumsum(p_BR, axis=-1) - p_BR
    stays_BR = (before_BR < sampler.top_p).at[:, 0].set(True)
    chances_BR = jnp.where(stays_BR, chances_BR, 0.0)
  if sampler.min_p:  # the likeliest has 1 here
    chances_BR = jnp.where(chances_BR >= sampler.min_p, chances_BR, 0.0)
  return chances_BR, ids_BR


def _pick(chances_BR: jax.Array, uniform_B2: jax.Array) -> jax.Array:
  """Draws an index a row, int32 [B]: a block of ranks first, then one of it."""
  rows, count = chances_BR.shape
  size = 1 << (count - 1).bit_length() // 2
  blocks = -(-count // size)
  chances_BR = jnp.pad(chances_BR, ((0, 0), (0, blocks * size - count)))
  chances_BJR = chances_BR.reshape(rows, blocks, size)
  block_B = _invert(chances_BJR.sum(axis=-1), uniform_B2[:, 0])
  chosen_BR = jnp.take_along_axis(chances_BJR, block_B[:, None, None], 1)[:, 0]
  return block_B * size + _invert(chosen_BR, uniform_B2[:, 1])


def _invert(chances_BR: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """The first index where the sum of chances passes a share of the whole."""
  count = chances_BR.shape[-1]
  upto_RR = jnp.triu(jnp.ones((count, count), jnp.float32))
  sums_BR = jnp.matmul(chances_BR, upto_RR, precision='highest')
  passed_BR = sums_BR > (uniform_B * sums_BR[:, -1])[:, None]
  passed_BR &= chances_BR > 0  # whatever rounding does
  # Where none is passed, by rounding again, it is the likeliest.
  score_BR = jnp.where(passed_BR, jnp.inf, chances_BR)
  return jnp.argmax(score_BR, axis=-1).astype(jnp.int32)
