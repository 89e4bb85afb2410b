import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_lm import config as configs
from tpu_lm import models, optim, sharding, stage, train, weights
from tpu_lm.errors import UserError

FAMILIES = models.families()
MIXED = {'data': 2, 'fsdp': 2, 'tensor': 2}


def sizes(**given):
  return dict.fromkeys(sharding.AXES, 1) | given


def named_specs(tree):
  """{path: spec} of a tree of shardings."""
  return {
    sharding.path_name(path): place.spec
    for path, place in jax.tree_util.tree_leaves_with_path(tree)
  }


# The mesh.


def test_minus_one_takes_the_devices_that_are_left():
  mesh = sharding.make_mesh(sizes(data=-1, tensor=2))
  assert dict(mesh.shape) == sizes(data=4, tensor=2)
  mesh = sharding.make_mesh(sizes(data=1, fsdp=-1))
  assert dict(mesh.shape) == sizes(fsdp=8)


def test_a_mesh_may_leave_devices_unused():
  mesh = sharding.make_mesh(sizes(data=3))
  assert mesh.devices.size == 3


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'data': 16}, r'mesh: data=16 needs 16 devices.* there are 8 cpu'),
    ({'data': -1, 'fsdp': 3}, r'mesh: fsdp=3 needs 3 devices or a multiple'),
    ({'data': -1, 'tensor': 16}, r'mesh: tensor=16 needs 16'),
    ({'data': 4, 'fsdp': 4}, r'mesh: data=4 x fsdp=4 needs 16'),
    ({'data': -1, 'fsdp': -1}, r'mesh\.fsdp=-1: only one axis'),
    ({'data': 0}, r'mesh\.data=0'),
    ({'tensor': -2}, r'mesh\.tensor=-2'),
  ],
)
def test_a_mesh_that_cannot_be_is_refused(given, message):
  with pytest.raises(UserError, match=message):
    sharding.make_mesh(sizes(**given))


def test_a_batch_that_the_mesh_cannot_divide_is_refused():
  mesh = tiny.mesh(data=2, fsdp=2)
  sharding.check_batch(mesh, 8, 2, 16)
  with pytest.raises(UserError, match=r'batch_size=6.* a multiple of 4$'):
    sharding.check_batch(mesh, 6, 1, 16)
  with pytest.raises(UserError, match=r'batch_size=12.* a multiple of 8$'):
    sharding.check_batch(mesh, 12, 2, 16)
  with pytest.raises(UserError, match=r'microbatches=3: must divide'):
    sharding.check_batch(mesh, 8, 3, 16)
  with pytest.raises(UserError, match=r'data\.length=15: .*sequence=2'):
    sharding.check_batch(tiny.mesh(sequence=2), 8, 1, 15)


# Where arrays lie.

EXPECTED = {
  'embedding': P('tensor', 'fsdp'),
  'head': P('tensor', 'fsdp'),
  'final_norm': P(),
  'layers/attention/norm': P(),
  'layers/attention/post_norm': P(),
  'layers/attention/q_norm': P(),
  'layers/attention/k_norm': P(),
  'layers/attention/q': P(None, 'fsdp', 'tensor', None),
  'layers/attention/k': P(None, 'fsdp', 'tensor', None),
  'layers/attention/v': P(None, 'fsdp', 'tensor', None),
  'layers/attention/q_bias': P(None, 'tensor', None),
  'layers/attention/k_bias': P(None, 'tensor', None),
  'layers/attention/v_bias': P(None, 'tensor', None),
  'layers/attention/o': P(None, 'tensor', None, 'fsdp'),
  'layers/mlp/norm': P(),
  'layers/mlp/post_norm': P(),
  'layers/mlp/gate': P(None, 'fsdp', 'tensor'),
  'layers/mlp/up': P(None, 'fsdp', 'tensor'),
  'layers/mlp/down': P(None, 'tensor', 'fsdp'),
  'layers/moe/norm': P(),
  'layers/moe/router': P(None, 'fsdp', None),
  'layers/moe/gate': P(None, 'expert', 'fsdp', 'tensor'),
  'layers/moe/up': P(None, 'expert', 'fsdp', 'tensor'),
  'layers/moe/down': P(None, 'expert', 'tensor', 'fsdp'),
}


