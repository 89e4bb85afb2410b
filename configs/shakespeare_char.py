"""Tiny Shakespeare, byte by byte: the well-known laptop run.

  tpu_lm train --config=configs/shakespeare_char.py --workdir=runs/shakespeare \
    --config.data.source=PATH/tinyshakespeare.txt.gz

4 layers, width 128, 4 heads, context 64, batch 12, 2,000 steps, 0.8 M
parameters; Muon on the hidden matrices, AdamW on the rest. The last tenth of
the file is held out, and scored whole.

Measured on 2 CPU cores, 1 to 2 minutes: 1.558 nats a byte (2.248 bits) on the
held-out tenth; the published figure of a run of this size is 1.88.
"""

from tpu_lm import config as configs


def get_config():
  config = configs.base()
  config.steps = 2000
  config.batch_size = 12
  config.eval_every = 500
  config.log_every = 50
  config.checkpoint.every = 500
  config.data.tokenizer = 'byte'
  config.data.length = 64
  config.data.heldout_by = 'tail'
  config.data.heldout_share = 0.1
  config.model_name = 'qwen3'
  config.model.num_layers = 4
  config.model.dim = 128
  config.model.num_heads = 4
  config.model.hidden_dim = 344
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 0.02
  config.optimizer.rest_learning_rate = 0.003
  config.optimizer.warmup = 100
  config.optimizer.final = 0.0
  config.optimizer.schedule = 'linear'
  config.optimizer.weight_decay = 0.0
  return config
