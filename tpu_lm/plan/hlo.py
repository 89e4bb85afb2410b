"""Reads the text of a compiled and scheduled program.

The text is XLA's HLO after scheduling: computations of instructions, the entry
last. Of it we need what costs time: matrix products, kernels, traffic to the
memory of the device, collectives, and loops, whose bodies run many times. The
compiler's own cost analysis counts a loop's body once.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

_BYTES = {
  'pred': 1, 's8': 1, 'u8': 1, 's4': 0.5, 'u4': 0.5, 'f8e4m3fn': 1,
  'f8e5m2': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
  'f32': 4, 's64': 8, 'u64': 8, 'f64': 8,
}  # fmt: skip
_EIGHT_BITS = ('s8', 'u8', 'f8e4m3fn', 'f8e5m2')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?')
_HEAD = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = ')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition)=%?([\w.-]+)')
_GROUP = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_IOTA_GROUP = re.compile(
  r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
)
_PAIR = re.compile(r'source_target_pairs=\{\{(\d+,\d+)\}')
_THROUGH = 'async_collective_fusion'


class Array(NamedTuple):
  """One array of an instruction's result."""

  dtype: str
  shape: tuple[int, ...]
  is_near: bool  # in the memory of the core (VMEM), not of the device

  @property
  def num_bytes(self) -> float:
    return _BYTES.get(self.dtype, 4) * math.prod(self.shape)


class Op(NamedTuple):
  """One instruction."""

  name: str
  kind: str  # HLO's opcode
  results: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str  # from the operands on

  @property
  def num_bytes(self) -> float:
    return sum(array.num_bytes for array in self.results)

  @property
  def called(self) -> tuple[str, ...]:
    """The computations that it names."""
    return tuple(_CALLED.findall(self.text))

  def called_as(self, role: str) -> str:
    return re.search(rf'{role}=%?([\w.-]+)', self.text)[1]

  @property
  def target(self) -> str:
    """Of a custom call: what is called."""
    found = re.search(r'custom_call_target="([^"]*)"', self.text)
    return found[1] if found else ''

  @property
  def path(self) -> str:
    """The names of the functions that it was traced in."""
    found = re.search(r'op_name="([^"]*)"', self.text)
    return found[1] if found else ''

  @property
  def cycles(self) -> int:
    """What the compiler thinks it takes; 0: it does not say."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
    return int(found[1]) if found else 0

  @property
  def group(self) -> int:
    """Of a collective: how many devices take part; 0: it does not say."""
    return 0 if _PAIR.search(self.text) else len(self.members)

  @property
  def members(self) -> list[int]:
    """Of a collective: the devices of its first group, or its first pair."""
    if found := _GROUP.search(self.text) or _PAIR.search(self.text):
      return [int(n) for n in found[1].split(',') if n]
    found = _IOTA_GROUP.search(self.text)
    if not found:
      return []
    groups, size, dims, order = found.groups()
    dims = [int(n) for n in dims.split(',')]
    ids = np.arange(math.prod(dims)).reshape(dims)
    if order:
      ids = ids.transpose([int(n) for n in order.split(',')])
    return ids.reshape(int(groups), int(size))[0].tolist()

  @property
  def rendezvous(self) -> str:
    """Of a send or recv between slices: which pair it is of."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', self.text)
    return found[1] if found else ''

  @property
  def exchange(self) -> str:
    """Of a send between slices: the kind of the collective."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', self.text)
    return found[1].lower().replace('_', '-') if found else ''

  @property
  def hands_on(self) -> bool:
    """Whether it is a product that an asynchronous collective goes through."""
    is_fusion = self.kind == 'fusion' and self.called
    return bool(is_fusion) and self.called[0].startswith(_THROUGH)


class Program(NamedTuple):
  """Computations by name; instructions stand in the order they run."""

  computations: dict[str, list[Op]]
  entry: str

  def find(self, computation: str, name: str) -> Op | None:
    ops = self.computations[computation]
    return next((op for op in ops if op.name == name), None)


def parse(text: str) -> Program:
  """Reads `compiled.as_text()`.

  Raises:
    ValueError: it has no entry.
  """
  computations, current, entry = {}, None, ''
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith((' ', 'HloModule')):
      words = line.split()
      name = words[1] if words[0] == 'ENTRY' else words[0]
      name = name.lstrip('%').split('(')[0]
      entry = name if words[0] == 'ENTRY' else entry
      current = computations.setdefault(name, [])
    elif current is not None and (head := _HEAD.match(line)):
      current.append(_instruction(head[2], line[head.end() :]))
  if not entry:
    raise ValueError('no ENTRY computation: not the text of a program')
  return Program(computations, entry)


def _instruction(name: str, rest: str) -> Op:
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  # A layout may hold blanks nowhere, parentheses it may.
  results, rest = rest[:end], rest[end:].lstrip()
  opened = rest.index('(')
  closed = _closing(rest, opened)
  operands = re.findall(r'%([\w.-]+)', rest[opened:closed])
  return Op(
    name,
    rest[:opened].strip(),
    arrays(results),
    tuple(operands),
    rest[opened:],
  )


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for match in re.compile(r'[()]').finditer(text, start):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.start()
  return len(text) - 1


@functools.lru_cache(maxsize=100_000)
def arrays(text: str) -> tuple[Array, ...]:
  """The arrays of the text of a type."""
  return tuple(
    Array(
      dtype,
      tuple(int(n) for n in shape.split(',') if n),
      bool(re.search(r'S\([1-9]\)', layout)),
    )
    for dtype, shape, layout in _ARRAY.findall(text)
  )


def trips(program: Program, loop: Op) -> int:
  """How often the body of a `while` runs.

  Scans count from 0 (or down, or between bounds) by one and compare with a
  constant, which is what is looked for; 1 where there is none.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
  if known:
    return int(known[1])
  for op in program.computations[loop.called_as('condition')]:
    if op.kind == 'compare' and 'direction=LT' in op.text:
      for name in op.operands:
        bound = program.find(loop.called_as('condition'), name)
        if bound and bound.kind == 'constant':
          return int(re.match(r'\((\d+)\)', bound.text)[1])
  return 1


