"""Pretrains a model of the shape of Llama 3 8B (arXiv 2407.21783, table 3).

  tpu_lm plan --config=configs/llama3_8b.py --topology=v5e-256
  tpu_lm train --config=configs/llama3_8b.py --workdir=gs://BUCKET/llama3_8b \
    --config.data.source=PATH --coordinator=auto

2 M tokens a step in rows of 8,192, fully sharded. Not measured here, where
there is no TPU; docs/plans holds what the compiler and a roofline say.
`:tiny` is the same on a laptop, narrow and shallow.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  configs.check_variant(variant, ('tiny',))
  config = configs.base()
  config.model_name = 'llama'
  config.mesh.data = 1
  config.mesh.fsdp = -1
  if variant == 'tiny':
    return configs.tiny(config)
  config.steps = 100_000
  config.batch_size = 256
  config.data.length = 8192
  config.data.vocab_size = 128_256
  config.model.num_layers = 32
  config.model.dim = 4096
  config.model.num_heads = 32
  config.model.num_kv_heads = 8
  config.model.hidden_dim = 14_336
  config.model.rope_theta = 500_000.0
  config.model.dtype = 'bfloat16'
  config.model.remat = 'attention'
  config.optimizer.learning_rate = 3e-4
  config.optimizer.warmup = 2000
  return config
