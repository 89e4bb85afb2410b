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
# What makes a batch of `ROWS` rows, ragged in every way, by kind of rows.
BATCHES = {
  'text': tiny.batch,
  'chat': tiny.batch,
  'pairs': tiny.pairs,
  'rated': tiny.rated,
  'scored': tiny.scored,
}
# What a stage needs beyond its defaults, and what else of it is looked at:
# (stage, rows) -> [(hyper-parameters, options of the network)].
VARIANTS = {
  ('pretrain', 'text'): [({}, {}), ({}, tiny.MOE)],
  ('sft', 'text'): [({}, {}), ({}, tiny.MOE)],
  ('dpo', 'pairs'): [({}, {}), ({}, tiny.MOE)],
  ('reward', 'pairs'): [({'centring': 0.01}, {'scalar_head': True})],
  ('reward', 'scored'): [({'loss_type': 'mse'}, {'scalar_head': True})],
  ('distill', 'text'): [({}, {}), ({'top_k': 8, 'divergence': 'gjsd'}, {})],
}


def module_of(name: str):
  return importlib.import_module(f'tpu_lm.stages.{name}')


def cases() -> list[tuple[str, str, int]]:
  """(stage, kind of rows, number of the variant); one of text and chat."""
  found = []
  for name in NAMES:
    kinds = module_of(name).ROWS
    # Of those that sample see rollouts_test.py.
    kinds = tuple(kind for kind in kinds if kind != 'prompts')
    if {'text', 'chat'} <= set(kinds):  # the same columns
      kinds = tuple(kind for kind in kinds if kind != 'chat')
    for kind in kinds:
      variants = VARIANTS.get((name, kind), [({}, {})])
      found += [(name, kind, i) for i in range(len(variants))]
  return found


CASES = cases()


def has_experts(case) -> bool:
  name, kind, number = case
  variants = VARIANTS.get((name, kind), [({}, {})])
  return 'num_experts' in variants[number][1]


def label(value) -> str:
  return '-'.join(map(str, value)) if isinstance(value, tuple) else str(value)


EVERY = pytest.mark.parametrize('case', CASES, ids=label)
TEXTS = [case for case in CASES if case[1] in ('text', 'chat')]


def stated(name: str, what: str) -> tuple[str, ...]:
  """The names that the stage's docstring states after `what`."""
  found = re.findall(
    what + r': ([\w, \n]+?)(?:, all|\.)', module_of(name).__doc__
  )
  assert found, f'stages/{name}.py: its docstring states no "{what}: …"'
  return tuple(sorted(re.findall(r'\w+', ', '.join(found))))


def columns(name: str, kind: str) -> tuple[str, ...]:
  """The columns of prepared rows that the docstring states."""
  kinds = module_of(name).ROWS
  first = kind == kinds[0] or {kind, kinds[0]} == {'text', 'chat'}
  return stated(name, 'Columns' if first else f'Columns of {kind}')


@functools.cache
def made(case, devices: int = 1):
  """(stage, params, batch) of the tiny model; not yet through `prepare`."""
  name, kind, number = case
  hparams, options = VARIANTS.get((name, kind), [({}, {})])[number]
  if name == 'distill':
    directory, num_vocab = tiny.teacher()
    hparams = hparams | {'teacher': directory}
    options = options | {'vocab_size': num_vocab}
  model = tiny.model(**options)
  params = tiny.params(model)
  # The reference is another network, or half of what it does stays unseen.
  start = jax.tree.map(lambda x: x * 1.1, params)
  with jax.set_mesh(tiny.mesh(data=devices)):  # a teacher is laid out on it
    stage_ = stage.make(name, model, lambda: start, hparams)
  return stage_, params, BATCHES[kind](ROWS)


@functools.cache
def prepared(case):
  """What `prepare` makes of the batch, on the host."""
  return jax.tree.map(np.asarray, spread(case, 1))


def spread(case, devices: int):
  """What `prepare` makes of the batch on several devices."""
  stage_, params, batch = made(case, devices)
  mesh = tiny.mesh(data=devices)
  with jax.set_mesh(mesh):
    put = sharding.put_batch(batch, mesh)
    (part,) = stage_.prepare(params, put, jax.random.key(0))
  return part


@functools.cache
def computed(case, microbatches: int, devices: int):
  """(mean loss, mean gradient) as float64 on the host."""
  stage_, params, batch = made(case, devices)
  return gradient(stage_, params, batch, microbatches, devices)


def nothing(params):
  """The frozen part where all is trained."""
  return jax.tree.map(lambda _: None, params)


def gradient(stage_, params, batch, microbatches=1, devices=1):
  mesh, key = tiny.mesh(data=devices), jax.random.key(0)
  with jax.set_mesh(mesh):
    batch = sharding.put_batch(batch, mesh)
    (part,) = stage_.prepare(params, batch, key)
    grads, mean, _ = summed(stage_.loss, microbatches)(params, part, key)
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


