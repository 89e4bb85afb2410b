"""How a mesh lies on the links between TPU chips.

Chips of a slice form a torus, with a ring of links along each of its sides;
slices are joined by the data-centre network, which is slower. A collective is
fast along a ring. So `fsdp` is made of whole rings where its size allows that,
and `data` spans the slices.
"""

import math
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from tpu_lm.errors import UserError


def sides(devices: Any) -> tuple[int, ...]:
  """Of the torus of one slice of these devices; () for other devices."""
  if getattr(devices[0], 'coords', None) is None:
    return ()
  corners = np.array([device.coords for device in devices])
  return tuple(int(n) for n in np.ptp(corners, axis=0) + 1)


def num_slices(devices: Any) -> int:
  """How many slices the devices are of."""
  return len({getattr(d, 'slice_index', None) or 0 for d in devices})


def rings(size: int, torus: tuple[int, ...], most: int = 3) -> tuple[int, ...]:
  """`size` as a product of at most `most` rings, whole ones where it goes.

  Args:
    size: of the axis `fsdp`.
    torus: its sides.
    most: of them.
  """
  found, rest = [], size
  for side in sorted(torus, reverse=True):
    ring = math.gcd(rest, side)
    if ring > 1 and len(found) < most:
      found.append(ring)
      rest //= ring
  if not found:
    return (size,)
  found[-1] *= rest
  return tuple(found)


def arranged(shape: dict[str, int], devices: Any) -> np.ndarray:
  """The devices as an array of this shape, near ones along the same axis.

  Args:
    shape: sizes by axis; `data` comes first.
    devices: as many.

  Raises:
    UserError: the mesh cannot be laid onto them.
  """
  sizes, slices = tuple(shape.values()), num_slices(devices)
  how = {'devices': devices, 'allow_split_physical_axes': True}
  if shape['data'] % slices:
    raise UserError(
      f'mesh.data={shape["data"]}: spans the {slices} slices; give a '
      f'multiple of {slices}'
    )
  try:
    if slices == 1:
      return mesh_utils.create_device_mesh(sizes, **how)
    inner = (sizes[0] // slices, *sizes[1:])
    outer = (slices, *(1,) * len(sizes[1:]))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, **how)
  except (NotImplementedError, ValueError) as error:
    spelled = ' x '.join(f'{a}={n}' for a, n in shape.items() if n > 1)
    raise UserError(
      f'mesh: {spelled} cannot be laid onto a torus of {sides(devices)}; take '
      'sizes that are products of its sides'
    ) from error
