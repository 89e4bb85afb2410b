"""What TRL's own loss functions make of the cases of losses_cases.py.

  PEER_PYTHON tests/parity/trl_losses.py INPUTS.npz OUTPUTS.npz

`PEER_PYTHON` is a python with torch and TRL (1.16 was used) and without this
package. Trainers are made without their constructors: a loss needs a few
attributes, no data set and no network. Where TRL's trainer computes something
else than we do, which functions of it are put together is said at the case.
"""

import collections
import json
import sys
import types

import numpy as np
import torch
from torch import nn
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

IGNORED = -100
FIELDS = ('log_probs', 'entropy', 'mean_logits', 'is_top1')


class Accelerator:
  """One process on one device."""

  device = torch.device('cpu')
  parallelism_config = None

  def gather(self, x):
    return x

  gather_for_metrics = gather


class TextConfig:
  model_type = 'given'

  def get_text_config(self):
    return self


class Backbone(nn.Module):
  """Gives the logits that belong to the rows it is asked for."""

  def __init__(self, *tables):
    super().__init__()
    self.tables = tables  # (input_ids, logits)

  def forward(self, input_ids=None, **kwargs):
    for known, logits in self.tables:
      if known.shape == input_ids.shape and bool((known == input_ids).all()):
        return types.SimpleNamespace(last_hidden_state=logits)
    raise ValueError('rows that no logits were given for')


class Network(nn.Module):
  """Logits are hidden states under an identity head; TRL's own kernel reads."""

  def __init__(self, *tables):
    super().__init__()
    self.config = TextConfig()
    self.base_model = Backbone(*tables)
    vocab = tables[0][1].shape[-1]
    self.head = nn.Linear(vocab, vocab, bias=False)
    with torch.no_grad():
      self.head.weight.copy_(torch.eye(vocab))
    self.head.weight.requires_grad_(False)
    add_fused_lm_head(self, outputs=FIELDS)

  def get_output_embeddings(self):
    return self.head

  def forward(self, input_ids=None, **kwargs):
    logits = self.base_model(input_ids).last_hidden_state
    return types.SimpleNamespace(logits=logits)


def trainer(kind, **attributes):
  """An instance with the attributes that its loss reads."""
  made = object.__new__(kind)
  shared = {
    'accelerator': Accelerator(),
    'aux_loss_enabled': False,
    '_metrics': collections.defaultdict(lambda: collections.defaultdict(list)),
    '_total_train_tokens': 0,
    '_tp_size': 1,
    'is_encoder_decoder': False,
  }
  for name, value in (shared | attributes).items():
    setattr(made, name, value)
  return made


def shown(logits):
  """Logits of the slots read, and one slot more that no target follows."""
  return torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)


def columns(batch, prefix=''):
  """(input_ids, attention_mask, completion_mask) of one half."""
  names = 'tokens', 'segment_ids', 'loss_mask'
  ids, segments, mask = (torch.tensor(batch[prefix + n]) for n in names)
  return ids.long(), (segments > 0).long(), mask.long()


def both(batch):
  """The same of chosen and rejected, one after the other as TRL has them."""
  halves = columns(batch, 'chosen_'), columns(batch, 'rejected_')
  return [torch.cat(pair) for pair in zip(*halves, strict=True)]


def labels_of(ids, completion):
  return ids.masked_fill(completion == 0, IGNORED)


def parted(interleaved):
  """Ours are interleaved along the rows; TRL's halves follow each other."""
  return torch.cat([interleaved[0::2], interleaved[1::2]])


