"""Attention over grouped heads: one function in front of several kernels.

Scaled dot-product attention (arXiv 1706.03762, equation 1) with grouped
key-value heads (arXiv 2305.13245). A query sees a key when all of these hold:
  - causal: its position is not before the key's;
  - window: it is fewer than `window` positions after the key (itself is one);
  - segments: both are of the same segment, and that is not 0 (padding).

Kernels:
  chunked  queries in chunks; each reads only the keys that it may see, and
           its probabilities are made again in the backward pass, so that no
           L x L array is ever held. Heads stand before positions in it, which
           spares XLA:CPU a transposition a matmul.
  xla      jax.nn.dot_product_attention: holds L x L logits.
  cudnn    the same with cuDNN's fused kernel (NVIDIA GPUs, 16-bit).
  auto     cudnn where it applies, else chunked.

What stands at tokens of segment 0, NaN included, reaches neither the output
(0 there) nor any gradient. Without segment ids, as with a cache, keys and
values that are not seen must still be finite.
"""

import functools

import jax
import jax.extend
import jax.numpy as jnp

IMPLEMENTATIONS = ('auto', 'chunked', 'xla', 'cudnn')
_CHUNK = 64  # queries; the best of 32, 64, 128 on two CPU cores at L 256-512
_ACCELERATOR_CHUNK = 512
_MAX_CHUNKS = 32  # the program grows with their number
_MASKED = -1e30  # finite: rows that see nothing must not become NaN

