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
  return configs.at_scale(
    'qwen3',
    variant,
    vocab_size=151_936,
    num_layers=64,
    dim=5120,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    hidden_dim=25_600,
    tied=False,
    rope_theta=1_000_000.0,
    remat='full',
  )
