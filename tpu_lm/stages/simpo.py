"""SimPO: preferences without a reference, rewards a token.

Columns: chosen_tokens, chosen_loss_mask, chosen_segment_ids, chosen_positions,
rejected_tokens, rejected_loss_mask, rejected_segment_ids, rejected_positions,
margins. All are [B, L+1] but `margins`, [B, S], of which only S is read.

-log sigmoid(beta m_c - beta m_r - gamma), where m is the mean log-probability
of a target of the chosen or rejected answer (arXiv 2405.14734, equation 6).
TRL (CPOTrainer with loss_type=simpo) has the same, and adds the mean of the
chosen answers' next-token loss unless cpo_alpha is 0.
"""

import jax

from tpu_lm import preference
from tpu_lm.stage import Stage, require

ROWS = ('pairs',)


def losses(chosen, rejected, beta, gamma):
  """Elementwise, of mean log-probabilities; see the module."""
  return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def make(model, start, *, beta: float = 2.0, gamma: float = 1.0) -> Stage:
  del start  # there is no reference
  require(beta > 0, 'beta', beta, 'must be above 0')

  def loss(params, batch, key):
    del key  # no dropout
    num_segments = batch['margins'].shape[1]
    found = preference.logps(model, params, batch, num_segments)
    chosen_BS, rejected_BS = found.means_BS
    each_BS = losses(chosen_BS, rejected_BS, beta, gamma)
    metrics = preference.metrics(chosen_BS, rejected_BS, found.counted_BS, beta)
    return preference.mean(each_BS, found.counted_BS), metrics

  return Stage(loss)
