"""From logits to tokens: temperature, top-k and top-p (nucleus) sampling.

Top-p: Holtzman et al., arXiv 1904.09751. The order is that of the field:
logits are divided by the temperature, the k likeliest tokens are kept, and of
those the smallest set whose probability reaches p. The likeliest token always
stays. Equally likely tokens rank by id, so that exactly k are kept.
"""

import dataclasses
import math

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

  Raises:
    UserError: a value out of range.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

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

  def check(self, vocab_size: int) -> None:
    """Raises UserError if more tokens are asked for than there are."""
    if self.top_k > vocab_size:
      raise UserError(
        f'top_k={self.top_k}: the vocabulary has only {vocab_size} tokens; '
        'give at most that, or 0 for all'
      )


def sample(
  logits_BV: jax.Array, key_B: jax.Array, sampler: Sampler
) -> jax.Array:
  """Draws a token a row, int32 [B], each row with its own key.

  Args:
    logits_BV: of the next token.
    key_B: typed random keys; unused when greedy.
    sampler: static.
  """
  if sampler.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV.astype(jnp.float32) / sampler.temperature
  if _keeps_all(logits_BV, sampler):
    return _draw(key_B, logits_BV)
  logits_BR, ids_BR = _ranked(logits_BV, sampler)
  rank_B = _draw(key_B, logits_BR)
  return jnp.take_along_axis(ids_BR, rank_B[:, None], axis=1)[:, 0]


def log_probabilities(logits_BV: jax.Array, sampler: Sampler) -> jax.Array:
  """Returns the log-probabilities [B, V] that `sample` draws from.

  Tokens that are never drawn have -inf; a greedy row has one 0.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  if sampler.temperature == 0:
    chosen_BV = jax.nn.one_hot(
      jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1], dtype=bool
    )
    return jnp.where(chosen_BV, 0.0, -jnp.inf)
  logits_BV = logits_BV / sampler.temperature
  if not _keeps_all(logits_BV, sampler):
    logits_BR, ids_BR = _ranked(logits_BV, sampler)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    logits_BV = jnp.full_like(logits_BV, -jnp.inf)
    logits_BV = logits_BV.at[rows_B1, ids_BR].set(logits_BR)
  return jax.nn.log_softmax(logits_BV)


def _keeps_all(logits_BV: jax.Array, sampler: Sampler) -> bool:
  sampler.check(logits_BV.shape[-1])
  return sampler.top_k in (0, logits_BV.shape[-1]) and sampler.top_p == 1


def _ranked(
  logits_BV: jax.Array, sampler: Sampler
) -> tuple[jax.Array, jax.Array]:
  """Returns (logits_BR, ids_BR) of the R likeliest, dropped ones -inf."""
  count = sampler.top_k or logits_BV.shape[-1]
  logits_BR, ids_BR = jax.lax.top_k(logits_BV, count)
  if sampler.top_p < 1:
    p_BR = jax.nn.softmax(logits_BR)
    # A token stays while those before it do not reach p: the first always.
    before_BR = jnp.cumsum(p_BR, axis=-1) - p_BR
    stays_BR = (before_BR < sampler.top_p).at[:, 0].set(True)
    logits_BR = jnp.where(stays_BR, logits_BR, -jnp.inf)
  return logits_BR, ids_BR


def _draw(key_B: jax.Array, logits_BR: jax.Array) -> jax.Array:
  return jax.vmap(jax.random.categorical)(key_B, logits_BR).astype(jnp.int32)
