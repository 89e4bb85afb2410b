"""Attention over grouped heads: one function in front of several kernels.

Scaled dot-product attention (arXiv 1706.03762, equation 1) with grouped
key-value heads (arXiv 2305.13245). A query sees a key when all of these hold:
  - causal: its position is not before the key's;
  - window: it is fewer than `window` positions after the key (itself is one);
  - segments: both are of the same segment, and that is not 0 (padding), or the
    key's is SHARED, where rows are said to have such a segment.

Kernels:
  chunked  queries in chunks; each reads only the keys that it may see, and
           its probabilities are made again in the backward pass, so that
           memory grows with L, not with L x L. Heads stand before positions
           in it, which spares XLA:CPU a transposition a matmul.
  xla      jax.nn.dot_product_attention: holds L x L logits.
  cudnn    the same with cuDNN's fused kernel (NVIDIA GPUs, 16-bit).
  splash   JAX's Pallas kernel for TPUs (splash.py).
  auto     cudnn or splash where it applies, else chunked.

Where a mesh divides positions (`sequence`), heads are divided in their stead:
each device then attends over whole rows for some heads, and gives back its
positions (DeepSpeed-Ulysses, arXiv 2309.14509).

What stands at tokens of segment 0, NaN included, reaches neither the output
(0 there) nor any gradient. Without segment ids, keys and values that are not
seen must still be finite.

Decoding has an attention of its own: ring.py.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tpu_lm import sharding, target
from tpu_lm.errors import UserError

IMPLEMENTATIONS = ('auto', 'chunked', 'xla', 'cudnn', 'splash')
SHARED = -1  # the segment that all others of its row see too
_CHUNK = 64  # queries; the best of 32, 64, 128 on two CPU cores at L 256-512
_ACCELERATOR_CHUNK = 512
_FEW = 8  # chunks that may as well be worked on at once
_AT_ONCE = 2  # chunks, if there are more
_MAX_CHUNKS = 32  # the program grows with their number
_MASKED = -1e30  # finite: rows that see nothing must not become NaN

Pair = tuple[jax.Array, jax.Array]
Span = tuple[int, int, int, int]  # queries from, to; keys from, to


def attend(
  q_BLHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  *,
  segment_ids: Pair | None = None,
  positions: Pair | None = None,
  window: int | jax.Array | None = None,
  soft_cap: float = 0.0,
  scale: float,
  causal: bool = True,
  shares: bool = False,
  implementation: str = 'auto',
) -> jax.Array:
  """Attends from every query to the keys that it may see.

  Args:
    q_BLHK: queries; H is a multiple of the G key-value heads, and query head
      h reads key-value head h // (H / G).
    k_BSGK: keys.
    v_BSGK: values.
    segment_ids: int ([B, L], [B, S]) of queries and keys; 0 is padding.
    positions: int ([B or 1, L], [B or 1, S]), for instance those of a cache's
      slots. None: both are 0, 1, …, which lets unseen chunks be skipped; of a
      row with a shared segment these are not what a window counts by.
    window: how many positions a query sees, its own included; None: all. A
      traced scalar only masks; an int also skips.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap); 0: they stay.
    scale: factor on the logits, before the cap.
    causal: False lets a query see later keys, too.
    shares: whether there may be a SHARED segment; looking costs a tenth.
    implementation: one of IMPLEMENTATIONS.

  Returns:
    out_BLHK, of the queries' dtype; 0 in rows of segment 0.

  Raises:
    ValueError: an unknown implementation, or one that cannot do this.
  """
  _check(q_BLHK, k_BSGK, window, causal, positions, implementation)
  num_keys, skips = k_BSGK.shape[1], causal and positions is None
  if implementation == 'auto':
    implementation = _best(q_BLHK, soft_cap, window, skips, shares)
  if segment_ids is not None:
    q_BLHK = _without_padding(q_BLHK, segment_ids[0])
    k_BSGK = _without_padding(k_BSGK, segment_ids[1])
    v_BSGK = _without_padding(v_BSGK, segment_ids[1])
  q_BLHK, k_BSGK, v_BSGK = _by_heads(q_BLHK, k_BSGK, v_BSGK)
  sees = causal, shares
  spots = _spots(q_BLHK, k_BSGK, segment_ids, positions, window)
  if implementation == 'chunked':
    spans = tuple(_spans(q_BLHK.shape[1], num_keys, skips, window))
    out_BLHK = _chunked(
      q_BLHK, k_BSGK, v_BSGK, spots, spans, sees, soft_cap, scale
    )
  elif implementation == 'splash':
    if not (skips and _can_splash(num_keys, window, shares)):
      raise ValueError('splash: cannot do this; use chunked')
    out_BLHK = _splash(q_BLHK, k_BSGK, v_BSGK, spots, soft_cap, scale)
  elif soft_cap:
    raise ValueError(f'{implementation}: has no soft_cap; use chunked')
  else:
    out_BLHK = _fused(
      q_BLHK, k_BSGK, v_BSGK, spots, skips, sees, scale, implementation
    )
  if segment_ids is not None:
    out_BLHK = _without_padding(out_BLHK, segment_ids[0])
  return out_BLHK


def _check(q_BLHK, k_BSGK, window, causal, positions, implementation):
  """Refuses arguments that do not go together."""
  num_keys, num_groups = k_BSGK.shape[1:3]
  if q_BLHK.shape[2] % num_groups:
    raise ValueError(
      f'{q_BLHK.shape[2]} query heads cannot share {num_groups} key heads'
    )
  if window is not None and not causal:
    raise ValueError('window: needs causal attention')
  if positions is None and causal and q_BLHK.shape[1] != num_keys:
    raise ValueError(
      f'{q_BLHK.shape[1]} queries and {num_keys} keys: give their positions'
    )
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation={implementation!r}: choose one of '
      f'{", ".join(IMPLEMENTATIONS)}'
    )


def _splash(q_BLHK, k_BSGK, v_BSGK, spots, soft_cap, scale):
  """The kernel 'splash'."""
  from tpu_lm.models import splash  # Pallas takes a second to import

  ids = spots.segment_ids
  return splash.attend(
    q_BLHK,
    k_BSGK,
    v_BSGK,
    segment_ids_BL=None if ids is None else ids[0],
    window=spots.window,
    soft_cap=soft_cap,
    scale=scale,
    interpret=target.platform() == 'cpu',
  )


def _by_heads(*tensors: jax.Array) -> tuple[jax.Array, ...]:
  """Queries, keys and values with heads divided in place of positions."""
  if not sharding.splits_sequence():
    return tensors
  parts = sharding.num_head_shards()
  num_heads = tensors[0].shape[2]
  if num_heads % parts:
    raise UserError(
      f'mesh.tensor x mesh.sequence = {parts}: must divide the {num_heads} '
      'attention heads, over which they are shared out; lower mesh.sequence'
    )
  found = []
  for x in tensors:
    if x.shape[2] % parts:  # few key heads: as many copies as are needed
      x = jnp.repeat(x, math.lcm(x.shape[2], parts) // x.shape[2], axis=2)
    found.append(sharding.constrain_heads(x))
  return tuple(found)


def _best(
  q_BLHK: jax.Array, soft_cap: float, window, whole: bool, shares: bool
) -> str:
  """The kernel that 'auto' means here."""
  platform = target.platform()
  if platform == 'tpu':
    can = whole and _can_splash(q_BLHK.shape[1], window, shares)
    return 'splash' if can else 'chunked'
  if platform != 'gpu':
    return 'chunked'
  backend = jax.extend.backend.get_backend()
  cudnn = (
    'cuda' in backend.platform_version
    and q_BLHK.dtype in (jnp.bfloat16, jnp.float16)
    and q_BLHK.shape[1] > 1
    and q_BLHK.shape[3] % 8 == 0
    and q_BLHK.shape[3] <= 128
    and not soft_cap
    and (window is None or isinstance(window, int))
  )
  return 'cudnn' if cudnn else 'chunked'


def _can_splash(length: int, window, shares: bool) -> bool:
  """Rows of whole lanes, a static window, no shared segment."""
  return length % 128 == 0 and isinstance(window, int | None) and not shares


def _without_padding(x_BLHK: jax.Array, segment_ids_BL: jax.Array):
  """Zeros where the segment is 0: a masked NaN times 0 would be NaN."""
  return jnp.where(segment_ids_BL[:, :, None, None] != 0, x_BLHK, 0)


class _Spots(NamedTuple):
  """Where queries and keys stand: what decides which see which."""

  positions: Pair
  segment_ids: Pair | None
  window: int | jax.Array | None

  def cut(self, span: Span) -> '_Spots':
    """Those of a span."""
    q_begin, q_end, k_begin, k_end = span

    def both(pair: Pair) -> Pair:
      return pair[0][:, q_begin:q_end], pair[1][:, k_begin:k_end]

    segments = None if self.segment_ids is None else both(self.segment_ids)
    return _Spots(both(self.positions), segments, self.window)

  def visible(self, sees: tuple[bool, bool], zero: jax.Array | None = None):
    """Which keys each query sees: bool [B or 1, L, S], or None: all.

    Padding sees padding, so that no row is masked as a whole. `zero` is added
    to what stands at queries; see `_tie`.
    """
    q_BL, k_BS = self.positions
    gap_BLS = _plus(q_BL, zero)[:, :, None] - k_BS[:, None, :]
    seen = []
    causal, shares = sees
    if causal:
      seen.append(gap_BLS >= 0)
    if self.window is not None:
      seen.append(gap_BLS < self.window)
    if self.segment_ids is not None:
      q_BL, k_BS = self.segment_ids
      same = _plus(q_BL, zero)[:, :, None] == k_BS[:, None, :]
      seen.append(same | (k_BS[:, None, :] == SHARED) if shares else same)
    return functools.reduce(jnp.logical_and, seen) if seen else None


def _spots(q_BLHK, k_BSGK, segment_ids, positions, window) -> _Spots:
  if positions is None:
    positions = tuple(jnp.arange(x.shape[1])[None] for x in (q_BLHK, k_BSGK))
  return _Spots(positions, segment_ids, window)


def _spans(num_queries, num_keys, skips: bool, window):
  """Chunks of queries with the keys they need: (q_begin, q_end, k_…, k_…)."""
  smallest = _CHUNK if target.platform() == 'cpu' else _ACCELERATOR_CHUNK
  size = max(smallest, -(-num_queries // _MAX_CHUNKS))
  for begin in range(0, num_queries, size):
    end = min(begin + size, num_queries)
    if not skips:
      yield begin, end, 0, num_keys
    elif isinstance(window, int):
      yield begin, end, max(0, begin - window + 1), end
    else:
      yield begin, end, 0, end


def _chunked(q_BLHK, k_BSGK, v_BSGK, spots, spans, sees, soft_cap, scale):
  """The kernel 'chunked'. M: query heads of a group."""
  num_rows, num_queries, _, size = q_BLHK.shape
  num_groups = k_BSGK.shape[2]
  q_BGMLK = jnp.moveaxis(
    q_BLHK.reshape(num_rows, num_queries, num_groups, -1, size), 1, 3
  )
  k_BGSK, v_BGSK = jnp.swapaxes(k_BSGK, 1, 2), jnp.swapaxes(v_BSGK, 1, 2)
  rule = spans, sees, soft_cap, scale
  out_BGMLK = _heads_first(q_BGMLK, k_BGSK, v_BGSK, spots, rule)
  return jnp.moveaxis(out_BGMLK, 3, 1).reshape(q_BLHK.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _heads_first(q_BGMLK, k_BGSK, v_BGSK, spots, rule):
  """Attention with heads before positions, span by span.

  Its own gradient keeps a logsumexp a query: kept, the probabilities of all
  chunks would be half of L x L again (arXiv 2205.14135, appendix B.4).
  """
  return _forward(q_BGMLK, k_BGSK, v_BGSK, spots, rule)[0]


def _forward(q_BGMLK, k_BGSK, v_BGSK, spots, rule):
  outs, lses = [], []
  for span in rule[0]:
    q, k, v = _cut(span, q_BGMLK, k_BGSK, v_BGSK)
    zero = _tie(rule, q_BGMLK, outs)
    logits, _ = _logits(_plus(q, zero), k, spots, span, rule, zero)
    top = logits.max(axis=-1, keepdims=True)
    p_BGMLS = jnp.exp(logits - top)
    norm = p_BGMLS.sum(axis=-1, keepdims=True)
    out = _matmul('BGMLS,BGSK->BGMLK', p_BGMLS.astype(v.dtype), v) / norm
    outs.append(out.astype(q.dtype))
    lses.append(top + jnp.log(norm))
  out_BGMLK = checkpoint_name(jnp.concatenate(outs, axis=3), 'attention')
  lse_BGML1 = checkpoint_name(jnp.concatenate(lses, axis=3), 'attention')
  return out_BGMLK, (q_BGMLK, k_BGSK, v_BGSK, spots, out_BGMLK, lse_BGML1)


def _backward(rule, kept, out_grad_BGMLK):
  q_BGMLK, k_BGSK, v_BGSK, spots, out_BGMLK, lse_BGML1 = kept
  spans, _, soft_cap, scale = rule
  dtype = q_BGMLK.dtype
  mean_BGML1 = jnp.sum(
    (out_BGMLK * out_grad_BGMLK).astype(jnp.float32), axis=-1, keepdims=True
  )
  q_grads = []
  k_grad = jnp.zeros(k_BGSK.shape, jnp.float32)
  v_grad = jnp.zeros(v_BGSK.shape, jnp.float32)
  for span in spans:
    q_begin, q_end, k_begin, k_end = span
    queries = (..., slice(q_begin, q_end), slice(None))
    q, k, v = _cut(span, q_BGMLK, k_BGSK, v_BGSK)
    zero = _tie(rule, out_grad_BGMLK, q_grads)
    q, out_grad = _plus(q, zero), _plus(out_grad_BGMLK[queries], zero)
    logits, unmasked = _logits(q, k, spots, span, rule, zero)
    p_BGMLS = jnp.exp(logits - lse_BGML1[queries])
    p_grad = _matmul('BGMLK,BGSK->BGMLS', out_grad, v)
    grad = scale * p_BGMLS * (p_grad - mean_BGML1[queries])
    if soft_cap:
      grad = grad * (1.0 - jnp.square(unmasked / soft_cap))
    grad = grad.astype(dtype)
    q_grads.append(_matmul('BGMLS,BGSK->BGMLK', grad, k).astype(dtype))
    rest = ((0, 0), (0, 0), (k_begin, k_BGSK.shape[2] - k_end), (0, 0))
    k_grad += jnp.pad(_matmul('BGMLS,BGMLK->BGSK', grad, q), rest)
    p_BGMLS = p_BGMLS.astype(dtype)
    v_grad += jnp.pad(_matmul('BGMLS,BGMLK->BGSK', p_BGMLS, out_grad), rest)
  q_grad = jnp.concatenate(q_grads, axis=3)
  return q_grad, k_grad.astype(k.dtype), v_grad.astype(v.dtype), None


_heads_first.defvjp(_forward, _backward)


def _cut(span, q_BGMLK, k_BGSK, v_BGSK):
  """What a span reads."""
  q_begin, q_end, k_begin, k_end = span
  keys = (slice(None), slice(None), slice(k_begin, k_end))
  return q_BGMLK[..., q_begin:q_end, :], k_BGSK[keys], v_BGSK[keys]


def _tie(rule, x: jax.Array, done: list[jax.Array]) -> jax.Array | None:
  """An int32 0 that is known only after `x` and most of `done` are.

  Left to itself XLA works on all chunks at once, and computes all masks ahead
  of the loop over layers: L x L, after all. On CPUs it drops optimization
  barriers, hence a zero that it cannot see through: the smaller of a bit and
  0. Added to queries it makes chunks take turns; added to positions and to the
  logit of what is masked it makes masks a part of the softmax, not arrays.
  It costs a tenth of the time; None: short rows need none.
  """
  if len(rule[0]) <= _FEW:
    return None
  before = done[-_AT_ONCE] if len(done) >= _AT_ONCE else x
  one = before[(0,) * x.ndim].astype(jnp.float32)
  return jnp.minimum(jax.lax.bitcast_convert_type(one, jnp.int32) & 1, 0)


def _plus(x: jax.Array, zero: jax.Array | None) -> jax.Array:
  return x if zero is None else x + zero.astype(x.dtype)


def _logits(q_BGMLK, k_BGSK, spots, span, rule, zero):
  """Float32 logits, and those before the mask for the gradient of the cap."""
  _, sees, soft_cap, scale = rule
  logits = scale * _matmul('BGMLK,BGSK->BGMLS', q_BGMLK, k_BGSK)
  if soft_cap:
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  seen_BLS = spots.cut(span).visible(sees, zero)
  if seen_BLS is None:
    return logits, logits
  masked = _plus(jnp.float32(_MASKED), zero)
  return jnp.where(seen_BLS[:, None, None], logits, masked), logits


def _matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _fused(q_BLHK, k_BSGK, v_BSGK, spots, skips, sees, scale, kernel):
  """The kernels of `jax.nn.dot_product_attention`."""
  mask_BLS = spots.visible(sees)
  local = skips and isinstance(spots.window, int)
  return jax.nn.dot_product_attention(
    q_BLHK,
    k_BSGK,
    v_BSGK,
    mask=None if mask_BLS is None else mask_BLS[:, None],
    scale=scale,
    is_causal=skips,
    local_window_size=(spots.window - 1, 0) if local else None,
    implementation=kernel,
  )
