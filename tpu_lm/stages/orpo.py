"""ORPO: fine-tuning on the chosen answer and an odds ratio, in one.

Columns: chosen_tokens, chosen_loss_mask, chosen_segment_ids, chosen_positions,
rejected_tokens, rejected_loss_mask, rejected_segment_ids, rejected_positions,
margins. All are [B, L+1] but `margins`, [B, S], of which only S is read.

-m_c - weight * log sigmoid(log odds_c - log odds_r), odds = p / (1 - p), where
log p = m is the mean log-probability of a target of an answer (arXiv
2403.07691, equations 2 to 7; weight is its lambda). The first term is the
paper's: a mean over the answer's targets, then over pairs. TRL's ORPOTrainer
differs there: it trains the prompt, too, and weighs all tokens of a batch
alike. The second is the same (TRL calls the weight beta).
"""

import jax
import jax.numpy as jnp

from tpu_lm import preference
from tpu_lm.stage import Stage, require

ROWS = ('pairs',)


def log_odds(logp):
  """log(p / (1 - p)) of log p <= 0, elementwise and stably."""
  small = logp < -jnp.log(2.0)
  # Both branches must be finite, or their gradient is not.
  far = jnp.log1p(-jnp.exp(jnp.where(small, logp, -1.0)))
  tiny = jnp.finfo(jnp.float32).tiny
  near = jnp.log(jnp.maximum(-jnp.expm1(jnp.where(small, -0.1, logp)), tiny))
  return logp - jnp.where(small, far, near)


def ratio_losses(chosen, rejected):
  """The second term of the module for weight 1, elementwise."""
  return -jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def make(model, start, *, weight: float = 0.1) -> Stage:
  del start  # there is no reference
  require(weight >= 0, 'weight', weight, 'must not be negative')

  def loss(params, batch, key):
    del key  # no dropout
    num_segments = batch['margins'].shape[1]
    found = preference.logps(model, params, batch, num_segments)
    chosen_BS, rejected_BS = found.means_BS
    ratio_BS = ratio_losses(chosen_BS, rejected_BS)
    metrics = preference.metrics(chosen_BS, rejected_BS, found.counted_BS) | {
      'nll': preference.mean(-chosen_BS, found.counted_BS),
      'ratio_loss': preference.mean(ratio_BS, found.counted_BS),
    }
    each_BS = weight * ratio_BS - chosen_BS
    return preference.mean(each_BS, found.counted_BS), metrics

  return Stage(loss)
