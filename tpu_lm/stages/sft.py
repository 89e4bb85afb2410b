"""Supervised fine-tuning: the mean of -log p over the assistant's tokens.

Columns: tokens, loss_mask, segment_ids, positions, all [B, L+1]; `loss_mask`
is True at the tokens that the assistant is to say, its stop token included
(data/chat.py). The loss is that of stages/pretrain.py: a mean over all
targets of the batch, however they lie in rows, microbatches and devices, as
TRL's SFTTrainer has it since it divides by `num_items_in_batch`.
"""

from tpu_lm.stage import Stage
from tpu_lm.stages import pretrain

ROWS = ('chat', 'text')


def make(model, start, *, z_loss: float = 0.0) -> Stage:
  return pretrain.make(model, start, z_loss=z_loss)