Pair = tuple[jax.Array, jax.Array]


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
      slots. None: both are 0, 1, …, which lets unseen chunks be skipped.
    window: how many positions a query sees, its own included; None: all. A
      traced scalar only masks; an int also skips.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap); 0: they stay.
    scale: factor on the logits, before the cap.
    causal: False lets a query see later keys, too.
    implementation: one of IMPLEMENTATIONS.

  Returns:
    out_BLHK, of the queries' dtype; 0 in rows of segment 0.

  Raises:
    ValueError: an unknown implementation, or one that cannot do this.
  """
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
  if implementation == 'auto':
    implementation = _best(q_BLHK, soft_cap, window)
  if segment_ids is not None:
    q_BLHK = _without_padding(q_BLHK, segment_ids[0])
    k_BSGK = _without_padding(k_BSGK, segment_ids[1])
    v_BSGK = _without_padding(v_BSGK, segment_ids[1])
  visible = functools.partial(_visible, segment_ids, positions, window, causal)
  skips = causal and positions is None
  if implementation == 'chunked':
    spans = _spans(q_BLHK.shape[1], num_keys, skips, window)
    out_BLHK = _chunked(q_BLHK, k_BSGK, v_BSGK, spans, visible, soft_cap, scale)
  elif soft_cap:
    raise ValueError(f'{implementation}: has no soft_cap; use chunked')
  else:
    out_BLHK = _fused(
      q_BLHK, k_BSGK, v_BSGK, visible, skips, window, scale, implementation
    )
  if segment_ids is not None:
    out_BLHK = _without_padding(out_BLHK, segment_ids[0])
  return out_BLHK


def _best(q_BLHK: jax.Array, soft_cap: float, window) -> str:
  """The kernel that 'auto' means here."""
  backend = jax.extend.backend.get_backend()
  cudnn = (
    backend.platform == 'gpu'
    and 'cuda' in backend.platform_version
    and q_BLHK.dtype in (jnp.bfloat16, jnp.float16)
    and q_BLHK.shape[1] > 1
    and q_BLHK.shape[3] % 8 == 0
    and q_BLHK.shape[3] <= 128
    and not soft_cap
    and (window is None or isinstance(window, int))
  )
  return 'cudnn' if cudnn else 'chunked'


def _without_padding(x_BLHK: jax.Array, segment_ids_BL: jax.Array):
  """Zeros where the segment is 0: a masked NaN times 0 would be NaN."""
  return jnp.where(segment_ids_BL[:, :, None, None] != 0, x_BLHK, 0)


def _visible(segment_ids, positions, window, causal, span) -> jax.Array | None:
  """Which keys of a span its queries see: bool [B or 1, L, S], or None: all.

  Padding sees padding, so that no row is masked as a whole.
  """
  q_begin, q_end, k_begin, k_end = span
  if positions is None:
    q_BL = jnp.arange(q_begin, q_end)[None]
    k_BS = jnp.arange(k_begin, k_end)[None]
  else:
    q_BL = positions[0][:, q_begin:q_end]
    k_BS = positions[1][:, k_begin:k_end]
  gap_BLS = q_BL[:, :, None] - k_BS[:, None, :]
  seen = []
  if causal:
    seen.append(gap_BLS >= 0)
  if window is not None:
    seen.append(gap_BLS < window)
  if segment_ids is not None:
    q_BL = segment_ids[0][:, q_begin:q_end]
    k_BS = segment_ids[1][:, k_begin:k_end]
    seen.append(q_BL[:, :, None] == k_BS[:, None, :])
  return functools.reduce(jnp.logical_and, seen) if seen else None


def _spans(num_queries, num_keys, skips: bool, window):
  """Chunks of queries with the keys they need: (q_begin, q_end, k_…, k_…)."""
  smallest = _CHUNK if jax.default_backend() == 'cpu' else _ACCELERATOR_CHUNK
  size = max(smallest, -(-num_queries // _MAX_CHUNKS))
  for begin in range(0, num_queries, size):
    end = min(begin + size, num_queries)
    if not skips:
      yield begin, end, 0, num_keys
    elif isinstance(window, int):
      yield begin, end, max(0, begin - window + 1), end
    else:
      yield begin, end, 0, end


def _chunked(q_BLHK, k_BSGK, v_BSGK, spans, visible, soft_cap, scale):
  """The kernel 'chunked'. M: query heads of a group."""
  num_rows, num_queries, _, size = q_BLHK.shape
  num_groups = k_BSGK.shape[2]
  q_BGMLK = jnp.moveaxis(
    q_BLHK.reshape(num_rows, num_queries, num_groups, -1, size), 1, 3
  )
  k_BGSK, v_BGSK = jnp.swapaxes(k_BSGK, 1, 2), jnp.swapaxes(v_BSGK, 1, 2)

  out = []
  for span in spans:
    q_begin, q_end, k_begin, k_end = span
    out.append(
      _chunk(
        q_BGMLK[..., q_begin:q_end, :],
        k_BGSK[:, :, k_begin:k_end],
        v_BGSK[:, :, k_begin:k_end],
        visible(span),
        soft_cap,
        scale,
      )
    )
  out_BGMLK = jnp.concatenate(out, axis=3)
  return jnp.moveaxis(out_BGMLK, 3, 1).reshape(q_BLHK.shape)


def _chunk_logits(q_BGMLK, k_BGSK, seen_BLS, soft_cap, scale):
  """Float32 logits and, for the gradient of the cap, those before the mask."""
  logits = scale * _matmul('BGMLK,BGSK->BGMLS', q_BGMLK, k_BGSK)
  if soft_cap:
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  if seen_BLS is None:
    return logits, logits
  return jnp.where(seen_BLS[:, None, None], logits, _MASKED), logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunk(q_BGMLK, k_BGSK, v_BGSK, seen_BLS, soft_cap, scale):
  """Attention of some queries over all the keys given.

  Its own gradient keeps a logsumexp a query: kept, the probabilities of all
  chunks would be half of L x L again (arXiv 2205.14135, appendix B.4).
  """
  args = q_BGMLK, k_BGSK, v_BGSK, seen_BLS, soft_cap, scale
  return _chunk_forward(*args)[0]


def _chunk_forward(q_BGMLK, k_BGSK, v_BGSK, seen_BLS, soft_cap, scale):
  logits, _ = _chunk_logits(q_BGMLK, k_BGSK, seen_BLS, soft_cap, scale)
  top = logits.max(axis=-1, keepdims=True)
  p_BGMLS = jnp.exp(logits - top)
  norm = p_BGMLS.sum(axis=-1, keepdims=True)
  out = _matmul('BGMLS,BGSK->BGMLK', p_BGMLS.astype(v_BGSK.dtype), v_BGSK)
  out = (out / norm).astype(q_BGMLK.dtype)
  lse = top + jnp.log(norm)
  return out, (q_BGMLK, k_BGSK, v_BGSK, seen_BLS, out, lse)


def _chunk_backward(soft_cap, scale, kept, out_grad):
  q_BGMLK, k_BGSK, v_BGSK, seen_BLS, out, lse = kept
  dtype = q_BGMLK.dtype
  logits, raw = _chunk_logits(q_BGMLK, k_BGSK, seen_BLS, soft_cap, scale)
  p_BGMLS = jnp.exp(logits - lse)
  v_grad = _matmul('BGMLS,BGMLK->BGSK', p_BGMLS.astype(dtype), out_grad)
  p_grad = _matmul('BGMLK,BGSK->BGMLS', out_grad, v_BGSK)
  mean = jnp.sum((out * out_grad).astype(jnp.float32), axis=-1, keepdims=True)
  grad = scale * p_BGMLS * (p_grad - mean)
  if soft_cap:
    grad = grad * (1.0 - jnp.square(raw / soft_cap))
  grad = grad.astype(dtype)
  q_grad = _matmul('BGMLS,BGSK->BGMLK', grad, k_BGSK)
  k_grad = _matmul('BGMLS,BGMLK->BGSK', grad, q_BGMLK)
  return (
    q_grad.astype(dtype),
    k_grad.astype(k_BGSK.dtype),
    v_grad.astype(v_BGSK.dtype),
    None,
  )


_chunk.defvjp(_chunk_forward, _chunk_backward)


def _matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _fused(q_BLHK, k_BSGK, v_BSGK, visible, skips, window, scale, kernel):
  """The kernels of `jax.nn.dot_product_attention`."""
  local = skips and (window is None or isinstance(window, int))
  mask_BLS = visible((0, q_BLHK.shape[1], 0, k_BSGK.shape[1]))
  return jax.nn.dot_product_attention(
    q_BLHK,
    k_BSGK,
    v_BSGK,
    mask=None if mask_BLS is None else mask_BLS[:, None],
    scale=scale,
    is_causal=local,
    local_window_size=(window - 1, 0) if local and window else None,
    implementation=kernel,
  )
