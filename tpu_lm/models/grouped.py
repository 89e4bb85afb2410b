"""Rows, each multiplied by the matrices of its expert.

Choices (a token and one of its experts) are sorted by expert, and each expert
multiplies its own:
  ragged  Megablox' Pallas kernels (Gale et al., arXiv 2211.15841, section
          5.1), for TPUs. They read a matrix either way round; for
          `jax.lax.ragged_dot` it would have to be turned in memory first.
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
_TILES = (512, 1024, 1024)  # at most: rows, inputs, outputs of a kernel

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
  to_TK = to.reshape(num_tokens, chosen)
  x_SD = _spread(h_TD, source, to_TK)
  gate, up, down = matrices
  if block:
    of_J = _experts_of(sizes_E // block, len(source) // block)
    product = functools.partial(_blocks, of_J=of_J)
  else:
    product = functools.partial(_ragged, sizes_E=sizes_E)
  hidden_SF = act(product(x_SD, gate)) * product(x_SD, up)
  y_TKD = _collected(product(hidden_SF, down, turned=True), to_TK, source)
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


def _taken(x: jax.Array, at: jax.Array) -> jax.Array:
  """x[at], 0 where that is too large."""
  return jnp.take(x, at, axis=0, mode='fill', fill_value=0)


# Each other's gradient, but for a sum over K, which would else be a slow sum of
# rows at places that come in any order.
@jax.custom_vjp
def _spread(h_TD: jax.Array, source: jax.Array, to_TK: jax.Array) -> jax.Array:
  """[S, D]: the token of the choice of each place."""
  return _taken(h_TD, source // to_TK.shape[1])


def _spread_forward(h_TD, source, to_TK):
  return _spread(h_TD, source, to_TK), to_TK


def _spread_backward(to_TK, grad_SD):
  return _taken(grad_SD, to_TK).sum(1), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collected(y_SD: jax.Array, to_TK: jax.Array, source: jax.Array):
  """[T, K, D]: what stands at the place of each choice."""
  return _taken(y_SD, to_TK)


def _collected_forward(y_SD, to_TK, source):
  return _collected(y_SD, to_TK, source), source


def _collected_backward(source, grad_TKD):
  return _taken(grad_TKD.reshape(-1, grad_TKD.shape[-1]), source), None, None


_collected.defvjp(_collected_forward, _collected_backward)


def _blocks(
  x_SX: jax.Array, weight_EXY: jax.Array, *, of_J: jax.Array, turned=False
) -> jax.Array:
  """Blocks of rows, each times the matrix of its expert."""
  del turned
  x_JSX = x_SX.reshape(len(of_J), -1, x_SX.shape[-1])
  y_JSY = jnp.einsum('JSX,JXY->JSY', x_JSX, weight_EXY[of_J])
  return y_JSY.reshape(len(x_SX), -1)


def _ragged(
  x_SX: jax.Array, weight_EXY: jax.Array, *, sizes_E: jax.Array, turned=False
) -> jax.Array:
  """The first rows times the first matrix, and so on.

  `turned`: matrices lie [E, Y, X] in memory (per_device.py).
  """
  if target.platform() != 'tpu':
    return jax.lax.ragged_dot(x_SX, weight_EXY, sizes_E)
  if turned:
    return by_kernel(x_SX, weight_EXY.swapaxes(1, 2), sizes_E, True)
  return by_kernel(x_SX, weight_EXY, sizes_E, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def by_kernel(
  x: jax.Array,
  weight: jax.Array,
  sizes_E: jax.Array,
  turned: bool,
  interpret: bool = False,
) -> jax.Array:
  """[S, Y]: the product of each expert's rows and its matrix.

  Args:
    x: [S, X], an expert's rows one after the other; S a multiple of 128.
    weight: [E, X, Y], or [E, Y, X] if `turned`.
    sizes_E: int32, rows of each expert. What is made of others is not defined.
    turned: see `weight`.
    interpret: run without a TPU.
  """
  # Pallas takes a second to import.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  outputs = weight.shape[1 if turned else 2]
  tiles = _tiles(*x.shape, outputs)
  return gmm(
    x, weight, sizes_E, x.dtype, tiles, transpose_rhs=turned,
    interpret=interpret,
  )  # fmt: skip


def _by_kernel_forward(x, weight, sizes_E, turned, interpret):
  y = by_kernel(x, weight, sizes_E, turned, interpret)
  return y, (x, weight, sizes_E)


def _by_kernel_backward(turned, interpret, kept, grad):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  x, weight, sizes_E = kept
  x_grad = by_kernel(grad, weight, sizes_E, not turned, interpret)
  a, b = (grad, x) if turned else (x, grad)
  tiles = _tiles(*a.shape, b.shape[1])
  weight_grad = tgmm(a.T, b, sizes_E, weight.dtype, tiles, interpret=interpret)
  return x_grad, weight_grad, None


by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _tiles(rows: int, inputs: int, outputs: int) -> tuple[int, int, int]:
  most, *sizes = _TILES
  fit = (n for n in (most, most // 2, _ROWS) if rows % n == 0)
  return next(fit), min(sizes[0], inputs), min(sizes[1], outputs)
