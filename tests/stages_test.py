"""The family test: what every file of `tpu_lm/stages/` must hold to.

A new stage is tested by being there. Where it reads columns that no stage
before it read, `BATCHES` learns to make them.
"""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from tpu_lm import sharding, stage, train

ROWS = 32  # so that 4 microbatches still give each of 8 devices a row
NAMES = stage.known('tpu_lm.stages')
# What makes a batch of `ROWS` rows with ragged masks, by columns.
BATCHES = {
  ('loss_mask', 'positions', 'segment_ids', 'tokens'): tiny.batch,
}


def columns(name: str) -> tuple[str, ...]:
  """The columns that the stage's docstring states."""
  doc = importlib.import_module(f'tpu_lm.stages.{name}').__doc__
  found = re.search(r'Columns: ([\w, \n]+?)(, all|\.)', doc)
  assert found, f'stages/{name}.py: its docstring states no "Columns: …"'
  return tuple(sorted(re.findall(r'\w+', found[1])))


@functools.cache
def made(name: str):
  """(stage, params, batch) of the tiny model."""
  model = tiny.model()
  params = tiny.params(model)
  return (
    stage.make(name, model, params, {}),
    params,
    BATCHES[columns(name)](ROWS),
  )


@functools.cache
def computed(name: str, microbatches: int, devices: int):
  """(mean loss, mean gradient) as float64 on the host."""
  stage_, params, batch = made(name)
  return gradient(stage_.loss, params, batch, microbatches, devices)


def nothing(params):
  """The frozen part where all is trained."""
  return jax.tree.map(lambda _: None, params)


def gradient(loss, params, batch, microbatches=1, devices=1):
  mesh = tiny.mesh(data=devices)
  with jax.set_mesh(mesh):
    grads, mean, _ = summed(loss, microbatches)(
      params, sharding.put_batch(batch, mesh), jax.random.key(0)
    )
  weight = float(mean.weight)
  grads = jax.tree.map(lambda g: np.asarray(g, np.float64) / weight, grads)
  return float(mean.total) / weight, grads


@functools.cache
def summed(loss, microbatches: int):
  return tiny.jit(
    lambda params, batch, key: train.summed_gradients(
      loss, params, nothing(params), batch, key, microbatches
    )
  )


def assert_close(found, expected, tolerance=1e-5):
  """Leaf by leaf, relative to the largest entry of the leaf."""
  loss, grads = found
  np.testing.assert_allclose(loss, expected[0], rtol=tolerance)
  jax.tree_util.tree_map_with_path(
    lambda path, a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=str(path)
    ),
    grads,
    expected[1],
  )


@pytest.mark.parametrize('name', NAMES)
def test_loss_is_finite_and_no_gradient_is_zero(name):
  loss, grads = computed(name, 1, 1)
  assert np.isfinite(loss)

  def look(path, g):
    assert np.isfinite(g).all(), path
    # Of each layer, not only of the stack.
    layers = g if 'layers' in str(path) else g[None]
    assert all(np.abs(layer).max() > 0 for layer in layers), path

  jax.tree_util.tree_map_with_path(look, grads)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('devices', [1, 2, 8])
@pytest.mark.parametrize('microbatches', [1, 2, 4])
def test_accumulation_and_devices_change_nothing(name, microbatches, devices):
  if (microbatches, devices) == (1, 1):
    pytest.skip('what the others are compared with')
  assert_close(computed(name, microbatches, devices), computed(name, 1, 1))


@pytest.mark.parametrize('name', NAMES)
def test_loss_falls_on_a_fixed_batch(name):
  stage_, params, batch = made(name)
  tx = optax.adam(1e-2)
  update = tiny.jit(
    train.make_update(
      stage_.loss, tx, optax.constant_schedule(1e-2),
      microbatches=1, clip=1.0, spike_factor=0.0,
    )
  )  # fmt: skip
  state = train.init(params, tx, 10)
  losses = []
  for step in range(12):
    for part in stage_.prepare(params, batch, jax.random.key(step)):
      state, metrics = update(
        state, nothing(params), part, jax.random.key(step)
      )
      losses.append(float(metrics['loss']))
  assert losses[-1] < 0.9 * losses[0]
  assert int(state.guard.skipped) == 0


