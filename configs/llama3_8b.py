"""Pretrains a model of the shape of Llama 3 8B (arXiv 2407.21783, table 3).

  tpu_lm plan --config=configs/llama3_8b.py --topology=v5e-256
  tpu_lm train --config=configs/llama3_8b.py --workdir=DIR \
    --config.data.source=PATH --coordinator=auto

2 M tokens a step in rows of 8,192, fully sharded. Not measured here, where
there is no TPU; docs/plans holds what the compiler and a roofline say.
`:tiny` is the same on a laptop, narrow and shallow.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  return configs.at_scale(
    'llama',
    variant,
    vocab_size=128_256,
    num_layers=32,
    dim=4096,
    num_heads=32,
    num_kv_heads=8,
    hidden_dim=14_336,
    rope_theta=500_000.0,
    remat='attention',
  )
