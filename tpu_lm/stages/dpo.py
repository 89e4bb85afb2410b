"""Direct preference optimisation, and its relatives with a reference.

Columns: chosen_tokens, chosen_loss_mask, chosen_segment_ids, chosen_positions,
rejected_tokens, rejected_loss_mask, rejected_segment_ids, rejected_positions,
margins. All are [B, L+1] but `margins`, [B, S], of which only S is read.
Prepared: reference_chosen_logps, reference_rejected_logps. Both [B, S], kept.

With d = log (pi/ref)(chosen) - log (pi/ref)(rejected), summed over targets:
- sigmoid: -log sigmoid(beta d), DPO (arXiv 2305.18290, equation 7); with
  label_smoothing e, 1 - e of it and e of the same for -d: conservative DPO
  (ericmitchell.ai/cdpo.pdf; TRL has e in CPOTrainer, not in DPOTrainer).
- robust: with -e for e, over 1 - 2e (rDPO, arXiv 2403.00409).
- ipo: (d - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17; beta is tau). The
  paper sums over tokens; TRL takes means, which length_normalised=True gives.
- hinge: max(0, 1 - beta d) (RSO, arXiv 2309.06657; SLiC, 2305.10425).
length_normalised: log-ratios are means over targets (Tulu 3, arXiv 2411.15124).
chosen_logratio, log (pi/ref) a chosen token, tells how far the policy went on
these answers. It is no KL: they are not its samples.
"""

import jax
import jax.numpy as jnp

from tpu_lm import preference
from tpu_lm.stage import Stage, require

ROWS = ('pairs',)
_KEPT = ('reference_chosen_logps', 'reference_rejected_logps')
_SMOOTHED = ('sigmoid', 'robust')


def losses(difference, loss_type, beta, label_smoothing=0.0):
  """Elementwise, of d; see the module."""
  x, e = beta * difference, label_smoothing
  if loss_type == 'ipo':
    return jnp.square(difference - 0.5 / beta)
  if loss_type == 'hinge':
    return jax.nn.relu(1 - x)
  right, wrong = -jax.nn.log_sigmoid(x), -jax.nn.log_sigmoid(-x)
  if loss_type == 'robust':
    return ((1 - e) * right - e * wrong) / (1 - 2 * e)
  return (1 - e) * right + e * wrong


def make(
  model,
  start,
  *,
  loss_type: str = 'sigmoid',
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  length_normalised: bool = False,
  on_the_fly: bool = False,
) -> Stage:
  known = (*_SMOOTHED, 'ipo', 'hinge')
  require(loss_type in known, 'loss_type', loss_type, ', '.join(known))
  require(beta > 0, 'beta', beta, 'must be above 0')
  limit = 0.5 if loss_type in _SMOOTHED else 1e-9
  wanted = 'from 0 to below 0.5, and 0 but for loss_type=sigmoid and robust'
  require(
    0 <= label_smoothing < limit, 'label_smoothing', label_smoothing, wanted
  )

  def logps(params, batch):
    return preference.logps(model, params, batch, batch['margins'].shape[1])

  def both(reference, batch):
    return logps(reference, batch).logps_BS

  def loss(params, batch, key):
    del key  # no dropout
    ratios = logps(params, batch).over(batch[name] for name in _KEPT)
    pair_BS = ratios.means_BS if length_normalised else ratios.logps_BS
    each_BS = losses(pair_BS[0] - pair_BS[1], loss_type, beta, label_smoothing)
    metrics = preference.metrics(*pair_BS, ratios.counted_BS, beta)
    metrics['chosen_logratio'] = ratios.a_token(0)
    return preference.mean(each_BS, ratios.counted_BS), metrics

  prepare = preference.referring(start, both, _KEPT, on_the_fly)
  return Stage(loss, prepare, () if on_the_fly else _KEPT)
