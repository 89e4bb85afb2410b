"""Fixed rollouts of every policy loss, and what our functions make of them.

Two groups of three answers. Logits are given for the policy, for what it was
when it answered, and for the reference; gradients are those by the policy's
logits. Numbers come from sines, so that they are the same everywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from parity.losses_cases import waves

from tpu_lm import advantages, divergence, policy

GROUPS, ANSWERS, PROMPT, ANSWER, VOCAB = 2, 3, 2, 7, 8
STOP, PADDING = 6, 7
LENGTHS = [5, 3, 7, 1, 4, 7]
CUT_OFF = [2, 4]  # their last token is no stop token
ROWS = GROUPS * ANSWERS
# TRL divides squares by n - 1 and adds 1e-4 to deviations.
TRLS = {'ddof': 1, 'epsilon': 1e-4}


class Case(NamedTuple):
  trainer: str  # of TRL: grpo or rloo
  trl: dict  # its arguments, beyond the defaults
  objective: dict  # ours
  scaling: dict = TRLS  # of `advantages.grouped`
  sampler: dict | None = None  # of `policy.sampler_weights`
  finished: bool = False  # answers that were cut off are dropped
  count_all: bool = False  # but still counted: TRL's mean over answers
  unjudged: bool = False  # some rewards are NaN
  first: bool = False  # the first update: the policy is the one that answered


def rollout(case: Case) -> dict:
  """The arrays of a case, for both sides."""
  shape = ROWS, PROMPT + ANSWER
  slots = np.arange(shape[1])
  last = PROMPT + np.array(LENGTHS)[:, None] - 1
  tokens = np.abs(waves(shape, 1.0, 1e4)).astype(np.int32) % STOP
  stops = ~np.isin(np.arange(ROWS), CUT_OFF)[:, None]
  tokens = np.where((slots == last) & stops, STOP, tokens)
  tokens = np.where(slots > last, PADDING, tokens).astype(np.int32)
  logits = waves((ROWS, shape[1] - 1, VOCAB), 3.0)
  old = logits + waves(logits.shape, 5.0, 0.8) * (not case.first)
  sampler = token_logps(old, tokens) + waves(tokens[:, 1:].shape, 8.0, 0.4)
  rewards = np.array([1, 0, 0.25, 2, -1, 0.5], np.float32)
  if case.unjudged:
    rewards[[1]] = np.nan
  return {
    'tokens': tokens,
    'lengths': np.array(LENGTHS),
    'logits': logits,
    'old': old,
    'reference': logits + waves(logits.shape, 6.0, 0.7),
    'sampler_logps': np.asarray(sampler),
    'rewards': rewards,
    'values': waves(tokens[:, 1:].shape, 9.0, 1.0),
    'old_values': waves(tokens[:, 1:].shape, 9.5, 1.0),
  }


def answer_mask(given: dict) -> np.ndarray:
  slots = np.arange(1, given['tokens'].shape[1])
  end = PROMPT + given['lengths'][:, None]
  return (slots >= PROMPT) & (slots < end)


def token_logps(logits, tokens):
  return divergence.picked_logps(jnp.asarray(logits), tokens[:, 1:])


def _grpo(objective: dict, trl: dict, **rest) -> Case:
  objective = {'aggregation': 'sequence'} | objective
  return Case('grpo', {'loss_type': 'grpo'} | trl, objective, **rest)


def _sampler(mode: str, level: str, drop: bool) -> Case:
  trl = {'vllm_importance_sampling_mode': mode}
  given = {'cap': 1.3, 'level': level, 'drop': drop}
  return _grpo({}, trl, sampler=given)


def cases() -> dict[str, Case]:
  """name -> case."""
  token, constant = {'aggregation': 'token'}, {
    'aggregation': 'constant', 'length': ANSWER,
  }  # fmt: skip
  high = {'clip_high': 0.28}
  k3 = {'beta': 0.2, 'kl': 'k3'}
  gspo = {'level': 'sequence', 'clip_low': 0.03, 'clip_high': 0.04}
  trl_gspo = {
    'importance_sampling_level': 'sequence', 'epsilon': 0.03,
    'epsilon_high': 0.04,
  }  # fmt: skip
  answer = {'level': 'answer', 'aggregation': 'sequence'}
  alone = {'scale': 'none', 'leave_one_out': True}
  masked = {'mask_truncated_completions': True}
  return {
    'grpo': _grpo({}, {}),
    'grpo_kl': _grpo(k3, {'beta': 0.2}),
    'grpo_kl_ratio': _grpo(
      k3 | {'kl_ratio': True}, {'beta': 0.2, 'use_bias_correction_kl': True}
    ),
    'grpo_unjudged': _grpo({}, {}, unjudged=True),
    'grpo_batch': _grpo(
      {}, {'scale_rewards': 'batch'}, scaling=TRLS | {'scale': 'batch'}
    ),
    'grpo_delta': _grpo({'dual_clip': 1.5}, {'delta': 1.5}),
    'grpo_cut_off': _grpo({}, masked, finished=True, count_all=True),
    'bnpo': _grpo(token, {'loss_type': 'bnpo'}),
    'dapo': _grpo(
      token | high, masked | {'loss_type': 'dapo', 'epsilon_high': 0.28},
      finished=True,
    ),
    'dapo_kl': _grpo(token | k3, {'loss_type': 'dapo', 'beta': 0.2}),
    'dr_grpo': _grpo(
      constant, {'loss_type': 'dr_grpo', 'scale_rewards': 'none'},
      scaling={'scale': 'none'},
    ),
    'dr_grpo_cut_off': _grpo(
      constant, masked | {'loss_type': 'dr_grpo'}, finished=True,
      count_all=True,
    ),
    'cispo': _grpo(
      token | {'kind': 'cispo', 'clip_low': 1.0, 'clip_high': 0.1},
      {'loss_type': 'cispo', 'epsilon_high': 1.1},
    ),
    'gspo': _grpo(gspo, trl_gspo),
    'gspo_kl': _grpo(gspo | k3, trl_gspo | {'beta': 0.2}),
    'sampler_token_truncate': _sampler('token_truncate', 'token', False),
    'sampler_token_mask': _sampler('token_mask', 'token', True),
    'sampler_sequence_truncate': _sampler('sequence_truncate', 'answer', False),
    'sampler_sequence_mask': _sampler('sequence_mask', 'answer', True),
    'rloo': Case('rloo', {}, answer, alone),
    'rloo_kl': Case('rloo', {'beta': 0.1}, answer, alone, unjudged=True),
    'rloo_reinforce': Case(
      'rloo', {},
      {'kind': 'reinforce', 'aggregation': 'constant', 'length': 1},
      alone, first=True,
    ),
  }  # fmt: skip


# Its value is another; its gradient is the same.
GRADIENT_ONLY = ('rloo_reinforce',)


def ours(name: str) -> tuple[float, np.ndarray]:
  """Our loss of a case, and its gradient by the policy's logits."""
  case = cases()[name]
  given = rollout(case)
  tokens, rewards = given['tokens'], given['rewards']
  answer = jnp.asarray(answer_mask(given))
  stops = jnp.asarray(~np.isin(np.arange(ROWS), CUT_OFF))
  mask = answer & stops[:, None] if case.finished else answer
  columns = {
    'old_logps': token_logps(given['old'], tokens),
    'reference_logps': token_logps(given['reference'], tokens),
    'sampler_logps': given['sampler_logps'],
  }
  if case.trainer == 'rloo':  # the KL is part of the reward
    pair = columns['old_logps'], columns['reference_logps']
    kl_B = policy.kl('k1', *pair, mask).sum(axis=1)
    rewards = rewards - case.trl.get('beta', 0.0) * np.asarray(kl_B)
  rewards = rewards.reshape(GROUPS, ANSWERS)
  found = advantages.grouped(rewards, **case.scaling)
  columns['advantages'] = found.reshape(-1)
  objective = policy.Objective(**case.objective)
  objective.check()
  everyone = jnp.ones(ROWS, bool) if case.count_all else None

  def value(logits):
    logps = token_logps(logits, tokens)
    each, _ = objective.losses(logps, columns, mask)
    if case.sampler:
      pair = columns['old_logps'], columns['sampler_logps']
      each *= policy.sampler_weights(*pair, mask, **case.sampler)
    mean = objective.mean(each, mask, everyone)
    return mean.total / mean.weight

  loss, gradient = jax.jit(jax.value_and_grad(value))(given['logits'])
  return float(loss), np.asarray(gradient)


