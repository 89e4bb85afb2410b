"""Sums over a batch's rows, for which each device works on its own rows.

Left to the partitioner, a fully sharded step waits: on a torus it turns the
gradients of shared-out weights into all-reduces of whole weights, and gathers
the head for every chunk of the loss. So the axes that share out rows are
worked on by hand (`jax.shard_map`), as in ZeRO-3 (arXiv 1910.02054, section
5.3): a weight is gathered, in the dtype of the matmuls, where a layer needs
it, and what flows back is summed and scattered, ring by ring of the torus.
`tensor` and `sequence` stay the partitioner's.

Model code asks for its weights by `whole` and `looked_up`; outside of `summed`
these return what they are given.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from tpu_lm import sharding, target

# {path: per dimension the axes of the region that share it out}, while traced.
_SHARED_OUT: contextvars.ContextVar[dict[str, tuple] | None]
_SHARED_OUT = contextvars.ContextVar('shared_out', default=None)
# {path: the dtype that it was gathered in}, written while traced.
_DTYPES: contextvars.ContextVar[dict[str, Any]]
_DTYPES = contextvars.ContextVar('dtypes')


def summed(
  function: Callable,
  params: Any,
  frozen: Any,
  batch: Any,
  key: jax.Array,
  once: bool = True,
) -> tuple[Any, Any]:
  """`function(params, frozen, batch, key)`, summed over rows.

  Args:
    function: returns (a tree like `params`, any tree), both sums over the rows
      it is given; the first are gradients by `params`.
    params: what is differentiated.
    frozen: other parameters; paths of both are those of the whole network.
    batch: columns whose first dimension is rows.
    key: the same on all devices.
    once: whether each gradient is one, and no sum of several: it then has no
      more bits than the dtype in which its weight was gathered, and that is how
      it goes to other slices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = sharding.row_axes(mesh)
  if not axes:
    return function(params, frozen, batch, key)
  specs = sharding.specs_of(params, mesh, axes)
  frozen_specs = sharding.specs_of(frozen, mesh, axes)
  by_path = {
    sharding.path_name(path): _dims(spec)
    for tree in (specs, frozen_specs)
    for path, spec in jax.tree_util.tree_leaves_with_path(tree)
  }

  def own(params, frozen, batch, key):
    with _region(by_path) as dtypes:
      grads, sums = function(params, frozen, batch, key)

    def rest(path, spec, grad):
      # What is not shared out over an axis has its part of the sum on each.
      over = [axis for axis in axes if axis not in _names(spec)]
      if not over:
        return grad
      dtype = dtypes.get(sharding.path_name(path)) if once else None
      return _psum(grad.astype(dtype or grad.dtype), over).astype(grad.dtype)

    grads = jax.tree_util.tree_map_with_path(rest, specs, grads)
    return grads, jax.tree.map(lambda x: _psum(x, axes), sums)

  return jax.shard_map(
    own,
    in_specs=(specs, frozen_specs, P(axes), P()),
    out_specs=(specs, P()),
    axis_names=set(axes),
    check_vma=False,
  )(params, frozen, batch, key)


@contextlib.contextmanager
def _region(by_path: dict[str, tuple]) -> Iterator[dict[str, Any]]:
  token, other = _SHARED_OUT.set(by_path), _DTYPES.set({})
  try:
    yield _DTYPES.get()
  finally:
    _SHARED_OUT.reset(token)
    _DTYPES.reset(other)


def _dims(spec: P) -> tuple[tuple[str, ...], ...]:
  """(('fsdp',), ()) for P('fsdp', None)."""
  return tuple(
    entry if isinstance(entry, tuple) else (entry,) if entry else ()
    for entry in spec
  )


def _names(spec: P) -> set[str]:
  return {axis for dim in _dims(spec) for axis in dim}


def _psum(x: jax.Array, axes: list[str]) -> jax.Array:
  return jax.lax.psum(x, tuple(axes)) if axes else x


def largest(x: jax.Array) -> jax.Array:
  """The largest `x` of all devices."""
  axes = jax.sharding.get_abstract_mesh().manual_axes
  return jax.lax.pmax(x, axes) if axes else x


