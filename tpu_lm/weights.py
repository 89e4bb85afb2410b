"""How weights are held: what a leaf of the parameter tree may be.

Models never multiply by a weight themselves: they call `einsum`, which knows
what kind of leaf it was given. Stages and models therefore do not know
whether a weight is plain, quantised, adapted or frozen.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_lm import sharding
from tpu_lm.sharding import path_name

Params = Any


def einsum(
  spec: str, x: jax.Array, weight: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """`jnp.einsum(spec, x, weight)` in `dtype`; `weight` is a tree's leaf.

  Args:
    spec: 'BL…,…->BL…': rows and positions come first on both sides.
    x: [B, L, …].
    weight: a leaf of the parameter tree.
    dtype: of the product's operands and result.
  """
  x, weight = x.astype(dtype), weight.astype(dtype)
  if sharding.splits_sequence():
    return jnp.einsum(spec, x, weight)
  # One axis of tokens: XLA's gradient of a weight is 1.5 times slower on CPUs
  # where tokens have two. (Two sharded axes could not be merged.)
  lead = x.shape[:2]
  y = jnp.einsum(spec.replace('BL', 'T'), x.reshape(-1, *x.shape[2:]), weight)
  return y.reshape(*lead, *y.shape[1:])


def count(params: Params) -> int:
  """The number of parameters."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def partition(params: Params, trainable: str) -> tuple[Params, Params]:
  """Splits `params` by a regular expression over paths.

  Returns:
    (trainable, frozen): two trees of the same structure; where one has a
    leaf the other has None, which JAX takes for an empty subtree.

  Raises:
    ValueError: no path matches.
  """
  pattern = re.compile(trainable)

  def choose(wanted: bool) -> Params:
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: (
        leaf if bool(pattern.search(path_name(path))) == wanted else None
      ),
      params,
    )

  chosen = choose(True)
  if not jax.tree.leaves(chosen):
    raise ValueError(f'no parameter path matches {trainable!r}')
  return chosen, choose(False)


def combine(trainable: Params, frozen: Params) -> Params:
  """Undoes `partition`."""
  return jax.tree.map(
    lambda a, b: b if a is None else a,
    trainable,
    frozen,
    is_leaf=lambda leaf: leaf is None,
  )
