"""The one network: a decoder-only transformer in Flax linen.

Its switches are those that the Llama, Qwen and Gemma families need, so that a
family is a preset (`llama.py`, `qwen3.py`, …) and no second network. Layers
are scanned: parameters of all layers are stacked on a leading axis, and the
program's size does not grow with depth.

Parameters (axis letters of DESIGN: N layers, D model, H heads, G key-value
heads, K head size, F hidden, V vocabulary):
  embedding [V, D]   head [V, D] (unless tied)   final_norm, scalar_head [D]
  layers/attention/{norm [N,D], q [N,D,H,K], k, v [N,D,G,K], o [N,H,K,D]}
  layers/attention/{q_norm, k_norm [N,K], q_bias [N,H,K], k_bias, v_bias}
  layers/mlp/{norm [N,D], gate, up [N,D,F], down [N,F,D]}
or, with experts (moe.py; E of them, S units in those that all tokens share):
  layers/moe/{norm [N,D], router [N,D,E], router_bias [N,E], gate, up [N,E,D,F]}
  layers/moe/{down [N,E,F,D], shared_gate, shared_up [N,D,S], shared_down}
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tpu_lm import low_precision, per_device, sharding, target, weights
from tpu_lm.models import attention, moe, remat, ring, rope
from tpu_lm.models.block import ACTIVATIONS, Block, held, rms_norm
from tpu_lm.models.ring import Cache


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape and the switches of a transformer; see the module."""

  vocab_size: int = 0  # 0: the tokenizer's
  num_layers: int = 4
  dim: int = 128
  num_heads: int = 4
  num_kv_heads: int = 0  # 0: as many as num_heads
  head_dim: int = 0  # 0: dim / num_heads
  hidden_dim: int = 384
  max_length: int = 0  # tokens; 0: the length of the training rows
  tied: bool = True  # the output head is the embedding table
  activation: str = 'silu'  # silu: SwiGLU; gelu: GeGLU
  norm_eps: float = 1e-6
  norm_plus_one: bool = False  # Gemma: scale by 1 + w, not by w
  post_norms: bool = False  # Gemma 2 and 3: norm what a block adds, too
  qk_norm: bool = False  # Qwen 3, Gemma 3: norm each query and key head
  qkv_bias: bool = False  # Qwen 2
  scale_embedding: bool = False  # Gemma: times sqrt(dim)
  query_scale: float = 0.0  # 0: head_dim ** -0.5
  attention_soft_cap: float = 0.0  # Gemma 2; 0: none
  logit_soft_cap: float = 0.0  # Gemma 2; 0: none
  window: int = 0  # tokens seen by a sliding layer, itself included; 0: all
  window_pattern: tuple[int, ...] = (1,)  # repeated over layers; 1: slides
  rope_theta: float = 10000.0
  rope_local_theta: float = 0.0  # theta of sliding layers; 0: rope_theta
  rope_scaling: str = ''  # linear, llama3 or yarn; see rope.py
  rope_factor: float = 1.0
  rope_original_length: int = 0
  rope_low: float = 1.0
  rope_high: float = 4.0
  rope_beta_fast: float = 32.0
  rope_beta_slow: float = 1.0
  rope_attention_factor: float = 0.0
  num_experts: int = 0  # 0: none; what they are: moe.py
  experts_per_token: int = 2
  expert_hidden_dim: int = 0  # 0: hidden_dim
  shared_experts: int = 0  # as many as that see every token
  router: str = 'softmax'  # or sigmoid
  renormalise: bool = True  # the weights of what was chosen sum to 1
  router_scale: float = 1.0
  router_bias: bool = False  # balances the load; see optimizer.balance_rate
  balance_loss: float = 0.0  # its coefficient
  router_z_loss: float = 0.0  # its coefficient
  moe_form: str = 'auto'  # dropless or capacity
  capacity_factor: float = 1.25
  scalar_head: bool = False  # reward models: hidden states to a number
  init_std: float = 0.02
  zero_init_output: bool = True  # what blocks add starts at zero
  dtype: str = 'float32'  # of the matmuls; parameters are float32
  matmul: str = ''  # int8 or fp8: products in 8 bits; see low_precision.py
  remat: str = 'none'  # what the backward pass keeps; see remat.py
  loss_chunk: int = 0  # positions whose logits are held; 0: by the device
  attention: str = 'auto'  # which kernel; see attention.py
  unroll: int = 0  # layers a step of the scan; 0: chosen by the device

  def __post_init__(self):
    def fail(key: str, what: str):
      raise ValueError(f'model.{key}={getattr(self, key)!r}: {what}')

    for key in ('num_layers', 'dim', 'num_heads', 'hidden_dim'):
      if getattr(self, key) < 1:
        fail(key, 'must be at least 1')
    for key in ('rope_theta', 'rope_factor', 'norm_eps'):
      if not 0 < getattr(self, key) < math.inf:
        fail(key, 'must be above 0')
    for key in (
      'vocab_size', 'num_kv_heads', 'head_dim', 'max_length', 'window',
      'rope_local_theta', 'rope_original_length', 'rope_attention_factor',
      'query_scale', 'loss_chunk', 'attention_soft_cap', 'logit_soft_cap',
      'init_std',
      'num_experts', 'expert_hidden_dim', 'shared_experts', 'balance_loss',
      'router_z_loss',
    ):  # fmt: skip
      if not 0 <= getattr(self, key) < math.inf:
        fail(key, 'must not be negative')
    if not self.window_pattern:
      fail('window_pattern', 'give a 1 or 0 for at least one layer')
    if not self.head_dim and self.dim % self.num_heads:
      fail('num_heads', f'must divide model.dim={self.dim}, or give head_dim')
    if self.num_heads % self.kv_heads:
      fail('num_kv_heads', f'does not divide num_heads={self.num_heads}')
    if self.head_size % 2:
      fail('head_dim', 'must be even: RoPE rotates pairs')
    for key, known in (
      ('activation', ACTIVATIONS),
      ('remat', remat.POLICIES),
      ('rope_scaling', rope.SCALINGS),
      ('dtype', ('float32', 'bfloat16', 'float16')),
      ('matmul', low_precision.KINDS),
      ('attention', attention.IMPLEMENTATIONS),
      ('router', moe.ROUTERS),
      ('moe_form', moe.FORMS),
    ):
      if getattr(self, key) not in known:
        fail(key, f'choose one of {", ".join(map(repr, known))}')
    if self.rope_scaling in ('llama3', 'yarn') and (
      self.rope_original_length < 1
    ):
      fail('rope_original_length', f'{self.rope_scaling} needs it')
    moe.check(self, fail)

  @property
  def kv_heads(self) -> int:
    return self.num_kv_heads or self.num_heads

  @property
  def head_size(self) -> int:
    return self.head_dim or self.dim // self.num_heads

  @property
  def expert_size(self) -> int:
    return self.expert_hidden_dim or self.hidden_dim

  @property
  def layers_a_step(self) -> int:
    """How many layers the scan takes at once.

    On a CPU all of them, up to eight: the loop's copies of weights and
    gradients took a fifth of the step of a small model. Elsewhere one.
    """
    chosen = 8 if target.platform() == 'cpu' else 1
    return min(self.unroll or chosen, self.num_layers)

  @property
  def windows(self) -> tuple[int, ...]:
    """Per layer: how many tokens it sees; 0 means all."""
    pattern = self.window_pattern
    return tuple(
      self.window * bool(pattern[i % len(pattern)])
      for i in range(self.num_layers)
    )

  @property
  def scaling(self) -> rope.Scaling:
    return rope.Scaling(
      kind=self.rope_scaling,
      factor=self.rope_factor,
      original_length=self.rope_original_length,
      low=self.rope_low,
      high=self.rope_high,
      beta_fast=self.rope_beta_fast,
      beta_slow=self.rope_beta_slow,
      attention_factor=self.rope_attention_factor,
    )