@functools.cache
def shapes_of(name, **options):
  model = tiny.model(name, **options)
  return jax.eval_shape(model.init_params, jax.random.key(0))


@pytest.mark.parametrize('name', FAMILIES)
def test_every_parameter_of_every_family_has_its_spec(name):
  found = named_specs(
    sharding.shardings_of(shapes_of(name), tiny.mesh(**MIXED))
  )
  assert found == {path: EXPECTED[path] for path in found}


# What a weight may be made of (weights.py).
PARTS = {
  'int8': {
    'embedding/values': P('tensor', 'fsdp'),
    'embedding/scales': P('tensor', None),
    'layers/attention/q/values': P(None, 'fsdp', 'tensor', None),
    'layers/attention/q/scales': P(None, None, 'tensor', None),
    'layers/attention/o/values': P(None, 'tensor', None, 'fsdp'),
    'layers/attention/o/scales': P(None, None, None, 'fsdp'),
    'layers/mlp/down/scales': P(None, None, 'fsdp'),
  },
  'nf4': {
    'head/values': P('tensor', 'fsdp'),
    'layers/mlp/up/codes': P(None, ('fsdp', 'tensor'), None),
    'layers/mlp/up/peaks': P(None, ('fsdp', 'tensor')),
    'layers/mlp/up/steps': P(),
    'layers/mlp/up/mean': P(),
  },
  'lora(dora=True)': {
    'layers/attention/q/base': P(None, 'fsdp', 'tensor', None),
    'layers/attention/q/a': P(None, 'fsdp', None),
    'layers/attention/q/b': P(None, None, 'tensor', None),
    'layers/attention/q/m': P(None, 'tensor', None),
    'layers/attention/o/a': P(None, 'tensor', None, None),
    'layers/attention/o/b': P(None, None, 'fsdp'),
    'layers/attention/o/m': P(None, 'fsdp'),
    'layers/mlp/up/a': P(None, 'fsdp', None),
    'layers/mlp/up/b': P(None, None, 'tensor'),
    'layers/mlp/down/base': P(None, 'tensor', 'fsdp'),
    'layers/mlp/down/a': P(None, 'tensor', None),
    'layers/mlp/down/b': P(None, None, 'fsdp'),
  },
  'nf4, lora': {
    'layers/attention/k/base/codes': P(None, ('fsdp', 'tensor'), None),
    'layers/attention/k/a': P(None, 'fsdp', None),
  },
  'int8, lora': {
    'layers/mlp/gate/base/values': P(None, 'fsdp', 'tensor'),
    'layers/mlp/gate/base/scales': P(None, None, 'tensor'),
  },
}


@pytest.mark.parametrize('spec', PARTS)
def test_every_part_of_a_weight_has_its_spec(spec):
  shapes = jax.eval_shape(
    lambda p: weights.transform(p, spec, jax.random.key(0)),
    shapes_of('llama', dim=64, hidden_dim=128),
  )
  mesh = tiny.mesh(**MIXED)
  found = named_specs(sharding.shardings_of(shapes, mesh))
  expected = PARTS[spec]
  assert {name: found[name] for name in expected} == expected
  # The optimizer's state of a factor lies as the factor.
  tx, _ = optim.make(configs.base().optimizer, 1000)
  if 'lora' in spec:
    state = jax.eval_shape(tx.init, weights.partition(shapes, '')[0])
    moments = named_specs(sharding.shardings_of(state, mesh))
    for name, place in moments.items():
      of = name.partition('mu/')[2] or name.partition('nu/')[2]
      assert not of or place == found[of], name


