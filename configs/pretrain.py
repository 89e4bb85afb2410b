"""Pretrains a decoder on your own text.

  tpu_lm train --config=configs/pretrain.py:tiny --workdir=runs/mine \
    --config.data.source=PATH

`:tiny` is for a laptop: 0.9 M parameters, 500 steps of 16 x 256 tokens.
Measured on 2 CPU cores, 2 minutes: 1.868 bits per byte on the held-out
document of 22 Victorian books (14 MB of JSONL).

Without it: 101 M parameters in bfloat16 on rows of 1,024, for one host with 8
accelerators or more, fully sharded; not measured here, where there are none.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  configs.check_variant(variant, ('tiny',))
  config = configs.base()
  config.model_name = 'qwen3'
  config.optimizer.name = 'muon'
  config.optimizer.schedule = 'wsd'
  config.optimizer.final = 0.0
  if variant == 'tiny':
    config.steps = 500
    config.batch_size = 16
    config.data.length = 256
    config.data.vocab_size = 1024
    config.model.num_layers = 4
    config.model.dim = 128
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.hidden_dim = 384
    config.optimizer.learning_rate = 0.02
    config.optimizer.rest_learning_rate = 0.004
    return config
  config.steps = 20_000
  config.batch_size = 256
  config.eval_every = 1000
  config.eval_rows = 2048
  config.checkpoint.every = 500
  config.data.length = 1024
  config.data.vocab_size = 32_768
  config.data.heldout_share = 0.01
  config.model.num_layers = 12
  config.model.dim = 768
  config.model.num_heads = 12
  config.model.num_kv_heads = 4
  config.model.hidden_dim = 2048
  config.model.dtype = 'bfloat16'
  config.model.remat = 'dots'
  config.optimizer.learning_rate = 0.01
  config.optimizer.rest_learning_rate = 0.001
  config.optimizer.warmup = 500
  config.mesh.data = 1
  config.mesh.fsdp = -1
  return config
