"""The stages of `tpu_lm quickstart`, on a language with a known entropy.

  tpu_lm train --config=configs/quickstart.py --workdir=runs/world
  tpu_lm train --config=configs/quickstart.py:sft --workdir=runs/sft \
    --config.init_from=runs/world

Without a variant it pretrains; `sft`, `lora` and `qlora` start from that,
`reward`, `dpo`, `ppo`, `grpo` and `gamed` from `sft`. `student` pretrains a
model of half the size, and `distill` the same one with a teacher
(`--config.stage.teacher=DIR`).
"""

from tpu_lm import config as configs

VARIANTS = (
  'sft', 'lora', 'qlora', 'reward', 'dpo', 'ppo', 'grpo', 'gamed', 'student',
  'distill',
)  # fmt: skip


def _pretrain(config):
  config.steps = 1500
  config.batch_size = 8
  config.eval_every = 500
  config.log_every = 100
  config.checkpoint.every = 500
  config.data.source = 'tfds:world/text@train'
  config.data.heldout_source = 'tfds:world/text@heldout'
  config.data.length = 256
  config.data.vocab_size = 1024
  config.model_name = 'qwen3'
  config.model.num_layers = 4
  config.model.dim = 128
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.hidden_dim = 384
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 0.02
  config.optimizer.rest_learning_rate = 0.005
  config.optimizer.schedule = 'linear'
  config.optimizer.final = 0.0
  config.optimizer.weight_decay = 0.0


def _student(config):
  config.steps = 300
  config.eval_every = 0
  config.model.num_layers = 3
  config.model.dim = 96
  config.model.hidden_dim = 288


def _fine_tune(config, kind: str):
  config.batch_size = 8
  config.eval_every = 0
  config.log_every = 20
  config.checkpoint.every = 1000
  config.data.source = f'tfds:world/{kind}@train'
  config.data.heldout_source = f'tfds:world/{kind}@heldout'
  config.data.length = 256
  config.optimizer.warmup = 10
  config.optimizer.schedule = 'linear'
  config.optimizer.final = 0.0
  config.optimizer.weight_decay = 0.0


def _learn_from_rewards(config, kind: str):
  _fine_tune(config, kind)
  config.stage_name = 'grpo'
  config.evals = ('rewards',)
  config.batch_size = 16
  config.log_every = 10
  config.data.length = 96


def get_config(variant: str = ''):
  configs.check_variant(variant, VARIANTS)
  config = configs.base()
  if variant in ('', 'student', 'distill'):
    _pretrain(config)
  if variant in ('student', 'distill'):
    _student(config)
  if variant == 'distill':
    config.stage_name = 'distill'
    config.stage.on_the_fly = True
  if variant in ('sft', 'lora', 'qlora'):
    _fine_tune(config, 'chat')
    config.stage_name = 'sft'
    config.steps = 400
    config.optimizer.learning_rate = 7e-4
    config.optimizer.b2 = 0.99
  if variant in ('lora', 'qlora'):
    config.transforms = 'lora(rank=2, alpha=4)'
    config.steps = 300
    config.optimizer.learning_rate = 2e-2
  if variant == 'qlora':
    config.transforms = 'nf4, ' + config.transforms
  if variant in ('reward', 'dpo'):
    _fine_tune(config, 'preference')
    config.stage_name = variant
    config.evals = ('heldout',)
  if variant == 'reward':
    config.model.scalar_head = True
    config.steps = 200
    config.optimizer.learning_rate = 1e-3
  if variant in ('ppo', 'gamed'):
    _learn_from_rewards(config, 'preference')
    config.stage.true_reward = "world(kind='reward')"
    config.stage.max_new_tokens = 40
    config.eval_rows = 64
  if variant == 'ppo':
    config.stage_name = 'ppo'
    config.model.scalar_head = True
    config.stage.group = 2
    config.stage.beta = 0.1
    config.steps = 16  # with 50 the true reward falls below its start
    config.log_every = 2
    config.optimizer.learning_rate = 1e-4
  if variant == 'gamed':
    config.stage.reward = "regex(pattern='Gladly|Of course|pleasure', limit=4)"
    config.steps = 40
    config.optimizer.learning_rate = 5e-4
  if variant == 'grpo':
    _learn_from_rewards(config, 'sums')
    config.stage.reward = 'world'
    config.stage.max_new_tokens = 16
    config.stage.beta = 0.03
    config.batch_size = 32
    config.stage.group = 8
    config.steps = 100
    config.optimizer.learning_rate = 5e-4
  if variant == 'dpo':
    config.steps = 120
    config.stage.beta = 0.3
    config.optimizer.learning_rate = 2e-4
  return config
