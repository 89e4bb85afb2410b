"""What the processes of a run share out, and how they come together again.

Steps are one program over all devices; each process gives its rows of a batch.
What the host does between programs (answers to prompts, rewards) is shared out
too, and gathered on every process, which then go on alike. All functions are
free where there is one process.
"""

import pickle
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_lm import sharding
from tpu_lm.buckets import bucket
from tpu_lm.errors import UserError

_SMALLEST = 1 << 12  # bytes gathered at once


def many() -> bool:
  """Whether there are several processes."""
  return jax.process_count() > 1


def share(mesh: Mesh) -> tuple[int, int]:
  """(i, n): this process gives the i-th of n equal parts of a batch's rows.

  Processes whose devices hold the same rows, since `tensor` or `sequence` goes
  across them, give the same part.

  Raises:
    UserError: this process has no device in the mesh, or its rows are not
      side by side.
  """
  num_shards = sharding.num_batch_shards(mesh)
  place = NamedSharding(mesh, P(sharding.rows_over(mesh)))
  found = place.addressable_devices_indices_map((num_shards,)).values()
  shards = sorted({index[0].indices(num_shards)[0] for index in found})
  shape = ', '.join(f'{axis}={n}' for axis, n in mesh.shape.items() if n > 1)
  if not shards or mesh.size < jax.device_count():
    raise UserError(
      f'mesh: {shape or "one device"} leaves devices out, of {mesh.size} and '
      f'{jax.device_count()} in {jax.process_count()} processes; set '
      'mesh.data=-1'
    )
  first, count = shards[0], len(shards)
  if shards != list(range(first, first + count)) or first % count:
    raise UserError(
      f'mesh: with {shape} process {jax.process_index()} has rows that are not '
      'side by side; make mesh.data x mesh.fsdp a multiple of the processes'
    )
  return first // count, num_shards // count


def own_rows(columns: dict[str, np.ndarray], mesh: Mesh) -> dict:
  """Of columns that every process has whole, the rows that this one gives."""
  if not many():
    return columns
  index, count = share(mesh)

  def part(column: np.ndarray) -> np.ndarray:
    size = len(column) // count
    return column[index * size : (index + 1) * size]

  return {name: part(column) for name, column in columns.items()}


def span(count: int, part: tuple[int, int] | None = None) -> range:
  """Which of `count` pieces of host work this process does.

  Args:
    count: of the pieces.
    part: (i, n), the i-th of n processes; None: this one.
  """
  index, of = part or (jax.process_index(), jax.process_count())
  return range(count * index // of, count * (index + 1) // of)


def whole(tree: Any) -> Any:
  """Arrays as numpy, those that lie across processes in every one."""
  if not many():
    return jax.device_get(tree)
  return jax.tree.map(_whole, tree)


def _whole(x: Any) -> np.ndarray:
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return np.asarray(jax.device_get(x))
  if x.is_fully_replicated:
    return np.asarray(x.addressable_data(0))
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def gathered(value: Any) -> list[Any]:
  """The value of every process, in every process; by way of pickle."""
  if not many():
    return [value]
  text = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32))
  sizes = np.asarray(sizes).reshape(-1)
  # Powers of two, so that few programs are compiled.
  padded = np.zeros(bucket(int(sizes.max()), _SMALLEST), np.uint8)
  padded[: len(text)] = text
  found = np.asarray(multihost_utils.process_allgather(padded))
  return [
    pickle.loads(row[:size].tobytes())
    for row, size in zip(found, sizes, strict=True)
  ]


def any_of(flag: bool) -> bool:
  """Whether it is set in any process; they agree on it."""
  if not many():
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def barrier(name: str) -> None:
  """Waits until every process has come here."""
  if many():
    multihost_utils.sync_global_devices(name)


def local(params: Any, mesh: Mesh) -> tuple[Any, Mesh]:
  """The parameters on the devices of this process alone, and their mesh.

  They are shared out over these if `mesh` shares out parameters, else each
  has them whole; nothing goes through the host.
  """
  if not many():
    return params, mesh
  here, everywhere = _meshes(mesh)
  across = jax.tree.map(
    lambda place: NamedSharding(everywhere, place.spec),
    sharding.shardings_of(params, here),
  )

  def moved(leaf: jax.Array, place: NamedSharding) -> jax.Array:
    parts = {s.device: s.data for s in leaf.addressable_shards}
    place = NamedSharding(here, place.spec)
    return jax.make_array_from_single_device_arrays(
      leaf.shape, place, [parts[device] for device in here.devices.flat]
    )

  return jax.tree.map(moved, jax.device_put(params, across), across), here


def _meshes(mesh: Mesh) -> tuple[Mesh, Mesh]:
  """(of the devices here, of all with the processes as their first axis)."""
  size = jax.local_device_count()
  tensor = np.gcd(mesh.shape['tensor'], size)
  replicas = mesh.shape['data'] * mesh.shape['sequence']
  shared = mesh.size // replicas > tensor
  sizes = dict.fromkeys(sharding.AXES, 1) | {
    'tensor': int(tensor),
    'fsdp' if shared else 'data': int(size // tensor),
  }
  here = sharding.make_mesh(sizes, jax.local_devices(), (sizes['fsdp'],))
  # As the devices here are laid out, so are those of every process.
  order = [jax.local_devices().index(device) for device in here.devices.flat]
  rows = [
    [jax.local_devices(process_index=p)[i] for i in order]
    for p in range(jax.process_count())
  ]
  devices = np.array(rows).reshape(-1, *here.devices.shape)
  axes = ('process', *here.axis_names)
  types = (AxisType.Auto,) * len(axes)
  return here, Mesh(devices, axes, axis_types=types)
