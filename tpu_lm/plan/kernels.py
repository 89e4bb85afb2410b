"""What Pallas kernels compute, which the compiler does not know."""

import math

from tpu_lm.plan import hlo


def flops(op: hlo.Op, index: dict[str, hlo.Op], held: float) -> float:
  """Of an instruction, if it is a kernel of ours.

  Args:
    op: the instruction.
    index: instructions of its computation, by name.
    held: the share of all experts that a device holds; so many of the rows
      that it is given are theirs, where the load is even.
  """
  if op.target != 'tpu_custom_call':
    return 0.0
  shapes = [
    array.shape
    for name in op.operands
    if name in index
    for array in index[name].results
    if array.dtype in ('bf16', 'f32')
  ]
  if 'splash' in op.name:
    return _attention(op, shapes)
  if op.name.startswith(('gmm', 'tgmm')):
    return held * _grouped([*shapes, *(array.shape for array in op.results)])
  return 0.0


def _attention(op: hlo.Op, shapes: list[tuple[int, ...]]) -> float:
  """Splash attention: half a square of queries and keys.

  Forward two products, backward five (FlashAttention-2, arXiv 2307.08691); by
  two kernels seven, since both make the logits and their gradient.
  """
  queries = next((shape for shape in shapes if len(shape) >= 3), None)
  if queries is None:
    return 0.0
  products = 5
  if '_fwd' in op.name:
    products = 2
  elif '_dq' in op.name:
    products = 3
  elif all(len(array.shape) <= len(queries) for array in op.results):
    products = 4  # the parts of dq are another kernel's
  heads, length, size = math.prod(queries[:-2]), *queries[-2:]
  return products * 2 * heads * length * length * size / 2


def _grouped(shapes: list[tuple[int, ...]]) -> float:
  """Rows by the matrices of their experts, or by rows to their gradient."""
  rows = [shape for shape in shapes if len(shape) == 2]
  if len(rows) != 2:
    return 0.0
  return 2.0 * rows[0][0] * rows[0][1] * rows[1][1]
