import jax
import made_plans
import pytest

from tpu_lm import sharding
from tpu_lm.errors import UserError
from tpu_lm.plan import columns, programs


def staged(name: str, **options):
  """A configuration of a stage on eight devices."""
  made = made_plans.config(fsdp=8)
  made.stage_name = name
  made.model.dtype = 'float32'  # XLA:CPU cannot scatter sums in 16 bits
  if name in ('grpo', 'ppo'):
    options = {'reward': 'exact', 'max_new_tokens': 8} | options
  if name in ('ppo', 'reward'):
    made.model.scalar_head = True
  made.stage.update(options)
  return made


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('pretrain', {}),
    ('sft', {}),
    ('reward', {}),
    ('dpo', {}),
    ('kto', {}),
    ('grpo', {'group': 4}),
    ('grpo', {'group': 4, 'beta': 0.1, 'updates': 2}),
    ('ppo', {'minibatches': 1}),
  ],
)
def test_the_update_of_a_stage_reads_what_is_planned(name, options):
  parts = programs.assemble(staged(name, **options), made_plans.devices())
  key = jax.eval_shape(lambda: jax.random.key(0))
  with jax.set_mesh(parts.mesh):
    state, _ = jax.eval_shape(
      parts.update, parts.state, parts.frozen, parts.batch, key
    )
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), parts.state)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes


@pytest.mark.parametrize(
  ('name', 'options', 'tokens'),
  [
    ('pretrain', {}, 8 * 16),
    ('dpo', {}, 2 * 8 * 16),  # both halves of a pair
    ('kto', {}, 8 * 16),  # the mismatched ones are scored, not trained on
    ('grpo', {'group': 4}, 8 * 4 * 32),  # 16 + 8, rounded up
  ],
)
def test_tokens_are_those_that_the_network_reads(name, options, tokens):
  made = staged(name, **options)
  mesh = programs.assemble(made, made_plans.devices()).mesh
  found = columns.batch(made, mesh)
  assert columns.num_tokens(found) == tokens
  for column in found.values():
    assert column.sharding.shard_shape(column.shape)[0] * 8 == column.shape[0]


def test_a_teachers_columns_are_those_that_are_kept():
  config = staged('distill', top_k=4)
  found = columns.batch(config, sharding.make_mesh(config.mesh))
  shape = config.batch_size, config.data.length
  assert found['teacher_ids'].shape == (*shape, 4)
  assert found['teacher_logps'].shape == (*shape, 5)


@pytest.mark.parametrize(
  ('rows', 'message'),
  [('', r'stage\.top_k=0'), ('prompts', r'stage_name=distill')],
)
def test_a_plan_opens_no_teacher(rows, message):
  config = staged('distill')
  config.data.rows = rows
  with pytest.raises(UserError, match=message):
    columns.batch(config, sharding.make_mesh(config.mesh))