def test_garbage_in_masked_slots_changes_not_one_bit():
  """Language modelling: padding, and targets that nothing reads."""
  for name in NAMES:
    if columns(name) != ('loss_mask', 'positions', 'segment_ids', 'tokens'):
      continue
    stage_, params, batch = made(name)
    clean = {k: v.copy() for k, v in batch.items()}
    segments = batch['segment_ids']
    padding = segments == 0
    # The last token of a document is no input of a counted target; where it
    # is not a target either, it may be anything.
    last = np.ones(segments.shape, bool)
    last[:, :-1] = segments[:, 1:] != segments[:, :-1]
    clean['loss_mask'] &= ~(last & (np.arange(len(last)) % 2 == 0)[:, None])
    unread = last & ~clean['loss_mask'] & ~padding
    assert padding.sum() > 20
    assert unread.sum() > 20
    expected = gradient(stage_.loss, params, clean)
    for value in (5, tiny.VOCAB + 7, 2**31 - 1, -3):
      dirty = {k: v.copy() for k, v in clean.items()}
      dirty['tokens'][padding] = value
      dirty['positions'][padding] = 11
      dirty['loss_mask'][padding] = True
      dirty['tokens'][unread] = value
      loss, grads = gradient(stage_.loss, params, dirty)
      assert loss == expected[0], value
      jax.tree.map(np.testing.assert_array_equal, grads, expected[1])


def programs(closed):
  """The program and, recursively, those that its equations hold."""
  yield closed
  inner = getattr(closed, 'jaxpr', closed)
  for equation in inner.eqns:
    for value in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda v: hasattr(v, 'eqns') or hasattr(v, 'jaxpr'),
    ):
      if hasattr(value, 'eqns') or hasattr(value, 'jaxpr'):
        yield from programs(value)


def largest_constant(closed) -> int:
  """Bytes of the largest array that stands in a program as a constant."""
  sizes = [0]
  for program in programs(closed):
    constants = [*getattr(program, 'consts', ())]
    for equation in getattr(program, 'jaxpr', program).eqns:
      constants += [v.val for v in equation.invars if hasattr(v, 'val')]
    sizes += [np.asarray(constant).nbytes for constant in constants]
  return max(sizes)


def program_of_gradient(loss, params, batch):
  return jax.make_jaxpr(
    lambda params, batch, key: train.summed_gradients(
      loss, params, nothing(params), batch, key, 2
    )
  )(params, batch, jax.random.key(0))


@pytest.mark.parametrize('name', NAMES)
def test_no_array_is_captured_as_a_constant(name):
  stage_, params, batch = made(name)

  def captures(params, batch, key):
    mean, metrics = stage_.loss(params, batch, key)
    kept = jnp.asarray(batch_before)[: len(batch['tokens'])]
    return mean._replace(total=mean.total + kept.sum()), metrics

  batch_before = np.ones((ROWS, 17), np.float32)
  # First that it would be seen: 2 kB, behind grad and scan.
  caught = program_of_gradient(captures, params, batch)
  assert largest_constant(caught) >= batch_before.nbytes
  closed = program_of_gradient(stage_.loss, params, batch)
  assert largest_constant(closed) <= 256


@pytest.mark.parametrize('name', NAMES)
def test_activations_are_constrained_under_a_mesh(name):
  stage_, params, batch = made(name)

  def constraints():
    closed = program_of_gradient(stage_.loss, params, batch)
    return sum(
      equation.primitive.name == 'sharding_constraint'
      for program in programs(closed)
      for equation in getattr(program, 'jaxpr', program).eqns
    )

  assert constraints() == 0
  with jax.set_mesh(tiny.mesh(data=2, fsdp=2, tensor=2)):
    # Embedding and each layer, forward and backward.
    assert constraints() >= 4


@pytest.mark.parametrize('name', NAMES)
def test_the_columns_of_the_docstring_are_those_that_are_read(name):
  stage_, params, batch = made(name)
  jax.eval_shape(stage_.loss, params, batch, jax.random.key(0))
  for column in columns(name):
    fewer = {k: v for k, v in batch.items() if k != column}
    with pytest.raises(KeyError, match=column):
      jax.eval_shape(stage_.loss, params, fewer, jax.random.key(0))