# Of PPO: what TRL's last trainer with these functions, 0.11.4, calls alike.
PPO = {'beta': 0.2, 'gamma': 0.97, 'lam': 0.9, 'clip': 0.2, 'value_clip': 0.3}
VALUE_WEIGHT = 0.5


def ours_ppo(whiten_rewards: bool) -> dict[str, np.ndarray]:
  """Advantages and returns, the loss, and its gradients."""
  given = rollout(cases()['grpo'])
  tokens, mask = given['tokens'], jnp.asarray(answer_mask(given))
  old = token_logps(given['old'], tokens)
  rewards = advantages.token_rewards(
    given['rewards'], old, token_logps(given['reference'], tokens), mask,
    PPO['beta'],
  )  # fmt: skip
  if whiten_rewards:
    rewards = advantages.whiten(rewards, mask, shift_mean=False, ddof=1)
  found, returns = advantages.gae(
    rewards, given['old_values'], mask, PPO['gamma'], PPO['lam']
  )
  found = advantages.whiten(found, mask, ddof=1)
  objective = policy.Objective(clip_low=PPO['clip'], clip_high=PPO['clip'])

  def value(logits, values):
    columns = {'advantages': found, 'old_logps': old}
    each, _ = objective.losses(token_logps(logits, tokens), columns, mask)
    each += VALUE_WEIGHT * policy.value_losses(
      values, given['old_values'], returns, mask, PPO['value_clip']
    )
    mean = objective.mean(each, mask)
    return mean.total / mean.weight

  both = jax.jit(jax.value_and_grad(value, (0, 1)))
  loss, slopes = both(given['logits'], given['values'])
  names = 'advantages', 'returns', 'loss', 'gradient', 'value_gradient'
  arrays = found, returns, loss, *slopes
  return dict(zip(names, map(np.asarray, arrays), strict=True))
