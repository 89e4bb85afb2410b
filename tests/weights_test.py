import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from tpu_lm import config as configs
from tpu_lm import (
  digest,
  models,
  optim,
  quantize,
  sharding,
  stage,
  train,
  weights,
)
from tpu_lm.errors import UserError
from tpu_lm.generate import engine
from tpu_lm.generate.sampler import Sampler
from tpu_lm.models import transformer

ALL = (
  'lora(rank=3)',
  'lora(rank=3, rslora=True, targets="attention")',
  'lora(rank=3, dora=True)',
  'int8',
  'nf4',
  'int8, lora(rank=3)',
  'nf4, lora(rank=3)',
  'nf4, lora(rank=3, dora=True)',
)


@functools.cache
def held(spec: str, moved: bool = True, **options):
  """(model, plain, transformed): factors are away from where they begin."""
  model = tiny.model(**options)
  plain = jax.tree.map(jnp.asarray, tiny.params(model))
  params = weights.transform(plain, spec, jax.random.key(1))

  def move(path, leaf):
    name = sharding.path_name(path)
    if not name.endswith(('/b', '/m')):
      return leaf
    return 1.2 * leaf + tiny.seeded(path, leaf.shape, 0.05)

  if moved:
    params = jax.tree_util.tree_map_with_path(move, params)
  return model, plain, params


def names(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {sharding.path_name(path) for path, _ in leaves}


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
  batch = tiny.batch(4)
  hidden = model.apply(
    {'params': params}, batch['tokens'], batch['positions'],
    batch['segment_ids'],
  )  # fmt: skip
  return transformer.logits(model.config, params, hidden)


def gradient(model, trainable, frozen, rows=4, microbatches=1):
  loss = stage.make('pretrain', model, lambda: None, {}).loss
  return tiny.jit(
    lambda t, f, batch: train.summed_gradients(
      loss, t, f, batch, jax.random.key(0), microbatches
    )[0]
  )(trainable, frozen, tiny.batch(rows))


@pytest.mark.parametrize(
  ('spec', 'x', 'w'),
  [
    ('BLD,DHK->BLHK', (2, 6, 8), (8, 4, 3)),
    ('BLHK,HKD->BLD', (2, 6, 4, 3), (4, 3, 8)),
    ('BLD,DF->BLF', (2, 6, 8), (8, 5)),
  ],
)
@pytest.mark.parametrize('sequence', [1, 2])
def test_einsum_is_that_of_numpy_on_every_mesh(spec, x, w, sequence):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=x), rng.normal(size=w)
  with jax.set_mesh(tiny.mesh(data=2, sequence=sequence)):
    found = weights.einsum(
      spec, jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32),
      jnp.float32,
    )  # fmt: skip
  np.testing.assert_allclose(found, np.einsum(spec, x, w), atol=1e-5)


def test_einsum_computes_in_the_type_that_is_asked_for():
  x, w = jnp.ones((1, 2, 4)), jnp.ones((4, 3))
  found = weights.einsum('BLD,DF->BLF', x, w, jnp.bfloat16)
  assert found.dtype == jnp.bfloat16


