"""Proximal policy optimisation: RLHF with a value head.

Columns: row, step, both int32 [B]; answers are sampled (rollouts.py).
Prepared: tokens, loss_mask, segment_ids, positions, all [N, L+1], a row an
answer; advantages, returns, old_values, old_logps, sampler_logps [N, L].

The reward of a token is -beta log (pi/ref), and at the last one the score of
the answer (InstructGPT, arXiv 2203.02155, equation 2); advantages are GAE
(advantages.py), policy and value are clipped (PPO, arXiv 1707.06347, equation
7; policy.py). The value of a position is read by the scalar head
(`model.scalar_head`) from the policy's own hidden state.
"""

import jax
import jax.numpy as jnp

from tpu_lm import advantages, meters, policy, rollouts, stage, weights
from tpu_lm.stage import Stage, require

ROWS = ('prompts',)
_SAMPLING = rollouts.Sampling(group=1, updates=2, minibatches=2)
_OBJECTIVE = policy.Objective(beta=0.05, kl='k1')
_RETURNS = advantages.Returns()


def make(
  model,
  start,
  sampler,
  *,
  sampling: rollouts.Sampling = _SAMPLING,
  objective: policy.Objective = _OBJECTIVE,
  returns: advantages.Returns = _RETURNS,
  value_weight: float = 0.1,
  value_clip: float = 0.2,
) -> Stage:
  for one in (sampling, objective, returns):
    one.check()
  require(bool(sampling.reward), 'reward', '', 'name a reward, such as model')
  head = model.config.scalar_head
  require(head, 'value_weight', value_weight, 'set model.scalar_head=true')
  reference = weights.reference(start)
  penalty = objective.beta, objective.kl  # in the reward, not in the loss
  objective = objective._replace(beta=0.0)

  def values(params, hidden_BLD):
    found = jnp.einsum('BLD,D->BL', hidden_BLD, params['scalar_head'])
    return found.astype(jnp.float32)

  @jax.jit
  def forward(params, batch):
    return values(params, stage.hidden_states(model, params, batch))

  def prepare(params, batch, key):
    rollout = sampler.sample(params, batch, key, sampling)
    columns, mask_BL = rollout.columns, rollout.mask_BL
    base_BL = sampler.logps(reference(), columns, sampling)
    logps_BL = columns['old_logps'], base_BL, mask_BL
    values_BL = sampler.over(forward, params, columns)
    rewards_BL = advantages.token_rewards(rollout.rewards, *logps_BL, *penalty)
    columns |= returns.columns(rewards_BL, values_BL, mask_BL)
    rollout.figures.update(meters.divergence(*logps_BL))
    yield from sampler.batches(rollout, key, sampling)

  def loss(params, batch, key):
    del key  # no dropout
    hidden_BLD = stage.hidden_states(model, params, batch)
    logps_BL, weights_BL = stage.token_logps(
      model, params, batch, sampling.temperature, hidden_BLD
    )
    mask_BL, values_BL = weights_BL > 0, values(params, hidden_BLD)
    losses_BL, metrics = objective.losses(logps_BL, batch, mask_BL)
    given = batch['old_values'], batch['returns'], mask_BL, value_clip
    losses_BL += value_weight * policy.value_losses(values_BL, *given)
    metrics |= policy.value_meters(values_BL, *given)
    metrics |= meters.figures_of(batch)
    return objective.mean(losses_BL, mask_BL), metrics

  return Stage(loss, prepare)
