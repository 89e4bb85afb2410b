"""KTO: from answers that are good or bad, each on its own.

  tpu_lm train --config=configs/kto.py:tiny --config.init_from=runs/sft \
    --config.data.source=PATH --workdir=runs/kto

Records are {"prompt", "completion", "label": true or false}.

Measured on 2 CPU cores, on the answers of 1,094 pairs (LLMs-from-scratch, a
tenth held out), from SFT of a 0.9 M parameter base on books: held-out loss 0.50
to 0.41 in the 100 steps of `:tiny`, 40 s.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  config = configs.beside(__file__, 'dpo', variant)
  config.stage_name = 'kto'
  return config
