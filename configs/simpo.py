"""SimPO: preferences without a reference, by average log-probability.

  tpu_lm train --config=configs/simpo.py:tiny --config.init_from=runs/sft \
    --config.data.source=PATH --workdir=runs/simpo

Records are pairs: {"prompt", "chosen", "rejected"}, each text or messages, or
{"instruction", "input", "chosen", "rejected"}.

`:tiny` is for a laptop CPU. Steps and sizes are those of dpo.py; not measured
yet.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  config = configs.beside(__file__, 'dpo', variant)
  config.stage_name = 'simpo'
  return config
