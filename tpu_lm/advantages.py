"""How much better than expected: groups, generalised advantages, whitening.

What compares answers with each other is host code over whole global batches
(numpy): `grouped`, `equal_groups`, `dead_groups`. It is made before rows are
laid on devices, so that a group which is split over them has the same
advantages, to the bit and in every order of its answers.

What goes along answers runs where values and log-probabilities are (jax):
`token_rewards`, `gae`, `whiten`. Arrays [B, L] are as in policy.py; masked
positions may hold anything, and results are 0 there. All of it is data for the
losses, to be made in `prepare`, before a batch is cut into microbatches:
whitening takes its mean over all of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpu_lm import policy
from tpu_lm.stage import Mean, require

SCALES = ('group', 'batch', 'none')
_EQUAL = 1e-6  # of a group's largest reward; what differs by less is equal


def grouped(
  rewards: np.ndarray,
  group_ids: np.ndarray | None = None,
  *,
  scale: str = 'group',
  leave_one_out: bool = False,
  ddof: int = 0,
  epsilon: float = 0.0,
) -> np.ndarray:
  """Float32: each answer's reward over the mean of its group.

  A NaN reward (it could not be judged) is left out of means and deviations, and
  its advantage is 0; the answer is to be dropped from the mask besides, or it
  still counts in means over answers and has its KL. A group of equal rewards,
  or with one that was judged, gives exactly 0 everywhere.

  Args:
    rewards: [prompts, answers], a group a row; or [N] with `group_ids`.
    group_ids: [N], the same for the answers to a prompt, in any order.
    scale: what divides the difference:
      - group: the group's standard deviation (GRPO, arXiv 2402.03300, section
        4.1.2).
      - batch: that of all rewards of the batch (arXiv 2508.08221).
      - none: nothing (Dr. GRPO, arXiv 2503.20783).
    leave_one_out: the mean is that of the others in the group (RLOO, arXiv
      2402.14740): n / (n - 1) times the difference to the mean of all n.
    ddof: a deviation is sqrt(sum of squares / (n - ddof)). The papers say no
      more than "standard deviation", which is 0 here; TRL has 1.
    epsilon: is added to deviations. The papers have none; TRL has 1e-4.

  Raises:
    ValueError: a reward is infinite, or ids are missing.
  """
  if scale not in SCALES:
    raise ValueError(f'scale={scale!r}: one of {", ".join(SCALES)}')
  sums = _Groups(rewards, group_ids)
  found = sums.above_mean
  counts = sums.counts[sums.group]
  if leave_one_out:
    found = found * counts / np.maximum(counts - 1, 1)
  if scale == 'group':
    squares = sums.total(sums.above_mean**2)
    deviations = np.sqrt(squares / np.maximum(sums.counts - ddof, 1))
    found = _over(found, (deviations + epsilon)[sums.group])
  elif scale == 'batch':
    values = np.sort(sums.rewards[sums.judged])
    several = len(values) > ddof
    found = _over(found, (values.std(ddof=ddof) if several else 0.0) + epsilon)
  return found.astype(np.float32).reshape(np.shape(rewards))


def equal_groups(
  rewards: np.ndarray, group_ids: np.ndarray | None = None
) -> np.ndarray:
  """Bool, a group: nothing can be learned from it, so DAPO resamples it.

  Its judged rewards are equal (to a millionth of the largest of them, so that
  rounding teaches nothing), or fewer than two. Groups are rows, or the ids in
  ascending order; arguments as in `grouped`. DAPO: arXiv 2503.14476, equation
  11.
  """
  return _Groups(rewards, group_ids).equal


def dead_groups(
  rewards: np.ndarray, group_ids: np.ndarray | None = None
) -> Mean:
  """The share of groups that teach nothing."""
  equal = equal_groups(rewards, group_ids)
  return Mean(np.float32(equal.sum()), np.float32(equal.size))


class _Groups:
  """Rewards by group. Sums are over sorted numbers, so no order matters.

  Answers that were not judged, and all of equal groups, are 0 above the mean.
  """

  def __init__(self, rewards, group_ids):
    rewards = np.asarray(rewards, np.float64)
    if group_ids is None:
      if rewards.ndim != 2:
        raise ValueError(f'rewards {rewards.shape}: without ids a group a row')
      group_ids = np.repeat(np.arange(len(rewards)), rewards.shape[1])
    if np.isinf(rewards).any():
      raise ValueError(
        'rewards: one is infinite; NaN marks what was not judged'
      )
    self.rewards = rewards.reshape(-1)
    if np.shape(group_ids) != self.rewards.shape:
      raise ValueError(
        f'group_ids {np.shape(group_ids)}: not one a reward, {rewards.shape}'
      )
    names, self.group = np.unique(group_ids, return_inverse=True)
    self.size = len(names)
    self.judged = ~np.isnan(self.rewards)
    self.counts = self.total(np.ones_like(self.rewards))
    low = np.full(self.size, np.inf)
    high = np.full(self.size, -np.inf)
    values, places = self.rewards[self.judged], self.group[self.judged]
    np.minimum.at(low, places, values)
    np.maximum.at(high, places, values)
    low, high = (np.where(self.counts > 0, x, 0) for x in (low, high))
    noise = _EQUAL * np.maximum(np.abs(low), np.abs(high))
    self.equal = high - low <= noise  # with fewer than two judged, 0 <= 0
    means = self.total(self.rewards) / np.maximum(self.counts, 1)
    counted = self.judged & ~self.equal[self.group]
    self.above_mean = np.where(counted, self.rewards - means[self.group], 0.0)

  def total(self, values: np.ndarray) -> np.ndarray:
    """The sums over the judged answers of each group."""
    values, group = values[self.judged], self.group[self.judged]
    order = np.lexsort((values, group))
    sums = np.zeros(self.size)
    np.add.at(sums, group[order], values[order])
    return sums


def _over(x: np.ndarray, deviation: np.ndarray) -> np.ndarray:
  """The quotient, and 0 where the deviation is."""
  positive = np.broadcast_to(deviation > 0, x.shape)
  return np.divide(x, deviation, out=np.zeros_like(x), where=positive)


@functools.partial(jax.jit, static_argnames='kind')
def token_rewards(
  scores_B: jax.Array,
  logps_BL: jax.Array,
  reference_logps_BL: jax.Array,
  mask_BL: jax.Array,
  beta: float,
  kind: str = 'k1',
) -> jax.Array:
  """Float32 [B, L]: the score at an answer's last token, less beta KL at each.

  RLHF's reward (arXiv 1909.08593, equation 2; InstructGPT, arXiv 2203.02155,
  equation 2), of which the KL is a sum over tokens.

  Args:
    scores_B: of answers. One that is NaN must be out of the mask.
    logps_BL: of the policy that answered.
    reference_logps_BL: of the reference.
    mask_BL: bool.
    beta: of the KL.
    kind: of its estimator, as in `policy.kl`; k1 is the papers'.
  """
  later_BL = jnp.cumsum(mask_BL[:, ::-1], axis=-1)[:, ::-1]
  last_BL = mask_BL & (later_BL == 1)
  kl_BL = policy.kl(kind, logps_BL, reference_logps_BL, mask_BL)
  return jnp.where(last_BL, scores_B[:, None], 0) - beta * kl_BL


@jax.jit  # else the scan would be compiled anew at each call
def gae(
  rewards_BL: jax.Array,
  values_BL: jax.Array,
  mask_BL: jax.Array,
  gamma: float = 1.0,
  lam: float = 0.95,
  bootstrap_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantages (arXiv 1506.02438, equation 16) of answers' tokens.

  A_t = d_t + gamma lam A_(t+1), d_t = r_t + gamma V_(t+1) - V_t, where t + 1 is
  the answer's next token in the mask: what others wrote in between (a tool) is
  skipped.

  Args:
    rewards_BL: what a token earned.
    values_BL: of what stands before the token, that is at its position.
    mask_BL: bool; a row may begin and end with any number of False.
    gamma: discount; RLHF has 1.
    lam: 0: one step ahead; 1: the whole return.
    bootstrap_B: V behind the last token of answers that were cut off; 0 for
      those that ended. None: 0 for all, as RLHF has it.

  Returns:
    (advantages_BL, returns_BL), float32; returns are advantages + values.
  """
  rewards_BL, values_BL = (
    jnp.where(mask_BL, x, 0).astype(jnp.float32)
    for x in (rewards_BL, values_BL)
  )
  if bootstrap_B is None:
    bootstrap_B = jnp.zeros(len(mask_BL))

  def step(carry, column):
    after_B, next_B = carry  # advantage and value of the token behind
    reward_B, value_B, mask_B = column
    delta_B = reward_B + gamma * next_B - value_B
    found_B = delta_B + gamma * lam * after_B
    carry = (
      jnp.where(mask_B, found_B, after_B),
      jnp.where(mask_B, value_B, next_B),
    )
    return carry, jnp.where(mask_B, found_B, 0)

  start = jnp.zeros(len(mask_BL)), bootstrap_B.astype(jnp.float32)
  columns = tuple(x.T for x in (rewards_BL, values_BL, mask_BL))
  _, advantages_LB = jax.lax.scan(step, start, columns, reverse=True)
  return advantages_LB.T, advantages_LB.T + values_BL


