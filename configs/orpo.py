"""ORPO: fine-tuning and preferences in one stage, from a base model.

  tpu_lm train --config=configs/orpo.py:tiny --config.init_from=runs/sft \
    --config.data.source=PATH --workdir=runs/orpo

Records are pairs: {"prompt", "chosen", "rejected"}, each text or messages, or
{"instruction", "input", "chosen", "rejected"}.

`:tiny` is for a laptop CPU. Steps and sizes are those of dpo.py; not measured
yet.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  config = configs.beside(__file__, 'dpo', variant)
  config.stage_name = 'orpo'
  config.optimizer.learning_rate = 3e-4 if variant == 'tiny' else 5e-6
  return config
