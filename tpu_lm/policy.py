"""Learning from rewards: losses of policies and values, and their meters.

A row is one answer behind its prompt. Arrays [B, L] are aligned with the
targets tokens[:, 1:], and `mask_BL` (bool) says which of these are the
answer's tokens. Elsewhere every argument may hold anything, NaN included; what
is returned for each token is 0 there (of ratios: 1), and so are gradients.
Log-probabilities are in nats. `old` is the trainer's own before the first
update on a rollout, `sampler` what the generation engine said of its tokens.

A loss is made in three moves: values for each token (`surrogate`, `kl`,
`value_losses`), which add up and may be weighed (`sampler_weights`); a mask;
and `aggregate`, whose sums add up over microbatches and
devices. The methods of the field, as (level, kind, how):
- PPO (arXiv 1707.06347, equation 7): token, clip, token.
- GRPO (arXiv 2402.03300, equation 3): token, clip, sequence; KL k3.
- DAPO (arXiv 2503.14476, equation 8): token, clip with clip_high > clip_low,
  token.
- Dr. GRPO (arXiv 2503.20783): token, clip, constant; advantages not scaled.
- GSPO (arXiv 2507.18071, equation 5): sequence, clip, sequence.
- CISPO (arXiv 2506.13585, equation 4): token, cispo, token.
- RLOO (arXiv 2402.14740): any, reinforce, constant with length 1; advantages
  with leave_one_out.
- On-policy distillation by the tokens sampled: any, reinforce, token; each has
  the advantage -kl('k1', pi, teacher), so that the mean gradient is that of
  KL(pi || teacher).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tpu_lm import per_device
from tpu_lm.stage import Batch, Mean, require

LEVELS = ('token', 'sequence', 'sequence_token', 'answer')
KINDS = ('clip', 'cispo', 'reinforce')
AGGREGATIONS = ('sequence', 'token', 'constant')
KLS = ('k1', 'k2', 'k3')
_LIMIT = 20.0  # of log-ratios: e^20 is far beyond what any loss lets through


def ratios(
  logps_BL: jax.Array,
  old_logps_BL: jax.Array,
  mask_BL: jax.Array,
  level: str = 'token',
) -> jax.Array:
  """Float32 [B, L]: pi / pi_old, by which a token of an answer is weighed.

  Args:
    logps_BL: of the policy; differentiable.
    old_logps_BL: of the policy that answered.
    mask_BL: bool.
    level: whose ratio:
      - token: its own.
      - sequence: the whole answer's to the power 1 / length, the same at all
        of its tokens (GSPO, arXiv 2507.18071, equation 7).
      - sequence_token: that number, of which the gradient at a token is only
        by its own log-probability (GSPO-token, equation 13), so that tokens
        may have advantages of their own.
      - answer: the whole answer's, the product over its tokens; TRL's
        RLOOTrainer clips this one.
  """
  _check('level', level, LEVELS)
  logs_BL = jnp.where(mask_BL, logps_BL - old_logps_BL, 0).astype(jnp.float32)
  if level != 'token':
    own_BL, logs_BL = logs_BL, logs_BL.sum(axis=-1, keepdims=True)
    if level != 'answer':
      logs_BL /= jnp.maximum(mask_BL.sum(axis=-1, keepdims=True), 1)
    if level == 'sequence_token':
      fixed_BL = jax.lax.stop_gradient(logs_BL)
      logs_BL = fixed_BL + (own_BL - jax.lax.stop_gradient(own_BL))
  # Else one inf would make 0 * inf of a gradient that is clipped away.
  ratios_BL = jnp.exp(jnp.clip(logs_BL, -_LIMIT, _LIMIT))
  return jnp.where(mask_BL, ratios_BL, 1)


def surrogate(
  kind: str,
  logps_BL: jax.Array,
  ratios_BL: jax.Array,
  advantages: jax.Array,
  mask_BL: jax.Array,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float = 0.0,
) -> jax.Array:
  """Float32 [B, L]: what to minimise, a token.

  With r the ratio, A the advantage and c(r) = clip(r, 1 - clip_low,
  1 + clip_high):
  - clip: -min(r A, c(r) A) (PPO, arXiv 1707.06347, equation 7); clip_high
    above clip_low is DAPO's "clip-higher". With dual_clip d, not above -d A
    where A < 0 (arXiv 1912.09729, equation 5); this is TRL's `delta`.
  - cispo: -c(r) A log pi without a gradient of c(r) (arXiv 2506.13585,
    equations 4 and 5): a clipped token still learns. The paper sets clip_low
    so high that it does nothing, which from 1 on it does. TRL's `epsilon_high`
    is the bound itself, 1 + clip_high here.
  - reinforce: -A log pi, without ratio (arXiv 2402.14740): right in the first
    update on a rollout only. TRL's RLOOTrainer has kind clip at level answer,
    whose gradient is the same in the first update.

  Args:
    kind: see above.
    logps_BL: of the policy; clip does not read it.
    ratios_BL: what `ratios` gives.
    advantages: [B], of answers, or [B, L]; no gradient flows into them.
    mask_BL: bool.
    clip_low: of ratios below 1.
    clip_high: of ratios above 1.
    dual_clip: above 1 + clip_high; 0: none.
  """
  _check('kind', kind, KINDS)
  advantages_BL = _by_token(advantages, mask_BL)
  logps_BL = jnp.where(mask_BL, logps_BL, 0)
  ratios_BL = jnp.where(mask_BL, ratios_BL, 1)
  clipped_BL = jnp.clip(ratios_BL, 1 - clip_low, 1 + clip_high)
  if kind == 'reinforce':
    gains_BL = advantages_BL * logps_BL
  elif kind == 'cispo':
    gains_BL = jax.lax.stop_gradient(clipped_BL) * advantages_BL * logps_BL
  else:
    gains_BL = jnp.minimum(
      ratios_BL * advantages_BL, clipped_BL * advantages_BL
    )
    if dual_clip:
      least_BL = jnp.maximum(gains_BL, dual_clip * advantages_BL)
      gains_BL = jnp.where(advantages_BL < 0, least_BL, gains_BL)
  return jnp.where(mask_BL, -gains_BL, 0)


def kl(
  kind: str,
  logps_BL: jax.Array,
  reference_logps_BL: jax.Array,
  mask_BL: jax.Array,
) -> jax.Array:
  """Float32 [B, L]: estimates of KL(pi || reference) from the policy's tokens.

  With d = log pi - log reference (Schulman, joschu.net/blog/kl-approx.html),
  and what the mean gradient is when one is added to a loss (arXiv 2506.09477):
  - k1: d. Unbiased, but of great variance. Its mean gradient is 0: a penalty in
    the reward it may be, in a loss it is noise.
  - k2: d^2 / 2. Biased, of small variance; its gradient is that of
    KL(pi || reference), without bias.
  - k3: e^-d + d - 1, GRPO's (arXiv 2402.03300, equation 4). Unbiased, never
    negative; but its gradient is that of KL(reference || pi).
  This holds for tokens that the policy itself has sampled, and at a token given
  those before it: what it does to later ones is seen by penalties in the reward
  only. Times `ratios` it holds after some updates on a rollout too, and the
  gradient of k1 and k3 is then that of KL(pi || reference), since the ratio has
  one (DeepSeek-V3.2, arXiv 2512.02556, equation 7; TRL's
  use_bias_correction_kl).
  """
  _check('kl', kind, KLS)
  d_BL = jnp.where(mask_BL, logps_BL - reference_logps_BL, 0)
  d_BL = d_BL.astype(jnp.float32)
  if kind == 'k1':
    return d_BL
  if kind == 'k2':
    return jnp.square(d_BL) / 2
  return jnp.expm1(-d_BL) + d_BL


def sampler_weights(
  old_logps_BL: jax.Array,
  sampler_logps_BL: jax.Array,
  mask_BL: jax.Array,
  cap: float,
  level: str = 'token',
  drop: bool = False,
) -> jax.Array:
  """Float32 [B, L]: what corrects for a sampler that is not quite the trainer.

  min(pi_old / pi_sampler, cap), truncated importance weights (rho of arXiv
  1802.01561, equation 1; for language models fengyao.notion.site/off-policy-rl)
  without a gradient. They multiply `surrogate`, not `kl`.

  Args:
    old_logps_BL: of the trainer.
    sampler_logps_BL: of the sampler, under the distribution it drew from.
    mask_BL: bool.
    cap: at least 1.
    level: as in `ratios`; TRL's `sequence_` modes are level answer.
    drop: beyond the cap the weight is 0; TRL's `_mask` modes.
  """
  weights_BL = ratios(old_logps_BL, sampler_logps_BL, mask_BL, level)
  beyond = 0.0 if drop else cap
  weights_BL = jnp.where(weights_BL > cap, beyond, weights_BL)
  return jax.lax.stop_gradient(jnp.where(mask_BL, weights_BL, 0))


def value_losses(
  values_BL: jax.Array,
  old_values_BL: jax.Array,
  returns_BL: jax.Array,
  mask_BL: jax.Array,
  clip: float = 0.2,
) -> jax.Array:
  """Float32 [B, L]: max((v - R)^2, (clip(v, old ± clip) - R)^2) / 2.

  The clip is of OpenAI's code for RLHF (arXiv 1909.08593) and not in the PPO
  paper, whose equation 9 has (v - R)^2; 0: none. Old values and returns are
  data: no gradient flows into them.
  """
  values_BL = jnp.where(mask_BL, values_BL, 0).astype(jnp.float32)
  old_BL, returns_BL = (
    jax.lax.stop_gradient(jnp.where(mask_BL, x, 0))
    for x in (old_values_BL, returns_BL)
  )
  errors_BL = jnp.square(values_BL - returns_BL)
  if clip:
    near_BL = jnp.clip(values_BL, old_BL - clip, old_BL + clip)
    errors_BL = jnp.maximum(errors_BL, jnp.square(near_BL - returns_BL))
  return errors_BL / 2


def value_meters(
  values_BL: jax.Array,
  old_values_BL: jax.Array,
  returns_BL: jax.Array,
  mask_BL: jax.Array,
  clip: float = 0.2,
) -> dict[str, Mean]:
  """How well values foretell returns; means over tokens.

  value_error is that of (v - R)^2; value_clip the share whose clipped error is
  the larger one, so that it learns nothing more.
  """
  values_BL = jax.lax.stop_gradient(values_BL)
  args = values_BL, old_values_BL, returns_BL, mask_BL
  plain_BL, clipped_BL = (value_losses(*args, c) for c in (0.0, clip))
  return {
    'value': aggregate(values_BL, mask_BL),
    'value_error': aggregate(2 * plain_BL, mask_BL),
    'value_clip': aggregate(clipped_BL > plain_BL, mask_BL),
    'return': aggregate(returns_BL, mask_BL),
  }


def aggregate(
  values_BL: jax.Array,
  mask_BL: jax.Array,
  how: str = 'token',
  length: int = 0,
  sequences_B: jax.Array | None = None,
) -> Mean:
  """One mean of values of tokens; its sums add up over parts of a batch.

  Args:
    values_BL: a number a token.
    mask_BL: bool.
    how: what weighs the same:
      - sequence: each answer, by the mean over its tokens (GRPO, arXiv
        2402.03300, equation 3).
      - token: each token of all answers (DAPO, arXiv 2503.14476, equation 12).
      - constant: the sum over an answer, divided by `length` whatever its own
        is (Dr. GRPO, arXiv 2503.20783): a longer answer is not diluted.
    length: of constant: the most tokens that an answer may have; 1 gives sums
      over answers, as RLOO has them.
    sequences_B: bool, the rows that are answers; None: those with a token in
      the mask, so that dropped answers are no part of the mean. TRL counts them
      (but for token): all of them True gives its figure.
  """
  _check('how', how, AGGREGATIONS)
  values_BL = jnp.where(mask_BL, values_BL, 0).astype(jnp.float32)
  counts_B = mask_BL.sum(axis=-1, dtype=jnp.float32)
  if how == 'token':
    return Mean(values_BL.sum(), counts_B.sum())
  counted_B = counts_B > 0 if sequences_B is None else sequences_B
  num_answers = counted_B.sum(dtype=jnp.float32)
  if how == 'constant':
    return Mean(values_BL.sum(), num_answers * length)
  means_B = values_BL.sum(axis=-1) / jnp.maximum(counts_B, 1)
  return Mean(means_B.sum(), num_answers)


class Objective(NamedTuple):
  """A policy's loss, from the hyper-parameters that stages take."""

  kind: str = 'clip'
  level: str = 'token'
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float = 0.0  # 0: none
  kl: str = 'k3'
  beta: float = 0.0  # of the KL to the reference in the loss; 0: none
  kl_ratio: bool = False  # the KL is multiplied by the ratio; see `kl`
  sampler_cap: float = 0.0  # of `sampler_weights`; 0: no correction
  aggregation: str = 'token'
  length: int = 0  # of aggregation=constant

  def check(self) -> None:
    """Refuses what cannot be, by the keys of a stage of the same names."""
    choices = {
      'kind': KINDS, 'level': LEVELS, 'kl': KLS, 'aggregation': AGGREGATIONS,
    }  # fmt: skip
    for key, known in choices.items():
      value = getattr(self, key)
      require(value in known, key, value, f'one of {", ".join(known)}')
    for key in ('clip_low', 'clip_high', 'beta'):
      value = getattr(self, key)
      require(value >= 0, key, value, 'must not be below 0')
    dual, least = self.dual_clip, 1 + self.clip_high
    ok = not dual or (dual > least and self.kind == 'clip')
    wanted = f'0 (none), or above 1 + clip_high = {least:g} with kind=clip'
    require(ok, 'dual_clip', dual, wanted)
    cap = self.sampler_cap
    require(not cap or cap >= 1, 'sampler_cap', cap, '0 (none), or at least 1')
    constant = self.aggregation == 'constant'
    wanted = 'the most tokens of an answer, if aggregation=constant; else 0'
    require((self.length > 0) == constant, 'length', self.length, wanted)

  def losses(
    self, logps_BL: jax.Array, columns: Batch, mask_BL: jax.Array
  ) -> tuple[jax.Array, dict[str, Mean]]:
    """What to minimise a token, [B, L], and meters.

    Without the column `old_logps` the policy is what answered, and is compared
    with its sampler here.
    """
    advantages, old_BL = columns['advantages'], columns.get('old_logps')
    fresh = old_BL is None
    if fresh:
      old_BL = jax.lax.stop_gradient(logps_BL)
    clips = self.clip_low, self.clip_high
    ratios_BL = ratios(logps_BL, old_BL, mask_BL, self.level)
    metrics = meters(logps_BL, old_BL, ratios_BL, advantages, mask_BL, *clips)
    if fresh:
      metrics |= gap(old_BL, columns['sampler_logps'], mask_BL)
    losses_BL = surrogate(
      self.kind, logps_BL, ratios_BL, advantages, mask_BL, *clips,
      self.dual_clip,
    )  # fmt: skip
    if self.sampler_cap:
      sampler_BL = columns['sampler_logps']
      weights_BL = sampler_weights(
        old_BL, sampler_BL, mask_BL, self.sampler_cap
      )
      metrics['sampler_weight'] = aggregate(weights_BL, mask_BL)
      losses_BL *= weights_BL
    if self.beta:
      kl_BL = kl(self.kl, logps_BL, columns['reference_logps'], mask_BL)
      metrics['kl'] = aggregate(jax.lax.stop_gradient(kl_BL), mask_BL)
      losses_BL += self.beta * kl_BL * (ratios_BL if self.kl_ratio else 1)
    return losses_BL, metrics

  def mean(
    self,
    losses_BL: jax.Array,
    mask_BL: jax.Array,
    sequences_B: jax.Array | None = None,
  ) -> Mean:
    """`aggregate` as asked for."""
    return aggregate(
      losses_BL, mask_BL, self.aggregation, self.length, sequences_B
    )


