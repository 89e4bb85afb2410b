"""Pretrains a model of the shape of Qwen3 32B (arXiv 2505.09388, table 1).

  tpu_lm plan --config=configs/qwen3_32b.py --topology=v5e-256
  tpu_lm train --config=configs/qwen3_32b.py --workdir=DIR \
    --config.data.source=PATH --coordinator=auto

2 M tokens a step, fully sharded. Not measured here, where there is no TPU;
docs/plans holds what the compiler and a roofline say.
`:tiny` is the same on a laptop, narrow and shallow.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  configs.check_variant(variant, ('tiny',))
  config = configs.base()
  config.model_name = 'qwen3'
  config.mesh.data = 1
  config.mesh.fsdp = -1
  if variant == 'tiny':
    return configs.tiny(config)
  config.steps = 100_000
  config.batch_size = 256
  config.data.length = 8192
  config.data.vocab_size = 151_936
  config.model.num_layers = 64
  config.model.dim = 5120
  config.model.num_heads = 64
  config.model.num_kv_heads = 8
  config.model.head_dim = 128
  config.model.hidden_dim = 25_600
  config.model.tied = False
  config.model.rope_theta = 1_000_000.0
  config.model.dtype = 'bfloat16'
  config.model.remat = 'full'
  config.optimizer.learning_rate = 3e-4
  config.optimizer.warmup = 2000
  return config
