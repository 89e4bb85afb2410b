"""The world of `tpu_lm quickstart`: a language with a known entropy.

tpu_lm train --config=configs/quickstart.py --workdir=runs/world
"""

from tpu_lm import config as configs


def get_config():
  config = configs.base()
  config.steps = 1500
  config.batch_size = 8
  config.eval_every = 500
  config.log_every = 100
  config.checkpoint.every = 500
  config.data.source = 'tfds:world/text@train'
  config.data.heldout_source = 'tfds:world/text@heldout'
  config.data.length = 256
  config.data.vocab_size = 1024
  config.model_name = 'qwen3'
  config.model.num_layers = 4
  config.model.dim = 128
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.hidden_dim = 384
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 0.02
  config.optimizer.rest_learning_rate = 0.005
  config.optimizer.schedule = 'linear'
  config.optimizer.final = 0.0
  config.optimizer.weight_decay = 0.0
  return config