def meters(
  logps_BL: jax.Array,
  old_logps_BL: jax.Array,
  ratios_BL: jax.Array,
  advantages: jax.Array,
  mask_BL: jax.Array,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
) -> dict[str, Mean]:
  """How far the updates on a rollout have gone; means over tokens.

  - clip_low, clip_high: the shares whose ratio is outside on the side that the
    advantage drives it to, so that a clipped one learns nothing more.
  - ratio: 1 in the mean while the policy can be told by its old answers.
  - ratio_max: the largest. Maxima do not add up: over several microbatches it
    is the mean of theirs.
  - approximate_kl: KL(old || pi) as mean of (r - 1) - log r, r the token's.
  """
  logps_BL, ratios_BL = jax.lax.stop_gradient((logps_BL, ratios_BL))
  advantages_BL = _by_token(advantages, mask_BL)
  low_BL = (ratios_BL < 1 - clip_low) & (advantages_BL < 0)
  high_BL = (ratios_BL > 1 + clip_high) & (advantages_BL > 0)
  largest = per_device.largest(jnp.where(mask_BL, ratios_BL, 0).max())
  return {
    'clip_low': aggregate(low_BL, mask_BL),
    'clip_high': aggregate(high_BL, mask_BL),
    'ratio': aggregate(ratios_BL, mask_BL),
    'ratio_max': Mean(largest, jnp.ones((), jnp.float32)),
    'approximate_kl': aggregate(
      kl('k3', old_logps_BL, logps_BL, mask_BL), mask_BL
    ),
  }


def gap(
  logps_BL: jax.Array, sampler_logps_BL: jax.Array, mask_BL: jax.Array
) -> dict[str, Mean]:
  """The sampler-trainer meter: |difference| of the answers' tokens, in nats.

  NaN if one of them is. Of the largest see `meters`.
  """
  apart_BL = jnp.where(mask_BL, jnp.abs(logps_BL - sampler_logps_BL), 0)
  apart_BL = apart_BL.astype(jnp.float32)
  largest = per_device.largest(apart_BL.max())
  return {
    'sampler_gap': aggregate(apart_BL, mask_BL),
    'sampler_gap_max': Mean(largest, jnp.ones((), jnp.float32)),
  }


def _by_token(advantages: jax.Array, mask_BL: jax.Array) -> jax.Array:
  """[B, L], 0 where the mask is False, without a gradient."""
  if advantages.ndim == 1:
    advantages = advantages[:, None]
  return jax.lax.stop_gradient(
    jnp.where(mask_BL, advantages, 0).astype(jnp.float32)
  )


def _check(what: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    raise ValueError(f'{what}={value!r}: one of {", ".join(known)}')