@EVERY
def test_loss_is_finite_and_no_gradient_is_zero(case):
  loss, grads = computed(case, 1, 1)
  assert np.isfinite(loss)

  def look(path, g):
    assert np.isfinite(g).all(), path
    # Of each layer, not only of the stack.
    layers = g if 'layers' in str(path) else g[None]
    assert all(np.abs(layer).max() > 0 for layer in layers), path

  jax.tree_util.tree_map_with_path(look, grads)


# The loop is the same for all stages: one of them sees every combination.
SPLITS = [
  (case, *split)
  for case in CASES
  for split in (
    [(m, d) for m in (1, 2, 4) for d in (1, 2, 8) if m * d > 1]
    if case[0] == 'pretrain' and not has_experts(case)
    else [(4, 1), (1, 8), (4, 8)]
  )
]


@pytest.mark.parametrize(('case', 'microbatches', 'devices'), SPLITS, ids=label)
def test_accumulation_and_devices_change_nothing(case, microbatches, devices):
  assert_close(computed(case, microbatches, devices), computed(case, 1, 1))


@EVERY
def test_loss_falls_on_a_fixed_batch(case):
  stage_, params, batch = made(case)
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
    key = jax.random.key(step)
    for part in stage_.prepare(state.params, batch, key):
      state, metrics = update(state, nothing(params), part, key)
      losses.append(float(metrics['loss']))
  assert losses[-1] < 0.9 * losses[0]
  assert int(state.guard.skipped) == 0


@pytest.mark.parametrize('case', TEXTS, ids=label)
def test_garbage_at_what_is_not_read_changes_not_one_bit(case):
  """Last tokens of documents that are no targets: no input of any either."""
  stage_, params, batch = made(case)
  clean = {k: v.copy() for k, v in batch.items()}
  segments = batch['segment_ids']
  last = np.ones(segments.shape, bool)
  last[:, :-1] = segments[:, 1:] != segments[:, :-1]
  clean['loss_mask'] &= ~(last & (np.arange(len(last)) % 2 == 0)[:, None])
  unread = last & ~clean['loss_mask'] & (segments > 0)
  assert unread.sum() > 20
  expected = gradient(stage_, params, clean)
  for value in (5, 2**31 - 1, -3):
    dirty = {k: v.copy() for k, v in clean.items()}
    dirty['tokens'][unread] = value
    loss, grads = gradient(stage_, params, dirty)
    if has_experts(case):  # other neighbours: sums in another order
      assert_close((loss, grads), expected)
      continue
    assert loss == expected[0], value
    jax.tree.map(np.testing.assert_array_equal, grads, expected[1])


def quadruples(batch) -> list[str]:
  """The prefixes of columns [B, L+1] in a batch."""
  return [k.removesuffix('tokens') for k in batch if k.endswith('tokens')]


@EVERY
def test_garbage_in_padding_changes_not_one_bit(case):
  stage_, params, batch = made(case)
  expected = gradient(stage_, params, batch)
  clean = prepared(case)
  prefixes = quadruples(batch)
  slots = np.arange(1, tiny.NUM_SEGMENTS + 1)
  ids = batch[prefixes[0] + 'segment_ids']
  absent = (ids[:, :, None] != slots).all(axis=1)  # [B, S]
  targets = (
    np.asarray(stage.target_weights(batch | clean)) > 0
    if ('tokens' in batch)
    else None
  )
  for value in (5, tiny.VOCAB + 7, 2**31 - 1, -3):
    dirty = {k: v.copy() for k, v in clean.items()}
    for prefix in prefixes:
      padding = batch[prefix + 'segment_ids'] == 0
      assert padding.sum() > 20
      dirty[prefix + 'tokens'][padding] = value
      dirty[prefix + 'positions'][padding] = 11
      dirty[prefix + 'loss_mask'][padding] = True
    # First through `prepare`, whose own columns must not change where they
    # count; then with anything where they do not.
    given = {k: dirty[k] for k in batch}
    for name in clean.keys() - batch.keys():
      array = dirty[name]
      if array.shape == absent.shape:
        array[absent] = np.nan
      elif array.ndim == 3:
        array[~targets] = np.nan if array.dtype.kind == 'f' else value
    for name in ('margins', 'scores'):
      if name in batch:
        given[name][absent] = dirty[name][absent] = np.nan
    for rows in (given, dirty):
      loss, grads = gradient(stage_, params, rows)
      assert loss == expected[0], value
      jax.tree.map(np.testing.assert_array_equal, grads, expected[1])