def flops(
  program: Program, computation: str, op: Op, low: float = 1.0
) -> float:
  """Of a matrix product, or of all within what the instruction calls.

  Args:
    program: that it is of.
    computation: that it is in.
    op: the instruction.
    low: products of 8 bits count as one part in so many.
  """
  if op.kind in ('dot', 'convolution'):
    small = low > 1 and all(
      side is not None and side.results[0].dtype in _EIGHT_BITS
      for side in (program.find(computation, name) for name in op.operands[:2])
    )
    return _product_flops(program, computation, op) / (low if small else 1)
  if op.kind != 'fusion':
    return 0.0
  return sum(
    flops(program, name, one, low)
    for name in op.called
    for one in program.computations.get(name, ())
  )


def _product_flops(program: Program, computation: str, op: Op) -> float:
  """Two FLOPs for each multiplication; TPUs spell products as convolutions."""
  out = math.prod(op.results[0].shape)
  sides = [program.find(computation, name) for name in op.operands[:2]]
  if None in sides:
    return 0.0
  left, right = (side.results[0].shape for side in sides)
  if op.kind == 'dot':
    dims = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', op.text)
    return 2 * out * math.prod(left[int(d)] for d in dims[1].split(',') if d)
  ins, kernel, outs = re.search(
    r'dim_labels=(\w+)_(\w+)->(\w+)', op.text
  ).groups()
  inner = right[kernel.index('i')]
  # Of a window over a dimension only what lies on the array is multiplied:
  # dimensions of batches are spelled as windows that mostly do not.
  for n, size in enumerate(_window(op.text, 'size')):
    where = left[ins.index(str(n))], op.results[0].shape[outs.index(str(n))]
    inner *= _visited(op.text, n, size, *where)
  return 2 * out * inner


def _visited(text: str, n: int, size: int, length: int, count: int) -> float:
  """Elements that a window of dimension `n` finds, a place of the output."""

  def get(key: str, default: int) -> int:
    values = _window(text, key)
    return values[n] if values else default

  pads = re.search(r'window=\{[^}]*\bpad=([-\d_x]+)', text)
  low = int(pads[1].split('x')[n].split('_')[0]) if pads else 0
  stride, apart = get('stride', 1), get('lhs_dilate', 1)
  step = get('rhs_dilate', 1)
  found = 0
  for place in range(count):
    for tap in range(size):
      at = place * stride + tap * step - low
      found += at % apart == 0 and 0 <= at // apart < length
  return found / max(count, 1)


def _window(text: str, key: str) -> list[int]:
  found = re.search(rf'window=\{{[^}}]*\b{key}=([\dx]+)', text)
  return [int(n) for n in found[1].split('x')] if found else []
