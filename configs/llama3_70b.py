"""Pretrains a model of the shape of Llama 3 70B (arXiv 2407.21783, table 3).

  tpu_lm plan --config=configs/llama3_70b.py --topology=v5p-128
  tpu_lm train --config=configs/llama3_70b.py --workdir=DIR \
    --config.data.source=PATH --coordinator=auto

2 M tokens a step, fully sharded. Not measured here, where there is no TPU;
docs/plans holds what the compiler and a roofline say.
`:tiny` is the same on a laptop, narrow and shallow.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  return configs.at_scale(
    'llama',
    variant,
    vocab_size=128_256,
    learning_rate=1.5e-4,
    num_layers=80,
    dim=8192,
    num_heads=64,
    num_kv_heads=8,
    hidden_dim=28_672,
    rope_theta=500_000.0,
    remat='full',
  )
