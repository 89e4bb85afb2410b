"""Learning from verifiable rewards: GRPO and its relatives.

  tpu_lm train --config=configs/grpo.py:tiny --config.init_from=runs/sft \
    --config.data.source=PATH --workdir=runs/grpo

Records ask something and hold what judges the answer: {"question", "answer"}
as GSM8K, {"prompt", "answer"}, {"prompt", "test"} as MBPP, or conversations.
`stage.reward` says how: `math`, `code`, `exact`, `model(workdir='DIR')`,
`path/to/file.py:function`, or a sum, `math + 0.1 * format(form='boxed')`.
`:dapo`, `:dr_grpo`, `:gspo`, `:cispo` and `:rloo` are the same by those papers.
Answers are in WORKDIR/rollouts, one file a step. Where prompts are longer than
most answers, `stage.together=8` computes a prompt once for 8 answers: an
iteration of 4 x 8 answers (prompt 256, answers of 1 to 256 tokens, 64 in the
mean) took 0.5 s instead of 1.3 s (LOG.md).

Measured on 2 CPU cores: the quickstart's own form of it (100 steps of 32
prompts x 8 answers) takes sums that SFT never showed from 12, 2 and 12 % exact
to 92, 50 and 52 % (three seeds), pass@8 from 38, 18 and 38 to 100, 74 and 84 %,
in about 1:20. `:tiny` on GSM8K: 30 steps in 84 s.
"""

from tpu_lm import config as configs

# What differs from the defaults of policy.py; see its head.
_METHODS = {
  'dapo': {'clip_high': 0.28, 'resample': 3},
  'dr_grpo': {'aggregation': 'constant', 'scale': 'none'},
  'gspo': {
    'level': 'sequence', 'aggregation': 'sequence', 'clip_low': 3e-4,
    'clip_high': 4e-4,
  },
  'cispo': {'kind': 'cispo', 'clip_low': 1.0, 'clip_high': 0.28},
  'rloo': {
    'kind': 'reinforce', 'leave_one_out': True, 'scale': 'none',
    'aggregation': 'constant', 'length': 1,
  },
}  # fmt: skip


def get_config(variant: str = ''):
  configs.check_variant(variant, ('tiny', *_METHODS))
  config = configs.base()
  config.stage_name = 'grpo'
  config.evals = ('rewards',)
  config.data.max_bad_share = 0.02
  config.stage.reward = 'math'
  config.optimizer.weight_decay = 0.0
  config.optimizer.schedule = 'constant'
  if variant == 'tiny':
    config.steps = 50
    config.batch_size = 8
    config.eval_every = 25
    config.eval_rows = 64
    config.data.length = 256
    config.stage.group = 8
    config.stage.max_new_tokens = 64
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup = 5
    return config
  config.stage.update(_METHODS.get(variant, {}))
  config.steps = 500
  config.batch_size = 128
  config.eval_every = 50
  config.eval_rows = 512
  config.data.length = 512
  config.data.heldout_share = 0.02
  config.stage.group = 8
  config.stage.slots = 512
  config.stage.max_new_tokens = 1024
  if variant == 'dr_grpo':
    config.stage.length = 1024
  config.model.dtype = 'bfloat16'
  config.model.remat = 'dots'
  config.optimizer.learning_rate = 1e-6
  config.mesh.data = 1
  config.mesh.fsdp = -1
  return config
