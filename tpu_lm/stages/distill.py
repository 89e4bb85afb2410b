"""Distillation: a student learns a teacher's next-token distributions.

Columns: tokens, loss_mask, segment_ids, positions, all [B, L+1].
Prepared: teacher_logits. It is [B, L, V], and new in each step.
Prepared with top_k: teacher_ids, teacher_logps. [B, L, K], [B, L, K+1], kept.

alpha T^2 D(p, q) + (1 - alpha) * -log q_1(target), a mean over targets, where p
and q are softmaxes of the teacher's and the student's logits over T, q_1 that
of the student's with T = 1, and D is forward_kl, reverse_kl or gjsd
(divergence.py; GKD, arXiv 2306.13649; its equation 2 takes means of sequences,
here and in TRL each token weighs the same). T^2 keeps the two gradients in
proportion when T changes (Hinton, arXiv 1503.02531, section 2); TRL has no T^2.
With top_k, D is over the teacher's K likeliest tokens and "any other". On rows
of prompts the student answers first, at T too: on-policy (GKD, section 3).
"""

import functools

import jax
import jax.numpy as jnp

from tpu_lm import divergence as divergences
from tpu_lm import meters, rollouts, sharding, stage
from tpu_lm.models import transformer
from tpu_lm.stage import Mean, Stage, require

ROWS = ('text', 'chat', 'prompts')


def make(
  model,
  start,
  sampler,
  *,
  sampling: rollouts.Sampling = rollouts.ONE_ANSWER,
  teacher: str = '',
  divergence: str = 'forward_kl',
  beta: float = 0.5,
  temperature: float = 1.0,
  alpha: float = 0.5,
  top_k: int = 0,
  on_the_fly: bool = False,
) -> Stage:
  del start  # the student is compared with the teacher alone
  num_vocab = model.config.vocab_size
  measure = divergences.Measure(divergence, beta, temperature, top_k)
  measure.check(num_vocab)
  sampling.check()
  require(0 <= alpha <= 1, 'alpha', alpha, 'from 0 to 1')
  require(bool(teacher), 'teacher', teacher, 'name a working directory')
  kept = measure.names if top_k and not (on_the_fly or sampler) else ()
  given = teacher, num_vocab, measure, jax.sharding.get_mesh()
  # Kept columns: it is opened only to make them.
  taught = functools.cache(functools.partial(divergences.teaching, *given))

  def each(head_VD, hidden_BLD, targets_BL, weights_BL, *known):
    mask_BL = weights_BL > 0
    hidden_BLD = jnp.where(mask_BL[..., None], hidden_BLD, 0)
    logits_BLV = transformer.project(model.config, head_VD, hidden_BLD)
    logps_BL = divergences.picked_logps(logits_BLV, targets_BL)
    apart_BL = measure.between(known, logits_BLV, mask_BL)
    return apart_BL, jnp.where(mask_BL, -logps_BL, 0)

  def loss(params, batch, key):
    del key  # no dropout
    head_VD = sharding.replicate_columns(transformer.head(params))
    hidden_BLD = stage.hidden_states(model, params, batch)
    weights_BL = stage.target_weights(batch)
    columns = [hidden_BLD, batch['tokens'][:, 1:], weights_BL]
    columns += [batch[name] for name in measure.names]
    sums = divergences.row_sums(each, head_VD, columns, num_vocab)
    apart, nll = (Mean(x.sum(), weights_BL.sum()) for x in sums)
    total = alpha * apart.total + (1 - alpha) * nll.total
    metrics = {'divergence': apart, 'nll': nll}
    return Mean(total, nll.weight), metrics | meters.figures_of(batch)

  if not kept:
    taught()
  prepare = stage.adding(measure.names, lambda batch: taught()(batch))
  return Stage(loss, rollouts.then(sampler, sampling, prepare), kept)
