"""The network against a second one in numpy, and what must hold of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import models, weights
from tpu_lm.errors import UserError
from tpu_lm.models import remat, ring, rope, transformer

# Presets, and switches that no preset of this size turns on by itself.
VARIANTS = {
  'llama': ('llama', {'norm_eps': 1e-5}),
  'qwen2': ('qwen2', {}),
  'qwen3': ('qwen3', {}),
  'gemma2': ('gemma2', {'window': 5}),
  'gemma3': ('gemma3', {'window': 5, 'num_layers': 3,
                        'window_pattern': (1, 1, 0)}),
  'scaled': ('gemma3', {'window': 5, 'rope_scaling': 'linear',
                        'rope_factor': 4.0, 'window_pattern': (1, 0)}),
  'yarn': ('llama', {'rope_scaling': 'yarn', 'rope_factor': 4.0,
                     'rope_original_length': 64}),
  'window': ('llama', {'window': 3}),
  'wide heads': ('llama', {'head_dim': 12, 'query_scale': 0.5,
                           'num_kv_heads': 1}),
}  # fmt: skip


@functools.cache
def made(variant: str = 'qwen3'):
  """(model, params) with no parameter at zero."""
  name, options = VARIANTS[variant]
  model = tiny.model(name, **options)
  return model, tiny.params(model, scale=0.15)


@functools.cache
def compiled(model):
  return tiny.jit(
    lambda params, *inputs: model.apply({'params': params}, *inputs)
  )


def hidden(variant, tokens, positions=None, segments=None):
  model, params = made(variant)
  return np.asarray(compiled(model)(params, tokens, positions, segments))


@functools.cache
def fresh(name):
  """Parameters as they are before the first step."""
  return tiny.jit(tiny.model(name).init_params)(jax.random.key(0))


def tokens_of(rows=2, length=tiny.LENGTH, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, tiny.VOCAB, (rows, length)).astype(np.int32)


# The second network: one row, one head, one query at a time, in float64.


def rms(x, scale, config):
  scale = scale + 1.0 if config.norm_plus_one else scale
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale


def turn(x, position, config, slides):
  theta, scaling = config.rope_theta, config.scaling
  if slides and config.rope_local_theta:
    theta, scaling = config.rope_local_theta, rope.Scaling()
  frequencies, factor = rope.frequencies(len(x), theta, scaling)
  z = x[: len(x) // 2] + 1j * x[len(x) // 2 :]
  z = z * np.exp(1j * position * frequencies.astype(np.float64)) * factor
  return np.concatenate([z.real, z.imag])


def attention(x, p, config, window):
  h = rms(x, p['norm'], config)
  sums = {n: np.einsum('td,dhk->thk', h, p[n]) for n in 'qkv'}
  group = config.num_heads // config.kv_heads
  out = np.zeros((len(x), config.num_heads, config.head_size))
  for n in 'qkv':
    if config.qkv_bias:
      sums[n] = sums[n] + p[f'{n}_bias']
    if config.qk_norm and n != 'v':
      sums[n] = rms(sums[n], p[f'{n}_norm'], config)
  for n in 'qk':
    sums[n] = np.array(
      [
        [turn(head, t, config, window > 0) for head in heads]
        for t, heads in enumerate(sums[n])
      ]
    )
  scale = config.query_scale or config.head_size**-0.5
  for t in range(len(x)):
    seen = [s for s in range(t + 1) if not window or t - s < window]
    for i in range(config.num_heads):
      k, v = (sums[n][seen, i // group] for n in 'kv')
      score = k @ sums['q'][t, i] * scale
      if config.attention_soft_cap:
        cap = config.attention_soft_cap
        score = cap * np.tanh(score / cap)
      share = np.exp(score - score.max())
      out[t, i] = share / share.sum() @ v
  y = np.einsum('thk,hkd->td', out, p['o'])
  return rms(y, p['post_norm'], config) if config.post_norms else y


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mlp(x, p, config):
  h = rms(x, p['norm'], config)
  a, b = h @ p['gate'], h @ p['up']
  a = gelu(a) if config.activation == 'gelu' else a / (1 + np.exp(-a))
  y = (a * b) @ p['down']
  return rms(y, p['post_norm'], config) if config.post_norms else y


def reference(row, params, config):
  """Logits [L, V] of one row."""
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  x = params['embedding'][row]
  if config.scale_embedding:
    x = x * config.dim**0.5
  pattern = config.window_pattern
  for layer in range(config.num_layers):
    p = jax.tree.map(lambda q, n=layer: q[n], params['layers'])
    window = config.window if pattern[layer % len(pattern)] else 0
    x = x + attention(x, p['attention'], config, window)
    x = x + mlp(x, p['mlp'], config)
  x = rms(x, params['final_norm'], config)
  out = x @ params['embedding' if config.tied else 'head'].T
  cap = config.logit_soft_cap
  return cap * np.tanh(out / cap) if cap else out


@pytest.mark.parametrize('variant', VARIANTS)
def test_logits_are_those_of_the_reference(variant):
  model, params = made(variant)
  tokens = tokens_of()
  found = transformer.logits(model.config, params, hidden(variant, tokens))
  expected = [reference(row, params, model.config) for row in tokens]
  assert np.abs(expected).max() > 0.5
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_soft_caps_are_felt():
  """Caps so low that leaving them out is another network."""
  tokens = tokens_of()
  for change in ({'attention_soft_cap': 0.3}, {'logit_soft_cap': 0.3}):
    model = tiny.model('llama', **change)
    params = tiny.params(model, scale=0.15)
    x = compiled(model)(params, tokens)
    found = transformer.logits(model.config, params, x)
    expected = [reference(row, params, model.config) for row in tokens]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    free = dataclasses.replace(model.config, **dict.fromkeys(change, 0.0))
    without = [reference(row, params, free) for row in tokens]
    assert np.abs(np.array(without) - expected).max() > 0.01


def test_tied_models_have_no_head_and_untied_ones_read_it():
  assert 'head' not in made('qwen3')[1]
  _, params = made('llama')
  assert transformer.head(params) is params['head']
  assert transformer.head(made('qwen3')[1]) is made('qwen3')[1]['embedding']


@pytest.mark.parametrize('variant', ['llama', 'gemma3'])
def test_a_token_changes_nothing_before_itself(variant):
  tokens = tokens_of()
  other = tokens.copy()
  other[:, 9] = (other[:, 9] + 1) % tiny.VOCAB
  a, b = hidden(variant, tokens), hidden(variant, other)
  np.testing.assert_array_equal(a[:, :9], b[:, :9])
  assert (np.abs(a[:, 9:] - b[:, 9:]).max(axis=-1) > 1e-6).all()


def test_sliding_layers_see_window_tokens_each():
  # Two layers of window 3: token t reaches t + 2 (3 - 1) and no further.
  tokens = tokens_of()
  other = tokens.copy()
  other[:, 4] = (other[:, 4] + 1) % tiny.VOCAB
  change = np.abs(hidden('window', tokens) - hidden('window', other))
  change = change.max(axis=(0, 2))
  assert (change[4:9] > 0).all()
  np.testing.assert_array_equal(change[9:], 0)


@pytest.mark.parametrize('variant', ['llama', 'qwen3', 'gemma2', 'gemma3'])
def test_a_packed_document_is_the_document_alone(variant):
  tokens, sizes = tokens_of(rows=1), (5, 7, 3)  # and one slot of padding
  ends = np.cumsum(sizes)
  segments, positions = np.zeros((2, 1, tiny.LENGTH), np.int32)
  for n, (size, end) in enumerate(zip(sizes, ends, strict=True)):
    segments[0, end - size : end] = n + 1
    positions[0, end - size : end] = np.arange(size)
  packed = hidden(variant, tokens, positions, segments)[0]
  for size, end in zip(sizes, ends, strict=True):
    alone = np.zeros_like(tokens)
    alone[0, :size] = tokens[0, end - size : end]
    found = hidden(variant, alone)[0, :size]
    np.testing.assert_allclose(packed[end - size : end], found, atol=1e-5)
  # Without segments they do leak, or this would show nothing.
  leaking = hidden(variant, tokens, positions)[0]
  assert np.abs(leaking - packed)[5:12].max() > 1e-3


def test_garbage_in_padding_changes_not_one_bit():
  tokens = tokens_of()
  segments = np.ones_like(tokens)
  segments[:, 11:] = 0
  positions = np.broadcast_to(np.arange(tiny.LENGTH), tokens.shape)
  clean = hidden('qwen3', tokens, positions, segments)
  for value in (3, tiny.VOCAB, 2**31 - 1, -1):
    dirty = tokens.copy()
    dirty[:, 11:] = value
    found = hidden('qwen3', dirty, positions, segments)
    np.testing.assert_array_equal(found[:, :11], clean[:, :11])
    assert np.isfinite(found).all()


@pytest.mark.parametrize('variant', ['llama', 'gemma2', 'gemma3', 'window'])
def test_decoding_with_a_cache_is_the_whole_forward_pass(variant):
  """Rows of different lengths: each has its own positions."""
  model, params = made(variant)
  tokens, starts = tokens_of(rows=2), np.array([6, 4])
  whole = hidden(variant, tokens)

  @tiny.jit
  def step(params, tokens, positions, cache):
    return model.apply({'params': params}, tokens, positions, None, cache)

  cache = ring.init_cache(model.config, 2, tiny.LENGTH + 2)
  positions = np.broadcast_to(np.arange(6), (2, 6))
  x, cache = step(params, tokens[:, :6], positions, cache)
  np.testing.assert_allclose(x, whole[:, :6], atol=1e-5)
  for i in range(5):  # row 1 decodes over what its prompt's padding left
    at = starts + i
    x, cache = step(params, tokens[[0, 1], at][:, None], at[:, None], cache)
    np.testing.assert_allclose(x[:, 0], whole[[0, 1], at], atol=1e-5)


def test_the_scan_is_a_loop_over_slices_of_the_stack():
  model, params = made('qwen3')
  config, tokens = model.config, tokens_of()
  x = params['embedding'][tokens]
  positions = np.broadcast_to(np.arange(tiny.LENGTH), tokens.shape)
  angles = rope.sinusoids(positions, config.head_size, config.rope_theta)

  @tiny.jit
  def layer(p, x):
    return transformer.Layer(config).apply(
      {'params': p}, x, (None, None), positions, None, (angles, angles)
    )[0]

  for n in range(config.num_layers):
    x = layer(jax.tree.map(lambda p, n=n: p[n], params['layers']), x)
  x = transformer.rms_norm(x, params['final_norm'], config.norm_eps, False)
  np.testing.assert_allclose(x, hidden('qwen3', tokens), atol=1e-6)


def test_unrolling_and_remat_change_no_gradient():
  model, params = made('qwen3')
  tokens = tokens_of()

  def gradient(**options):
    config = dataclasses.replace(model.config, **options)
    net = transformer.Transformer(config)

    def loss(params):
      return (net.apply({'params': params}, tokens) ** 3).sum()

    return tiny.jit(jax.grad(loss))(params)

  plain = gradient()
  policies = [{'remat': name} for name in remat.POLICIES[1:]]
  for options in (*policies, {'unroll': 2}):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, atol=1e-5 * np.abs(b).max()
      ),
      gradient(**options),
      plain,
    )


def test_remat_keeps_less():
  """What is computed again shows as more products in the program."""
  model, params = made('qwen3')
  counts = {}
  for name in remat.POLICIES:
    config = dataclasses.replace(model.config, remat=name)
    net = transformer.Transformer(config)
    grad = jax.grad(lambda p, n=net: n.apply({'params': p}, tokens_of()).sum())
    counts[name] = str(jax.make_jaxpr(grad)(params)).count('dot_general')
  assert counts['none'] < counts['dots'] < counts['full']
  # Projections and logits of attention, then its kernel, run but once.
  assert counts['none'] < counts['qkv'] < counts['attention'] < counts['full']
  assert counts['offload'] == counts['full']  # on a CPU there is no other place


def test_bfloat16_keeps_parameters_and_logits_in_float32():
  model = tiny.model('qwen3', dtype='bfloat16')
  shapes = jax.eval_shape(model.init_params, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {
    jnp.dtype('float32')
  }
  params, tokens = made('qwen3')[1], tokens_of()
  x = compiled(model)(params, tokens)
  assert x.dtype == jnp.bfloat16
  logits = transformer.logits(model.config, params, x)
  assert logits.dtype == jnp.float32
  exact = transformer.logits(model.config, params, hidden('qwen3', tokens))
  np.testing.assert_allclose(logits, exact, atol=0.1)


def test_a_fresh_model_predicts_evenly():
  """Blocks add nothing at first, and the first loss is near log V."""
  model = tiny.model('qwen3')
  params = fresh('qwen3')
  for name, part in (('attention', 'o'), ('mlp', 'down')):
    assert not np.asarray(params['layers'][name][part]).any()
  logits = transformer.logits(
    model.config, params, compiled(model)(params, tokens_of())
  )
  spread = jax.nn.log_softmax(logits) + np.log(tiny.VOCAB)
  assert np.abs(spread).max() < 1
  assert np.asarray(params['layers']['attention']['q']).std() == pytest.approx(
    0.02, rel=0.1
  )
  gemma = fresh('gemma3')
  assert not np.asarray(gemma['final_norm']).any()  # 1 + w


def test_layers_do_not_start_alike():
  params = fresh('qwen3')
  q = np.asarray(params['layers']['attention']['q'])
  assert not np.array_equal(q[0], q[1])


def test_size_of_the_program_does_not_grow_with_depth():
  def size(num_layers):
    model = tiny.model('gemma3', num_layers=num_layers, window=5)
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    return len(
      str(
        jax.make_jaxpr(lambda p: model.apply({'params': p}, tokens_of()))(
          shapes
        )
      ).splitlines()
    )

  assert size(24) == size(6)


# Mistakes.


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_layers': 0}, r'model\.num_layers=0: must be at least 1'),
    ({'dim': -4}, r'model\.dim=-4'),
    ({'hidden_dim': 0}, r'model\.hidden_dim=0'),
    ({'num_heads': 0}, r'model\.num_heads=0'),
    ({'num_heads': 5}, r'model\.num_heads=5: must divide model\.dim=32'),
    ({'num_kv_heads': 3}, r'model\.num_kv_heads=3: does not divide'),
    ({'num_kv_heads': -1}, r'model\.num_kv_heads=-1'),
    ({'head_dim': 7}, r'model\.head_dim=7: must be even'),
    ({'dim': 36, 'num_heads': 4}, r'model\.head_dim=0: must be even'),
    ({'window': -1}, r'model\.window=-1'),
    ({'window_pattern': ()}, r'model\.window_pattern=\(\)'),
    ({'activation': 'relu'}, r"model\.activation='relu': choose .*'silu'"),
    ({'remat': 'some'}, r"model\.remat='some'.*'dots'"),
    ({'dtype': 'float8'}, r"model\.dtype='float8'.*'bfloat16'"),
    ({'attention': 'magic'}, r"model\.attention='magic'"),
    ({'rope_scaling': 'ntk'}, r"model\.rope_scaling='ntk'.*'yarn'"),
    ({'rope_scaling': 'yarn'}, r'model\.rope_original_length=0: yarn needs'),
    ({'rope_scaling': 'linear', 'rope_factor': 0.0}, r'model\.rope_factor=0'),
    ({'rope_theta': 0.0}, r'model\.rope_theta=0\.0'),
    ({'rope_theta': -1.0}, r'model\.rope_theta=-1\.0'),
    ({'rope_local_theta': -1.0}, r'model\.rope_local_theta=-1\.0'),
    ({'norm_eps': -1e-6}, r'model\.norm_eps=-1e-06'),
    ({'init_std': -0.02}, r'model\.init_std=-0\.02'),
    ({'logit_soft_cap': -30.0}, r'model\.logit_soft_cap=-30\.0'),
    ({'attention_soft_cap': -1.0}, r'model\.attention_soft_cap=-1\.0'),
    ({'query_scale': -1.0}, r'model\.query_scale=-1\.0'),
    ({'vocab_size': 63}, r'model\.vocab_size=63: the tokenizer has 64'),
    ({'max_length': -5}, r'model\.max_length=-5'),
  ],
)
def test_a_shape_that_cannot_be_is_refused(options, message):
  with pytest.raises(UserError, match=message):
    tiny.model('llama', **options)


def test_an_unknown_family_names_the_nearest():
  with pytest.raises(UserError, match=r"model_name='qwen33'.*'qwen3'"):
    models.make('qwen33', {}, 64, 16)
  with pytest.raises(UserError, match='model_name'):
    models.make('rope', {}, 64, 16)  # a file of the folder, but no family


def test_every_parameter_is_used():
  """No leaf that the network makes and then forgets."""
  for variant in ('qwen2', 'gemma2', 'gemma3'):
    model, params = made(variant)
    jaxpr = jax.make_jaxpr(
      lambda p, m=model: transformer.logits(
        m.config, p, m.apply({'params': p}, tokens_of())
      )
    )(params)
    used = {id(v) for e in jaxpr.jaxpr.eqns for v in e.invars}
    assert all(id(v) in used for v in jaxpr.jaxpr.invars)
    assert weights.count(params) > 0
