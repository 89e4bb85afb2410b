"""The device mesh, and where every array lies on it.

Mesh axes: `data` (replicas), `fsdp` (replicas that also share out the
parameters), `tensor` (heads and hidden units), `sequence` (positions of the
activations), `expert` (replicas that share out experts, and all else like
`fsdp`). Axes of size 1 cost nothing. On a torus `fsdp` may stand for several
rings, `fsdp`, `fsdp_y` and `fsdp_z`: collectives are fast along one ring.

One table of (pattern, spec) says how a parameter is laid out; optimizer state
follows its parameter, since its paths end in the parameter's path.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_lm import torus
from tpu_lm.errors import UserError

AXES = ('data', 'fsdp', 'tensor', 'sequence', 'expert')

# The first pattern that is found in the path decides. Leading N: layers. The
# number says how many dimensions of a matrix are its inputs; they come first.
RULES = (
  (r'(^|/)(embedding|head)$', P('tensor', 'fsdp'), 0),  # V D
  (r'attention/(q|k|v)$', P(None, 'fsdp', 'tensor', None), 1),  # N D H K
  (r'attention/(q|k|v)_bias$', P(None, 'tensor', None), 0),  # N H K
  (r'attention/o$', P(None, 'tensor', None, 'fsdp'), 2),  # N H K D
  (r'mlp/(gate|up)$', P(None, 'fsdp', 'tensor'), 1),  # N D F
  (r'mlp/down$', P(None, 'tensor', 'fsdp'), 1),  # N F D
  (r'moe/router$', P(None, 'fsdp', None), 0),  # N D E
  (r'moe/(gate|up)$', P(None, 'expert', 'fsdp', 'tensor'), 0),  # N E D F
  (r'moe/down$', P(None, 'expert', 'tensor', 'fsdp'), 0),  # N E F D
  (r'moe/shared_(gate|up)$', P(None, 'fsdp', 'tensor'), 1),  # N D S
  (r'moe/shared_down$', P(None, 'tensor', 'fsdp'), 1),  # N S D
)
# What a weight may be made of (weights.py, quantize.py): the path goes on.
_PARTS = re.compile(
  r'^(.*?)(?:/base)?'
  r'(?:/(values|scales|a|b|m|codes|peaks|steps|mean))?$'
)
_BLOCKS = ('fsdp', 'tensor')  # the axes that share out blocks of 4-bit codes
_RINGS = ('fsdp', 'fsdp_y', 'fsdp_z')
EXPERTS = re.compile(r'moe/(gate|up|down)$')  # a matrix for each of many
HEADS = ('tensor', 'sequence')  # attention's heads: see attention.py


def path_name(path: tuple[Any, ...]) -> str:
  """'layers/attention/q' for a key path of `jax.tree_util`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def make_mesh(
  sizes: dict[str, int],
  devices: Any = None,
  rings: tuple[int, ...] = (),
) -> Mesh:
  """Makes the mesh; a size of -1 (one axis at most) takes what is left.

  Args:
    sizes: by the names of AXES.
    devices: all that there are by default.
    rings: what the axis `fsdp` is made of; by default as torus.py has it.

  Raises:
    UserError: the sizes do not make up the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {axis: sizes[axis] for axis in AXES}
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise UserError(f'mesh.{axis}={size}: give a size of at least 1, or -1')
  slices = torus.num_slices(devices)
  if sizes['data'] == 1 and slices > 1:
    sizes['data'] = slices  # nothing else may span them
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise UserError(
      f'mesh.{free[1]}=-1: only one axis may take what is left, and '
      f'mesh.{free[0]} does already'
    )
  taken = int(np.prod([size for size in sizes.values() if size != -1]))
  product = ' x '.join(f'{a}={n}' for a, n in sizes.items() if n not in (1, -1))
  if free and taken <= len(devices) and len(devices) % taken == 0:
    sizes[free[0]] = len(devices) // taken
  elif free or taken > len(devices):
    raise UserError(
      f'mesh: {product} needs {taken} devices or a multiple, and there are '
      f'{len(devices)} {devices[0].platform} devices; lower one of them'
    )
  devices = devices[: math.prod(sizes.values())]
  rings = rings or torus.rings(sizes['fsdp'], torus.sides(devices))
  shape = {}
  for axis, size in sizes.items():
    split = dict(zip(_RINGS, rings, strict=False))
    shape |= split if axis == 'fsdp' else {axis: size}
  return Mesh(
    torus.arranged(shape, devices),
    tuple(shape),
    axis_types=(AxisType.Auto,) * len(shape),
  )


def rows_over(mesh: Any) -> tuple[str, ...]:
  """The axes that share out a batch's rows."""
  return ('data', *_rings(mesh), 'expert')