class Attention(Block):
  """Grouped-query attention (arXiv 2305.13245) with RoPE.

  Returns, beside its output, what is kept: the keys and values if it `keeps`
  them, the slots if it was given a cache of this one layer, else None.
  """

  keeps: bool = False
  shares: bool = False

  @nn.compact
  def __call__(
    self, x_BLD, cos, sin, positions_BL, segment_ids_BL, window, cache
  ):
    config = self.config
    head = config.head_size
    h_BLD = self.normed('norm', x_BLD)
    q_BLHK, k_BLGK, v_BLGK = self._projected(h_BLD, cos, sin)
    rule = {
      'window': window,
      'soft_cap': config.attention_soft_cap,
      'scale': config.query_scale or head**-0.5,
    }
    if cache is None:
      segment_ids = None
      if segment_ids_BL is not None:
        segment_ids = (segment_ids_BL, segment_ids_BL)
      out_BLHK = attention.attend(
        q_BLHK,
        k_BLGK,
        v_BLGK,
        segment_ids=segment_ids,
        shares=self.shares,
        implementation=config.attention,
        **rule,
      )
      slots = (k_BLGK, v_BLGK) if self.keeps else None
    else:
      (slots,), clock, prefix_B = cache
      at = positions_BL[:, 0] if clock is None else clock
      slots = ring.write(slots, k_BLGK, v_BLGK, at)
      out_BLHK = ring.read(
        q_BLHK, slots, positions_BL, at, prefix_B=prefix_B, **rule
      )
    if self.is_packed:
      y_BLD = self.product('o', out_BLHK.reshape(*out_BLHK.shape[:2], -1))
    else:
      weight = self.matrix('o', (config.num_heads, head, config.dim), True)
      y_BLD = self.times('BLHK,HKD->BLD', out_BLHK, weight)
    if config.post_norms:
      y_BLD = self.normed('post_norm', y_BLD)
    return y_BLD, slots

  def _projected(self, h_BLD, cos, sin) -> list[jax.Array]:
    """Queries, keys and values, rotated."""
    config, head = self.config, self.config.head_size
    counts = {'q': config.num_heads, 'k': config.kv_heads, 'v': config.kv_heads}
    shapes = {name: (config.dim, n, head) for name, n in counts.items()}
    if self.is_packed:
      joint = self.product('qkv', h_BLD)
      joint = joint.reshape(*joint.shape[:2], -1, head)
      ends = config.num_heads, config.num_heads + config.kv_heads
      joint = dict(zip('qkv', jnp.split(joint, ends, axis=2), strict=True))
    else:
      matrices = self.matrices(shapes)

    def project(name: str) -> jax.Array:
      if self.is_packed:
        y = joint[name]
      else:
        y = self.times('BLD,DHK->BLHK', h_BLD, matrices[name])
      if config.qkv_bias:
        bias = self.param(
          f'{name}_bias', nn.initializers.zeros, shapes[name][1:]
        )
        y = y + bias.astype(y.dtype)
      if config.qk_norm and name != 'v':
        y = self.normed(f'{name}_norm', y)
      return y if name == 'v' else rope.rotate(y, cos, sin)

    return [checkpoint_name(project(name), name) for name in 'qkv']


