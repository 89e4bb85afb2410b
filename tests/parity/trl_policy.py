"""What TRL's own trainers make of the cases of policy_cases.py.

  PEER_PYTHON tests/parity/trl_policy.py INPUTS.npz OUTPUTS.npz

As trl_losses.py. Both halves of a trainer are called: the one that samples and
scores (given what it would have sampled, and the scores) gives advantages,
masks and importance weights, and the loss reads them.
"""

import collections
import contextlib
import json
import sys
import types

import numpy as np
import torch
import trl_losses
from accelerate import PartialState
from trl import GRPOTrainer, RLOOTrainer

PADDING, STOP = 7, 6
PROMPT = 2


class Accelerator(trl_losses.Accelerator):
  """One process; nothing is averaged."""

  num_processes = 1
  process_index = 0
  is_main_process = True

  def autocast(self):
    return contextlib.nullcontext()

  def reduce(self, x, reduction):
    return x

  def unwrap_model(self, model):
    return model


def logs():
  return collections.defaultdict(
    list,
    rewards=collections.defaultdict(list),
    extra=collections.defaultdict(list),
  )


def attributes(options, rows, given):
  """What both trainers read; `options` are those of their configurations."""
  epsilon = options.get('epsilon', 0.2)
  cut_off = options.get('mask_truncated_completions', False)
  mode = options.get('vllm_importance_sampling_mode')
  rewards = torch.tensor(given['rewards'])[:, None]
  args = types.SimpleNamespace(
    per_device_train_batch_size=rows, steps_per_generation=1,
    gradient_accumulation_steps=3, gradient_checkpointing_kwargs=None,
    report_to=[], delta=options.get('delta'),
    use_bias_correction_kl=options.get('use_bias_correction_kl', False),
  )  # fmt: skip
  return {
    'accelerator': Accelerator(), 'args': args,
    'environment_factories': None, 'environments': None, 'tools': None,
    '_is_vlm': False, 'pad_to_multiple_of': None, 'num_iterations': 2,
    '_tokenizer': types.SimpleNamespace(pad_token_id=PADDING),
    'eos_token_ids': [STOP], 'mask_truncated_completions': cut_off,
    'use_vllm': mode is not None,
    'vllm_importance_sampling_correction': mode is not None,
    'vllm_importance_sampling_mode': mode,
    'vllm_importance_sampling_clip_min': None,
    'vllm_importance_sampling_clip_max': 1.3,
    'beta': options.get('beta', 0.0), 'num_generations': 3,
    'multi_objective_aggregation': 'sum_then_normalize',
    'scale_rewards': options.get('scale_rewards', 'group'),
    'reward_weights': torch.ones(1), 'reward_func_names': ['given'],
    'reward_funcs': [None], 'reward_clip_range': None,
    'normalize_advantages': False, 'log_multimodal': False,
    '_calculate_rewards': lambda *_: rewards.clone(),
    '_logs': logs(), '_pending_extra_logs': {}, '_pending_metrics': {},
    'loss_type': options.get('loss_type'), 'top_entropy_quantile': 1.0,
    'importance_sampling_level': options.get(
      'importance_sampling_level', 'token'
    ),
    'off_policy_mask_threshold': None, '_entropy_bonus_enabled': False,
    'epsilon_low': epsilon,
    'epsilon_high': options.get('epsilon_high', epsilon),
    'max_completion_length': 7, 'current_gradient_accumulation_steps': 1,
    'state': types.SimpleNamespace(global_step=0),
  }  # fmt: skip


class Network(trl_losses.Network):
  """As a transformers model says it."""

  is_gradient_checkpointing = False


def network(given, name):
  ids, logits = torch.tensor(given['tokens']).long(), given[name]
  if not isinstance(logits, torch.Tensor):
    logits = torch.tensor(logits)
  return Network((ids, trl_losses.shown(logits)))


def loss(trainer, options, given):
  rows, ids = len(given['tokens']), given['tokens'].tolist()
  ends = (PROMPT + given['lengths']).tolist()
  prompts = [row[:PROMPT] for row in ids]
  answers = [row[PROMPT:end] for row, end in zip(ids, ends, strict=True)]
  sampled = [
    row[PROMPT - 1 : end - 1]
    for row, end in zip(given['sampler_logps'].tolist(), ends, strict=True)
  ]
  made = trl_losses.trainer(
    {'grpo': GRPOTrainer, 'rloo': RLOOTrainer}[trainer],
    model=network(given, 'old'), ref_model=network(given, 'reference'),
    **attributes(options, rows, given),
  )  # fmt: skip
  texts = [''] * rows
  if trainer == 'grpo':
    sampled = sampled if made.use_vllm else None
    made._generate = lambda _: (
      prompts, answers, None, texts, sampled, {}, None, None,
    )  # fmt: skip
  else:
    made._generate = lambda _: (prompts, answers, texts)
  inputs = made._generate_and_score_completions([{'prompt': ''}] * rows)
  return made._compute_loss(network(given, 'logits'), inputs)


def main(source: str, target: str) -> None:
  PartialState(cpu=True)
  arrays, found = np.load(source), {}
  for case, (trainer, options) in json.loads(str(arrays['cases'])).items():
    start = case + '/'
    given = {
      name.removeprefix(start): arrays[name]
      for name in arrays.files
      if name.startswith(start)
    }
    logits = torch.tensor(given['logits'], requires_grad=True)
    value = loss(trainer, options, given | {'logits': logits})
    value.backward()
    found[start + 'loss'] = value.detach().numpy()
    found[start + 'gradient'] = logits.grad.numpy()
  np.savez(target, **found)


if __name__ == '__main__':
  main(*sys.argv[1:])
