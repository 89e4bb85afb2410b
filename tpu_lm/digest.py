"""A 32-bit digest of every array of a tree, computed where the array lies.

The digest of an array is the wrapping sum over its 32-bit words of
`mix(word XOR mix(position))`, `mix` being the finalizer of MurmurHash3, a
bijection of 32-bit words. Hence:

- one changed word, by one bit or by many, always changes the digest;
- swapped, shifted or doubly changed words go unnoticed once in 2^32;
- integer sums do not depend on their order, so the digest is the same on every
  mesh, and no array is gathered or copied to the host to compute it.

It finds damage; it is not made to withstand an adversary.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def names(tree: Tree) -> list[str]:
  """Returns one name a leaf, in the tree's order: 'params/block/kernel'."""
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def digest(tree: Tree) -> dict[str, int]:
  """Returns the digest of every leaf, by the leaf's name.

  Args:
    tree: jax or numpy arrays of any dtype and sharding, typed keys included.
  """
  sums = jax.device_get(_sums(jax.tree.leaves(tree)))
  return dict(zip(names(tree), (int(x) for x in sums), strict=True))


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_sum(leaf) for leaf in leaves]


def _sum(x: jax.Array) -> jax.Array:
  words = _words(x)
  # Built from one iota per dimension: a reshape to one dimension would gather
  # a sharded array.
  position = jnp.zeros((), jnp.uint32)
  for dim in range(words.ndim):
    stride = math.prod(words.shape[dim + 1 :]) % 2**32
    iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
    position = position + iota * jnp.uint32(stride)
  return jnp.sum(_mix(words ^ _mix(position)), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
  """Returns the bits of x as uint32; narrow elements fill one word each."""
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    x = jnp.stack([x.real, x.imag], axis=-1)
  if x.dtype == bool:
    return x.astype(jnp.uint32)
  if jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
    x = x.astype(jnp.int8)
  bits = 8 * x.dtype.itemsize
  if bits >= 32:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
  unsigned = {8: jnp.uint8, 16: jnp.uint16}[bits]
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
