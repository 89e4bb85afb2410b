"""ORPO: fine-tuning and preferences in one stage, from a base model.

  tpu_lm train --config=configs/orpo.py:tiny --config.init_from=runs/sft \
    --config.data.source=PATH --workdir=runs/orpo

Records are pairs: {"prompt", "chosen", "rejected"}, each text or messages, or
{"instruction", "input", "chosen", "rejected"}.

Measured on 2 CPU cores, on 1,094 pairs (LLMs-from-scratch, a tenth held out),
from SFT of a 0.9 M parameter base on books: held-out loss
3.26 to 3.05 and 60 to 65 % of the pairs in the 100 steps of `:tiny`; a minute.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  config = configs.beside(__file__, 'dpo', variant)
  config.stage_name = 'orpo'
  config.optimizer.learning_rate = 3e-4 if variant == 'tiny' else 5e-6
  return config