def test_blocks_are_divided_as_far_as_they_can_be():
  spec = functools.partial(sharding.spec_of, 'layers/mlp/up/codes')
  mesh = tiny.mesh(fsdp=2, tensor=4)
  whole = P(None, ('fsdp', 'tensor'), None)
  assert spec((2, 16, 32), mesh) == whole
  assert spec((2, 6, 32), mesh) == P(None, 'fsdp', None)
  assert spec((2, 5, 32), mesh) == P()


def test_a_dimension_that_its_axis_does_not_divide_stays_whole():
  mesh = tiny.mesh(fsdp=8)
  assert sharding.spec_of('embedding', (61, 32), mesh) == P('tensor', 'fsdp')
  assert sharding.spec_of('embedding', (61, 36), mesh) == P('tensor', None)
  mesh = tiny.mesh(tensor=8)
  assert sharding.spec_of('head', (61, 32), mesh) == P(None, 'fsdp')


def test_tensor_must_divide_heads_and_hidden_units():
  shapes = shapes_of('qwen3')  # two key-value heads
  with pytest.raises(UserError, match=r'mesh\.tensor=4: .* 2 .*attention/k'):
    sharding.shardings_of(shapes, tiny.mesh(tensor=4))


def test_experts_share_out_what_is_not_theirs_like_fsdp():
  shapes = shapes_of('mixtral', router_bias=True, shared_experts=1)
  mesh = tiny.mesh(fsdp=2, expert=4)
  found = named_specs(sharding.shardings_of(shapes, mesh))
  both = ('fsdp', 'expert')
  expected = {
    'embedding': P('tensor', both),
    'layers/attention/q': P(None, both, 'tensor', None),
    'layers/moe/router': P(None, both, None),
    'layers/moe/router_bias': P(),
    'layers/moe/down': P(None, 'expert', 'tensor', 'fsdp'),
    'layers/moe/shared_gate': P(None, both, 'tensor'),
    'layers/moe/shared_down': P(None, 'tensor', both),
  }
  assert {path: found[path] for path in expected} == expected
  with pytest.raises(UserError, match=r'mesh\.expert=3: .* 8 experts'):
    sharding.spec_of('layers/moe/up', (2, 8, 6, 4), tiny.mesh(expert=3))


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'lion', 'muon'])
def test_optimizer_state_lies_where_its_parameter_lies(name):
  options = configs.base().optimizer
  options.name, options.warmup = name, 0
  tx, _ = optim.make(options, 10)
  shapes = shapes_of('llama', dim=256, hidden_dim=128)
  state = jax.eval_shape(lambda p: train.init(p, tx, 4), shapes)
  mesh = tiny.mesh(**MIXED)
  params = {
    sharding.path_name(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
  }
  followers = 0
  places = named_specs(sharding.shardings_of(state, mesh))
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    path = sharding.path_name(path)
    owner = [
      p for p, shape in params.items()
      if path.endswith(f'/{p}') and leaf.shape == shape
    ]  # fmt: skip
    if owner:
      followers += 1
      assert places[path] == EXPECTED[max(owner, key=len)], path
    # What is not of its parameter's shape is small, and whole.
    elif not path.startswith('params'):
      assert places[path] == P()
      assert leaf.size <= 256 * 8, path
  assert followers >= len(params)


@functools.cache
def created(name, **mesh_sizes):
  """A state made the way `run.py` makes it: (state, mesh)."""
  options = configs.base().optimizer
  options.name, options.warmup = name, 0
  tx, _ = optim.make(options, 10)
  model, mesh = tiny.model('llama'), tiny.mesh(**mesh_sizes)

  def fresh(key):
    return train.init(model.init_params(key), tx, 4)

  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(fresh, jax.random.key(0))
    places = sharding.shardings_of(shapes, mesh)
    program = tiny.jit(fresh, out_shardings=places)
    return program(jax.random.key(0)), mesh


def test_nothing_is_created_whole_on_a_device():
  state, _ = created('adamw', fsdp=8)
  checked = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    path = sharding.path_name(path)
    shard = leaf.addressable_shards[0].data
    if leaf.size >= 1024:
      assert shard.size * 8 == leaf.size, path
      checked += 1
  assert checked == 3 * 9  # matrices, and Adam's two moments of each


def test_initial_values_do_not_depend_on_the_mesh():
  one, _ = created('adamw', data=1)
  for other in (created('adamw', fsdp=8)[0], created('adamw', **MIXED)[0]):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_put_batch_divides_rows_over_data_and_fsdp():
  batch = tiny.batch(8)
  put = sharding.put_batch(batch, tiny.mesh(**MIXED))
  for name, column in put.items():
    assert column.addressable_shards[0].data.shape == (2, 17)
    np.testing.assert_array_equal(column, batch[name])


def test_constraints_are_silent_without_a_mesh_and_real_under_one():
  def program():
    return str(jax.make_jaxpr(sharding.constrain_activations)(
      jnp.zeros((4, 8, 2))
    ))  # fmt: skip

  assert 'sharding_constraint' not in program()
  with jax.set_mesh(tiny.mesh(data=1)):
    assert 'sharding_constraint' not in program()
  with jax.set_mesh(tiny.mesh(data=2, sequence=2)):
    assert 'sharding_constraint' in program()


# Numbers do not depend on the mesh.


@functools.cache
def language_model(name='llama'):
  options = {'window': 5} if name == 'gemma2' else {}
  model = tiny.model(name, **options)
  params = tiny.params(model)
  return stage.make('pretrain', model, params, {}).loss, params


@functools.cache
def gradient(axes, name='llama'):
  """(mean loss, gradient) of a packed batch on a mesh, params laid out."""
  loss, params = language_model(name)
  mesh = tiny.mesh(**dict(axes))
  frozen = jax.tree.map(lambda _: None, params)
  places = sharding.shardings_of(params, mesh)
  with jax.set_mesh(mesh):
    grads, mean, _ = tiny.jit(
      lambda p, b: train.summed_gradients(
        loss, p, frozen, b, jax.random.key(0), 1
      )
    )(jax.device_put(params, places), sharding.put_batch(tiny.batch(8), mesh))
  return float(mean.total / mean.weight), jax.device_get(grads)


@pytest.mark.parametrize(
  ('axes', 'name'),
  [
    ({'data': 8}, 'llama'),
    ({'fsdp': 8}, 'llama'),
    (MIXED, 'llama'),
    ({'data': 4, 'sequence': 2}, 'llama'),
    ({'fsdp': 2, 'tensor': 2, 'sequence': 2}, 'gemma2'),
  ],
)
def test_loss_and_gradient_are_those_of_one_device(axes, name):
  loss, grads = gradient(tuple(axes.items()), name)
  expected_loss, expected = gradient((('data', 1),), name)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  jax.tree_util.tree_map_with_path(
    lambda path, a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=str(path)
    ),
    grads,
    expected,
  )


