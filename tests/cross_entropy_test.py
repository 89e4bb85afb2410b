"""The chunked loss equals the loss of whole logits, and holds less."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tpu_lm import cross_entropy, sharding

VOCAB = 61
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def inputs(rows=4, length=24, dim=16):
  """hidden_BLD, head_VD, targets_BL and ragged weights_BL."""
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(rows, length, dim)).astype(np.float32),
    rng.normal(size=(VOCAB, dim)).astype(np.float32),
    rng.integers(0, VOCAB, (rows, length)).astype(np.int32),
    (rng.random((rows, length)) * (rng.random((rows, length)) < 0.7)).astype(
      np.float32
    ),
  )


def whole_logits(hidden, head, soft_cap):
  logits = jnp.einsum('bld,vd->blv', hidden, head, precision='highest')
  return soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits


def whole(hidden, head, targets, weights, soft_cap=0.0, z_loss=0.0):
  """The same sum, the plain way."""
  logits = whole_logits(hidden, head, soft_cap)
  lse = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return (weights * (lse - picked + z_loss * lse**2)).sum()


def gradients(f, hidden, head, targets, weights):
  """Value and gradients for hidden, head and weights; the sum is scaled."""

  def loss(hidden, head, weights):
    # What has no weight is not looked at, nor the gradient for that weight.
    weights = jnp.where(weights == 0, 0.0, weights)
    return 0.3 * f(hidden, head, targets, weights)

  return jit(jax.value_and_grad(loss, (0, 1, 2)))(hidden, head, weights)


def assert_close(got, wanted):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('chunk', [0, 1, 7, 24])
@pytest.mark.parametrize(
  'options', [{}, {'soft_cap': 3.0}, {'soft_cap': 3.0, 'z_loss': 0.01}]
)
def test_mean_equals_whole_logits(chunk, options):
  args = inputs()

  def chunked(*args):
    return cross_entropy.mean(*args, chunk=chunk, **options)[0]

  exact = functools.partial(whole, **options)
  assert_close(gradients(chunked, *args), gradients(exact, *args))
  total, weight = cross_entropy.mean(*args, chunk=chunk, **options)
  np.testing.assert_allclose(total, exact(*args), rtol=1e-5)
  np.testing.assert_allclose(weight, args[3].sum(), rtol=1e-6)


def test_a_loss_computed_by_hand():
  # Logits 0 and ln 3: the second has probability 3/4.
  hidden = jnp.ones((1, 2, 1))
  head = jnp.array([[0.0], [np.log(3.0)]])
  total, weight = cross_entropy.mean(
    hidden, head, jnp.array([[1, 0]]), jnp.array([[1.0, 2.0]])
  )
  np.testing.assert_allclose(total, -np.log(3 / 4) - 2 * np.log(1 / 4), 1e-6)
  assert weight == 3.0


def test_what_has_no_weight_may_be_anything():
  hidden, head, targets, weights = inputs()
  free = weights == 0
  dirty = (
    np.where(free[..., None], np.nan, hidden),
    head,
    np.where(free, np.int32(2**30), targets),
    weights,
  )

  def chunked(*args):
    return cross_entropy.mean(*args, chunk=8)[0]

  clean = gradients(chunked, hidden, head, targets, weights)
  got = gradients(chunked, *dirty)
  jax.tree.map(np.testing.assert_array_equal, clean, got)
  assert np.isfinite(got[1][0]).all()


def test_a_target_outside_of_the_vocabulary_is_not_silent():
  hidden, head, targets, _ = inputs()
  targets[0, 0] = VOCAB
  ones = np.ones(targets.shape, np.float32)
  assert np.isnan(cross_entropy.mean(hidden, head, targets, ones)[0])
  logps = cross_entropy.token_logps(hidden, head, targets)
  assert np.isnan(logps[0, 0])
  assert np.isfinite(logps.ravel()[1:]).all()


@pytest.mark.parametrize('chunk', [0, 5, 24])
@pytest.mark.parametrize('soft_cap', [0.0, 3.0])
@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_token_logps_equal_whole_logits(chunk, soft_cap, temperature):
  args = inputs()
  targets = args[2]

  def chunked(hidden, head, targets):
    return cross_entropy.token_logps(
      hidden,
      head,
      targets,
      soft_cap=soft_cap,
      temperature=temperature,
      chunk=chunk,
    )

  def exact(hidden, head, targets):
    logits = whole_logits(hidden, head, soft_cap) / temperature
    logps = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]

  np.testing.assert_allclose(
    jit(chunked)(*args[:3]), exact(*args[:3]), atol=1e-5
  )

  # A loss that is no weighted sum: the square of each.
  def squares(f):
    return lambda h, w, t, weights: (weights * f(h, w, t) ** 2).sum()

  assert targets.max() < VOCAB
  assert_close(
    gradients(squares(chunked), *args), gradients(squares(exact), *args)
  )


def test_masked_token_logps_may_be_anything():
  hidden, head, targets, weights = inputs()
  mask = weights > 0

  def loss(hidden, head, targets):
    logps = cross_entropy.token_logps(
      hidden, head, targets, mask_BL=mask, chunk=8
    )
    return (logps**2).sum(), logps

  run = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  clean = run(hidden, head, targets)
  dirty = run(
    np.where(mask[..., None], hidden, np.nan),
    head,
    np.where(mask, targets, -5),
  )
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)
  assert np.abs(np.where(mask, 0.0, clean[0][1])).max() == 0.0


def temporaries(f, *shapes):
  compiled = jax.jit(f).lower(*shapes).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_saves_the_memory_of_the_logits():
  rows, length, dim, vocab = 2, 256, 64, 32_768
  shapes = (
    jax.ShapeDtypeStruct((rows, length, dim), jnp.float32),
    jax.ShapeDtypeStruct((vocab, dim), jnp.float32),
    jax.ShapeDtypeStruct((rows, length), jnp.int32),
    jax.ShapeDtypeStruct((rows, length), jnp.float32),
  )
  logits = rows * length * vocab * 4

  def chunked(*args):
    return cross_entropy.mean(*args)[0]

  def logps(hidden, head, targets, weights):
    return (cross_entropy.token_logps(hidden, head, targets) * weights).sum()

  most = temporaries(jax.value_and_grad(whole, (0, 1)), *shapes)
  for f in (chunked, logps):
    least = temporaries(jax.value_and_grad(f, (0, 1)), *shapes)
    assert most - least >= logits


def test_the_value_alone_computes_no_gradient():
  args = inputs(length=64, dim=64)

  def loss(hidden, head):
    return cross_entropy.mean(hidden, head, *args[2:], chunk=16)[0]

  def flops(f):
    return jax.jit(f).lower(*args[:2]).compile().cost_analysis()['flops']

  # One matmul instead of three.
  assert flops(loss) < 0.5 * flops(jax.value_and_grad(loss, (0, 1)))


def test_what_is_frozen_costs_no_gradient():
  args = inputs(length=64, dim=64)

  def loss(hidden, head):
    return cross_entropy.mean(hidden, head, *args[2:], chunk=16)[0]

  def measured(which):
    f = jax.jit(jax.grad(loss, which))
    flops = f.lower(*args[:2]).compile().cost_analysis()['flops']
    return f(*args[:2]), flops

  (hidden, head), both = measured((0, 1))
  value = jax.jit(loss).lower(*args[:2]).compile().cost_analysis()['flops']
  for which, expected in ((0, hidden), (1, head)):
    found, flops = measured(which)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # One matmul of the two that a gradient costs beside the logits.
    assert abs((flops - value) / (both - value) - 0.5) < 0.1


def test_the_sum_of_the_weights_alone_can_be_differentiated():
  args = inputs()

  def weight(weights):
    return cross_entropy.mean(*args[:3], weights)[1]

  np.testing.assert_array_equal(jax.grad(weight)(args[3]), 1.0)


@pytest.mark.parametrize(
  'sizes', [{'data': 2, 'fsdp': 2}, {'data': 2, 'sequence': 2}, {'tensor': 4}]
)
def test_is_the_same_on_a_mesh(sizes):
  args = inputs()

  def chunked(*args):
    return cross_entropy.mean(*args, chunk=5)[0]

  alone = gradients(chunked, *args)
  logps = cross_entropy.token_logps(*args[:3], chunk=5)
  mesh = tiny.mesh(**sizes)
  placed = sharding.put_batch({'t': args[2], 'w': args[3]}, mesh)
  with jax.set_mesh(mesh):
    spread = gradients(chunked, *args[:2], placed['t'], placed['w'])
    run = jit(functools.partial(cross_entropy.token_logps, chunk=5))
    spread_logps = run(*args[:2], placed['t'])
  assert_close(spread, alone)
  np.testing.assert_allclose(spread_logps, logps, atol=1e-5)


def test_reduces_the_gradient_of_the_head_once():
  """No collective stands inside the scan over chunks."""
  mesh = tiny.mesh(data=2, fsdp=2)
  hidden, head, targets, weights = inputs()

  def loss(hidden, head, targets, weights):
    return cross_entropy.mean(hidden, head, targets, weights, chunk=4)[0]

  batch = sharding.put_batch({'h': hidden, 't': targets, 'w': weights}, mesh)
  spec = jax.sharding.PartitionSpec('tensor', 'fsdp')
  head = jax.device_put(head, jax.sharding.NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(jax.value_and_grad(loss, (0, 1)))
      .lower(batch['h'], head, batch['t'], batch['w'])
      .compile()
    )
  bodies = [
    body
    for body in compiled.as_text().split('\n\n')
    if 'while/body' in body and not body.lstrip().startswith('ENTRY')
  ]
  assert bodies
  for body in bodies:
    assert 'all-reduce(' not in body
    assert 'all-gather(' not in body