class Mlp(Block):
  """Gated feed-forward: SwiGLU or GeGLU (arXiv 2002.05202, equation 6)."""

  @nn.compact
  def __call__(self, x_BLD):
    config = self.config
    h_BLD = self.normed('norm', x_BLD)
    if self.is_packed:
      a_BLF, b_BLF = jnp.split(self.product('gate_up', h_BLD), 2, axis=-1)
      c_BLF = ACTIVATIONS[config.activation](a_BLF) * b_BLF
      y_BLD = self.product('down', c_BLF)
    else:
      y_BLD = self.gated(h_BLD, config.hidden_dim)
    if config.post_norms:
      y_BLD = self.normed('post_norm', y_BLD)
    return y_BLD


class Layer(nn.Module):
  """One layer of the scan. `scanned` is what differs between layers."""

  config: Config
  keeps: bool = False
  shares: bool = False

  @nn.compact
  def __call__(self, x_BLD, scanned, positions_BL, segment_ids_BL, angles):
    cache, window = scanned
    local, whole = angles
    x_BLD = checkpoint_name(x_BLD, 'input')
    if window is None:  # all layers are alike
      window = self.config.windows[0]
    if isinstance(window, int):  # static
      window = window or None
      angle = local if window else whole
    else:
      angle = jax.tree.map(
        lambda a, b: jnp.where(window > 0, a, b), local, whole
      )
      window = jnp.where(window > 0, window, jnp.iinfo(jnp.int32).max)
    block = Attention(self.config, self.keeps, self.shares, name='attention')
    y_BLD, kept = block(
      x_BLD, *angle, positions_BL, segment_ids_BL, window, cache
    )
    x_BLD = x_BLD + y_BLD
    if self.config.num_experts:
      is_whole = cache is None and not self.keeps  # the pass that trains
      block = moe.Moe(self.config, name='moe')
      y_BLD, figures = block(x_BLD, segment_ids_BL, drops=is_whole)
    else:
      y_BLD, figures = Mlp(self.config, name='mlp')(x_BLD), {}
    x_BLD = sharding.constrain_activations(x_BLD + y_BLD)
    return x_BLD, (kept, figures)


