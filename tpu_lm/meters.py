"""What is told of a rollout: how long, how good, how far from its start."""

import numpy as np

from tpu_lm import advantages, policy, scoring, stage
from tpu_lm.errors import UserError

FIGURE = 'figure/'  # begins the names of columns that are only reported
_NOT_JUDGED = 0.05  # of the answers, beyond which a run stops


def figures_of(batch: dict) -> dict[str, stage.Mean]:
  """The figures of a rollout, as metrics of a loss on its rows."""
  return {
    name.removeprefix(FIGURE): stage.Mean(column.sum(), column.size * 1.0)
    for name, column in batch.items()
    if name.startswith(FIGURE)
  }


def divergence(
  logps_BL: np.ndarray, reference_BL: np.ndarray, mask_BL: np.ndarray
) -> dict[str, float]:
  """KL(policy || reference) on its own answers: a token, and an answer."""
  apart_BL = np.where(mask_BL, logps_BL - reference_BL, 0)
  return {
    'kl': float(apart_BL.sum() / max(mask_BL.sum(), 1)),
    'kl_answer': float(apart_BL.sum(axis=1).mean()),
  }


def of_answers(found: list) -> dict[str, float]:
  """Length, truncation and entropy of completions."""
  lengths = np.array([len(one.tokens) for one in found])
  finished = np.array([one.finished for one in found])
  spent = -np.concatenate([one.sampled_logps for one in found])
  return {
    'answer_tokens': float(lengths.mean()),
    'truncated': float((~finished).mean()),
    # Of the tokens drawn: an estimate without bias.
    'entropy': float(spent.mean()),
  }


def of_rewards(
  scored: scoring.Scored, group: int, reward: str
) -> dict[str, float]:
  """Each reward alone, and what became of the groups.

  Args:
    scored: the answers to a prompt side by side.
    group: how many these are.
    reward: as the configuration has it, for the message.

  Raises:
    UserError: too many answers could not be judged.
  """
  rewards = scored.total
  failed = float(np.isnan(rewards).mean())
  if failed > _NOT_JUDGED:
    raise UserError(
      f'stage.reward={reward}: {failed:.0%} of the answers could not be '
      'judged, more than 5 %; see the notes in rollouts/, or run `tpu_lm '
      'doctor`'
    )
  found = {'reward': float(np.nanmean(rewards)), 'not_judged': failed}
  for name, values in scored.values.items():
    key = 'true_reward' if name == 'true' else f'reward/{name}'
    found[key] = float(np.nanmean(values))
  for name, parsed in scored.parsed.items():
    found[f'not_parsed/{name}'] = float((~parsed).mean())
  dead = advantages.dead_groups(rewards.reshape(-1, group))
  found['dead_groups'] = float(dead.total / dead.weight)
  return found


def of_gap(columns: dict[str, np.ndarray]) -> dict[str, float]:
  """The meter between sampler and trainer, of the columns of a rollout."""
  mask_BL = columns['loss_mask'][:, 1:]
  pair = columns['old_logps'], columns['sampler_logps']
  return {
    name: float(one.total / one.weight)
    for name, one in policy.gap(*pair, mask_BL).items()
  }


def check_gap(figures: dict[str, float], limit: float) -> None:
  """Ends a run whose sampler is not the policy that it trains.

  Args:
    figures: with `sampler_gap`.
    limit: nats a token, in the mean; 0: none.

  Raises:
    UserError: they differ by more.
  """
  mean = figures['sampler_gap']
  if limit and not mean <= limit:
    raise UserError(
      f'sampler and trainer differ by {mean:.3g} nats a token in the mean, '
      f'above stage.max_gap={limit}: they are not one policy; compare '
      'model.dtype and model.attention, or raise stage.max_gap'
    )