def test_partition_and_combine_are_inverse():
  params = tiny.params(tiny.model())
  chosen, frozen = weights.partition(params, 'mlp/|final_norm')
  names = {
    sharding.path_name(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(chosen)
  }
  assert names == {
    'final_norm', 'layers/mlp/norm', 'layers/mlp/gate', 'layers/mlp/up',
    'layers/mlp/down',
  }  # fmt: skip
  whole = len(jax.tree.leaves(params))
  assert len(jax.tree.leaves(frozen)) == whole - len(names)
  jax.tree.map(
    np.testing.assert_array_equal, weights.combine(chosen, frozen), params
  )


def test_partition_refuses_a_pattern_that_matches_nothing():
  with pytest.raises(ValueError, match='no parameter path matches'):
    weights.partition(tiny.params(tiny.model()), 'atention')


def test_count():
  # V D + N (D + 2 D H K + 2 D G K + 2 K + D + 3 D F) + D, by hand.
  layer = 32 + 2 * 32 * 32 + 2 * 32 * 16 + 2 * 8 + 32 + 3 * 32 * 48
  expected = 64 * 32 + 2 * layer + 32
  assert weights.count(tiny.params(tiny.model('qwen3'))) == expected


# Adapters.


def test_lora_by_hand():
  leaf = weights.Lora(
    base=jnp.array([[1.0, 2.0], [3.0, 4.0]]),
    a=jnp.array([[1.0], [2.0]]),
    b=jnp.array([[10.0, 20.0]]),
    m=None,
    scale=0.5,
  )
  x = jnp.array([[[1.0, 1.0]]])
  # x W = 4 6; x A = 3; times B: 30 60.
  found = weights.einsum('BLD,DF->BLF', x, leaf, jnp.float32)
  np.testing.assert_allclose(found, [[[4 + 15, 6 + 30]]])
  np.testing.assert_allclose(weights.dense(leaf), [[6, 12], [13, 24]])


def dora_by_hand():
  """W + s A B is 3 0 / 4 5, its columns are 5 and 5 long."""
  return weights.Lora(
    base=jnp.array([[2.0, 0.0], [2.0, 5.0]]),
    a=jnp.array([[1.0], [2.0]]),
    b=jnp.array([[2.0, 0.0]]),
    m=jnp.array([10.0, 1.0]),
    scale=0.5,
  )


def test_dora_by_hand():
  leaf = dora_by_hand()
  x = jnp.array([[[1.0, 1.0]]])
  found = weights.einsum('BLD,DF->BLF', x, leaf, jnp.float32)
  np.testing.assert_allclose(found, [[[7 * 10 / 5, 5 * 1 / 5]]], rtol=1e-6)
  np.testing.assert_allclose(weights.dense(leaf), [[6, 0], [8, 1]], rtol=1e-6)


def test_the_norm_of_dora_has_no_gradient():
  leaf = dora_by_hand()
  x = jnp.array([[[1.0, 1.0]]])

  def total(a, b, m):
    changed = weights.Lora(leaf.base, a, b, m, leaf.scale)
    return weights.einsum('BLD,DF->BLF', x, changed, jnp.float32).sum()

  def constant(a, b, m):
    whole = leaf.base + leaf.scale * a @ b
    return ((x @ whole) * m / jnp.array([5.0, 5.0])).sum()

  for found, expected in zip(
    jax.grad(total, (0, 1, 2))(leaf.a, leaf.b, leaf.m),
    jax.grad(constant, (0, 1, 2))(leaf.a, leaf.b, leaf.m),
    strict=True,
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('spec', ALL)
def test_merging_changes_no_logits(spec):
  model, plain, params = held(spec, tied=spec != 'nf4')
  merged = jax.jit(weights.merge)(params)
  assert names(merged) == names(plain)
  found, expected = logits(model, params), logits(model, merged)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  # And something was done at all.
  assert np.abs(found - logits(model, plain)).max() > 1e-3


@pytest.mark.parametrize(
  'spec', ['lora', 'lora(rslora=True)', 'lora(dora=True)']
)
def test_training_starts_from_the_base(spec):
  model, plain, params = held(spec, moved=False)
  np.testing.assert_allclose(
    logits(model, params), logits(model, plain), atol=1e-5
  )


def test_the_scale_of_the_factors():
  for spec, scale in (
    ('lora', 16 / 8),
    ('lora(rank=4, alpha=2)', 0.5),
    ('lora(rank=4, rslora=True)', 16 / 2),
  ):
    leaf = held(spec)[2]['layers']['attention']['o']
    assert leaf.scale == scale
  leaf = held('lora(rank=8)', moved=False)[2]['layers']['mlp']['down']
  assert leaf.a.shape == (2, 48, 8)
  assert leaf.b.shape == (2, 8, 32)
  np.testing.assert_allclose(np.std(leaf.a), 48**-0.5, rtol=0.1)
  assert not np.any(leaf.b)


def test_factors_depend_on_the_key_and_the_name_alone():
  _, plain, params = held('lora')
  again = weights.transform(
    plain, 'lora(targets="up|gate")', jax.random.key(1)
  )['layers']['mlp']
  mlp = params['layers']['mlp']
  np.testing.assert_array_equal(mlp['up'].a, again['up'].a)
  assert np.abs(mlp['up'].a - mlp['gate'].a).max() > 0.1
  other = weights.transform(plain, 'lora', jax.random.key(2))
  assert np.abs(other['layers']['mlp']['up'].a - mlp['up'].a).max() > 0.1


def test_unadapt_shares_the_base():
  _, plain, params = held('lora')
  base = weights.unadapt(params)
  for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(plain), strict=True):
    assert a is b
  quantised = weights.unadapt(held('nf4, lora(rank=3)')[2])
  assert isinstance(quantised['layers']['mlp']['up'], quantize.Nf4)
  assert not weights.is_adapted(quantised)
  assert weights.is_adapted(params)


@pytest.mark.parametrize('spec', ALL)
def test_parameters_are_counted_as_what_they_stand_for(spec):
  _, plain, params = held(spec)
  base = weights.unadapt(params)
  assert weights.count(base) == weights.count(plain)
  trainable, frozen = weights.partition(params, '')
  whole = weights.count(trainable) + weights.count(frozen)
  assert whole == weights.count(params)
  assert weights.num_bytes(params) == sum(
    x.nbytes for x in jax.tree.leaves(params)
  )


# What is trained.


@pytest.mark.parametrize('spec', [s for s in ALL if 'lora' in s])
def test_only_factors_are_trained_and_all_of_them_have_a_gradient(spec):
  model, plain, params = held(spec)
  trainable, frozen = weights.partition(params, '')
  parts = {'a', 'b', 'm'} if 'dora' in spec else {'a', 'b'}
  assert {name.split('/')[-1] for name in names(trainable)} == parts
  assert not names(trainable) & names(frozen)
  grads = gradient(model, trainable, frozen)
  assert names(grads) == names(trainable)
  for leaf in jax.tree.leaves(grads):
    assert all(np.abs(layer).max() > 0 for layer in leaf)
  # Those of merged weights, by the chain rule: an independent way.
  if 'dora' not in spec:
    merged = gradient(model, weights.merge(params), jax.tree.map(
      lambda _: None, plain
    ))  # fmt: skip
    down = params['layers']['mlp']['down'] if 'mlp' in str(grads) else None
    if isinstance(down, weights.Lora):
      expected = down.scale * np.einsum(
        'nfr,nfd->nrd', down.a, merged['layers']['mlp']['down']
      )
      found = grads['layers']['mlp']['down'].b
      np.testing.assert_allclose(
        found, expected, atol=1e-5 * np.abs(expected).max()
      )


@pytest.mark.parametrize('spec', ['', 'lora', 'nf4, lora', 'int8'])
@pytest.mark.parametrize('trainable', ['', 'norm', 'top:1', 'top:2'])
def test_combine_undoes_every_partition(spec, trainable):
  if spec == 'int8' and trainable.startswith('top'):
    pytest.skip('is refused')
  _, _, params = held(spec)
  for tree in (params, jax.eval_shape(lambda: params)):
    chosen, frozen = weights.partition(tree, trainable)
    again = weights.combine(chosen, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
      assert (a.shape, a.dtype) == (b.shape, b.dtype)
      if tree is params:
        np.testing.assert_array_equal(a, b)


def test_without_adapters_all_floating_arrays_are_trained():
  _, plain, params = held('int8')
  assert weights.partition(plain, '')[1] == jax.tree.map(lambda _: None, plain)
  found = names(weights.partition(params, '')[0])
  assert found == {name for name in names(plain) if 'norm' in name}


def test_what_a_stage_has_added_is_trained_beside_adapters():
  _, _, params = held('lora')
  params = params | {'scalar_head': jnp.zeros(32)}
  chosen, _ = weights.partition(params, '')
  assert 'scalar_head' in names(chosen)
  assert 'final_norm' not in names(chosen)


def test_the_last_layers():
  model, plain, _ = held('')
  chosen, frozen = weights.partition(plain, 'top:1')
  assert names(chosen) == {k for k in names(plain) if k.startswith('layers/')}
  up = plain['layers']['mlp']['up']
  np.testing.assert_array_equal(chosen['layers']['mlp']['up'], up[1:])
  np.testing.assert_array_equal(frozen['layers']['mlp']['up'], up[:1])
  found = gradient(model, chosen, frozen)
  whole = gradient(model, *weights.partition(plain, ''))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b[1:], atol=1e-5),
    found['layers'],
    whole['layers'],
  )
  assert found['embedding'] is None


