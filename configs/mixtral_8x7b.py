"""Pretrains a model of the shape of Mixtral 8x7B (arXiv 2401.04088, table 1).

  tpu_lm plan --config=configs/mixtral_8x7b.py --topology=v5e-256
  tpu_lm train --config=configs/mixtral_8x7b.py --workdir=DIR \
    --config.data.source=PATH --coordinator=auto

2 M tokens a step, fully sharded. Not measured here, where there is no TPU;
docs/plans holds what the compiler and a roofline say.
`:tiny` is the same on a laptop, narrow and shallow.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  return configs.at_scale(
    'mixtral',
    variant,
    vocab_size=32_000,
    num_layers=32,
    dim=4096,
    num_heads=32,
    num_kv_heads=8,
    hidden_dim=14_336,
    rope_theta=1_000_000.0,
    remat='full',
  )
