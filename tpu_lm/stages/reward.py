"""A reward model: a scalar read at the last token of a record.

Columns: chosen_tokens, chosen_loss_mask, chosen_segment_ids, chosen_positions,
rejected_tokens, rejected_loss_mask, rejected_segment_ids, rejected_positions,
margins. All are [B, L+1] but `margins`, [B, S].
Columns of scored: tokens, loss_mask, segment_ids, positions, scores.
All are [B, L+1] but `scores`, [B, S].

Pairs (loss_type=bradley_terry): -log sigmoid(r_c - r_r - m), the loss of
InstructGPT (arXiv 2203.02155, equation 1) with the margin m of Llama 2 (arXiv
2307.09288, equation 2), plus centring * (r_c + r_r)^2, which keeps rewards
around 0 (arXiv 2312.09244, equation 2). A mean over pairs, as in TRL.
Scored records (data.rows=scored, loss_type=mse): (r - score)^2.

`preference.rewards` reads the scalar, for evaluation and RL too.
"""

import jax
import jax.numpy as jnp

from tpu_lm import preference
from tpu_lm.errors import UserError
from tpu_lm.stage import Stage, require

ROWS = ('pairs', 'scored')


def losses(chosen, rejected, margins, centring):
  """Elementwise; see the module."""
  apart = -jax.nn.log_sigmoid(chosen - rejected - margins)
  return apart + centring * jnp.square(chosen + rejected)


def make(
  model, start, *, loss_type: str = 'bradley_terry', centring: float = 0.0
) -> Stage:
  del start  # nothing is compared with where it started
  pairwise = loss_type == 'bradley_terry'
  wanted = 'bradley_terry (data.rows=pairs) or mse (data.rows=scored)'
  require(pairwise or loss_type == 'mse', 'loss_type', loss_type, wanted)
  if not model.config.scalar_head:
    raise UserError(
      'stage_name=reward: this network has no scalar head; set '
      '--config.model.scalar_head=true'
    )

  def pairs(params, batch):
    rows, margins_BS = preference.interleaved(batch), batch['margins']
    found = preference.rewards(model, params, rows, margins_BS.shape[1])
    (chosen_BS, rejected_BS), counted = map(preference.halves, found)
    counted_BS = counted[0] & counted[1]
    margins_BS = jnp.where(counted_BS, margins_BS, 0)
    each_BS = losses(chosen_BS, rejected_BS, margins_BS, centring)
    read = chosen_BS, rejected_BS, counted_BS
    metrics = preference.metrics(*read) | preference.calibration(*read)
    return preference.mean(each_BS, counted_BS), metrics

  def scored(params, batch):
    scores_BS = batch['scores']
    rewards_BS, counted_BS = preference.rewards(
      model, params, batch, scores_BS.shape[1]
    )
    error_BS = rewards_BS - jnp.where(counted_BS, scores_BS, 0)
    return preference.mean(jnp.square(error_BS), counted_BS), {
      'reward': preference.mean(rewards_BS, counted_BS),
      'absolute_error': preference.mean(jnp.abs(error_BS), counted_BS),
    }

  def loss(params, batch, key):
    del key  # no dropout
    other = 'scores' if pairwise else 'margins'
    require(other not in batch, 'loss_type', loss_type, f'give {wanted}')
    return (pairs if pairwise else scored)(params, batch)

  return Stage(loss)