@functools.cache
def adapted_gradient(spec, axes):
  """(mean loss, gradient of the factors), made and laid out on a mesh."""
  model = tiny.model('llama', dim=64, hidden_dim=128)
  loss = stage.make('pretrain', model, lambda: None, {}).loss
  plain = tiny.params(model)
  mesh = tiny.mesh(**dict(axes))

  def make(plain):
    params = weights.transform(plain, spec, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
      lambda path, x: (
        x + tiny.seeded(path, x.shape, 0.05)
        if sharding.path_name(path).endswith('/b')
        else x
      ),
      params,
    )

  with jax.set_mesh(mesh):
    places = sharding.shardings_of(jax.eval_shape(make, plain), mesh)
    params = tiny.jit(make, out_shardings=places)(plain)
    trainable, frozen = weights.partition(params, '')
    grads, mean, _ = tiny.jit(
      lambda t, f, b: train.summed_gradients(
        loss, t, f, b, jax.random.key(0), 1
      )
    )(trainable, frozen, sharding.put_batch(tiny.batch(8), mesh))
  up = params['layers']['mlp']['up'].base
  largest = max(jax.tree.leaves(up), key=lambda x: x.nbytes)
  share = largest.addressable_shards[0].data.size / largest.size
  return float(mean.total / mean.weight), jax.device_get(grads), share


