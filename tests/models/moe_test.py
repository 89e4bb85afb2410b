"""Experts against every expert on every token, and numbers made by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import auxiliary, flops, models, optim, stage, train, weights
from tpu_lm import config as configs
from tpu_lm.errors import UserError
from tpu_lm.generate import engine
from tpu_lm.generate.sampler import Sampler
from tpu_lm.models import grouped, moe, ring, transformer

SMALL = {'num_layers': 1, 'dim': 8, 'num_heads': 2, 'num_kv_heads': 1,
         'hidden_dim': 12, 'num_experts': 4, 'experts_per_token': 2,
         'expert_hidden_dim': 6}  # fmt: skip
VARIANTS = {
  'mixtral': {},
  'one of four': {'experts_per_token': 1},
  'as they are': {'renormalise': False},
  'sigmoid': {'router': 'sigmoid', 'router_scale': 2.5},
  'biased': {'router': 'sigmoid', 'router_bias': True, 'renormalise': False},
  'shared': {'shared_experts': 2, 'activation': 'gelu'},
  'all of them': {'experts_per_token': 4, 'post_norms': True},
}


def block(**options):
  """(module, its parameters)."""
  model = models.make('llama', SMALL | options, tiny.VOCAB, tiny.LENGTH)
  params = tiny.params(model, 0.7)['layers']['moe']
  return moe.Moe(model.config), jax.tree.map(lambda x: x[0], params)


def inputs(rows=3, length=tiny.LENGTH, dim=8):
  """(x_BLD, segment ids) with padding."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(rows, length, dim)).astype(np.float32)
  ids = np.ones((rows, length), np.int32)
  ids[0, 10:], ids[2, 7:12], ids[2, 12:] = 0, 2, 0
  return x, ids


def applied(module, params, x, ids, drops=True):
  return tiny.jit(
    lambda p, x: module.apply({'params': p}, x, ids, drops=drops)[0]
  )(params, x)


def rms(x, scale, config):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale


def feed_forward(h, gate, up, down, config):
  a = h @ gate
  if config.activation == 'gelu':
    a = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
  else:
    a = a / (1 + np.exp(-a))
  return (a * (h @ up)) @ down


def weighed(h, p, config):
  """What one token gives each expert."""
  logits = h @ p['router']
  scores = np.exp(logits - logits.max())
  scores /= scores.sum()
  if config.router == 'sigmoid':
    scores = 1 / (1 + np.exp(-logits))
  ranks = scores + p['router_bias'] if config.router_bias else scores
  chosen = np.argsort(-ranks)[: config.experts_per_token]
  found = np.zeros(config.num_experts)
  found[chosen] = scores[chosen]
  if config.renormalise:
    found /= found.sum()
  return found * config.router_scale


