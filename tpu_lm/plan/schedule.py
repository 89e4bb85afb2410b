"""The time of a scheduled program on a chip, by a roofline a step.

Instructions run one after the other. Each takes what its matrix products take
at the chip's peak, or what its traffic takes at the bandwidth of the memory,
whichever is longer. An asynchronous collective runs beside what stands between
its start and its end, on links that do one at a time; only what is left over
then is waited for. The body of a loop counts as often as it runs.

What this leaves out: how well a product fills the units, contention, the host.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

from tpu_lm.plan import hlo, kernels, traffic
from tpu_lm.plan.chips import Topology

KINDS = (
  'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all',
  'ragged-all-to-all', 'collective-permute', 'collective-broadcast',
)  # fmt: skip
# Bytes that a device receives, by those of the whole array.
_WIRE = {'all-reduce': 2.0, 'collective-permute': 1.0}
_FREE = (
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast',
  'after-all', 'partition-id', 'replica-id', 'iota', 'opt-barrier', 'send',
  'recv',
)  # fmt: skip
_AWAY = ('copy-start', 'slice-start')  # to or from the device's memory
# Run beside the core: by the links alone, or by a SparseCore.
_BESIDE = ('async-start', 'call-start')


class Collective(NamedTuple):
  """Collectives of one instruction."""

  kind: str
  num_bytes: float  # received by a device, a time
  group: int  # devices that take part
  seconds: float  # a time, on the links
  is_async: bool
  crosses_slices: bool
  in_loop: bool  # of the layers, or of chunks
  times: int
  path: str


class Span(NamedTuple):
  """When an instruction is at work, in seconds from where all begins."""

  op: hlo.Op
  lane: str  # core, links or slices
  kind: str  # matmul, memory, loop, or the kind of the collective
  start: float
  seconds: float


@dataclasses.dataclass
class Cost:
  """Seconds of a device, and what they are made of."""

  seconds: float = 0.0
  matmul: float = 0.0  # bound by products
  memory: float = 0.0  # bound by traffic to the device's memory
  exposed: float = 0.0  # waited for collectives
  flops: float = 0.0  # of products and kernels, recomputed ones included
  collectives: list[Collective] = dataclasses.field(default_factory=list)

  def add(self, other: 'Cost', times: int = 1) -> None:
    for name in ('seconds', 'matmul', 'memory', 'exposed', 'flops'):
      value = getattr(self, name) + times * getattr(other, name)
      setattr(self, name, value)
    self.collectives += [
      one._replace(times=one.times * times, in_loop=one.in_loop or times > 1)
      for one in other.collectives
    ]


def cost(program: hlo.Program, topology: Topology, held: float = 1.0) -> Cost:
  """What one call of the program takes.

  Args:
    program: as it was compiled.
    topology: it is for.
    held: the share of all experts that a device holds.
  """
  return Reader(program, topology, held).of(program.entry)


class Reader:
  """Knows what each computation of one program takes, by `of`."""

  def __init__(self, program: hlo.Program, topology: Topology, held: float):
    self.program, self.topology, self.held = program, topology, held
    self.chip = topology.chip

  def of(self, computation: str, spans: list[Span] | None = None) -> Cost:
    """The cost of a computation that is scheduled (not one of a fusion).

    What it is made of, but for its own computations, is added to `spans`.
    """
    spans = [] if spans is None else spans
    total, pending = Cost(), {}
    links = collections.Counter()  # until when they are busy
    index = {op.name: op for op in self.program.computations[computation]}
    away = 0.0  # traffic that runs beside everything else
    for op in index.values():
      begun, ends = self._collective(op, index)
      if begun:
        total.collectives.append(begun)
        wire = 'slices' if begun.crosses_slices else 'links'
        free = max(total.seconds, links[wire]) + begun.seconds
        links[wire] = free
        took = begun.seconds
        spans.append(Span(op, wire, begun.kind, free - took, took))
        if begun.is_async:
          pending[op.rendezvous or op.name] = free
        else:
          total.exposed += free - total.seconds
          total.seconds = free
      for name in ends:
        free = pending.pop(index[name].rendezvous or name, 0.0)
        total.exposed += max(free - total.seconds, 0.0)
        total.seconds = max(free, total.seconds)
      if op.kind in _AWAY:
        away += op.results[0].num_bytes / self.chip.bandwidth
      if not begun or (op.kind == 'fusion' and begun.is_async):
        before = total.seconds, total.matmul
        self._compute(computation, op, index, total)
        start, took = before[0], total.seconds - before[0]
        kind = 'matmul' if total.matmul > before[1] else 'memory'
        kind = 'loop' if op.kind == 'while' else kind
        spans += [Span(op, 'core', kind, start, took)] if took else []
    if away > total.seconds:
      total.memory += away - total.seconds
      total.seconds = away
    return total

  def _compute(self, computation, op, index, total: Cost) -> None:
    """Adds what an instruction itself takes."""
    if op.kind in _FREE or op.kind.endswith(('-start', '-done')):
      return
    if op.kind == 'while':
      body = self.of(op.called_as('body'))
      total.add(body, hlo.trips(self.program, op))
      return
    if op.kind in ('call', 'conditional'):
      inner = [
        self.of(name)
        for name in _branches(op)
        if name in self.program.computations
      ]
      total.add(max(inner, key=lambda one: one.seconds, default=Cost()))
      return
    if self._only_carries(op):
      return
    kernel = kernels.flops(op, index, self.held)
    flops = kernel + hlo.flops(self.program, computation, op)
    busy = kernel + hlo.flops(self.program, computation, op, self.chip.low)
    if op.kind == 'custom-call' and op.target != 'tpu_custom_call':
      return
    busy /= self.chip.flops
    moved = traffic.of(self.program, op, index) / self.chip.bandwidth
    took = max(busy, moved)
    if self.chip.cycles and op.cycles:
      took = op.cycles / self.chip.cycles
    total.seconds += took
    total.flops += flops
    if flops and busy >= moved:
      total.matmul += took
    else:
      total.memory += took

  def _only_carries(self, op: hlo.Op) -> bool:
    """Whether a fusion begins or ends a collective, and computes nothing."""
    if op.kind != 'fusion':
      return False
    inner = [
      one
      for name in op.called
      for one in self.program.computations.get(name, ())
      if one.kind not in (*_FREE, *KINDS)
    ]
    targets = ('AsyncCollectiveStart', 'AsyncCollectiveDone')
    return bool(inner) and all(one.target in targets for one in inner)

  def _collective(self, op, index):
    """(the collective that begins here or None, names of those that end)."""
    kind = op.kind.removesuffix('-start')
    if op.kind == 'send-done':  # what is waited for is what comes back
      return None, ()
    if op.kind.endswith('-done'):
      return None, op.operands
    if op.kind == 'send' and op.rendezvous:
      return self._exchanged(op, index), ()
    if kind in KINDS:
      is_async = op.kind.endswith('-start')
      return self._made(kind, op, op, is_async), ()
    if op.kind in _BESIDE or (op.kind == 'fusion' and op.called):
      inner = [one for name in op.called for one in self._inside(name, set())]
      found = next((one for one in inner if one.kind in KINDS), None)
      targets = {one.target for one in inner}
      if 'AsyncCollectiveDone' in targets:
        return None, self._sources(op, index)
      if found is None:
        return None, ()
      begins = 'AsyncCollectiveStart' in targets or op.kind in _BESIDE
      if begins or not op.hands_on:
        kind = found.kind
        if 'all-reduce-scatter' in op.called[0]:
          kind = 'reduce-scatter'
        return self._made(kind, found, op, begins), ()
    return None, ()

  def _inside(self, computation: str, seen: set):
    """All instructions of a computation and of those that it calls."""
    if computation in seen:
      return
    seen.add(computation)
    for op in self.program.computations.get(computation, ()):
      yield op
      for name in op.called:
        yield from self._inside(name, seen)

  def _sources(self, op: hlo.Op, index: dict) -> set[str]:
    """The instructions that begun what ends here, through their tuples."""
    found, todo = set(), list(op.operands)
    while todo:
      one = index.get(todo.pop())
      if one is None or one.name in found:
        continue
      found.add(one.name)
      is_link = one.kind == 'get-tuple-element' or one.hands_on
      todo += one.operands if is_link else ()
    return found

  def _made(self, kind, op, outer, is_async) -> Collective:
    sizes = [array.num_bytes for array in op.results]
    if op.kind.endswith('-start') and kind != 'all-reduce':
      sizes = [max(sizes)]
    whole = sum(sizes)
    group = op.group or 2
    if op.kind == 'reduce-scatter':
      whole *= group
    share = 1.0 if kind == 'collective-permute' else (group - 1) / group
    num_bytes = whole * share * _WIRE.get(kind, 1.0)
    ids = op.members
    crosses = len({i // self.topology.slice_size for i in ids}) > 1
    speed = self.chip.slices if crosses else self._speed(ids)
    seconds = num_bytes / speed
    if kind == 'all-to-all' and not crosses:
      seconds *= max(1.0, self._longest(ids) / 8)  # what a ring's middle bears
    return Collective(
      kind, num_bytes, group, seconds, is_async, crosses, False, 1,
      op.path or outer.path,
    )  # fmt: skip

  def _exchanged(self, op, index) -> Collective:
    """What hosts carry between slices: a pair of send and recv."""
    other = next(
      one
      for one in index.values()
      if one.kind == 'recv' and one.rendezvous == op.rendezvous
    )
    group = self.topology.num_slices
    whole = max(one.results[0].num_bytes for one in (op, other))
    num_bytes = whole * (group - 1) / group * _WIRE.get(op.exchange, 1.0)
    seconds = num_bytes / self.chip.slices
    return Collective(
      op.exchange, num_bytes, group, seconds, True, True, False, 1, op.path
    )

  def _speed(self, ids: list[int]) -> float:
    """Bytes/s that a device receives in a collective of these devices."""
    chip, sides = self.chip, self.topology.sides
    if chip.is_gpu or not ids:
      return chip.link
    axes = [n for n in range(len(sides)) if len(self._along(ids, n)) > 1]
    speed = 0.0
    for n in axes:
      is_ring = len(self._along(ids, n)) == sides[n] >= chip.full
      speed += chip.link * (2 if is_ring else 1)
    return speed or chip.link

  def _along(self, ids: list[int], n: int) -> set[int]:
    """The coordinates of devices along side `n`; ids run along the first."""
    before = math.prod(self.topology.sides[:n])
    return {i // before % self.topology.sides[n] for i in ids}

  def _longest(self, ids: list[int]) -> int:
    return max(
      len(self._along(ids, n)) for n in range(len(self.topology.sides))
    )


def _branches(op: hlo.Op) -> list[str]:
  listed = re.search(r'branch_computations=\{([^}]*)\}', op.text)
  names = re.findall(r'%([\w.-]+)', listed[1]) if listed else []
  either = re.findall(r'(?:true|false)_computation=%?([\w.-]+)', op.text)
  return [*names, *either, *op.called]
