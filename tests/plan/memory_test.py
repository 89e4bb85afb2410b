import jax
import made_plans
import pytest

from tpu_lm.models.transformer import Config
from tpu_lm.plan import memory, programs

# Of the two layers of made_plans.config: matrices, norms, both tables.
MATRICES = 2 * (32 * 4 * 8 * 2 + 32 * 2 * 8 * 2 + 3 * 32 * 48)
NORMS = 2 * 2 * 32 + 32
TABLES = 2 * 64 * 32


def bars(microbatches=1, batch_size=8, **sizes):
  config = made_plans.config(**sizes)
  config.microbatches = microbatches
  config.batch_size = batch_size
  count = 1
  for size in sizes.values():
    count *= size
  parts = programs.assemble(config, made_plans.devices(count))
  return memory.bars(parts, microbatches)


def test_on_one_device_all_is_there():
  found = bars()
  numbers = MATRICES + NORMS + TABLES
  assert found.parameters == 4 * numbers
  assert found.optimizer == 2 * 4 * numbers + 2 * 4  # two counts
  assert found.batch == 8 * 17 * (3 * 4 + 1)
  assert found.copies == 2 * (MATRICES + 2 * 2 * 32)  # of layers, in bfloat16
  assert found.gradients == 0  # they are the layers'
  # The input of each layer, in bfloat16, a token of 8 x 16.
  assert found.activations == 2 * 8 * 16 * 32 * 2


def test_shared_out_over_fsdp_and_tensor_each_holds_its_part():
  found = bars(fsdp=4, tensor=2)
  numbers = (MATRICES + TABLES) / 8 + NORMS
  assert found.parameters == 4 * numbers
  assert found.optimizer == 2 * 4 * numbers + 2 * 4
  assert found.batch == 2 * 17 * (3 * 4 + 1)  # rows by fsdp only
  assert found.copies == 2 * (MATRICES / 8 + 2 * 2 * 32)
  assert found.activations == 2 * 2 * 16 * 32 * 2


def test_gradients_that_are_summed_are_there_twice():
  numbers = MATRICES + NORMS + TABLES
  assert bars(data=2).gradients == 4 * numbers
  shared_out = (MATRICES + TABLES) / 2 + NORMS
  assert bars(data=2, fsdp=2).gradients == 2 * shared_out  # in bfloat16
  assert bars(microbatches=2).gradients == 4 * numbers
  assert bars(fsdp=2).gradients == 0


def test_a_layer_at_work_has_its_weights_whole():
  found = bars(fsdp=8)
  tokens = 16
  weights = (MATRICES + 2 * 2 * 32) // 2 * 2  # of one layer, in bfloat16
  # Hidden units, the residual stream, heads of queries and of keys.
  working = tokens * 2 * (6 * 48 + 4 * 32 + 4 * (4 + 2) * 8)
  assert found.layer == found.parameters + weights + working


def test_the_loss_has_the_head_whole_and_logits():
  rest = 4 * 16 * 64 + 3 * 16 * 32 * 2  # logits of all positions, hidden states
  head = 64 * 32 * (2 + 4)  # gathered, and its gradient in float32
  assert bars(fsdp=4, batch_size=4).loss == head + rest
  # Shards of four columns are no whole tiles: there is a copy.
  assert bars(fsdp=8).loss == head + 64 * 32 * 2 + rest


def test_chunks_of_the_loss_hold_fewer_logits():
  config = made_plans.config(fsdp=8)
  whole = memory.bars(programs.assemble(config, made_plans.devices()), 1)
  config.model.loss_chunk = 4
  less = memory.bars(programs.assemble(config, made_plans.devices()), 1)
  assert whole.loss - less.loss == 4 * (16 - 4) * 64


def test_microbatches_keep_less_and_sum_gradients():
  whole, parts = bars(), bars(microbatches=4)
  assert parts.activations == whole.activations / 4
  assert parts.gradients == parts.parameters == whole.parameters


def test_a_layer_and_the_loss_take_turns():
  made = memory.Bars(1, 2, 4, 8, 16, 32, layer=64, loss=128)
  assert made.fixed == 7
  assert made.total == 7 + 8 + 16 + 32 + 128
  assert made._replace(layer=256).total == 7 + 8 + 16 + 32 + 256
  assert made._fields == memory.NAMES


class _Mesh:
  def __init__(self, tensor):
    self.shape = {'tensor': tensor}


@pytest.mark.parametrize(
  ('policy', 'expected'),
  [
    ('full', 32),
    ('offload', 0),
    ('attention', 32 + 32 + 8),
    ('qkv', 32 + 2 * 32 + 2 * 16 + 8),
    ('dots', 3 * 32 + 2 * 32 + 2 * 16 + 8 + 2 * 48),
    ('none', 6 * 32 + 3 * 32 + 2 * 2 * 16 + 8 + 5 * 48),
  ],
)
def test_what_is_kept_goes_by_the_policy(policy, expected):
  config = Config(
    vocab_size=64,
    num_layers=2,
    dim=32,
    num_heads=4,
    num_kv_heads=2,
    hidden_dim=48,
    remat=policy,
  )
  assert memory.kept(config, _Mesh(1)) == expected


def test_experts_count_as_many_as_a_token_uses():
  config = Config(
    vocab_size=64,
    num_layers=2,
    dim=32,
    num_heads=4,
    num_kv_heads=2,
    hidden_dim=48,
    num_experts=8,
    experts_per_token=2,
    expert_hidden_dim=24,
    remat='dots',
  )
  dense = 3 * 32 + 2 * 32 + 2 * 16 + 8
  assert memory.kept(config, _Mesh(1)) == dense + 2 * 2 * 24
  # Heads and hidden units are shared out, the stream is not.
  half = 3 * 32 + (2 * 32 + 2 * 16 + 8) / 2
  assert memory.kept(config, _Mesh(2)) == half + 2 * 2 * 24 / 2


def test_bytes_of_an_array_are_those_of_one_device():
  mesh = programs.assemble(made_plans.config(fsdp=8), made_plans.devices()).mesh
  place = jax.NamedSharding(mesh, jax.P('fsdp'))
  x = jax.ShapeDtypeStruct((16, 3), 'float32', sharding=place)
  assert memory.num_bytes({'x': x}) == 2 * 3 * 4
  assert memory.num_bytes({'x': x}, 2) == 2 * 3 * 2
