"""What TRL 1.16 gave for the cases of parity/losses_cases.py, as constants.

tests/parity/losses_test.py computes them anew where TRL is installed.
"""

import numpy as np
import pytest
from parity import losses_cases

# Loss, and norm of its gradient by the logits (of reward: by the rewards).
TRL = {
  'sft': (2.189366, 0.2481671),
  'reward': (1.04886, 0.4363224),
  'reward_margin_centring': (1.767982, 0.5500607),
  'dpo_sigmoid': (0.7846379, 0.2388295),
  'dpo_sigmoid_smoothed': (1.110927, 0.231825),
  'dpo_sigmoid_normalised': (0.5530092, 0.05067809),
  'dpo_robust': (0.6989883, 0.280749),
  'dpo_hinge': (0.9992963, 0.3093882),
  'dpo_ipo': (42.98886, 20.31208),
  'dpo_ipo_normalised': (5.423063, 2.410936),
  'simpo': (1.883181, 0.7323159),
  'orpo': (3.078299, 0.4570396),
  'orpo_even': (2.584373, 0.2686961),
  'kto': (0.6472396, 0.005884884),
  'kto_clamped': (0.554911, 0.02275157),
  'forward_kl': (0.5855434, 0.1009962),
  'reverse_kl': (0.4947287, 0.08596297),
  'gjsd': (0.1194592, 0.01833834),
  'gjsd_small': (0.04861376, 0.00772596),
  'gjsd_large': (0.04341783, 0.007177832),
  'gjsd_warm': (0.1552084, 0.024896),
}


def test_every_case_is_here():
  assert TRL.keys() == losses_cases.cases().keys()


@pytest.mark.parametrize('case', TRL)
def test_loss_and_gradient_are_those_that_trl_gave(case):
  loss, gradient = losses_cases.ours(case)
  norm = np.sqrt(np.square(gradient.astype(np.float64)).sum())
  np.testing.assert_allclose((loss, norm), TRL[case], rtol=1e-5)
