"""Frozen weights in 8 and 4 bits.

Int8: symmetric, one scale an output channel (a row of a table): w ~ q s with
q in -127 to 127, so that |w - q s| <= s / 2.

Nf4: QLoRA (Dettmers et al., arXiv 2305.14314), section 3. The weights of a
layer, flattened, are cut into blocks of 64; a block holds w / max|w| as the
nearest of 16 quantiles of a normal distribution (equation 4), and its max|w|
is quantised again, in blocks of 256, after the mean over the layer was taken
away ("double quantisation"). Where the paper stores these in 8-bit floats, we
store them as linear 8-bit integers: they lie about as evenly as integers do.
That makes 4.13 bits a weight.

Quantised weights are never trained. Products with them keep no dequantised
copy for the backward pass, which makes it again from the codes.

Axis letters beside those of DESIGN: J blocks of 64 weights, M blocks of 256
scales. A leaf of a whole tree has N, the layers, before them; inside of the
scan over layers it has not, and all that is static is of one layer.
"""

import dataclasses
import functools
import itertools
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp

from tpu_lm import sharding

_BLOCK = 64  # weights that share a scale
_GROUP = 256  # scales that share a scale
_MOST = 127  # of a symmetric int8


def leaf(*static: str):
  """Makes a class one of arrays that JAX looks into, but for `static`."""

  def register(cls):
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(
      cls, [name for name in names if name not in static], list(static)
    )

  return register


@leaf()
class Int8:
  """The weight is values * scales."""

  values: jax.Array  # int8, of the weight's shape
  scales: jax.Array  # float32, the same, but 1 where a scale is shared


@leaf('shape')
class Nf4:
  """Codes of 4 bits and their scales; see `dense`."""

  codes: jax.Array  # uint8 [J, 32]; weight i below, i + 32 above
  peaks: jax.Array  # int8 [J], max|w| of a block, less the mean
  steps: jax.Array  # float32 [M], what one unit of `peaks` is
  mean: jax.Array  # float32 []
  shape: tuple[int, ...]  # of the weight of one layer


QUANTISED = Int8 | Nf4


def _make_table() -> tuple[float, ...]:
  """The 16 values: eight quantiles above 0, seven below, and 0 itself.

  The paper's equation 4 with the asymmetry of its section 3 and the tail of
  its code: quantiles are spaced evenly between 1/2 and the mean of 1 - 1/30
  and 1 - 1/32, and scaled into -1 to 1.
  """
  end = 1 - (1 / 30 + 1 / 32) / 2
  quantile = NormalDist().inv_cdf

  def side(count: int) -> list[float]:
    gap = (end - 0.5) / count
    return [quantile(0.5 + gap * (i + 1)) / quantile(end) for i in range(count)]

  return (*(-x for x in reversed(side(7))), 0.0, *side(8))


TABLE = _make_table()


def int8(weight: jax.Array, axes: int | tuple[int, ...]) -> Int8:
  """Quantises; a scale is shared along `axes`, those of the inputs."""
  peak = jnp.max(jnp.abs(weight), axis=axes, keepdims=True)
  scales = jnp.where(peak > 0, peak, 1.0) / _MOST
  values = jnp.round(weight / scales).astype(jnp.int8)
  return Int8(values, scales.astype(jnp.float32))


def nf4(weight: jax.Array) -> Nf4:
  """Quantises the weight of one layer; `jax.vmap` it over a stack."""
  weight_J64 = _filled(weight.reshape(-1).astype(jnp.float32), _BLOCK)
  peak_J = jnp.max(jnp.abs(weight_J64), axis=1)
  unit_J64 = weight_J64 / jnp.where(peak_J > 0, peak_J, 1.0)[:, None]
  index_J64 = jnp.zeros(unit_J64.shape, jnp.uint8)
  for low, high in itertools.pairwise(TABLE):
    index_J64 += unit_J64 > (low + high) / 2
  half = _BLOCK // 2
  codes = index_J64[:, :half] | (index_J64[:, half:] << 4)
  mean = peak_J.mean()
  offset_MG = _filled(peak_J - mean, _GROUP)
  top_M = jnp.max(jnp.abs(offset_MG), axis=1)
  step_M = jnp.where(top_M > 0, top_M, 1.0) / _MOST
  peaks = jnp.round(offset_MG / step_M[:, None]).astype(jnp.int8)
  return Nf4(
    codes, peaks.reshape(-1)[: len(peak_J)], step_M, mean, weight.shape
  )


