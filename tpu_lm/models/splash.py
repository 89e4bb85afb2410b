"""Attention on TPUs: the splash kernel of JAX, forward and fused backward.

It visits only the blocks of the L x L square that a mask leaves over, and keeps
a logsumexp a query (FlashAttention-2, arXiv 2307.08691). A Pallas call is
opaque to the partitioner: each device is given its rows and heads by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)
from jax.sharding import PartitionSpec as P

from tpu_lm import sharding

_LANES = 128  # lengths are a multiple of it
_BLOCK = 1024  # queries and keys that are worked on at once
_KEYS = 2048  # keys of a backward block
_PARTS = 4  # of dq, one for each such block, that may be written and summed


class _ByDistance:
  """A mask that depends on how far a key lies before its query.

  The kernel asks of each block of the L x L square whether any or all of it is
  seen. The distances in a block answer that as its elements do, which are
  500 times as many: to trace rows of 512k tokens took 20 minutes.
  """

  def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
    queries, keys = index
    distances = np.arange(
      queries.start - keys.stop + 1, queries.stop - keys.start
    )
    return self.mask_function(distances[None], np.zeros_like(distances)[None])


class Causal(_ByDistance, masks.CausalMask):
  """A query sees itself and what is before it."""


class Local(_ByDistance, masks.LocalMask):
  """The same within a window."""


def attend(
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGK: jax.Array,
  *,
  segment_ids_BL: jax.Array | None,
  window: int | None,
  soft_cap: float,
  scale: float,
  interpret: bool = False,
) -> jax.Array:
  """Causal attention within segments; arguments as in attention.py.

  Args:
    q_BLHK: queries.
    k_BLGK: keys.
    v_BLGK: values.
    segment_ids_BL: int; None: one segment.
    window: positions that a query sees, its own included; None: all.
    soft_cap: of the logits; 0: none.
    scale: factor on the logits; the kernel has none, so queries bear it.
    interpret: run without a TPU, in minutes what takes it milliseconds.
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = sharding.free_axes(mesh)
  run = functools.partial(
    _local, window=window, soft_cap=soft_cap, interpret=interpret
  )
  q_BLHK = q_BLHK * jnp.asarray(scale, q_BLHK.dtype)
  if not free:
    return run(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)
  rows = sharding.free_rows(mesh)
  if segment_ids_BL is None:
    segment_ids_BL = jnp.ones(q_BLHK.shape[:2], jnp.int32)
  heads = P(rows, None, sharding.HEADS, None)
  return jax.shard_map(
    run,
    in_specs=(heads, heads, heads, P(rows, None)),
    out_specs=heads,
    axis_names=set(free),
    check_vma=False,
  )(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)


def _local(
  q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, *, window, soft_cap, interpret
):
  """Of the rows and heads of one device."""
  length, num_heads = q_BLHK.shape[1:3]
  if window is None or window >= length:
    mask = Causal((length, length))
  else:
    mask = Local((length, length), (window - 1, 0), offset=0)
  block, keys = _divisor(length, _BLOCK), _divisor(length, _KEYS)
  # Parts of dq take L x L / keys: long rows have a kernel for dq alone.
  fused = length // keys <= _PARTS
  apart = {} if fused else {'block_q_dq': block, 'block_kv_dq': block}
  made = kernel.make_splash_mha(
    masks.MultiHeadMask([mask] * num_heads),
    block_sizes=kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=keys,
      block_kv_dkv_compute=min(block, keys),
      use_fused_bwd_kernel=fused,
      **apart,
    ),
    attn_logits_soft_cap=soft_cap or None,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
    residual_checkpoint_name='attention',
  )
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
  if segment_ids_BL is None:
    out_BHLK = jax.vmap(made)(q, k, v)
  else:
    ids = kernel.SegmentIds(segment_ids_BL, segment_ids_BL)
    out_BHLK = jax.vmap(made)(q, k, v, ids)
  return jnp.swapaxes(out_BHLK, 1, 2).astype(q_BLHK.dtype)


def _divisor(length: int, most: int) -> int:
  """The largest block of whole lanes that divides the length."""
  blocks = range(_LANES, min(most, length) + 1, _LANES)
  return max(block for block in blocks if length % block == 0)
