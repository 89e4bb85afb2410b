"""What TRL's PPO makes of the rollout of policy_cases.py.

  PYTHONPATH=FOLDER PEER_PYTHON tests/parity/trl_ppo.py INPUTS.npz OUTPUTS.npz

TRL 1 has no PPO. `FOLDER` holds TRL 0.11.4, the last whose PPOTrainer has its
formulas in methods of their own, and the versions of its time:
  pip install --target=FOLDER --no-deps trl==0.11.4 transformers==4.45.2 \\
    tokenizers==0.20.3 huggingface_hub==0.26.5 accelerate==0.34.2 \\
    datasets==3.0.2 … (what these ask for)
"""

import json
import sys
import types

import numpy as np
import torch
from trl.core import masked_whiten
from trl.trainer.ppo_trainer import PPOTrainer


def computed(given, options, weight, whiten_rewards):
  arrays = {name: torch.tensor(array) for name, array in given.items()}
  mask = arrays['mask'].float()
  ids = arrays['tokens'].long()[:, 1:, None]

  def logps(logits):
    return torch.log_softmax(logits, dim=-1).gather(-1, ids)[..., 0]

  made = object.__new__(PPOTrainer)
  made.config = types.SimpleNamespace(
    kl_penalty='kl', whiten_rewards=False, gamma=options['gamma'],
    lam=options['lam'], cliprange=options['clip'],
    cliprange_value=options['value_clip'], vf_coef=weight,
    ratio_threshold=10.0,
  )  # fmt: skip
  made.kl_ctl = types.SimpleNamespace(value=options['beta'])
  old = logps(arrays['old'])
  rewards, _, _ = made.compute_rewards(
    arrays['rewards'], old, logps(arrays['reference']), mask
  )
  if whiten_rewards:
    # Its own call leaves numbers behind the answers, which flow into them.
    rewards = masked_whiten(rewards, mask, shift_mean=False)
  values, advantages, returns = made.compute_advantages(
    arrays['old_values'], rewards, mask
  )
  logits = arrays['logits'].requires_grad_()
  now = arrays['values'].requires_grad_()
  parts = made.loss(
    old, values, logits, now, logps(logits), mask, advantages, returns
  )
  loss = parts[0] + parts[1]
  loss.backward()
  return {
    'advantages': advantages * mask,
    'returns': returns * mask,
    'loss': loss.detach(),
    'gradient': logits.grad,
    'value_gradient': now.grad,
  }


def main(source: str, target: str) -> None:
  given = dict(np.load(source))
  options, weight = json.loads(str(given.pop('options')))
  found = {
    f'{whiten}/{name}': array.numpy()
    for whiten in (False, True)
    for name, array in computed(given, options, weight, whiten).items()
  }
  np.savez(target, **found)


if __name__ == '__main__':
  main(*sys.argv[1:])