def reference(x, ids, params, config):
  """Every expert on every token, in float64."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  y = np.zeros(x.shape)
  for at in zip(*np.nonzero(ids), strict=True):
    h = rms(x[at].astype(np.float64), p['norm'], config)
    share = weighed(h, p, config)
    for e in range(config.num_experts):
      matrices = (p[name][e] for name in ('gate', 'up', 'down'))
      y[at] += share[e] * feed_forward(h, *matrices, config)
    if config.shared_experts:
      matrices = (p[f'shared_{name}'] for name in ('gate', 'up', 'down'))
      y[at] += feed_forward(h, *matrices, config)
    if config.post_norms:
      y[at] = rms(y[at], p['post_norm'], config)
  return y


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('form', ['dropless', 'capacity'])
def test_both_forms_are_every_expert_on_every_token(variant, form):
  options = VARIANTS[variant] | {'moe_form': form, 'capacity_factor': 9.0}
  module, params = block(**options)
  x, ids = inputs()
  expected = reference(x, ids, params, module.config)
  assert np.abs(expected).max() > 0.3
  found = applied(module, params, x, ids)
  np.testing.assert_allclose(
    found, expected, rtol=0, atol=1e-6 * np.abs(expected).max()
  )


def routed(logits, **options):
  """(ids, weights) of one token whose router sees these logits."""
  config = block(**options)[0].config
  bias_E = None
  if config.router_bias:  # lifts the last expert
    bias_E = jnp.array([0.0, 0.0, 0.0, 1.0])
  logits_BLE = jnp.array(logits)[None, None]
  found = moe.routed(config, logits_BLE, bias_E, jnp.ones((1, 1), bool))
  return found.ids_BLK[0, 0].tolist(), found.gates_BLK[0, 0].tolist()


def test_routing_by_hand():
  e = np.exp(1.0)
  logits = [0.0, 2.0, 1.0, -1.0]
  ids, gates = routed(logits)
  assert ids == [1, 2]
  assert gates == pytest.approx([e / (e + 1), 1 / (e + 1)])
  ids, gates = routed(logits, renormalise=False)
  total = 1 + e**2 + e + 1 / e
  assert gates == pytest.approx([e**2 / total, e / total])
  high, low = 1 / (1 + e**-2), 1 / (1 + e**-1)
  ids, gates = routed(logits, router='sigmoid', router_scale=2.0)
  assert gates == pytest.approx(
    [2 * high / (high + low), 2 * low / (high + low)]
  )
  # The bias lifts the last expert to the top, and its weight not at all.
  ids, gates = routed(
    logits, router='sigmoid', router_bias=True, renormalise=False
  )
  assert ids == [3, 1]
  assert gates == pytest.approx([1 / (1 + e), high])


@pytest.mark.parametrize('size', [0, 4, 64])
def test_groups_have_the_gradient_of_every_expert_on_every_token(size):
  rng = np.random.default_rng(3)
  h, gates = rng.normal(size=(20, 8)), rng.uniform(size=(20, 2))
  ids = np.array([rng.permutation(5)[:2] for _ in range(20)])  # 4: not here
  ids[7] = 4
  matrices = [rng.normal(size=s) for s in ((4, 8, 6), (4, 8, 6), (4, 6, 8))]
  given = jax.tree.map(jnp.float32, (h, gates, tuple(matrices)))

  def every(h, gates, matrices):
    gate, up, down = matrices
    a = jax.nn.silu(jnp.einsum('td,edf->etf', h, gate))
    y = jnp.einsum('etf,efd->etd', a * jnp.einsum('td,edf->etf', h, up), down)
    share = (gates[..., None] * (ids[..., None] == jnp.arange(4))).sum(1)
    return jnp.einsum('etd,te->td', y, share)

  def ours(h, gates, matrices):
    return grouped.weighed(h, ids, gates, matrices, jax.nn.silu, size)

  cotangent = jnp.float32(rng.normal(size=h.shape))
  results = [
    tiny.jit(lambda *x, f=f: (f(*x), jax.vjp(f, *x)[1](cotangent)))(*given)
    for f in (ours, every)
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max()),
    *results,
  )


@pytest.mark.parametrize('turned', [False, True])
def test_the_kernel_for_tpus_has_the_gradient_of_each_product(turned):
  rng = np.random.default_rng(0)
  x, grad = (jnp.float32(rng.normal(size=(256, n))) for n in (16, 24))
  weight = jnp.float32(rng.normal(size=(4, 16, 24)))
  sizes = jnp.array([100, 0, 60, 30])  # the rest is of none
  given = weight.swapaxes(1, 2) if turned else weight
  y, pull = jax.vjp(
    lambda x, w: grouped.by_kernel(x, w, sizes, turned, True), x, given
  )
  x_grad, weight_grad = pull(grad)
  if turned:
    weight_grad = weight_grad.swapaxes(1, 2)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5 * 20)
  ends = np.cumsum([0, *sizes])
  for e, (start, end) in enumerate(itertools.pairwise(ends)):
    close(y[start:end], x[start:end] @ weight[e])
    close(x_grad[start:end], grad[start:end] @ weight[e].T)
    close(weight_grad[e], x[start:end].T @ grad[start:end])


def test_padding_may_be_anything_and_takes_no_room():
  x, ids = inputs()
  for form in ('dropless', 'capacity'):
    module, params = block(moe_form=form, capacity_factor=0.5)
    clean = applied(module, params, x, ids)
    dirty = np.where(ids[..., None] == 0, np.nan, x)
    found = applied(module, params, dirty, ids)
    np.testing.assert_array_equal(found[ids > 0], clean[ids > 0])
    assert np.isfinite(found).all()
    last = x.copy()  # padding before what counts, too
    last[0], shifted = np.roll(x[0], 6, 0), ids.copy()
    shifted[0] = np.roll(ids[0], 6)
    np.testing.assert_allclose(
      applied(module, params, last, shifted)[0, 6:], clean[0, :10], atol=1e-6
    )


def collected(module, params, x, ids):
  with auxiliary.collected():
    return module.apply({'params': params}, x, ids, drops=True)


def test_what_a_full_expert_refuses_is_dropped_and_counted():
  module, params = block(
    experts_per_token=1, moe_form='capacity', capacity_factor=1.0
  )
  x = np.ones((2, 8, 8), np.float32)  # all go to one expert, with room for 2
  ids = np.ones((2, 8), np.int32)
  ids[1, 0] = 0
  y, figures = collected(module, params, x, ids)
  kept = np.abs(y).max(-1) > 0
  np.testing.assert_array_equal(np.flatnonzero(kept[0]), [0, 1])
  np.testing.assert_array_equal(np.flatnonzero(kept[1]), [1, 2])
  assert tuple(map(int, figures['dropped_share'])) == (6 + 5, 8 + 7)
  # Decoding drops nothing.
  assert np.abs(applied(module, params, x, ids, drops=False))[0].max(-1).all()


def test_no_token_depends_on_a_later_one():
  module, params = block(moe_form='capacity', capacity_factor=0.5)
  x, ids = inputs()[0], np.ones((3, tiny.LENGTH), np.int32)
  other = x.copy()
  other[:, 9:] = -other[:, 9:]
  a, b = (applied(module, params, given, ids) for given in (x, other))
  np.testing.assert_array_equal(a[:, :9], b[:, :9])


def test_figures_by_hand():
  module, params = block(experts_per_token=1, norm_eps=1e-12)
  # Three tokens, to experts 0, 0 and 1; the norm doubles what it is given.
  params = params | {'router': np.eye(8, 4, dtype=np.float32)}
  params['norm'] = np.full(8, 2.0, np.float32)
  x = np.zeros((1, 4, 8), np.float32)
  x[0, [0, 1, 2, 3], [0, 0, 1, 2]] = 1
  size = 2 * np.sqrt(8)  # of a token whose root mean square is 1
  _, figures = collected(module, params, x, np.array([[1, 1, 2, 0]]))
  means = {name: float(a / b) for name, (a, b) in figures.items()}
  total = np.exp(size) + 3
  high, low = np.exp(size) / total, 1 / total
  share, score = [2 / 3, 1 / 3], [(2 * high + low) / 3, (high + 2 * low) / 3]
  assert means == {
    'balance_loss': pytest.approx(4 * np.dot(share, score), rel=1e-5),
    'router_z_loss': pytest.approx(np.log(total) ** 2, rel=1e-5),
    'expert_load': pytest.approx(4 * 2 / 3, rel=1e-5),
  }
  # Even scores: the smallest balance loss, however the choices fall.
  params['router'] = np.zeros((8, 4), np.float32)
  _, figures = collected(module, params, x, np.array([[1, 1, 2, 0]]))
  assert float(figures['balance_loss'][0]) == pytest.approx(3)


# In training.

BIASED = tiny.MOE | {'router_bias': True, 'router': 'sigmoid'}
BATCH, KEY = tiny.batch(8), jax.random.key(0)


@functools.cache
def model_of(**options):
  model = tiny.model('qwen3', **(BIASED | options))
  return model, jax.tree.map(jnp.asarray, tiny.params(model))


def gradient(microbatches=1, **options):
  """(gradients, objective, metrics), divided."""
  model, params = model_of(**options)
  loss = stage.make('pretrain', model, lambda: params, {}).loss
  grads, mean, metrics = tiny.jit(
    lambda p: train.summed_gradients(
      loss, p, jax.tree.map(lambda _: None, p), BATCH, KEY, microbatches
    )
  )(params)
  means = {name: float(m.total / m.weight) for name, m in metrics.items()}
  grads = jax.tree.map(lambda g: np.asarray(g / mean.weight), grads)
  return grads, float(mean.total / mean.weight), means


def test_the_objective_is_the_loss_and_coefficients_times_means():
  _, plain, means = gradient()
  assert means['balance_loss'] > 0.9
  assert means['expert_load'] > 1
  grads, found, again = gradient(balance_loss=0.3, router_z_loss=0.05)
  added = 0.3 * means['balance_loss'] + 0.05 * means['router_z_loss']
  assert found == pytest.approx(plain + added, rel=1e-6)
  assert again == pytest.approx(means)
  model, params = model_of(balance_loss=0.3, router_z_loss=0.05)
  loss = stage.make('pretrain', model, lambda: params, {}).loss
  router = grads['layers']['moe']['router']
  assert np.abs(router).max() > 1e-3

  @tiny.jit
  def objective(step):
    layers = params['layers']
    part = layers['moe'] | {'router': layers['moe']['router'] - step * router}
    moved = params | {'layers': layers | {'moe': part}}
    with auxiliary.collected() as terms:
      mean, _ = loss(moved, BATCH, KEY)
    return (mean.total + auxiliary.objective(terms, mean.weight)) / mean.weight

  # Central difference; a choice that flips would be a jump.
  slope = (objective(-0.01) - objective(0.01)) / 0.02
  assert float(slope) == pytest.approx(float((router**2).sum()), rel=0.02)


def test_microbatches_weigh_their_means_as_their_losses():
  parts = []
  model, params = model_of()
  loss = stage.make('pretrain', model, lambda: params, {}).loss
  for first in (0, 1):  # row r goes to microbatch r % 2
    with auxiliary.collected() as terms:
      mean, _ = loss(params, {k: v[first::2] for k, v in BATCH.items()}, None)
    term = terms['balance_loss']
    parts.append((mean.weight, term.total / term.weight))
  weight, value = np.array(parts).T
  expected = (weight * value).sum() / weight.sum()
  _, plain, _ = gradient(2)
  _, found, _ = gradient(2, balance_loss=1.0)
  assert found - plain == pytest.approx(expected, rel=1e-4)
  assert value[0] != pytest.approx(value[1], rel=1e-4)


def test_nothing_is_added_where_nobody_collects():
  model, params = model_of(balance_loss=1.0)

  def program():
    return str(
      jax.make_jaxpr(lambda p: stage.hidden_states(model, p, BATCH))(params)
    )

  alone = program()
  with auxiliary.collected() as terms:
    assert program() != alone
  assert set(terms) == {'balance_loss', 'router_z_loss', 'expert_load'}


def test_microbatches_change_no_gradient_of_the_dropless_form():
  one, four = (gradient(m)[0] for m in (1, 4))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
    four,
    one,
  )


def updated(clip=1.0, loss_scale=1.0, **options):
  """(router_bias before and after an update, loads, metrics)."""
  section = configs.base().optimizer
  section.update(warmup=0, balance_rate=0.01, clip=clip, **options)
  tx, schedule = optim.make(section, 10)
  model, params = model_of()
  made = stage.make('pretrain', model, lambda: params, {}).loss

  def loss(params, batch, key):
    mean, metrics = made(params, batch, key)
    return mean._replace(total=mean.total * loss_scale), metrics

  frozen = jax.tree.map(lambda _: None, params)
  update = tiny.jit(
    train.make_update(
      loss, tx, schedule, microbatches=2, clip=clip, spike_factor=0.0
    )
  )
  state, metrics = update(train.init(params, tx, 4), frozen, BATCH, KEY)
  excess = gradient()[0]['layers']['moe']['router_bias']
  before = params['layers']['moe']['router_bias']
  return before, state.params['layers']['moe']['router_bias'], excess, metrics


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'lion', 'muon'])
def test_the_bias_of_a_router_moves_against_the_load(name):
  before, after, excess, _ = updated(name=name)
  assert np.abs(excess).max() > 0
  np.testing.assert_allclose(after - before, -0.01 * np.sign(excess), atol=1e-7)
  np.testing.assert_allclose(excess.sum(-1), 0, atol=1e-5)


def test_the_loads_of_the_bias_are_those_of_the_tokens():
  excess = gradient()[0]['layers']['moe']['router_bias']
  _, _, means = gradient()
  weight = float(stage.target_weights(BATCH).sum())
  tokens = (BATCH['segment_ids'][:, :-1] > 0).sum()
  loads = excess * weight + tokens * 2 / 4  # two choices, four experts
  np.testing.assert_allclose(loads, np.round(loads), atol=1e-3)
  assert loads.max(-1).mean() / (tokens / 2) == pytest.approx(
    means['expert_load'], rel=1e-5
  )


@pytest.mark.slow
def test_the_bias_is_no_part_of_the_norm_and_stays_in_skipped_steps():
  grads = gradient()[0]
  norm = updated(clip=1e-9)[3]['gradient_norm']
  grads['layers']['moe'].pop('router_bias')
  total = sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads))
  assert float(norm) == pytest.approx(total**0.5, rel=1e-5)
  before, after, excess, _ = updated(clip=1e-9)  # no matter how it is clipped
  np.testing.assert_allclose(after - before, -0.01 * np.sign(excess), atol=1e-7)
  before, after, _, metrics = updated(loss_scale=np.nan)
  assert int(metrics['skipped']) == 1
  np.testing.assert_array_equal(before, after)


def test_adapters_leave_the_bias_as_it_is():
  params = model_of()[1]
  adapted = weights.transform(params, 'lora', jax.random.key(0))
  trainable, frozen = weights.partition(adapted, '')
  assert trainable['layers']['moe']['router_bias'] is None
  assert frozen['layers']['moe']['router_bias'] is not None


def test_transforms_hold_shared_experts_and_leave_the_others_plain():
  _, params = model_of(shared_experts=1)
  found = weights.transform(
    params, 'nf4, lora(targets="moe")', jax.random.key(0)
  )['layers']['moe']
  assert isinstance(found['shared_up'], weights.Lora)
  assert isinstance(found['up'], jax.Array)


# As a network.


def test_decoding_is_the_whole_forward_pass():
  model, params = model_of(num_layers=2, shared_experts=1)
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, tiny.VOCAB, (2, 9)).astype(np.int32)
  whole = model.apply({'params': params}, tokens)
  cache = ring.init_cache(model.config, 2, 12)
  step = tiny.jit(
    lambda *inputs: model.apply(
      {'params': params}, inputs[0], inputs[1], None, inputs[2]
    )
  )
  positions = np.broadcast_to(np.arange(9), (2, 9))
  x, cache = step(tokens[:, :6], positions[:, :6], cache)
  np.testing.assert_allclose(x, whole[:, :6], atol=1e-5)
  for t in range(6, 9):
    x, cache = step(tokens[:, t : t + 1], positions[:, t : t + 1], cache)
    np.testing.assert_allclose(x[:, 0], whole[:, t], atol=1e-5)


@pytest.mark.parametrize('form', ['dropless', 'capacity'])
def test_generation_is_greedy_search_by_the_forward_pass(form):
  model, params = model_of(moe_form=form, capacity_factor=4.0)
  prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5]]
  found = engine.generate(model, params, prompts, 4, Sampler(temperature=0.0))
  for prompt, one in zip(prompts, found, strict=True):
    row = prompt + one.tokens
    hidden = model.apply({'params': params}, np.array([row]))
    logits = transformer.logits(model.config, params, hidden)[0]
    best = np.argmax(logits, -1)[len(prompt) - 1 : -1]
    assert best.tolist() == one.tokens


def test_active_parameters_are_what_a_token_goes_through():
  mixtral = transformer.Config(
    vocab_size=32000, num_layers=32, dim=4096, num_heads=32, num_kv_heads=8,
    hidden_dim=14336, tied=False, num_experts=8, experts_per_token=2,
  )  # fmt: skip
  # 12.9 B active of 46.7 B (arXiv 2401.04088), less what is no product.
  assert flops.matmul_parameters(mixtral) == pytest.approx(12.75e9, rel=5e-3)
  small = transformer.Config(**SMALL, vocab_size=10, shared_experts=1)
  attention = 8 * 4 * (2 * 2 + 2 * 1)
  experts = 3 * 8 * 6 * (2 + 1) + 8 * 4
  assert flops.matmul_parameters(small) == attention + experts + 80


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'experts_per_token': 5}, r'model\.experts_per_token=5: from 1 to'),
    ({'router': 'softmx'}, r"model\.router='softmx': choose one of"),
    ({'moe_form': 'dense'}, r"model\.moe_form='dense': choose one of"),
    ({'capacity_factor': 0.0}, r'model\.capacity_factor=0\.0: must be above 0'),
    ({'balance_loss': -1.0}, r'model\.balance_loss=-1\.0: must not be neg'),
    ({'num_experts': 0, 'shared_experts': 1}, r'model\.shared_experts=1: need'),
  ],
)
def test_values_that_cannot_be_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    tiny.model(**(tiny.MOE | options))


def test_meshes_that_cannot_be_are_refused():
  model, _ = model_of()
  moe.check_mesh(model.config, tiny.mesh(expert=4, data=2))
  with pytest.raises(UserError, match=r'mesh\.expert=8: .*=4; lower .* to 4$'):
    moe.check_mesh(model.config, tiny.mesh(expert=8))
  dense = tiny.model().config
  moe.check_mesh(dense, tiny.mesh(data=8))
  with pytest.raises(UserError, match=r'mesh\.expert=2: .* no experts; set'):
    moe.check_mesh(dense, tiny.mesh(expert=2))
