"""Attention over grouped heads: one function in front of several kernels.

Scaled dot-product attention (arXiv 1706.03762, equation 1) with grouped
key-value heads (arXiv 2305.13245). A query sees a key when all of these hold:
  - causal: its position is not before the key's;
  - window: it is fewer than `window` positions after the key (itself is one);
  - segments: both are of the same segment, and that is not 0 (padding).

Kernels:
  chunked  queries in chunks; each reads only the keys that it may see, and
           its probabilities are computed again in the backward pass, so that
           no L x L array is ever held. Heads stand before positions in it,
           which spares XLA:CPU a transposition per matmul.
  xla      jax.nn.dot_product_attention: holds L x L logits.
  cudnn    the same with cuDNN's fused kernel (NVIDIA GPUs, 16-bit).
  auto     cudnn where it applies, else chunked.

What stands at tokens of segment 0, NaN included, reaches neither the output
(0 there) nor any gradient. Without segment ids, as with a cache, keys and
values that are not seen must still be finite.
"""

import functools

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ('auto', 'chunked', 'xla', 'cudnn')
_CHUNK = 64  # queries; the best of 32, 64, 128 on two CPU cores at L 256-512
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
  if implementation == 'auto':
    implementation = _best(q_BLHK, soft_cap, window)
  if segment_ids is not None:
    q_BLHK = _without_padding(q_BLHK, segment_ids[0])
    k_BSGK = _without_padding(k_BSGK, segment_ids[1])
    v_BSGK = _without_padding(v_BSGK, segment_ids[1])
  if implementation == 'chunked':
    visible = functools.partial(_visible, segment_ids, positions, window)
    if not causal:
      visible = functools.partial(_visible_both_ways, segment_ids)
    spans = _spans(q_BLHK.shape[1], num_keys, positions, window, causal)
    return _chunked(q_BLHK, k_BSGK, v_BSGK, spans, visible, soft_cap, scale)
  return _fused(
    q_BLHK, k_BSGK, v_BSGK, segment_ids, positions, window, soft_cap, scale,
    causal, implementation,
  )  # fmt: skip