def test_the_last_layers_of_adapters():
  _, _, params = held('nf4, lora(rank=3)')
  chosen, frozen = weights.partition(params, 'top:1')
  assert chosen['layers']['mlp']['up'].a.shape == (1, 32, 3)
  assert frozen['layers']['mlp']['up'].a.shape == (1, 32, 3)
  assert chosen['layers']['mlp']['norm'] is None


@pytest.mark.parametrize(
  ('spec', 'trainable', 'message'),
  [
    ('nf4', 'top:1', r"'top:1' would train layers/.*which is quantised"),
    ('nf4, lora', '.*', r"'\.\*' would train .*; with lora .*trainable=''"),
    ('int8', 'embedding', r"'embedding' would train embedding/values"),
    ('', 'top:3', r"'top:3': write top:N with N from 1 to .* layers, 2$"),
    ('', 'top:0', r"'top:0': write top:N"),
    ('', 'top:x', r"'top:x': write top:N"),
    ('lora', 'atention', r"no parameter path matches 'atention'"),
  ],
)
def test_what_cannot_be_trained_is_refused(spec, trainable, message):
  with pytest.raises(ValueError, match=message):
    weights.partition(held(spec)[2], trainable)


# The language of `transforms`.


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('nf5', r"nf5 is unknown \(did you mean 'nf4'\?\); there are int8, nf4"),
    ('lora(rnk=3)', r"lora\.rnk: unknown key \(did you mean 'rank'"),
    ('lora(rank=2.5)', r'lora\.rank=2\.5: must be int'),
    ('lora(rank=0)', r'lora\.rank=0.*must be above 0'),
    ('lora(alpha=0)', r'lora\.alpha=0'),
    ('lora(rank=x)', r'cannot be read; write it like nf4, lora\(rank=8'),
    ('lora(8)', 'cannot be read'),
    ('lora(', 'cannot be read'),
    ('nf4 lora', 'cannot be read'),
    ('3', 'cannot be read'),
    ('nf4(bits=4)', r'nf4\.bits: unknown key'),
    ('lora, nf4', r'quantise before lora.*nf4, lora\(…\)'),
    ('int8, nf4', 'quantised once'),
    ('lora, lora', 'adapters already'),
    ('lora(targets="atention")', r"found in no path .*mean 'attention'"),
    ('lora(targets="embedding")', 'found in no path of a matrix'),
    ('lora(targets="(")', 'no regular expression'),
  ],
)
def test_transforms_that_cannot_be_are_refused(spec, message):
  plain = held('')[1]
  with pytest.raises(UserError, match=message) as error:
    weights.transform(plain, spec, jax.random.key(0))
  assert str(error.value).startswith('transforms')
  assert '\n' not in str(error.value)


