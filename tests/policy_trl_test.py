"""What TRL gave for the rollouts of parity/policy_cases.py, as constants.

TRL 1.16, and 0.11.4 for PPO. tests/parity/policy_parity_test.py computes them
anew where they are installed.
"""

import itertools

import numpy as np
import pytest
from parity import policy_cases

# Loss, and norm of its gradient by the logits.
TRL = {
  'grpo': (-0.07353914, 0.097627),
  'grpo_kl': (-0.04696299, 0.1076454),
  'grpo_kl_ratio': (-0.0534489, 0.1033665),
  'grpo_unjudged': (-0.04857787, 0.08769188),
  'grpo_batch': (-0.06797413, 0.1133112),
  'grpo_delta': (-0.07363609, 0.09689339),
  'grpo_cut_off': (-0.2913319, 0.06415462),
  'bnpo': (0.03254661, 0.09812088),
  'dapo': (-0.3425224, 0.1202899),
  'dapo_kl': (0.06255978, 0.1092841),
  'dr_grpo': (0.07767469, 0.0668714),
  'dr_grpo_cut_off': (-0.1243108, 0.04582472),
  'cispo': (0.1232107, 0.1262759),
  'gspo': (-0.01889302, 0.07026287),
  'gspo_kl': (0.007683118, 0.07723375),
  'sampler_token_truncate': (-0.0323693, 0.1160875),
  'sampler_token_mask': (-0.236822, 0.08655543),
  'sampler_sequence_truncate': (0.04646307, 0.107804),
  'sampler_sequence_mask': (-0.3754185, 0.04969884),
  'rloo': (-0.1256442, 0.6421087),
  'rloo_kl': (-0.1376492, 0.706124),
  'rloo_reinforce': (0, 0.8243448),
}


def test_every_case_is_here():
  assert TRL.keys() == policy_cases.cases().keys()


def test_no_two_cases_are_alike():
  """What a case is about does something."""
  for (one, a), (other, b) in itertools.combinations(TRL.items(), 2):
    assert not np.allclose(a, b, rtol=1e-4), (one, other)


@pytest.mark.parametrize('case', TRL)
def test_loss_and_gradient_are_those_that_trl_gave(case):
  loss, gradient = policy_cases.ours(case)
  norm = np.sqrt(np.square(gradient.astype(np.float64)).sum())
  if case not in policy_cases.GRADIENT_ONLY:
    np.testing.assert_allclose(loss, TRL[case][0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(norm, TRL[case][1], rtol=1e-5)


# Norms, without and with whitened rewards.
PPO = {
  (False, 'advantages'): 5.09902,
  (False, 'returns'): 3.820054,
  (False, 'loss'): 0.1751566,
  (False, 'gradient'): 0.1250642,
  (False, 'value_gradient'): 0.08086864,
  (True, 'advantages'): 5.099019,
  (True, 'returns'): 7.118856,
  (True, 'loss'): 0.4318516,
  (True, 'gradient'): 0.1334531,
  (True, 'value_gradient'): 0.119139,
}


@pytest.mark.parametrize('whiten_rewards', [False, True])
def test_ppo_is_what_trl_gave(whiten_rewards):
  found = policy_cases.ours_ppo(whiten_rewards)
  assert len(found) == 5
  for name, array in found.items():
    norm = np.sqrt(np.square(array.astype(np.float64)).sum())
    np.testing.assert_allclose(norm, PPO[whiten_rewards, name], rtol=1e-5)
