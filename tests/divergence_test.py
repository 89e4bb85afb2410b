"""Divergences by hand, stored parts of them, and chunks that change nothing."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_lm import cross_entropy, divergence
from tpu_lm.errors import UserError

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])


def kl(p, q):
  return float((p * np.log(p / q)).sum())


def between(kind, beta=0.5):
  return divergence.divergence(jnp.log(P), jnp.log(Q), kind, beta)


def test_which_direction_is_which():
  np.testing.assert_allclose(between('forward_kl'), kl(P, Q), rtol=1e-5)
  np.testing.assert_allclose(between('reverse_kl'), kl(Q, P), rtol=1e-5)
  middle = 0.3 * P + 0.7 * Q
  expected = 0.3 * kl(P, middle) + 0.7 * kl(Q, middle)
  np.testing.assert_allclose(between('gjsd', 0.3), expected, rtol=1e-5)


def test_gjsd_nears_forward_and_reverse_kl():
  e = 1e-3
  np.testing.assert_allclose(between('gjsd', e) / e, kl(P, Q), rtol=1e-2)
  np.testing.assert_allclose(between('gjsd', 1 - e) / e, kl(Q, P), rtol=1e-2)


def logits(seed=0, shape=(2, 5, 11)):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape) * 3, jnp.float32)


def test_the_rest_is_one_event():
  ids = jax.lax.top_k(logits(), 3)[1]
  found = np.exp(divergence.with_rest(logits(), ids))
  p = np.asarray(jax.nn.softmax(logits()))
  some = np.take_along_axis(p, np.asarray(ids), -1)
  np.testing.assert_allclose(found[..., :3], some, rtol=1e-5)
  np.testing.assert_allclose(found[..., 3], 1 - some.sum(-1), rtol=1e-4)


def test_the_rest_is_exact_where_next_to_nothing_is_left():
  sharp = jnp.array([[[40.0, 0.0, 0.0, 0.0]]])
  found = divergence.with_rest(sharp, jnp.array([[[0]]]))
  # 1 - p is 0 in float32; the log-probability of the rest is log 3 - 40.
  np.testing.assert_allclose(found[0, 0, 1], math.log(3) - 40, rtol=1e-6)


@pytest.mark.parametrize('kind', divergence.KINDS)
def test_stored_top_k_is_a_lower_bound_and_exact_with_all(kind):
  teacher, student = logits(1), logits(2)
  mask = jnp.ones(teacher.shape[:2], bool)

  def measured(top_k):
    measure = divergence.Measure(kind, 0.4, 1.7, top_k)
    return measure.between(measure.columns(teacher), student, mask)

  whole, parts = measured(0), [measured(k) for k in (1, 4, 8, 10)]
  np.testing.assert_allclose(parts[-1], whole, rtol=1e-4, atol=1e-6)
  for fewer, more in itertools.pairwise(parts):
    assert (fewer <= more + 1e-5).all()
  assert (parts[0] > 0).all()


@pytest.mark.parametrize('kind', divergence.KINDS)
def test_temperature_keeps_the_gradient_of_small_differences(kind):
  """T^2 times: for high T the gradient no longer depends on it (Hinton)."""
  teacher = logits(1) * 0.01
  mask = jnp.ones(teacher.shape[:2], bool)

  def slope(temperature):
    measure = divergence.Measure(kind, 0.5, temperature, 0)
    return jax.grad(lambda x: measure.between((teacher,), x, mask).sum())(
      logits(2) * 0.01
    )

  np.testing.assert_allclose(slope(4.0), slope(1.0), rtol=0, atol=3e-4)


@pytest.mark.parametrize('top_k', [0, 3])
@pytest.mark.parametrize('kind', divergence.KINDS)
def test_masked_positions_may_hold_anything(kind, top_k):
  measure = divergence.Measure(kind, 0.5, 2.0, top_k)
  mask = jnp.arange(5)[None] < jnp.array([[3], [5]])
  columns = measure.columns(logits(1))
  dirty = tuple(
    jnp.where(mask[..., None], x, jnp.nan if x.dtype == jnp.float32 else 99)
    for x in columns
  )

  def total(student, columns):
    return measure.between(columns, student, mask).sum()

  expected = jax.value_and_grad(total)(logits(2), columns)
  found = jax.value_and_grad(total)(logits(2), dirty)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert not found[1][0, 3:].any()


def test_a_student_that_is_its_teacher_has_no_gradient():
  mask = jnp.ones((2, 5), bool)
  for kind in divergence.KINDS:
    for top_k in (0, 3):
      measure = divergence.Measure(kind, 0.5, 2.0, top_k)
      columns = measure.columns(logits())
      value, slope = jax.value_and_grad(
        lambda x, m=measure, c=columns: m.between(c, x, mask).sum()
      )(logits())
      np.testing.assert_allclose(value, 0, atol=1e-5)
      np.testing.assert_allclose(slope, 0, atol=1e-5)


@pytest.mark.parametrize('most', [1, 3 * 2 * 11, 10**6])
def test_chunks_change_nothing(most, monkeypatch):
  monkeypatch.setattr(cross_entropy, '_LOGITS', most)
  head, x = logits(3, (11, 4)), logits(4, (2, 7, 4))
  targets = jnp.arange(14).reshape(2, 7) % 11

  def each(head, x, targets, mask):
    logps = divergence.picked_logps(x @ head.T, targets)
    return jnp.where(mask, logps, 0.0)  # what fills up the last chunk is 0

  def total(head, x):
    columns = x, targets, jnp.ones(targets.shape, bool)
    return divergence.row_sums(each, head, columns, 11)

  expected = divergence.picked_logps(x @ head.T, targets)
  np.testing.assert_allclose(total(head, x), expected.sum(1), rtol=1e-5)
  found = jax.grad(lambda *a: total(*a).sum(), (0, 1))(head, x)
  slopes = jax.grad(lambda *a: each(*a, targets, True).sum(), (0, 1))(head, x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    found,
    slopes,
  )


def test_no_temporary_is_as_large_as_all_logits():
  rows, length, dim, num_vocab = 4, 256, 8, 65536
  measure = divergence.Measure('gjsd', 0.5, 1.0, 4)

  def each(head, x, ids, logps):
    mask = jnp.ones(ids.shape[:2], bool)
    return measure.between((ids, logps), x @ head.T, mask)

  def total(head, x, ids, logps):
    return divergence.row_sums(each, head, (x, ids, logps), num_vocab).sum()

  shapes = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((num_vocab, dim), jnp.float32),
      ((rows, length, dim), jnp.float32),
      ((rows, length, 4), jnp.int32),
      ((rows, length, 5), jnp.float32),
    )
  ]
  compiled = jax.jit(jax.grad(total, (0, 1))).lower(*shapes).compile()
  whole = rows * length * num_vocab * 4
  assert compiled.memory_analysis().temp_size_in_bytes < whole / 2


@pytest.mark.parametrize(
  ('measure', 'message'),
  [
    (('kl', 0.5, 1.0, 0), r"stage\.divergence='kl': forward_kl"),
    (('gjsd', 0.0, 1.0, 0), r'stage\.beta=0\.0: above 0 and below 1'),
    (('gjsd', 0.5, 0.0, 0), r'stage\.temperature=0\.0'),
    (('gjsd', 0.5, 1.0, 64), r'stage\.top_k=64: below the 64 tokens'),
    (('gjsd', 0.5, 1.0, -1), r'stage\.top_k=-1'),
  ],
)
def test_mistakes_are_named(measure, message):
  with pytest.raises(UserError, match=message):
    divergence.Measure(*measure).check(64)