def unpacked(batch) -> dict:
  """The same records, one a row, all in segment 1."""
  prefixes = quadruples(batch)
  rows = []
  for r in range(len(batch[prefixes[0] + 'tokens'])):
    for s in range(1, batch[prefixes[0] + 'segment_ids'][r].max() + 1):
      row = {}
      for prefix in prefixes:
        at = np.flatnonzero(batch[prefix + 'segment_ids'][r] == s)
        for name in ('tokens', 'loss_mask', 'positions', 'segment_ids'):
          column = batch[prefix + name][r]
          new = np.zeros_like(column)
          new[: len(at)] = 1 if name == 'segment_ids' else column[at]
          row[prefix + name] = new
      for name in ('margins', 'scores'):
        if name in batch:
          row[name] = np.zeros_like(batch[name][r])
          row[name][0] = batch[name][r, s - 1]
      rows.append(row)
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@EVERY
def test_packing_changes_nothing(case):
  stage_, params, batch = made(case)
  alone = unpacked(batch)
  assert len(next(iter(alone.values()))) > ROWS
  assert_close(gradient(stage_, params, alone), computed(case, 1, 1))


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


@EVERY
def test_no_array_is_captured_as_a_constant(case):
  stage_, params, batch = made(case)
  batch = prepared(case)
  first = next(iter(batch))

  def captures(params, batch, key):
    mean, metrics = stage_.loss(params, batch, key)
    kept = jnp.asarray(batch_before)[: len(batch[first])]
    return mean._replace(total=mean.total + kept.sum()), metrics

  batch_before = np.ones((ROWS, 17), np.float32)
  # First that it would be seen: 2 kB, behind grad and scan.
  caught = program_of_gradient(captures, params, batch)
  assert largest_constant(caught) >= batch_before.nbytes
  closed = program_of_gradient(stage_.loss, params, batch)
  assert largest_constant(closed) <= 256


@EVERY
def test_prepare_captures_neither_reference_nor_teacher(case):
  """They are arguments of the programs that `prepare` calls."""
  stage_, params, batch = made(case)
  stage_.prepare(params, batch, jax.random.key(0))
  closed = jax.make_jaxpr(
    lambda params, batch: tuple(
      stage_.prepare(params, batch, jax.random.key(0))
    )
  )(params, batch)
  inner = list(programs(closed))[1:]  # the outermost is this test's own
  assert bool(inner) == (stage_.prepare is not stage.as_it_came)
  for program in inner:
    constants = [*getattr(program, 'consts', ())]
    assert all(np.asarray(c).nbytes <= 256 for c in constants)


@EVERY
def test_activations_are_constrained_under_a_mesh(case):
  stage_, params, _ = made(case)
  batch = prepared(case)

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


def both(stage_):
  """`prepare`, then the loss."""

  def traced(params, batch):
    (part,) = stage_.prepare(params, batch, jax.random.key(0))
    return stage_.loss(params, part, jax.random.key(0))

  return traced


@EVERY
def test_the_columns_of_the_docstring_are_those_that_are_read(case):
  stage_, params, batch = made(case)
  # Opens a teacher, which cannot be done while tracing.
  stage_.prepare(params, batch, jax.random.key(0))
  jax.eval_shape(both(stage_), params, batch)
  assert columns(*case[:2]) == tuple(sorted(batch))
  for column in columns(*case[:2]):
    fewer = {k: v for k, v in batch.items() if k != column}
    with pytest.raises(KeyError, match=column):
      jax.eval_shape(both(stage_), params, fewer)


@EVERY
def test_the_columns_that_prepare_adds(case):
  """They are stated, have a row axis, and are kept where they are there."""
  stage_, params, batch = made(case)
  part = prepared(case)
  added = part.keys() - batch.keys()
  if stage_.prepare is stage.as_it_came:
    assert not added
    return
  assert added <= set(stated(case[0], 'Prepared(?: with \\w+)?'))
  assert set(stage_.kept) <= added
  assert all(len(part[name]) == ROWS for name in added)
  # Another start and other parameters: what is kept stays, to the bit.
  kept = {name: part[name] + 1 for name in stage_.kept}
  (again,) = stage_.prepare(
    jax.tree.map(lambda x: x * 2, params), batch | kept, jax.random.key(1)
  )
  for name in stage_.kept:
    assert again[name] is kept[name]


@EVERY
def test_what_prepare_adds_is_spread_over_devices(case):
  part = spread(case, 8)
  for name, column in part.items():
    shards = {shard.data.shape[0] for shard in column.addressable_shards}
    # A number that is the same in all rows may lie everywhere.
    assert shards == {ROWS // 8} or column.ndim == 1, name
  for name in part.keys() - made(case)[2].keys():
    np.testing.assert_allclose(
      np.asarray(part[name]), prepared(case)[name], rtol=1e-5, atol=1e-5
    )