def test_transforms_can_be_written_over_lines():
  _, plain, _ = held('')
  spec = '\n  nf4,\n  lora(rank=2),\n'
  params = weights.transform(plain, spec, jax.random.key(0))
  assert params['layers']['mlp']['up'].a.shape == (2, 32, 2)
  assert weights.transform(plain, '', jax.random.key(0)) is plain


def test_lora_takes_its_targets_and_nothing_else():
  _, _, params = held('lora(targets="attention/(q|v)$")')
  adapted = {
    name for name in names(params) if name.endswith(('/a', '/b', '/base'))
  }
  assert adapted == {
    f'layers/attention/{m}/{part}' for m in 'qv' for part in ('a', 'b', 'base')
  }


# What carries trees must carry these.


@pytest.mark.parametrize('spec', ['lora(dora=True)', 'nf4, lora', 'int8'])
def test_orbax_and_digests_keep_every_leaf(spec, tmp_path):
  _, _, params = held(spec)
  with ocp.StandardCheckpointer() as writer:
    writer.save(tmp_path / 'tree', params)
    writer.wait_until_finished()
    shapes = sharding.abstract(
      jax.eval_shape(lambda: params), tiny.mesh(fsdp=2)
    )
    again = writer.restore(tmp_path / 'tree', shapes)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert digest.digest(again) == digest.digest(params)
  up = 'layers/mlp/up'
  expected = {
    'lora(dora=True)': {f'{up}/{part}' for part in ('base', 'a', 'b', 'm')},
    'nf4, lora': {f'{up}/{part}' for part in (
      'a', 'b', 'base/codes', 'base/peaks', 'base/steps', 'base/mean'
    )},
    'int8': {f'{up}/values', f'{up}/scales'},
  }  # fmt: skip
  assert {n for n in digest.names(params) if up in n} == expected[spec]


