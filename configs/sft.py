"""Supervised fine-tuning on conversations.

  tpu_lm train --config=configs/sft.py:tiny --config.init_from=runs/base \
    --config.data.source=PATH --workdir=runs/sft

Records are {"messages"}, {"prompt", "completion"}, {"instruction", "input",
"output"} or ShareGPT's {"conversations"}. The assistant's tokens are trained,
stop token included. `tpu_lm check --config=…` shows them.

Measured on 2 CPU cores, from a 0.9 M parameter base on books, `:tiny`: 1,100
conversations of LLMs-from-scratch, held-out loss 5.40 to 2.90 nats, a minute;
883 of Dolly at length 512, 4.59 to 4.13. The quickstart's own form of it
(configs/quickstart.py:sft, 400 steps of 8 x 256) takes 35 s.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  configs.check_variant(variant, ('tiny',))
  config = configs.base()
  config.stage_name = 'sft'
  config.optimizer.schedule = 'cosine'
  config.data.max_bad_share = 0.02
  if variant == 'tiny':
    config.steps = 200
    config.batch_size = 8
    config.eval_every = 50
    config.data.length = 256
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup = 20
    return config
  config.steps = 2000
  config.batch_size = 64
  config.data.length = 2048
  config.data.heldout_share = 0.02
  config.model.dtype = 'bfloat16'
  config.model.remat = 'dots'
  config.optimizer.learning_rate = 2e-5
  config.optimizer.weight_decay = 0.0
  config.mesh.data = 1
  config.mesh.fsdp = -1
  return config
