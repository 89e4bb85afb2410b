"""A reward model: Bradley-Terry on pairs, a scalar head on the last token.

  tpu_lm train --config=configs/reward.py:tiny --config.init_from=runs/sft \
    --config.data.source=PATH --workdir=runs/reward

Records are pairs: {"prompt", "chosen", "rejected"}, each text or messages, or
{"instruction", "input", "chosen", "rejected"}. A "margin" is used where it
is given. With `--config.data.rows=scored` the records are {"prompt",
"completion", "score"}.

Measured on 2 CPU cores, on 1,094 pairs (LLMs-from-scratch, a tenth held out),
from SFT of a 0.9 M parameter base on books: held-out loss
0.69 to 0.38, 89 % of the 118 held-out pairs ordered rightly (chance is 50 ± 5),
a minute. The quickstart's own form of it (200 steps of 8 x 256)
orders 94.5 % of held-out pairs rightly, 47 s.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  config = configs.beside(__file__, 'dpo', variant)
  config.stage_name = 'reward'
  config.model.scalar_head = True
  config.optimizer.learning_rate = 3e-4 if variant == 'tiny' else 1e-5
  return config
