"""Weights as decoding on a CPU reads them fastest.

A decode step is bound by reading every weight once, and XLA:CPU reads a stack
of layers slowly: it copies a layer out of it first. So layers are held one by
one, as plain matrices, those that read one input joined into one, and adapters
are added to what they adapt. Accelerators get the tree as it is, and so do
trees with quantised weights: both for the sake of memory.
"""

import functools
import math
import operator
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpu_lm import quantize, target, weights
from tpu_lm.models import transformer

_FEW = 2  # rows
# Of a block: what is joined to what, with how many dimensions of inputs.
_MATRICES = {
  'attention': {'qkv': ('qkv', 1), 'o': ('o', 2)},
  'mlp': {'gate_up': (('gate', 'up'), 1), 'down': (('down',), 1)},
}


@quantize.leaf('inputs_last')
class Matrix:
  """A matrix [inputs, outputs], or turned around."""

  values: jax.Array
  inputs_last: bool

  def product(self, x: jax.Array, dtype: Any = None) -> jax.Array:
    """x [..., inputs] times the matrix, in `dtype`, x's by default."""
    # Turned around inside of it, the product copied the matrix at each step.
    axes = ((x.ndim - 1,), (1 if self.inputs_last else 0,)), ((), ())
    return jax.lax.dot_general(
      x, self.values.astype(x.dtype), axes, preferred_element_type=dtype
    )


class _Last(NamedTuple):
  """What was packed last, and what of."""

  sources: list[weakref.ref]
  is_few: bool
  packed: Any


_last: _Last | None = None


def packed(params: Any, rows: int) -> Any:
  """Returns the parameters as decoding so many rows reads them.

  Asked again for the same arrays it gives what it gave.
  """
  global _last
  is_quantised = weights.is_held(weights.unadapt(params))
  if target.platform() != 'cpu' or is_quantised:
    return params
  leaves, is_few = jax.tree.leaves(params), rows < _FEW
  if _last is not None and _last.is_few == is_few:
    found = [source() for source in _last.sources]
    if len(found) == len(leaves) and all(map(operator.is_, found, leaves)):
      return _last.packed
  sources = [weakref.ref(leaf, _forget) for leaf in leaves]
  made = {**params, 'layers': _pack(params['layers'], rows=rows)}
  if not is_few:
    made['packed_head'] = _turned(transformer.head(params))
  _last = _Last(sources, is_few, made)
  return made


def _forget(source: weakref.ref) -> None:
  """Drops what was packed of an array that is gone."""
  global _last
  if _last is not None and source in _last.sources:
    _last = None


@functools.partial(jax.jit, static_argnames='rows')
def _pack(stack: Any, *, rows: int) -> tuple[Any, ...]:
  """The layers of a stack."""
  stack = weights.merge(stack)
  count = jax.tree.leaves(stack)[0].shape[0]

  def layer(n: int) -> Any:
    one = jax.tree.map(lambda leaf: leaf[n], stack)
    return {name: _block(block, name, rows) for name, block in one.items()}

  return tuple(map(layer, range(count)))


@jax.jit
def _turned(table_VD: jax.Array) -> Matrix:
  return Matrix(table_VD.T, inputs_last=False)


def _block(block: dict[str, Any], name: str, rows: int) -> dict[str, Any]:
  if name not in _MATRICES:  # experts stay plain: few of them are read
    return block
  found, matrices = dict(block), {}
  # One dot product an output is the best for one row, the worst for more.
  inputs_last = rows < _FEW
  for joint, (parts, inputs) in _MATRICES[name].items():
    taken = [found.pop(part) for part in parts]
    size = math.prod(taken[0].shape[:inputs])
    matrix = jnp.concatenate([leaf.reshape(size, -1) for leaf in taken], 1)
    matrices[joint] = Matrix(matrix.T if inputs_last else matrix, inputs_last)
  return {**found, 'packed': matrices}