def total(x: jax.Array) -> jax.Array:
  """The sum of `x` over all devices' rows; not to be differentiated."""
  axes = jax.sharding.get_abstract_mesh().manual_axes
  return jax.lax.psum(x, axes) if axes else x


def is_inside() -> bool:
  """Whether what is traced sees its own rows only."""
  return _SHARED_OUT.get() is not None


def whole(
  name: str, leaf: Any, dtype: Any = None, keep: tuple[str, ...] = ()
) -> Any:
  """A parameter that is shared out, gathered on every device.

  Args:
    name: its path; of a layer of a stack, that of the stack.
    leaf: an array, or what a weight is made of (weights.py).
    dtype: plain arrays are gathered in it; None: in their own.
    keep: axes that go on sharing it out.
  """
  if not is_inside():
    return leaf
  is_plain = isinstance(leaf, jax.Array)

  def gathered(path: tuple, x: jax.Array) -> jax.Array:
    part = '/'.join(filter(None, (name, sharding.path_name(path))))
    if dtype is not None and is_plain:
      x = x.astype(dtype)
    many = bool(sharding.EXPERTS.search(name)) and x.ndim == 3
    for dim, axes in enumerate(_shared_out(part, x.ndim)):
      if axes and not set(axes) <= set(keep):
        _note(part, x.dtype)
        x = _gathered(x, axes, dim, many)
    return x

  return jax.tree_util.tree_map_with_path(gathered, leaf)


def _shared_out(name: str, ndim: int) -> tuple[tuple[str, ...], ...]:
  """A dimension's axes, for each of a parameter, or of its part of a layer."""
  dims = _SHARED_OUT.get()[name]
  return ((),) * (ndim - len(dims)) + dims[-ndim:] if ndim else ()


def _note(name: str, dtype: Any) -> None:
  """Keeps in which dtype a layer's weight is gathered, and its gradient made.

  (The gradient of a tied table is a sum. XLA:CPU sums 16 bits in 32.)
  """
  if name.startswith('layers/') and target.platform() != 'cpu':
    _DTYPES.get()[name] = dtype


def in_turn(leaf: Any, x: jax.Array) -> tuple[Any, jax.Array]:
  """Both; the gradient of `x` goes on once that of `leaf` is scattered.

  Else the compiler may keep the gradient of a whole head until the layers' are
  done: it fills as much memory as some layers.

  Args:
    leaf: a parameter, not yet gathered.
    x: what it is used with.
  """
  if not is_inside() or not isinstance(leaf, jax.Array):
    return leaf, x
  return _in_turn(leaf, x)


@jax.custom_vjp
def _in_turn(leaf, x):
  return leaf, x


def _in_turn_forward(leaf, x):
  both = leaf.perturbed and x.perturbed
  return (leaf.value, x.value), (() if both else None)


def _in_turn_backward(both, grads):
  if both is None:
    return tuple(_or_none(grad) for grad in grads)
  return jax.lax.optimization_barrier(grads)


def _or_none(grad: Any) -> jax.Array | None:
  is_zero = isinstance(grad, jax.custom_derivatives.SymbolicZero)
  return None if is_zero else grad


_in_turn.defvjp(_in_turn_forward, _in_turn_backward, symbolic_zeros=True)


def all_whole(names: list[str], leaves: list[Any], dtype: Any) -> list[Any]:
  """`whole` of matrices of the same inputs, by one collective if it can be.

  Small collectives wait longest; one for all is large.

  Args:
    names: their paths.
    leaves: [D, …].
    dtype: as in `whole`.
  """
  free = sharding.free_axes(jax.sharding.get_abstract_mesh())
  plain = all(isinstance(leaf, jax.Array) for leaf in leaves)
  pairs = list(zip(names, leaves, strict=True))
  if is_inside() and plain and free.get('tensor', 1) == 1:
    dims = {_shared_out(name, leaf.ndim)[0] for name, leaf in pairs}
    if len(dims) == 1 and (axes := dims.pop()):
      for name in names:
        _note(name, dtype)
      return _all_gathered(leaves, axes, dtype)
  return [whole(name, leaf, dtype) for name, leaf in pairs]


