"""What a chip can do, and what topologies are called.

Peak FLOP/s, memory and bandwidths are those of the makers' pages
(cloud.google.com/tpu/docs, one page a version; NVIDIA's H100 data sheet); the
bandwidth of one link in one direction is that of "How to Scale Your Model"
(jax-ml.github.io/scaling-book, part 2). No number here was measured by us.
"""

import math
import re
from typing import NamedTuple

from tpu_lm.errors import UserError, nearest


class Chip(NamedTuple):
  """One device as JAX counts them."""

  name: str
  flops: float  # bfloat16, FLOP/s
  memory: float  # bytes that a program may use
  bandwidth: float  # bytes/s of it
  link: float  # bytes/s of one link between chips in one direction
  slices: float  # bytes/s to other slices (DCN), a chip
  cycles: float  # a second, where the compiler's counts of them are right
  full: int  # a side of the torus from which on it is closed to a ring
  is_gpu: bool = False
  low: float = 2.0  # times as many FLOPs of operands of 8 bits


CHIPS = {
  'v4': Chip('v4', 275e12, 30.75 * 2**30, 1.23e12, 4.5e10, 6.25e9, 0, 4, low=1),
  'v5e': Chip('v5e', 197e12, 15.75 * 2**30, 8.1e11, 4.5e10, 3.125e9, 1.5e9, 16),
  'v5p': Chip('v5p', 459e12, 95.74 * 2**30, 2.765e12, 9e10, 6.25e9, 0, 4),
  'v6e': Chip('v6e', 918e12, 31.25 * 2**30, 1.64e12, 9e10, 6.25e9, 0, 16),
  'h100': Chip(
    'h100', 989e12, 79 * 2**30, 3.35e12, 4.5e11, 5e10, 0, 1, is_gpu=True
  ),
}
# A side a dimension, by the number of chips.
_SQUARES = {
  1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8),
  128: (8, 16), 256: (16, 16),
}  # fmt: skip
_CUBES = {
  4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4),
  128: (4, 4, 8), 256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16),
  2048: (8, 16, 16), 4096: (16, 16, 16),
}  # fmt: skip
_SIDES = {'v4': _CUBES, 'v5e': _SQUARES, 'v5p': _CUBES, 'v6e': _SQUARES}
_CORES = ('v4', 'v5p')  # their names count cores, of which a chip has two


class Topology(NamedTuple):
  """Chips and how they are connected."""

  name: str
  chip: Chip
  sides: tuple[int, ...]  # of the torus of a slice
  num_slices: int = 1

  @property
  def slice_size(self) -> int:
    return math.prod(self.sides)

  @property
  def size(self) -> int:
    return self.slice_size * self.num_slices


def known() -> list[str]:
  """Names of one slice each; 2x before one means two of them."""
  found = []
  for name, sides in _SIDES.items():
    cores = 2 if name in _CORES else 1
    found += [f'{name}-{count * cores}' for count in sides]
  return [*found, 'h100-8']


def find(text: str) -> Topology:
  """The topology of a name: v5e-256, 2xv5e-256, v5p-128, v5e:4x4, h100-8.

  The names are those of Google Cloud: v4 and v5p count cores, two a chip.

  Raises:
    UserError: there is none of this name.
  """
  slices = re.fullmatch(r'(\d+)x(v.+)', text)
  name = slices[2] if slices else text
  number = int(slices[1]) if slices else 1
  match = re.fullmatch(r'(\w+?)(?:-(\d+)|:([\dx]+))', name)
  chip = CHIPS.get(match[1]) if match else None
  sides = None
  if chip and chip.is_gpu and match[2]:
    sides = (int(match[2]),)
  elif chip and match[3]:
    sides = tuple(int(side) for side in match[3].split('x'))
    if not chip.is_gpu and len(sides) != len(_SIDES[match[1]][4]):
      sides = None
  elif chip and not chip.is_gpu:
    cores = 2 if match[1] in _CORES else 1
    sides = _SIDES[match[1]].get(int(match[2]) / cores)
  if not sides or number < 1 or math.prod(sides) < 1:
    names = known()
    raise UserError(
      f'--topology={text}: unknown{nearest(name, names)}; there are '
      f'{", ".join(names)}, 2x… for two slices, and v5e:4x4 by its sides'
    )
  return Topology(text, chip, sides, number)