def _filled(x: jax.Array, size: int) -> jax.Array:
  """[n] to [n / size, size], filled up with zeros at the end."""
  return jnp.pad(x, (0, -x.size % size)).reshape(-1, size)


def _looked_up(index_J32: jax.Array, unit_J1: jax.Array) -> jax.Array:
  """TABLE[index] * unit, by a tree of 15 selections.

  On a CPU 4.9 G weights/s; a gather of the 16 values 4.1, tables of byte pairs
  4.2. TPUs have no quick gather at all. The values are scaled before they are
  selected: XLA would take 16 arrays of constants out of the loop over layers.
  """
  found = [value * unit_J1 for value in TABLE]
  for bit in range(4):
    is_set = (index_J32 >> bit) & 1 != 0
    found = [
      jnp.where(is_set, high, low)
      for low, high in zip(found[::2], found[1::2], strict=True)
    ]
  return found[0]


def dense(leaf: QUANTISED) -> jax.Array:
  """Float32, what a leaf stands for.

  Args:
    leaf: of one layer, or a table; an `Int8` may be a stack of layers.
  """
  if isinstance(leaf, Int8):
    return leaf.values.astype(jnp.float32) * leaf.scales
  peak_MG = _filled(leaf.peaks.astype(jnp.float32), _GROUP)
  peak_J = (peak_MG * leaf.steps[:, None]).reshape(-1)[: len(leaf.peaks)]
  unit_J1 = (peak_J + leaf.mean)[:, None]
  halves = leaf.codes & 15, leaf.codes >> 4
  weight_J64 = jnp.concatenate(
    [_looked_up(half, unit_J1) for half in halves], axis=1
  )
  flat = weight_J64.reshape(-1)
  return flat[: math.prod(leaf.shape)].reshape(leaf.shape)


def count(leaf: QUANTISED) -> int:
  """The number of weights that a leaf, or a stack of them, stands for."""
  if isinstance(leaf, Int8):
    return math.prod(leaf.values.shape)
  layers = leaf.codes.shape[:-2]
  return math.prod((*layers, *leaf.shape))


def letters_of(spec: str) -> tuple[str, str, str]:
  """('TD', 'DHK', 'THK') for 'TD,DHK->THK'."""
  inputs, output = spec.split('->')
  x, weight = inputs.split(',')
  return x, weight, output


def _operand(spec: str, leaf: QUANTISED, dtype: jnp.dtype):
  """(what the product multiplies with, what its result is scaled by)."""
  _, letters, output = letters_of(spec)
  # Codes are gathered, not what they stand for; but each device keeps only
  # the heads and hidden units that it multiplies.
  if isinstance(leaf, Int8):
    values = sharding.constrain_weight(leaf.values, letters)
    scales = leaf.scales.reshape(
      [
        size
        for letter, size in zip(letters, leaf.values.shape, strict=True)
        if letter in output
      ]
    )
    return values.astype(dtype), scales.astype(dtype)
  weight = dense(jax.tree.map(sharding.replicate, leaf))
  return sharding.constrain_weight(weight, letters).astype(dtype), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, x: jax.Array, leaf: QUANTISED) -> jax.Array:
  """`jnp.einsum(spec, x, dense(leaf))` in the dtype of x.

  Only x has a gradient, for which the codes are kept and nothing else.

  Args:
    spec: of an einsum whose second operand's inputs come first.
    x: of a floating dtype.
    leaf: of one layer.
  """
  weight, scales = _operand(spec, leaf, x.dtype)
  y = jnp.einsum(spec, x, weight)
  return y if scales is None else y * scales


def _forward(spec, x, leaf):
  return product(spec, x, leaf), leaf


def _backward(spec, leaf, y_grad):
  # Without the barrier XLA would find that the forward pass has made the same
  # weights, and keep those of all layers until here.
  leaf, y_grad = jax.lax.optimization_barrier((leaf, y_grad))
  x_letters, letters, output = letters_of(spec)
  weight, scales = _operand(spec, leaf, y_grad.dtype)
  y_grad = y_grad if scales is None else y_grad * scales
  return jnp.einsum(f'{output},{letters}->{x_letters}', y_grad, weight), None


product.defvjp(_forward, _backward)