def sft(case, batch, hparams, logits):
  """In two microbatches, as TRL accumulates."""
  ids, attention, completion = columns(batch)
  labels = labels_of(ids, completion)
  made = trainer(
    SFTTrainer, compute_loss_func=None, label_smoother=None,
    args=types.SimpleNamespace(
      loss_type='nll', average_tokens_across_devices=False, max_length=None
    ),
  )  # fmt: skip
  total = (labels[:, 1:] != IGNORED).sum()
  losses = []
  for part in (slice(0, 1), slice(1, None)):
    network = Network((ids[part], shown(logits)[part]))
    inputs = {
      'input_ids': ids[part],
      'attention_mask': attention[part],
      'labels': labels[part],
    }
    made.model = network
    losses.append(made.compute_loss(network, inputs, num_items_in_batch=total))
  return sum(losses)


def reward(case, batch, hparams, values):
  ids, attention, _ = both(batch)
  last = attention.sum(dim=1) - 1
  read = parted(values)[torch.arange(len(ids)), last]

  def network(**kwargs):
    return types.SimpleNamespace(logits=read)

  network.training = True
  made = trainer(
    RewardTrainer, model=network,
    args=types.SimpleNamespace(
      center_rewards_coefficient=hparams.get('centring')
    ),
  )  # fmt: skip
  inputs = {'input_ids': ids, 'attention_mask': attention}
  margins = torch.tensor(batch['margins'])[:, 0]
  if margins.any():
    inputs['margin'] = margins
  return made.compute_loss(network, inputs)


def cpo(batch, logits, **attributes):
  """(trainer, its batch, network)."""
  data = {}
  for prefix in ('chosen_', 'rejected_'):
    ids, attention, completion = columns(batch, prefix)
    data[prefix + 'input_ids'] = ids
    data[prefix + 'attention_mask'] = attention
    data[prefix + 'labels'] = labels_of(ids, completion)
  ids = torch.cat([data['chosen_input_ids'], data['rejected_input_ids']])
  inner = Network((ids, shown(parted(logits))))

  def network(input_ids, **kwargs):
    return inner(input_ids)

  kind = attributes.pop('kind', CPOTrainer)
  defaults = {
    'alpha': 0.0, 'cpo_alpha': 0.0, 'label_smoothing': 0.0,
    'pad_token_id': 0, 'padding_value': 0,
  }  # fmt: skip
  return trainer(kind, **(defaults | attributes)), data, network


def summed_logps(made, data, logits, average):
  labels = torch.cat([data['chosen_labels'], data['rejected_labels']])
  logps = made.get_batch_logps(
    shown(parted(logits)), labels, average_log_prob=average
  )
  return logps.chunk(2)


def dpo(case, batch, hparams, logits):
  loss_type = hparams.get('loss_type', 'sigmoid')
  names = 'reference_chosen_logps', 'reference_rejected_logps'
  references = [torch.tensor(batch[name])[:, 0] for name in names]
  if case == 'dpo_sigmoid_smoothed':
    # DPOTrainer's sigmoid has no label smoothing. CPOTrainer's has, without a
    # reference: that of this case is 0.
    assert not any(r.any() for r in references)
    made, data, network = cpo(
      batch, logits, loss_type='sigmoid', beta=hparams['beta'],
      label_smoothing=hparams['label_smoothing'],
    )  # fmt: skip
    return made.get_batch_loss_metrics(network, data)[0]
  if case == 'dpo_ipo':
    # DPOTrainer takes means over tokens. CPOTrainer's function is given the
    # sums of log-ratios.
    made, data, _ = cpo(batch, logits, loss_type='ipo', beta=hparams['beta'])
    pair = summed_logps(made, data, logits, average=False)
    ratios = (x - r for x, r in zip(pair, references, strict=True))
    return made.cpo_loss(*ratios)[0].mean()
  if hparams.get('length_normalised'):
    loss_type = {'sigmoid': 'sigmoid_norm', 'ipo': 'ipo'}[loss_type]
  ids, attention, completion = both(batch)
  network = Network((ids, shown(parted(logits))))
  made = trainer(
    DPOTrainer, model=network, beta=hparams['beta'], ld_alpha=None,
    precompute_ref_logps=True, f_divergence_type='reverse_kl',
    loss_types=[loss_type], loss_weights=[1.0], use_weighting=False,
    label_smoothing=hparams.get('label_smoothing', 0.0),
  )  # fmt: skip
  inputs = {
    'input_ids': ids,
    'attention_mask': attention,
    'completion_mask': completion,
    'ref_chosen_logps': references[0],
    'ref_rejected_logps': references[1],
  }
  return made._compute_loss(network, inputs, return_outputs=False)


