"""Loss and gradients are those of one device, on every mesh of eight.

Of packed rows with padding, for a network without experts and one with all
that moe.py knows. The gradient of a router's bias is the load, so that loads
are compared, too.
"""

import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest
import tiny

from tpu_lm import config as configs
from tpu_lm import optim, sharding, stage, train

# Divisible by eight in every direction; the scan is compiled once.
SHAPE = {'dim': 32, 'num_heads': 8, 'num_kv_heads': 8, 'hidden_dim': 48,
         'head_dim': 4, 'unroll': 1}  # fmt: skip
EXPERTS = {'num_experts': 8, 'experts_per_token': 2, 'expert_hidden_dim': 24,
           'shared_experts': 1, 'router': 'sigmoid', 'router_bias': True,
           'balance_loss': 0.1, 'router_z_loss': 0.01}  # fmt: skip
KINDS = {
  'dense': SHAPE,
  'dropless': SHAPE | EXPERTS,
  'capacity': SHAPE | EXPERTS | {'moe_form': 'capacity'},
  'odd': SHAPE | {'dim': 36},  # which eight devices do not share out
}
ONE = (('data', 1),)
BATCH = tiny.batch(8)


@functools.cache
def made(kind):
  """(network, loss, parameters)."""
  model = tiny.model('qwen3', **KINDS[kind])
  params = tiny.params(model)
  return model, stage.make('pretrain', model, lambda: params, {}).loss, params


@functools.cache
def computed(kind, axes=ONE, rings=()):
  """(objective, gradients, metrics), all divided, and the loss alone.

  The latter as evaluation has it, without a gradient.
  """
  _, loss, params = made(kind)
  sizes = dict.fromkeys(sharding.AXES, 1) | dict(axes)
  count = math.prod(sizes.values())
  mesh = sharding.make_mesh(sizes, jax.devices()[:count], rings)
  frozen = jax.tree.map(lambda _: None, params)

  def both(params, batch):
    found = train.summed_gradients(loss, params, frozen, batch, None, 1)
    return *found, loss(params, batch, None)[0]

  with jax.set_mesh(mesh):
    placed = jax.device_put(params, sharding.shardings_of(params, mesh))
    grads, mean, metrics, alone = jax.device_get(
      tiny.jit(both)(placed, sharding.put_batch(BATCH, mesh))
    )
  grads = jax.tree.map(lambda g: g / mean.weight, grads)
  means = {name: total / weight for name, (total, weight) in metrics.items()}
  means |= {'loss': mean.total / mean.weight, 'alone': alone[0] / alone[1]}
  return means, grads


def assert_same(kind, axes, rings=()):
  (means, grads), (expected, gradient) = (
    computed(kind, tuple(axes.items()), rings), computed(kind)
  )  # fmt: skip
  for name, value in expected.items():
    np.testing.assert_allclose(means[name], value, rtol=1e-5, err_msg=name)
  jax.tree_util.tree_map_with_path(
    lambda path, a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=str(path)
    ),
    grads,
    gradient,
  )


# (sizes, rings of fsdp); all axes alone, and mixtures that have them all.
MESHES = [
  ({'data': 8}, ()),
  ({'fsdp': 8}, ()),
  ({'tensor': 8}, ()),
  ({'sequence': 8}, ()),
  ({'data': 2, 'fsdp': 2, 'tensor': 2}, ()),
  ({'fsdp': 4, 'sequence': 2}, (2, 2)),
]
WITH_EXPERTS = [
  ({'expert': 8}, ()),
  ({'data': 2, 'sequence': 2, 'expert': 2}, ()),
  ({'fsdp': 4, 'expert': 2}, (2, 2)),
  ({'fsdp': 2, 'tensor': 2, 'expert': 2}, ()),
]
CASES = [
  *(('dense', *mesh) for mesh in MESHES[2:4] + MESHES[5:]),  # sharding_test.py
  *(('dropless', *mesh) for mesh in (MESHES[1::4] + WITH_EXPERTS)),
  *(('capacity', *mesh) for mesh in WITH_EXPERTS[1::2]),
  ('odd', {'fsdp': 8}, ()),
]


def label(value):
  if isinstance(value, dict):
    return '-'.join(f'{axis}{size}' for axis, size in value.items())
  return 'x'.join(map(str, value)) if isinstance(value, tuple) else value


def test_the_batch_is_ragged_and_the_experts_differ():
  means, grads = computed('dropless')
  assert (BATCH['segment_ids'] == 0).any(axis=1).sum() > 2
  assert means['expert_load'] > 1.1
  assert computed('capacity')[0]['dropped_share'] > 0.01
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(('kind', 'axes', 'rings'), CASES, ids=label)
def test_loss_and_gradients_are_those_of_one_device(kind, axes, rings):
  assert_same(kind, axes, rings)


EVERY = [
  dict(zip(sharding.AXES, sizes, strict=True))
  for sizes in itertools.product((1, 2, 4, 8), repeat=len(sharding.AXES))
  if math.prod(sizes) == 8
]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['dense', 'dropless', 'capacity'])
@pytest.mark.parametrize('axes', EVERY, ids=label)
def test_every_mesh_of_eight_devices_is_one_device(kind, axes):
  assert_same(kind, axes)


# What travels.

_SIZES = {'f32': 4, 'bf16': 2, 's32': 4, 'u32': 4, 'pred': 1}
_COLLECTIVE = re.compile(
  r'= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|'
  r'collective-permute)(?:-start)?\('
)
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')


def largest_results(text: str) -> list[int]:
  """Bytes of the largest array that each collective of a program makes."""
  return [
    max(
      _SIZES[kind] * math.prod(map(int, filter(None, dims.split(','))))
      for kind, dims in _ARRAY.findall(result)
    )
    for result in _COLLECTIVE.findall(text)
  ]


@pytest.mark.parametrize(
  ('kind', 'axes'),
  [
    ('dense', {'fsdp': 8}),
    ('dense', {'data': 2, 'fsdp': 4}),
    ('dropless', {'fsdp': 4, 'expert': 2}),
  ],
  ids=label,
)
def test_nothing_travels_that_is_as_large_as_all_layers(kind, axes):
  """Not the parameters, nor a stack, but one layer's matrix or the table."""
  num_layers = 6
  model = tiny.model('qwen3', **KINDS[kind], num_layers=num_layers)
  loss = stage.make('pretrain', model, lambda: None, {}).loss
  tx, schedule = optim.make(configs.base().optimizer, 100)
  mesh = tiny.mesh(**axes)
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    state = jax.eval_shape(lambda p: train.init(p, tx, 4), shapes)
    state = sharding.abstract(state, mesh)
    update = tiny.jit(
      train.make_update(
        loss, tx, schedule, microbatches=1, clip=1.0, spike_factor=0.0
      ),
      donate_argnums=0,
      out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    frozen = jax.tree.map(lambda _: None, shapes)
    batch = sharding.put_batch(tiny.batch(8), mesh)
    text = update.lower(state, frozen, batch, jax.random.key(0)).compile()
  found = largest_results(text.as_text())
  layers = jax.tree.leaves(shapes['layers'])
  stack = min(4 * x.size for x in layers if x.ndim > 2 and x.shape[-1] > 8)
  layer = max(4 * x.size // num_layers for x in layers)
  assert len(found) > 10
  # A layer's largest matrix does travel, so that the sizes are read.
  table = 4 * shapes['embedding'].size
  share = axes.get('expert', 1) if kind != 'dense' else 1
  assert max(found) >= min(layer // share, table)
  assert max(found) < stack
