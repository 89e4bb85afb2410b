"""KTO: from answers that are good or bad, each on its own.

  tpu_lm train --config=configs/kto.py:tiny --config.init_from=runs/sft \
    --config.data.source=PATH --workdir=runs/kto

Records are {"prompt", "completion", "label": true or false}.

`:tiny` is for a laptop CPU. Steps and sizes are those of dpo.py; not measured
yet.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  config = configs.beside(__file__, 'dpo', variant)
  config.stage_name = 'kto'
  return config