def num_weight_shards(mesh: Any) -> int:
  """Among how many devices with rows of their own a weight is shared out."""
  return math.prod(mesh.shape[axis] for axis in rows_over(mesh)[1:])


def row_axes(mesh: Any) -> tuple[str, ...]:
  """Those of them along which there are several devices."""
  if mesh.empty:
    return ()
  return tuple(axis for axis in rows_over(mesh) if mesh.shape[axis] > 1)


def free_rows(mesh: Any) -> tuple[str, ...]:
  """Those of `rows_over` that are the partitioner's (`free_axes`)."""
  free = free_axes(mesh)
  return tuple(axis for axis in rows_over(mesh) if axis in free)


def _rings(mesh: Any) -> tuple[str, ...]:
  return tuple(axis for axis in _RINGS if axis in mesh.shape)


def check_batch(
  mesh: Mesh, batch_size: int, microbatches: int, length: int
) -> None:
  """Refuses a batch that cannot be divided: its rows, or their positions."""
  if microbatches < 1 or batch_size % microbatches:
    raise UserError(
      f'microbatches={microbatches}: must divide batch_size={batch_size}'
    )
  rows, parts = batch_size // microbatches, num_batch_shards(mesh)
  if rows % parts:
    raise UserError(
      f'batch_size={batch_size}: {rows} rows a microbatch cannot be divided '
      f'by mesh.data x mesh.fsdp = {parts}; make batch_size a multiple of '
      f'{parts * microbatches}'
    )
  if length % mesh.shape['sequence']:
    raise UserError(
      f'data.length={length}: cannot be divided by mesh.sequence='
      f'{mesh.shape["sequence"]}'
    )


def num_batch_shards(mesh: Mesh) -> int:
  """Into how many parts the mesh divides a batch's rows."""
  return math.prod(mesh.shape[axis] for axis in rows_over(mesh))


def num_inputs(name: str) -> int:
  """How many dimensions of the matrix of this path are inputs; 0: no matrix.

  Args:
    name: of the weight, without what it may be made of (`stem`).
  """
  found = (n for pattern, _, n in RULES if re.search(pattern, name))
  return next(found, 0)


def stem(name: str) -> str:
  """'layers/attention/q' for 'layers/attention/q/base/codes' and the like."""
  return _PARTS.match(name)[1]


def _rule(name: str, ndim: int) -> P:
  """The spec that the table has for a path, whatever the sizes are."""
  name, part = _PARTS.match(name).groups()
  if part in ('codes', 'peaks'):
    return P(None, _BLOCKS, *(None,) * (ndim - 2))
  for pattern, spec, inputs in RULES:
    if not re.search(pattern, name):
      continue
    if part == 'a':
      spec = P(*spec[: 1 + inputs], None)
    elif part == 'b':
      spec = P(spec[0], None, *spec[1 + inputs :])
    elif part == 'm':
      spec = P(spec[0], *spec[1 + inputs :])
    if len(spec) == ndim:
      return spec
  return P(*(None,) * ndim)


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The spec of the array called `name` (a path, or one that ends in it).

  A dimension that its axes do not divide is shared out over fewer, or stays
  whole, but for `tensor` over heads and hidden units and for `expert`, where
  that would undo what was asked for.

  Raises:
    UserError: `tensor` or `expert` does not divide what it must.
  """
  found, rule = [], _rule(name, len(shape))
  for axes, size in zip(rule, shape, strict=True):
    axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    axes = _expanded(axes, mesh, 'expert' in rule)
    must = axes in (('tensor',), ('expert',)) and len(shape) > 2 and size > 1
    wanted = axes
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
      axes = axes[:-1]
    if must and not axes:
      axis = wanted[0]
      what = 'experts' if axis == 'expert' else 'heads or hidden units'
      raise UserError(
        f'mesh.{axis}={mesh.shape[axis]}: does not divide the {size} {what} '
        f'of {name}'
      )
    found.append(axes if len(axes) > 1 else axes[0] if axes else None)
  return P(*found) if any(found) else P()


def _expanded(
  axes: tuple[str, ...], mesh: Any, is_expert: bool
) -> tuple[str, ...]:
  """`fsdp` as all the axes it stands for; `expert` helps where it can."""
  found = []
  for axis in axes:
    more = [*_rings(mesh)[1:], *(() if is_expert else ('expert',))]
    more = [other for other in more if mesh.shape[other] > 1]
    found += [axis, *more] if axis == 'fsdp' else [axis]
  return tuple(found)


def specs_of(tree: Any, mesh: Any, axes: tuple[str, ...]) -> Any:
  """The spec of every leaf, as far as it is about `axes`."""

  def spec(path: tuple, leaf: Any) -> P:
    kept = []
    for entry in spec_of(path_name(path), leaf.shape, mesh):
      names = entry if isinstance(entry, tuple) else (entry,)
      kept.append(tuple(name for name in names if name in axes) or None)
    return P(*kept)

  return jax.tree_util.tree_map_with_path(spec, tree)


def shardings_of(tree: Any, mesh: Mesh) -> Any:
  """The sharding of every leaf of an abstract tree (shapes)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(
      mesh, spec_of(path_name(path), leaf.shape, mesh)
    ),
    tree,
  )