def simpo(case, batch, hparams, logits):
  made, data, network = cpo(
    batch, logits, loss_type='simpo', beta=hparams['beta'],
    simpo_gamma=hparams['gamma'],
  )  # fmt: skip
  return made.get_batch_loss_metrics(network, data)[0]


def orpo(case, batch, hparams, logits):
  made, data, network = cpo(
    batch, logits, kind=ORPOTrainer, beta=hparams['weight']
  )
  if case == 'orpo_even':  # answers are alike long, prompts a token
    return made.get_batch_loss_metrics(network, data)[0]
  # ORPOTrainer's first term trains prompts and weighs all tokens of a batch
  # alike; the paper's is the mean log-probability of an answer.
  chosen, rejected = summed_logps(made, data, logits, average=True)
  return (-chosen - made.odds_ratio_loss(chosen, rejected)[0]).mean()


def kto(case, batch, hparams, logits):
  ids, attention, completion = columns(batch)
  other = columns(batch, 'mismatched_')
  mismatched = torch.tensor(batch['mismatched'])
  network = Network((ids, shown(logits)), (other[0], shown(mismatched)))
  made = trainer(
    KTOTrainer, model=network, beta=hparams['beta'], loss_type='kto',
    calculate_KL=True, precompute_ref_logps=True,
    desirable_weight=hparams.get('desirable_weight', 1.0),
    undesirable_weight=hparams.get('undesirable_weight', 1.0),
  )  # fmt: skip
  inputs = {
    'input_ids': ids,
    'attention_mask': attention,
    'completion_mask': completion,
    'KL_input_ids': other[0],
    'KL_attention_mask': other[1],
    'KL_completion_mask': other[2],
    'label': torch.tensor(batch['scores'])[:, 0] > 0.5,
    'ref_logps': torch.tensor(batch['reference_logps'])[:, 0],
    'ref_KL_logps': torch.tensor(batch['reference_mismatched_logps'])[:, 0],
  }
  return made._compute_loss(network, inputs, return_outputs=False)


def distill(case, batch, hparams, logits):
  ids, _, completion = columns(batch)
  # For the ends GKDTrainer gives the KL divergences themselves.
  beta = {'forward_kl': 0.0, 'reverse_kl': 1.0}.get(
    hparams['divergence'], hparams.get('beta', 0.5)
  )
  temperature = hparams.get('temperature', 1.0)
  loss = GKDTrainer.generalized_jsd_loss(
    logits, torch.tensor(batch['teacher']), labels_of(ids, completion)[:, 1:],
    beta=beta, temperature=temperature,
  )  # fmt: skip
  return temperature**2 * loss  # which GKDTrainer leaves out


STAGES = {
  'sft': sft,
  'reward': reward,
  'dpo': dpo,
  'simpo': simpo,
  'orpo': orpo,
  'kto': kto,
  'distill': distill,
}


def main(source: str, target: str) -> None:
  arrays = np.load(source)
  found = {}
  for case, (stage, hparams) in json.loads(str(arrays['cases'])).items():
    start = case + '/'
    batch = {
      name.removeprefix(start): arrays[name]
      for name in arrays.files
      if name.startswith(start)
    }
    given = torch.tensor(batch['hidden'], requires_grad=True)
    loss = STAGES[stage](case, batch, hparams, given)
    loss.backward()
    found[start + 'loss'] = loss.detach().numpy()
    found[start + 'gradient'] = given.grad.numpy()
  np.savez(target, **found)


if __name__ == '__main__':
  main(*sys.argv[1:])
