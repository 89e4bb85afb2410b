"""Every kernel agrees with attention written out for one query and one head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_lm.models import attention

SCALE = 0.3
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def inputs(length=150, keys=None, heads=4, groups=2, size=8, rows=2, seed=0):
  """q_BLHK, k_BSGK and v_BSGK with logits of some size."""
  rng = np.random.default_rng(seed)
  keys = keys or length
  shapes = [(rows, length, heads, size)] + [(rows, keys, groups, size)] * 2
  return [rng.normal(size=s).astype(np.float32) * 1.5 for s in shapes]


def packed(length, rows=2, first=1):
  """Segment ids: ragged documents, then padding; the last row has none."""
  ids = np.zeros((rows, length), np.int32)
  for r in range(rows):
    ends = np.array([0.2, 0.21, 0.7, 0.9 if r < rows - 1 else 1.0]) * length
    for segment, (a, b) in enumerate(
      zip([0, *ends[:-1]], ends, strict=True), 1
    ):
      ids[r, int(a) : int(b)] = first if segment == 1 else segment
  return ids


def reference(
  q, k, v, segments=None, positions=None, window=None, cap=0.0, causal=True
):
  """Whole masks and logits, in the plainest way."""
  length, heads, keys = q.shape[1], q.shape[2], k.shape[1]
  k = jnp.repeat(k, heads // k.shape[2], axis=2)
  v = jnp.repeat(v, heads // v.shape[2], axis=2)
  q_at, k_at = positions or (np.arange(length)[None], np.arange(keys)[None])
  gap = q_at[:, :, None] - k_at[:, None, :]
  seen = (gap >= 0) | (not causal)
  if window is not None:
    seen = seen & (gap < window)
  alive = True
  if segments is not None:
    of_keys = segments[1][:, None, :]
    same = segments[0][:, :, None] == of_keys
    seen = seen & (same | (of_keys == attention.SHARED))
    alive = (segments[0] != 0)[:, :, None, None]
  logits = SCALE * jnp.einsum('blhk,bshk->bhls', q, k, precision='highest')
  if cap:
    logits = cap * jnp.tanh(logits / cap)
  p = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
  out = jnp.einsum('bhls,bshk->blhk', p, v, precision='highest')
  return jnp.where(alive, out, 0.0)


def value_and_grads(f, args):
  """The result, and its gradients against a fixed random cotangent."""
  shape = args[0].shape
  pull = np.random.default_rng(1).normal(size=shape).astype(np.float32)

  def run(*args):
    out, back = jax.vjp(f, *args)
    return out, back(pull)

  return jit(run)(*args)


CASES = {
  'causal': {},
  'many_chunks': {'length': 600, 'segments': True},
  'one_chunk_exactly': {'length': 64},
  'shorter_than_a_chunk': {'length': 5},
  'one_head_a_group': {'heads': 2},
  'one_group': {'groups': 1},
  'segments': {'segments': True},
  'shared': {'segments': True, 'first': attention.SHARED},
  'window': {'window': 37},
  'window_of_one': {'window': 1},
  'window_longer_than_row': {'window': 1000},
  'window_of_several_chunks': {'window': 70, 'length': 200},
  'traced_window': {'window': 37, 'traced': True},
  'soft_cap': {'cap': 2.0},
  'all': {'segments': True, 'window': 20, 'cap': 2.0},
  'both_ways': {'causal': False, 'segments': True},
}


@pytest.mark.parametrize('implementation', ['chunked', 'xla'])
@pytest.mark.parametrize('case', CASES)
def test_agrees_with_reference_in_value_and_gradient(case, implementation):
  options = {'length': 150, 'heads': 4, 'groups': 2} | CASES[case]
  args = inputs(options['length'], None, options['heads'], options['groups'])
  cap, window = options.get('cap', 0.0), options.get('window')
  causal = options.get('causal', True)
  if implementation == 'xla' and cap:
    pytest.skip('has no soft cap')
  segments = None
  if options.get('segments'):
    first = options.get('first', 1)
    segments = (packed(options['length'], first=first),) * 2

  def attend(q, k, v):
    return attention.attend(
      q,
      k,
      v,
      segment_ids=segments,
      window=jnp.asarray(window) if options.get('traced') else window,
      soft_cap=cap,
      scale=SCALE,
      causal=causal,
      shares='first' in options,
      implementation=implementation,
    )

  def plain(q, k, v):
    return reference(q, k, v, segments, None, window, cap, causal)

  # -inf has no gradient in rows that see nothing: there are none of padding.
  expected = value_and_grads(plain, args)
  for got, wanted in zip(
    jax.tree.leaves(value_and_grads(attend, args)),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('implementation', ['chunked', 'xla'])
def test_padding_may_hold_nan(implementation):
  args = inputs()
  segments = packed(150)
  padding = segments == 0
  assert padding.any()

  def attend(q, k, v):
    return attention.attend(
      q,
      k,
      v,
      segment_ids=(segments, segments),
      scale=SCALE,
      implementation=implementation,
    )

  def poison(x):
    return np.where(padding[..., None, None], np.nan, x)

  clean = value_and_grads(attend, args)
  dirty = value_and_grads(attend, [poison(x) for x in args])
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)
  out, grads = dirty
  for x in (out, *grads):
    assert np.abs(np.asarray(x)[padding]).max() == 0.0

  # Nor may a NaN in the gradient of what stands at padding come through.
  def run(*args):
    out, back = jax.vjp(attend, *args)
    return back(jnp.where(padding[..., None, None], jnp.nan, out))

  assert all(np.isfinite(x).all() for x in jit(run)(*args))


@pytest.mark.parametrize('window', [None, 9])
def test_reads_a_cache_by_positions(window):
  """One query a row, at its own position, and slots that are not filled."""
  q, k, v = inputs(length=1, keys=40, rows=3)
  at = np.array([[0], [7], [31]])
  slots = np.arange(40)[None]
  free = slots > at
  k, v = (np.where(free[..., None, None], 1e9, x) for x in (k, v))
  out = jit(
    lambda q, k, v: attention.attend(
      q, k, v, positions=(at, slots), window=window, scale=SCALE
    )
  )(q, k, v)
  wanted = reference(q, k, v, positions=(at, slots), window=window)
  np.testing.assert_allclose(out, wanted, atol=1e-5, rtol=1e-5)


def test_rows_of_a_cache_equal_the_whole():
  q, k, v = inputs(length=90)
  whole = attention.attend(q, k, v, scale=SCALE)
  at = np.broadcast_to(np.arange(50, 90), (2, 40))
  part = attention.attend(
    q[:, 50:], k, v, positions=(at, np.arange(90)[None]), scale=SCALE
  )
  np.testing.assert_allclose(part, whole[:, 50:], atol=1e-5)


def test_16_bit_keeps_its_dtype_and_float32_softmax():
  args = inputs()
  halves = [jnp.asarray(x, jnp.bfloat16) for x in args]
  out, grads = value_and_grads(
    lambda *a: attention.attend(*a, scale=SCALE).astype(jnp.float32), halves
  )
  exact, exact_grads = value_and_grads(
    reference, [np.asarray(x, np.float32) for x in halves]
  )
  assert attention.attend(*halves, scale=SCALE).dtype == jnp.bfloat16
  np.testing.assert_allclose(out, exact, atol=0.03)
  for got, wanted in zip(grads, exact_grads, strict=True):
    assert got.dtype == jnp.bfloat16
    gap = np.abs(np.asarray(got, np.float32) - wanted).max()
    assert gap < 0.03 * np.abs(wanted).max()


def test_memory_grows_with_the_length_not_with_its_square():
  def temporaries(length, implementation):
    shapes = [
      jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)
      for heads in (4, 2, 2)
    ]

    def loss(q, k, v):
      def layer(q, _):  # masks must not be held for all layers either
        out = attention.attend(
          q, k, v, scale=SCALE, implementation=implementation
        )
        return q + out, None

      return jnp.square(jax.lax.scan(layer, q, None, length=2)[0]).sum()

    compiled = jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  square = 4 * 1280 * 1280 * 4  # float32 logits of four heads
  assert temporaries(1280, 'xla') > square
  long = temporaries(1280, 'chunked')
  assert long < 0.6 * square  # all chunks at once: 1.7
  assert long < 3 * temporaries(640, 'chunked')


def test_a_static_window_skips_whole_chunks():
  def flops(window):
    args = inputs(length=512)
    attend = functools.partial(attention.attend, scale=SCALE, window=window)
    return jit(attend).lower(*args).compile().cost_analysis()['flops']

  assert flops(32) < flops(None) / 2


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'implementation': 'flash'}, "implementation='flash'"),
    ({'implementation': 'xla', 'soft_cap': 3.0}, 'soft_cap'),
    ({'window': 4, 'causal': False}, 'window'),
  ],
)
def test_refuses_what_it_cannot_do(options, message):
  with pytest.raises(ValueError, match=message):
    attention.attend(*inputs(length=8), scale=SCALE, **options)


def test_refuses_heads_and_lengths_that_do_not_fit():
  with pytest.raises(ValueError, match='share'):
    attention.attend(*inputs(length=8, heads=3), scale=SCALE)
  with pytest.raises(ValueError, match='positions'):
    attention.attend(*inputs(length=8, keys=9), scale=SCALE)
