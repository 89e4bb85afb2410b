"""KTO: answers that were liked or disliked, one by one.

Columns: tokens, loss_mask, segment_ids, positions, mismatched_tokens,
mismatched_loss_mask, mismatched_segment_ids, mismatched_positions, scores.
All are [B, L+1] but `scores`, [B, S]; above `threshold` an answer was liked.
Prepared: reference_logps, reference_mismatched_logps, reference_point. Two of
[B, S], kept, and one of [B], new in each step.

A mean over answers (arXiv 2402.01306, section 4), r being log (pi/ref)(answer):
desirable_weight * (1 - sigmoid(beta (r - z))), or if it was not liked,
undesirable_weight * (1 - sigmoid(beta (z - r))). z = max(0, the mean r of the
mismatched answers of the whole batch; TRL: of a microbatch), without gradient.
"""

import jax
import jax.numpy as jnp

from tpu_lm import preference
from tpu_lm.stage import Stage, require, sequence_logps

ROWS = ('rated',)
_KEPT = ('reference_logps', 'reference_mismatched_logps')


def losses(ratio, liked, point, beta, weights):
  """Elementwise; `weights` of liked answers and of others; see the module."""
  x = beta * (ratio - point)
  return jnp.where(liked, *weights) * jax.nn.sigmoid(jnp.where(liked, -x, x))


def make(
  model,
  start,
  *,
  beta: float = 0.1,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
  threshold: float = 0.5,
  on_the_fly: bool = False,
) -> Stage:
  require(beta > 0, 'beta', beta, 'must be above 0')

  def logps(params, batch, rows):
    return sequence_logps(model, params, rows, batch['scores'].shape[1])

  def both(reference, batch):
    rows = preference.interleaved(batch, ('', 'mismatched_'))
    return preference.halves(logps(reference, batch, rows)[0])

  def ratios(params, batch, prefix=''):
    rows = preference.rows_of(batch, prefix)
    logps_BS, counts_BS = logps(params, batch, rows)
    theirs_BS = jnp.where(counts_BS > 0, batch[f'reference_{prefix}logps'], 0)
    return logps_BS - theirs_BS, counts_BS > 0

  @jax.jit
  def reference_point(params, batch):
    total, weight = preference.mean(*ratios(params, batch, 'mismatched_'))
    point = jnp.maximum(total / jnp.maximum(weight, 1), 0)
    return jnp.full(len(batch['tokens']), point)

  def prepare(params, batch, key):
    (batch,) = refer(params, batch, key)
    return (batch | {'reference_point': reference_point(params, batch)},)

  def loss(params, batch, key):
    del key  # no dropout
    ratios_BS, counted_BS = ratios(params, batch)
    liked_BS, point_B = batch['scores'] > threshold, batch['reference_point']
    weights = desirable_weight, undesirable_weight
    each_BS = losses(ratios_BS, liked_BS, point_B[:, None], beta, weights)
    reward_BS = beta * ratios_BS
    return preference.mean(each_BS, counted_BS), {
      'reference_point': preference.mean(point_B, True),
      'desirable_reward': preference.mean(reward_BS, counted_BS & liked_BS),
      'undesirable_reward': preference.mean(reward_BS, counted_BS & ~liked_BS),
    }

  refer = preference.referring(start, both, _KEPT, on_the_fly)
  return Stage(loss, prepare, () if on_the_fly else _KEPT)
