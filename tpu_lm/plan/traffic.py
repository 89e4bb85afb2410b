"""Bytes that an instruction moves to and from the memory of the device.

Operands are read and results written, but for what lies in the memory of the
core. Of a stack of layers only the slice that is read or written counts, and
the buffers of a collective that a product hands on do not.
"""

import re

from tpu_lm.plan import hlo

_SLICES = ('dynamic-slice', 'slice', 'gather')
_SAME = ('bitcast', 'reshape')  # other names of the same bytes


def of(program: hlo.Program, op: hlo.Op, index: dict[str, hlo.Op]) -> float:
  """Bytes that one instruction reads and writes.

  Args:
    program: for what it calls.
    op: the instruction.
    index: instructions of its computation, by name.
  """
  outs, ins = _handed_on(op)
  written = _written(program, op, index)
  total = sum(
    min(size, array.num_bytes)
    for n, (array, size) in enumerate(zip(op.results, written, strict=True))
    if n not in outs and not array.is_near
  )
  operands = {name: n for n, name in enumerate(op.operands) if n not in ins}
  for name, n in operands.items():
    far = [a for a in index[name].results if not a.is_near]
    total += _read(program, op, n, sum(a.num_bytes for a in far))
  return total


def _handed_on(op: hlo.Op) -> tuple[set[int], set[int]]:
  """Results and operands that are only on their way through a product."""
  if not op.hands_on:
    return set(), set()
  pairs = re.findall(r'\{(\d+)\}: \((\d+), \{\}\)', op.text)
  return {int(out) for out, _ in pairs}, {int(at) for _, at in pairs}


def _read(program: hlo.Program, op: hlo.Op, n: int, whole: float) -> float:
  """Bytes of its n-th operand, of `whole`, that an instruction reads."""
  if op.kind in _SLICES and n == 0:
    return min(whole, op.num_bytes)
  if op.kind == 'dynamic-update-slice' and n == 0:
    return 0.0  # written in its place
  inner = program.computations.get(op.called[0]) if op.called else None
  if op.kind != 'fusion' or not inner:
    return whole
  for one in inner:
    if one.kind == 'parameter' and one.text.startswith(f'({n})'):
      return min(whole, _used(program, inner, one, whole))
  return whole


def _used(
  program: hlo.Program, ops: list[hlo.Op], source: hlo.Op, whole: float
) -> float:
  """Bytes of `source` that the instructions of a fusion read."""
  if source is ops[-1]:
    return whole  # what calls the fusion reads it
  total = 0.0
  for one in ops:
    if source.name not in one.operands or one.kind == 'tuple':
      continue
    if one.kind in _SAME:
      total += _used(program, ops, one, whole)
    else:
      total += _read(program, one, one.operands.index(source.name), whole)
  return total


def _written(
  program: hlo.Program, op: hlo.Op, index: dict[str, hlo.Op]
) -> list[float]:
  """Bytes of each result that an instruction writes."""
  if op.kind in _SAME and op.operands[0] in index:
    return _written(program, index[op.operands[0]], index)
  if op.kind == 'dynamic-update-slice' and op.operands[1] in index:
    return [index[op.operands[1]].num_bytes]
  inner = program.computations.get(op.called[0]) if op.called else None
  if op.kind == 'fusion' and inner:
    own = {one.name: one for one in inner}
    root = inner[-1]
    if root.kind != 'tuple':
      return _written(program, root, own)
    if len(root.operands) == len(op.results):
      return [sum(_written(program, own[x], own)) for x in root.operands]
  return [array.num_bytes for array in op.results]