@pytest.mark.parametrize(
  ('axes', 'share'),
  [
    pytest.param({'data': 8}, 1, marks=pytest.mark.slow),
    pytest.param({'fsdp': 8}, 1 / 8, marks=pytest.mark.slow),
    (MIXED, 1 / 4),
    ({'data': 2, 'sequence': 2, 'tensor': 2}, 1 / 2),
  ],
)
@pytest.mark.parametrize(
  'spec', ['lora(dora=True)', 'int8, lora', 'nf4, lora(dora=True)']
)
def test_adapters_train_alike_on_every_mesh(spec, axes, share):
  loss, grads, held = adapted_gradient(spec, tuple(axes.items()))
  expected_loss, expected, _ = adapted_gradient(spec, (('data', 1),))
  assert held == share
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  jax.tree_util.tree_map_with_path(
    lambda path, a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=2e-5 * np.abs(b).max(), err_msg=str(path)
    ),
    grads,
    expected,
  )


@pytest.fixture
def uncached():
  """Programs are compiled anew, so that what XLA says of them is said."""
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # else JAX remembers that there is one
  jax.clear_caches()
  yield
  jax.config.update('jax_enable_compilation_cache', True)
  compilation_cache.reset_cache()


@pytest.mark.parametrize('axes', [MIXED, {'fsdp': 8}])
def test_nothing_is_rematerialised_whole(axes, uncached, capfd):
  mesh = tiny.mesh(**axes)
  loss, params = language_model('llama')
  places = sharding.shardings_of(params, mesh)
  with jax.set_mesh(mesh):
    tx, schedule = optim.make(configs.base().optimizer, 100)
    update = tiny.jit(
      train.make_update(
        loss, tx, schedule, microbatches=1, clip=1.0, spike_factor=0.0
      )
    )
    shapes = jax.eval_shape(lambda p: train.init(p, tx, 4), params)
    state = sharding.abstract(shapes, mesh)
    frozen = jax.tree.map(lambda _: None, places)
    batch = sharding.put_batch(tiny.batch(8), mesh)
    update.lower(state, frozen, batch, jax.random.key(0)).compile()
  assert 'ematerialization' not in capfd.readouterr().err


@pytest.mark.parametrize('gathers', [False, True])
def test_the_embedding_is_gathered_before_it_is_read(gathers, uncached, capfd):
  """Without it XLA rematerialises, and says so: the test above can fail."""
  mesh = tiny.mesh(**MIXED)
  table = jax.ShapeDtypeStruct(
    (64, 32), jnp.float32,
    sharding=NamedSharding(mesh, EXPECTED['embedding']),
  )  # fmt: skip

  def look_up(table, ids):
    if gathers:
      table = sharding.replicate_columns(table)
    return (sharding.constrain_activations(table[ids]) ** 2).sum()

  with jax.set_mesh(mesh):
    ids = sharding.put_batch({'ids': np.zeros((8, 16), np.int32)}, mesh)['ids']
    tiny.jit(look_up).lower(table, ids).compile()
  assert ('ematerialization' in capfd.readouterr().err) != gathers


def test_parameters_are_counted_once_however_they_lie():
  state, _ = created('adamw', fsdp=8)
  assert weights.count(state.params) == weights.count(shapes_of('llama'))