def abstract(tree: Any, mesh: Mesh) -> Any:
  """`tree` (of shapes) with its shardings; a target to restore onto."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    tree,
    shardings_of(tree, mesh),
  )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Lays this process's rows of a batch out over the mesh, rows divided."""

  def put(rows: np.ndarray) -> jax.Array:
    place = NamedSharding(mesh, P(rows_over(mesh), *(None,) * (rows.ndim - 1)))
    return jax.make_array_from_process_local_data(place, rows)

  return {name: put(rows) for name, rows in batch.items()}


def _constrain(x: jax.Array, *axes: Any) -> jax.Array:
  """A sharding constraint under a mesh; nothing outside of one."""
  mesh = jax.sharding.get_abstract_mesh()
  sizes = free_axes(mesh)
  if math.prod(sizes.values()) == 1:
    return x
  # A leading size 1 (initialisation) or a ragged one stays whole.
  spec = []
  for given, size in zip(axes, x.shape, strict=True):
    names = (given,) if isinstance(given, str) else (given or ())
    names = tuple(name for name in names if name in sizes)
    parts = math.prod(sizes[name] for name in names)
    spec.append(names if names and size % parts == 0 else None)
  return jax.lax.with_sharding_constraint(x, P(*spec))


def free_axes(mesh: Any) -> dict[str, int]:
  """The axes that are the partitioner's, with their sizes.

  The others are those of a region that is worked on by hand (per_device.py).
  """
  if mesh.empty:
    return {}
  return {a: n for a, n in mesh.shape.items() if a not in mesh.manual_axes}


def splits_sequence() -> bool:
  """Whether the mesh in force divides the positions of activations."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.shape['sequence'] > 1


def constrain_activations(x_BLD: jax.Array) -> jax.Array:
  """Rows over data and fsdp, positions over sequence, the model whole."""
  mesh = jax.sharding.get_abstract_mesh()
  return _constrain(x_BLD, rows_over(mesh), 'sequence', None)


def num_head_shards() -> int:
  """Into how many parts attention divides its heads."""
  sizes = free_axes(jax.sharding.get_abstract_mesh())
  return math.prod(sizes.get(axis, 1) for axis in HEADS)


def constrain_heads(x_BLHK: jax.Array) -> jax.Array:
  """Rows over their axes, positions whole, heads over HEADS."""
  mesh = jax.sharding.get_abstract_mesh()
  return _constrain(x_BLHK, rows_over(mesh), None, HEADS, None)


def constrain_weight(weight: jax.Array, letters: str) -> jax.Array:
  """A weight that was just made: heads and hidden units over tensor.

  Args:
    weight: of one layer.
    letters: its axis letters, those of DESIGN.
  """
  axes = ('tensor' if letter in 'HF' else None for letter in letters)
  return _constrain(weight, *axes)


def replicate(x: jax.Array) -> jax.Array:
  """Gathers a whole array on every device."""
  return _constrain(x, *(None,) * x.ndim)


def replicate_columns(table_VD: jax.Array) -> jax.Array:
  """Gathers the columns of a table before its rows are looked up.

  Without this XLA falls back to rematerialising the whole table.
  """
  return _constrain(table_VD, 'tensor', None)
