"""Pretrains a model of the shape of Llama 3.2 1B.

  tpu_lm plan --config=configs/llama3_1b.py --topology=v5e-16
  tpu_lm train --config=configs/llama3_1b.py --workdir=DIR \
    --config.data.source=PATH --coordinator=auto

1 M tokens a step, fully sharded. Not measured here, where there is no TPU;
docs/plans holds what the compiler and a roofline say.
`:tiny` is the same on a laptop, narrow and shallow.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  return configs.at_scale(
    'llama',
    variant,
    vocab_size=128_256,
    batch_size=128,
    num_layers=16,
    dim=2048,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    hidden_dim=8192,
    tied=True,
    rope_theta=500_000.0,
    remat='full',
  )
