"""RLHF: PPO against a reward model, or any reward.

  tpu_lm train --config=configs/ppo.py:tiny --config.init_from=runs/sft \
    --config.data.source=PATH --workdir=runs/ppo \
    "--config.stage.reward=model(workdir='runs/reward')"

Records are prompts: conversations, pairs or questions; answers in them are left
out. The reference is what it starts from; `stage.beta` is the weight of the KL
in the reward. Other keys are those of grpo.py.

Measured on 2 CPU cores: the quickstart's own form of it (16 steps of 16 prompts
x 2 answers) lifts the true reward from 0.73, 0.72 and 0.76 to 1.22, 1.12 and
1.21 (three seeds) at a KL of 2.5 to 3.1 nats an answer, in 12 s. With 50 steps
it cheats the reward model, and the true reward falls below 0.
"""

from tpu_lm import config as configs


def get_config(variant: str = ''):
  configs.check_variant(variant, ('tiny',))
  config = configs.beside(__file__, 'grpo', variant)
  config.stage_name = 'ppo'
  config.model.scalar_head = True
  config.stage.reward = ''
  config.stage.group = 1
  if variant == 'tiny':
    config.batch_size = 32
  return config
