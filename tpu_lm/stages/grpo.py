"""Group-relative policy optimisation, and its relatives without a value.

Columns: row, step, both int32 [B]; answers are sampled (rollouts.py).
Prepared: rows of `together` answers (data/answer_rows.py); advantages [N] of
the answers; sampler_logps, reference_logps [B, L]; old_logps [B, L], where
there are several updates on a rollout.

Each prompt is answered `group` times, and an answer's advantage is its reward
over the group's mean (advantages.py); the loss is policy.py's, whose head says
which keys make GRPO, DAPO, Dr. GRPO, GSPO, CISPO and RLOO. Defaults are those
of GRPO (DeepSeekMath, arXiv 2402.03300) with means over tokens, no KL and no
reference, as is usual since DAPO (arXiv 2503.14476). `resample` is DAPO's
dynamic sampling: groups without variance make way for other prompts.
Log-probabilities are those at the sampling temperature, so that every ratio is
1 before the first update; there is no top-p, which would break that.
"""

from tpu_lm import advantages, meters, policy, rollouts, stage, weights
from tpu_lm.data import answer_rows
from tpu_lm.stage import Stage, require

ROWS = ('prompts',)
_SAMPLING, _OBJECTIVE = rollouts.Sampling(), policy.Objective()


def make(
  model,
  start,
  sampler,
  *,
  sampling: rollouts.Sampling = _SAMPLING,
  objective: policy.Objective = _OBJECTIVE,
  scale: str = 'group',
  leave_one_out: bool = False,
  drop_unfinished: bool = False,
  together: int = 1,
) -> Stage:
  sampling.check()
  objective.check()
  sliding, group = any(model.config.windows), sampling.group
  fits = together == 1 or (together > 1 and not (sliding or group % together))
  wanted = f'must divide group={group}; 1 for a network with sliding windows'
  require(fits, 'together', together, wanted)
  known = advantages.SCALES
  require(scale in known, 'scale', scale, f'one of {", ".join(known)}')
  require(bool(sampling.reward), 'reward', '', 'name a reward, such as math')
  require(sampling.group > 1, 'group', sampling.group, 'must be at least 2')
  reference = weights.reference(start)

  def advantage(rollout):
    groups = rollout.rewards.reshape(-1, sampling.group)
    found = advantages.grouped(groups, scale=scale, leave_one_out=leave_one_out)
    return rollout.of_answers(found.reshape(-1))

  def prepare(params, batch, key):
    scores = sampling.num_updates > 1
    rollout = sampler.sample(params, batch, key, sampling, scores, together)
    columns = rollout.columns
    columns['advantages'] = advantage(rollout)
    if objective.beta:
      columns['reference_logps'] = sampler.logps(reference(), columns, sampling)
    if drop_unfinished:
      answer_rows.keep(columns, rollout.finished)
    yield from sampler.batches(rollout, key, sampling)

  def loss(params, batch, key):
    del key  # no dropout
    heat = sampling.temperature
    logps_BL, weights_BL = stage.token_logps(model, params, batch, heat)
    answers = rollouts.by_answer(batch, logps_BL, weights_BL > 0)
    columns, logps_NA, mask_NA = answers
    losses_NA, metrics = objective.losses(logps_NA, columns, mask_NA)
    metrics |= meters.figures_of(batch)
    return objective.mean(losses_NA, mask_NA), metrics

  def watch(metrics):
    if sampling.num_updates == 1 and metrics['targets']:
      meters.check_gap(metrics, sampling.max_gap)

  return Stage(loss, prepare, watch=watch)
