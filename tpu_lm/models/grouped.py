"""Rows, each multiplied by the matrices of its expert.

Choices (a token and one of its experts) are sorted by expert, and each expert
multiplies its own:
  ragged  `jax.lax.ragged_dot`, a Pallas kernel on TPUs. The gradient of the
          matrices would there multiply every row by every expert, so it is
          Megablox' `tgmm` (Gale et al., arXiv 2211.15841, section 5.1).
  blocks  an expert's rows fill up blocks, and blocks of all experts are one
          batched product; the matrices are copied, once a block. For CPUs
          and GPUs, where ragged_dot multiplies every row by every expert.

Axis letters beside those of DESIGN: T tokens, A choices, S places, J blocks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tpu_lm import target

_BLOCK = {'cpu': 64, 'gpu': 512, 'tpu': 0}  # rows; 0: ragged
_ROWS = 128  # places are a multiple of it, since tiles of a TPU are
_TILES = (256, 1024, 1024)  # at most: rows, inputs, outputs that tgmm takes

Matrices = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down


def weighed(
  h_TD: jax.Array,
  ids_TK: jax.Array,
  gates_TK: jax.Array,
  matrices: Matrices,
  act: Callable,
  block: int | None = None,
) -> jax.Array:
  """The weighed sum of what the chosen experts make of each token.

  Args:
    h_TD: tokens.
    ids_TK: of the experts; E or more: of none that is here.
    gates_TK: float32.
    matrices: gate and up [E, D, F], down [E, F, D].
    act: the activation.
    block: rows of a block; 0: no blocks; None: what the device does best.
  """
  num_experts, (num_tokens, chosen) = len(matrices[0]), ids_TK.shape
  num_choices = num_tokens * chosen
  if block is None:
    block = _BLOCK[target.platform()]
  if block:  # decoding: no block is larger than all there is to do
    block = min(block, 1 << (num_choices - 1).bit_length())
  to, source, sizes_E = _places(ids_TK, num_experts, block)
  rows_AD = jnp.broadcast_to(
    h_TD[:, None], (num_tokens, chosen, h_TD.shape[1])
  ).reshape(num_choices, -1)
  x_SD = _moved(rows_AD, source, to)
  gate, up, down = matrices
  if block:
    of_J = _experts_of(sizes_E // block, len(source) // block)
    product = functools.partial(_blocks, of_J=of_J)
  else:
    product = functools.partial(_ragged, sizes_E=sizes_E)
  y_SD = product(act(product(x_SD, gate)) * product(x_SD, up), down)
  y_TKD = _moved(y_SD, to, source).reshape(num_tokens, chosen, -1)
  # What is not here may be anything, and its gradient, too.
  is_here = (ids_TK < num_experts)[..., None]
  y_TKD = jnp.where(is_here, y_TKD.astype(jnp.float32), 0)
  return (y_TKD * gates_TK[..., None]).sum(1).astype(h_TD.dtype)


def _places(
  ids_TK: jax.Array, num_experts: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Where choices stand, sorted by expert.

  Args:
    ids_TK: of the experts.
    num_experts: E.
    block: what places of an expert are a multiple of; 0: of nothing.

  Returns:
    (the place of each choice, the choice of each place, places of each
    expert). A choice without an expert has no place, and some places have no
    choice: these are too large.
  """
  ids_A = jnp.minimum(ids_TK.reshape(-1), num_experts)
  num_choices = len(ids_A)
  num_places = -(-num_choices // _ROWS) * _ROWS
  if block:
    many = min(num_choices, num_experts)  # that begin a block
    num_places = (num_choices // block + many) * block
  counts_E = (ids_A[:, None] == jnp.arange(num_experts)).sum(0)
  sizes_E = -(-counts_E // block) * block if block else counts_E
  first_E = jnp.cumsum(counts_E) - counts_E
  # How far the choices of an expert move, to begin with a block.
  shift_E = jnp.cumsum(sizes_E) - sizes_E - first_E
  order_A = jnp.argsort(ids_A, stable=True)
  ids_A = ids_A[order_A]
  place_A = jnp.arange(num_choices) + jnp.append(shift_E, 0)[ids_A]
  place_A = jnp.where(ids_A < num_experts, place_A, num_places)
  to = jnp.zeros(num_choices, int).at[order_A].set(place_A, unique_indices=True)
  source = jnp.full(num_places, num_choices)
  source = source.at[place_A].set(order_A, mode='drop')
  return to, source, sizes_E.astype(jnp.int32)


def _experts_of(blocks_E: jax.Array, num_blocks: int) -> jax.Array:
  """Whose each block is; those that are left over are of the last one."""
  ends_E = jnp.cumsum(blocks_E)
  of_J = jnp.searchsorted(ends_E, jnp.arange(num_blocks), side='right')
  return jnp.minimum(of_J, len(blocks_E) - 1)


@jax.custom_vjp
def _moved(x: jax.Array, source: jax.Array, to: jax.Array) -> jax.Array:
  """x[source], 0 where that is too large; row i of x stands at to[i]."""
  del to  # for the gradient, which would else be a slow sum
  return jnp.take(x, source, axis=0, mode='fill', fill_value=0)


def _moved_forward(x, source, to):
  return _moved(x, source, to), (source, to)


def _moved_backward(kept, grad):
  source, to = kept
  return _moved(grad, to, source), None, None


_moved.defvjp(_moved_forward, _moved_backward)


def _blocks(x_SX: jax.Array, weight_EXY: jax.Array, *, of_J: jax.Array):
  """Blocks of rows, each times the matrix of its expert."""
  x_JSX = x_SX.reshape(len(of_J), -1, x_SX.shape[-1])
  y_JSY = jnp.einsum('JSX,JXY->JSY', x_JSX, weight_EXY[of_J])
  return y_JSY.reshape(len(x_SX), -1)


def _ragged(x_SX: jax.Array, weight_EXY: jax.Array, *, sizes_E: jax.Array):
  """The first rows times the first matrix, and so on."""
  return _ragged_product(x_SX, weight_EXY, sizes_E)


@jax.custom_vjp
def _ragged_product(x_SX, weight_EXY, sizes_E):
  return jax.lax.ragged_dot(x_SX, weight_EXY, sizes_E)


def _ragged_forward(x_SX, weight_EXY, sizes_E):
  return _ragged_product(x_SX, weight_EXY, sizes_E), (x_SX, weight_EXY, sizes_E)


def _ragged_backward(kept, grad_SY):
  x_SX, weight_EXY, sizes_E = kept
  if target.platform() != 'tpu':
    product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes_E)
    return *jax.vjp(product, x_SX, weight_EXY)[1](grad_SY), None
  x_grad_SX = jax.lax.ragged_dot(grad_SY, weight_EXY.swapaxes(1, 2), sizes_E)
  grad_EXY = weight_gradient(x_SX, grad_SY, sizes_E)
  return x_grad_SX, grad_EXY.astype(weight_EXY.dtype), None


_ragged_product.defvjp(_ragged_forward, _ragged_backward)


def weight_gradient(
  x_SX: jax.Array,
  grad_SY: jax.Array,
  sizes_E: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """[E, X, Y]: for each expert the sum over its rows of their products."""
  # Pallas takes a second to import.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  rows, inputs, outputs = _TILES
  rows = rows if len(x_SX) % rows == 0 else _ROWS
  tiles = rows, min(inputs, x_SX.shape[1]), min(outputs, grad_SY.shape[1])
  return tgmm(x_SX.T, grad_SY, sizes_E, x_SX.dtype, tiles, interpret=interpret)