@pytest.mark.parametrize('spec', ['lora', 'nf4, lora(dora=True)', 'int8'])
def test_generation_runs_on_transformed_trees(spec):
  model, _, params = held(spec)
  prompts = [[1, 2, 3], [7, 5, 3, 2, 1]]
  run = functools.partial(
    engine.generate, model, prompts=prompts, max_new_tokens=8,
    sampler=Sampler(temperature=0),
  )  # fmt: skip
  found = run(params=params)
  expected = run(params=jax.jit(weights.merge)(params))
  for a, b in zip(found, expected, strict=True):
    assert a.tokens == b.tokens
    np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)


@pytest.mark.parametrize(
  'spec', ['lora', pytest.param('nf4, lora', marks=pytest.mark.slow)]
)
def test_remat_and_microbatches_change_no_gradient(spec):
  model, _, params = held(spec)
  parts = weights.partition(params, '')
  expected = gradient(model, *parts)
  other = tiny.model(remat='full', unroll=2)
  for found in (gradient(other, *parts), gradient(model, *parts, 4, 2)):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, atol=1e-5 * max(np.abs(b).max(), 1)
      ),
      found,
      expected,
    )


@pytest.mark.parametrize('spec', ALL)
def test_products_are_done_in_the_type_of_the_model(spec):
  model, _, params = held(spec, dtype='bfloat16')
  hidden = model.apply({'params': params}, jnp.ones((1, 4), jnp.int32))
  assert hidden.dtype == jnp.bfloat16
  exact = tiny.model().apply({'params': params}, jnp.ones((1, 4), jnp.int32))
  assert np.abs(hidden.astype(jnp.float32) - exact).mean() < 0.05


# Memory, by the compiler's own plan.


@functools.cache
def plan(spec: str, merges: bool = False):
  """What one update of 8 layers of 512 takes, in bytes, with a true scan."""
  shape = {
    'num_layers': 8, 'dim': 512, 'num_heads': 8, 'num_kv_heads': 4,
    'hidden_dim': 1536, 'unroll': 1,
  }  # fmt: skip
  model = models.make('qwen3', shape, 8192, 64)
  assert model.config.tied
  plain_loss = stage.make('pretrain', model, lambda: None, {}).loss

  def loss(params, batch, key):
    params = weights.merge(params) if merges else params
    return plain_loss(params, batch, key)

  tx, schedule = optim.make(configs.base().optimizer, 1000)

  def fresh(key):
    params = weights.transform(model.init_params(key), spec, key)
    trainable, frozen = weights.partition(params, '')
    return train.init(trainable, tx, 8), frozen

  state, frozen = jax.eval_shape(fresh, jax.random.key(0))
  update = train.make_update(
    loss, tx, schedule, microbatches=1, clip=1.0, spike_factor=0.0
  )
  program = jax.jit(
    update,
    donate_argnums=0,
    compiler_options={'xla_backend_optimization_level': 0},
  )
  key, batch = jax.random.key(0), tiny.batch(2, 64)
  compiled = program.lower(state, frozen, batch, key).compile()
  return types.SimpleNamespace(
    state=weights.num_bytes((state.params, state.optimizer)),
    frozen=weights.num_bytes(frozen),
    count=weights.count(weights.unadapt(weights.combine(state.params, frozen))),
    temporaries=compiled.memory_analysis().temp_size_in_bytes,
  )


@pytest.mark.slow
def test_what_adapters_save_in_memory():
  full, lora, qlora = plan(''), plan('lora'), plan('nf4, lora')
  merged = 4 * full.count
  assert full.count == lora.count == qlora.count > 29e6
  # Trained parameters and optimizer: two per cent of those of full training.
  assert lora.state == qlora.state <= 0.05 * full.state
  assert qlora.frozen <= 0.6 * full.count
  # Nothing is as large as the weights, in which a merge ends.
  for least in (lora, qlora):
    assert least.temporaries < 0.9 * merged
    assert least.temporaries < 0.35 * full.temporaries
  for spec, least in (('lora', lora), ('nf4, lora', qlora)):
    most = plan(spec, merges=True).temporaries
    assert most - least.temporaries > merged