def _angles(config: Config, positions_BL: jax.Array):
  """(cos, sin) of sliding layers, and of the others."""
  head, local = config.head_size, config.rope_local_theta
  whole = rope.sinusoids(positions_BL, head, config.rope_theta, config.scaling)
  return rope.sinusoids(positions_BL, head, local) if local else whole, whole


def _layer(stack: Any, n: int) -> Any:
  """The parameters of layer `n`."""
  return jax.tree.map(lambda leaf: leaf[n], stack)


class Transformer(nn.Module):
  """Tokens to the hidden states that the output head reads."""

  config: Config

  @nn.compact
  def __call__(
    self,
    tokens_BL: jax.Array,
    positions_BL: jax.Array | None = None,
    segment_ids_BL: jax.Array | None = None,
    cache: Cache | None = None,
    keeps: bool = False,
    shares: bool = False,
  ):
    """Applies the network.

    Args:
      tokens_BL: int ids, each below `config.vocab_size`.
      positions_BL: int positions for RoPE; by default 0, 1, … in each row.
      segment_ids_BL: int; a token sees earlier tokens of its own segment.
      cache: of earlier tokens (`init_cache`); each row's tokens must then
        stand at consecutive positions, and see all before them.
      keeps: whether the keys and values of all layers are returned.
      shares: whether a token also sees what is earlier of the segment
        attention.SHARED.

    Returns:
      hidden_BLD after the final norm; with a cache, (hidden_BLD, new cache);
      if it keeps them, (hidden_BLD, (k_NBLGK, v_NBLGK)).
    """
    config = self.config
    dtype = jnp.dtype(config.dtype)
    init = nn.initializers.normal(config.init_std)
    table = held(self, 'embedding', init, (config.vocab_size, config.dim))
    if not config.tied:
      held(self, 'head', init, (config.vocab_size, config.dim))
    if config.scalar_head:  # read by preference.py; from 0, it prefers none
      self.param('scalar_head', nn.initializers.zeros, (config.dim,))
    if positions_BL is None:
      positions_BL = jnp.arange(tokens_BL.shape[1])[None]
      positions_BL = jnp.broadcast_to(positions_BL, tokens_BL.shape)
    x_BLD = weights.rows('embedding', table, tokens_BL, dtype)
    if config.scale_embedding:
      x_BLD = x_BLD * jnp.sqrt(float(config.dim)).astype(dtype)
    x_BLD = sharding.constrain_activations(x_BLD)
    angles = _angles(config, positions_BL)
    if cache is None:
      x_BLD, kept = self._scanned(
        x_BLD, positions_BL, segment_ids_BL, angles, keeps, shares
      )
    else:
      x_BLD, kept = self._unrolled(x_BLD, positions_BL, angles, cache)
    start = nn.initializers.constant(0.0 if config.norm_plus_one else 1.0)
    scale = self.param('final_norm', start, (config.dim,))
    x_BLD = rms_norm(x_BLD, scale, config.norm_eps, config.norm_plus_one)
    return x_BLD if cache is None and not keeps else (x_BLD, kept)

  def _scanned(
    self, x_BLD, positions_BL, segment_ids_BL, angles, keeps, shares
  ):
    """The layers as one scan."""
    config = self.config
    windows_N = None
    if len(set(config.windows)) > 1:
      windows_N = jnp.array(config.windows, jnp.int32)
    layer = Layer
    if config.remat != 'none':
      layer = nn.remat(
        Layer, policy=remat.policy(config.remat), prevent_cse=False
      )
    unroll = config.layers_a_step
    # XLA:CPU would make the weights of all the layers of a step at once.
    if not config.unroll and weights.is_held(self.variables.get('params', {})):
      unroll = 1
    stack = nn.scan(
      layer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=config.num_layers,
      unroll=unroll,
    )
    x_BLD, (kept, figures_N) = stack(config, keeps, shares, name='layers')(
      x_BLD, (None, windows_N), positions_BL, segment_ids_BL, angles
    )
    moe.tell(config, figures_N)
    return x_BLD, kept

  def _unrolled(self, x_BLD, positions_BL, angles, cache: Cache):
    """The layers one by one: their caches may differ in size."""
    config = self.config
    layers = self.get_variable('params', 'layers')
    kept = []
    for n, window in enumerate(config.windows):
      # A stack, or a tuple of layers (`generate.packed`).
      one = layers[n] if isinstance(layers, tuple) else _layer(layers, n)
      x_BLD, (slots, _) = Layer(config, parent=None).apply(
        {'params': one},
        x_BLD,
        (cache._replace(layers=cache.layers[n : n + 1]), window),
        positions_BL,
        None,
        angles,
      )
      kept.append(slots)
    clock = cache.clock
    clock = None if clock is None else clock + x_BLD.shape[1]
    return x_BLD, cache._replace(layers=tuple(kept), clock=clock)

  def init_params(self, key: jax.Array):
    """A fresh parameter tree; trace it to create it sharded."""
    return self.init(key, jnp.zeros((1, 2), jnp.int32))['params']