@functools.partial(jax.jit, static_argnames=('shift_mean', 'ddof'))
def whiten(
  x_BL: jax.Array, mask_BL: jax.Array, shift_mean: bool = True, ddof: int = 0
) -> jax.Array:
  """Float32 [B, L]: deviation 1 over all tokens, and mean 0 if it is shifted.

  (x - mean) / sqrt(variance + 1e-8), plus the mean unless `shift_mean`, as the
  code of arXiv 1909.08593 has it, whose variance is that of the numbers
  themselves. TRL divides the squares by n - 1, which ddof=1 gives.
  """
  x_BL = jnp.where(mask_BL, x_BL, 0).astype(jnp.float32)
  count = mask_BL.sum(dtype=jnp.float32)
  mean = x_BL.sum() / jnp.maximum(count, 1)
  off_BL = jnp.where(mask_BL, x_BL - mean, 0)
  variance = jnp.square(off_BL).sum() / jnp.maximum(count - ddof, 1)
  found_BL = off_BL * jax.lax.rsqrt(variance + 1e-8)
  if not shift_mean:
    found_BL += mean
  return jnp.where(mask_BL, found_BL, 0)


class Returns(NamedTuple):
  """PPO's advantages, from the hyper-parameters that stages take."""

  gamma: float = 1.0
  lam: float = 0.95
  whiten_rewards: bool = False  # without shifting their mean
  whiten_advantages: bool = True

  def check(self) -> None:
    """Refuses what cannot be, by the keys of a stage of the same names."""
    for key in ('gamma', 'lam'):
      value = getattr(self, key)
      require(0 <= value <= 1, key, value, 'from 0 to 1')

  def columns(
    self,
    rewards_BL: jax.Array,
    values_BL: jax.Array,
    mask_BL: jax.Array,
    bootstrap_B: jax.Array | None = None,
  ) -> dict[str, np.ndarray]:
    """Float32 [B, L]: advantages, returns and old_values of a whole rollout.

    Returns are sums of the rewards as they are whitened, if they are.
    Arguments as in `gae`.
    """
    if self.whiten_rewards:
      rewards_BL = whiten(rewards_BL, mask_BL, shift_mean=False)
    found_BL, returns_BL = gae(
      rewards_BL, values_BL, mask_BL, self.gamma, self.lam, bootstrap_B
    )
    if self.whiten_advantages:
      found_BL = whiten(found_BL, mask_BL)
    columns = {
      'advantages': found_BL,
      'returns': returns_BL,
      'old_values': jnp.where(mask_BL, values_BL, 0).astype(jnp.float32),
    }
    return jax.device_get(columns)