def _all_gathered(
  leaves: list[jax.Array], axes: tuple[str, ...], dtype: Any
) -> list[jax.Array]:
  """[D, …] of each, from [D / devices, …]."""
  parts = [leaf.astype(dtype).reshape(len(leaf), -1) for leaf in leaves]
  found = _gathered(jnp.concatenate(parts, axis=1), axes, 0, False)
  ends = np.cumsum([part.shape[1] for part in parts])[:-1]
  # Apart here: a TPU would have to copy what heads made of a joint matrix.
  return [
    part.reshape(-1, *leaf.shape[1:])
    for part, leaf in zip(jnp.split(found, ends, axis=1), leaves, strict=True)
  ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(
  x: jax.Array, axes: tuple[str, ...], dim: int, many: bool
) -> jax.Array:
  """The shards of `x` along `dim` put together.

  Args:
    x: a device's shard.
    axes: that share out `dim`; the first counts most.
    dim: of `x`.
    many: [E, …], matrices of experts: gathered as they lie, then put together.
      Else the shards would be turned to have `dim` first, and the whole back.
  """
  rows, turn_back = _rows(x, dim, many)
  # Two rings of a torus go together; over three it would be an all-reduce.
  for some in (axes[2:], axes[:2]):
    if some:
      rows = jax.lax.all_gather(rows, some, tiled=True)
  return turn_back(rows)


def _gathered_forward(x, axes, dim, many):
  return _gathered(x, axes, dim, many), None


def _gathered_backward(axes, dim, many, kept, grad):
  del kept
  parts = math.prod(jax.lax.axis_size(axis) for axis in axes)
  rows, turn_back = _rows(grad, dim, many, parts)
  if target.platform() == 'cpu':  # XLA:CPU cannot scatter sums in 16 bits
    rows = rows.astype(jnp.float32)
  # One ring at a time: only so it becomes a reduce-scatter on a torus.
  for axis in axes:
    rows = _rows_apart(rows)
    rows = jax.lax.psum_scatter(rows, axis, tiled=True)
  return (turn_back(rows.astype(grad.dtype)),)


def _rows(
  x: jax.Array, dim: int, many: bool, parts: int = 1
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
  """What is gathered or scattered along its first dimension, and the way back.

  That is [dim, all others], and for `many` [parts, E dim / parts, others].
  Along a dimension within a TPU's tiles, a scatter would be an all-reduce.
  """
  moved = jnp.moveaxis(x, dim, 1 if many else 0)
  if not many:
    rest = moved.shape[1:]

    def turn_back(rows: jax.Array) -> jax.Array:
      return jnp.moveaxis(rows.reshape(len(rows), *rest), 0, dim)

    return moved.reshape(len(moved), -1), turn_back

  num, size, rest = moved.shape
  shape = num, parts, size // parts, rest
  rows = moved.reshape(shape).swapaxes(0, 1).reshape(parts, -1, rest)

  def put_together(rows: jax.Array) -> jax.Array:
    whole = rows.reshape(len(rows), num, -1, rest).swapaxes(0, 1)
    return jnp.moveaxis(whole.reshape(num, -1, rest), 1, dim)

  return rows, put_together


def _rows_apart(rows: jax.Array) -> jax.Array:
  """The same, with rows that lie one after the other in a TPU's memory."""
  if target.platform() != 'tpu':
    return rows
  return with_layout_constraint(rows, Layout(tuple(range(rows.ndim))))


_gathered.defvjp(_gathered_forward, _gathered_backward)


def looked_up(name: str, table_VD: jax.Array, ids: jax.Array) -> jax.Array:
  """table_VD[ids], of a table whose columns may be shared out.

  Ids travel, and what was found for them, not the table: each device looks up
  its columns for the rows of all.

  Args:
    name: path of the table.
    table_VD: in the dtype of the result.
    ids: int [B, L].
  """
  axes = _shared_out(name, 2)[-1] if is_inside() else ()
  if not axes:
    return sharding.replicate_columns(table_VD)[ids]
  ids = jax.lax.all_gather(ids, axes, axis=0, tiled=True)
  found = sharding.replicate_columns(table_VD)[ids]
  return jax.lax.all_to_all(
    found, axes, split_axis=0, concat_axis=found.ndim - 1, tiled=True
  )