def head(params) -> jax.Array:
  """The output head [V, D]: the embedding table where they are tied."""
  name = 'head' if 'head' in params else 'embedding'
  return weights.dense(per_device.whole(name, params[name]))


def read_by_head(params, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(hidden states, head) for a loss, the head in their dtype if gathered."""
  name = 'head' if 'head' in params else 'embedding'
  leaf, hidden = per_device.in_turn(params[name], hidden)
  return hidden, weights.dense(per_device.whole(name, leaf, hidden.dtype))


def logits(config: Config, params, hidden: jax.Array) -> jax.Array:
  """Float32 logits [..., V] of hidden states [..., D], soft cap included."""
  if 'packed_head' in params:  # generate/packed.py
    result = params['packed_head'].product(hidden, jnp.float32)
    return _capped(config, result)
  return project(config, read_by_head(params, hidden)[1], hidden)


def project(config: Config, head_VD: jax.Array, hidden: jax.Array) -> jax.Array:
  """The same by a head that stands here whole."""
  result = jnp.einsum(
    '...D,VD->...V',
    hidden,
    sharding.replicate_columns(head_VD).astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )
  return _capped(config, result)


def _capped(config: Config, logits: jax.Array) -> jax.Array:
  cap = config.logit_soft_cap
  return cap * jnp.tanh(logits / cap) if cap else logits
