"""What a scheduled program does when: one pass of each of its loops.

A network's layers are one loop forward and one backward, the chunks of the loss
another; what happens within one pass is nearly all that a step does.
"""

from typing import Any

from tpu_lm.plan import hlo, schedule
from tpu_lm.plan.chips import Topology

_LOOPS = 4  # at most, those that take longest
_SHARE = 0.01  # of the program's time, that a shown loop takes at least
_FINEST = 0.004  # of a pass: shorter spans of a kind are drawn as one


def timeline(
  program: hlo.Program, topology: Topology, held: float = 1.0
) -> list[dict[str, Any]]:
  """Spans of one pass of each loop, the loops in the order they are found.

  Args:
    program: as it was compiled.
    topology: it is for.
    held: as in schedule.cost.

  Returns:
    loop (its name), times (how often its body runs), name, kind (matmul,
    memory, kernel, loop or collective), lane (core, links or slices), start and
    seconds, from the beginning of the pass.
  """
  reader = schedule.Reader(program, topology, held)
  whole = reader.of(program.entry).seconds
  found = []
  for loop, times in loops(program, program.entry):
    spans = []
    seconds = reader.of(loop.called_as('body'), spans).seconds
    total = seconds * times
    if spans and total >= _SHARE * whole:
      found.append((total, loop, times, merged(spans, _FINEST * seconds)))
  most = sorted((total for total, *_ in found), reverse=True)[:_LOOPS]
  kept = [one for one in found if one[0] >= most[-1]]
  titles = [_title(loop) for _, loop, _, _ in kept]
  return [
    {'loop': _told_apart(titles, n), 'times': times, **span}
    for n, (_, _, times, spans) in enumerate(kept)
    for span in spans
  ]


def loops(
  program: hlo.Program, computation: str, times: int = 1
) -> list[tuple[hlo.Op, int]]:
  """Loops of a scheduled computation and of its loops; how often each runs."""
  found = []
  for op in program.computations[computation]:
    if op.kind == 'while':
      inner = times * hlo.trips(program, op)
      found.append((op, inner))
      found += loops(program, op.called_as('body'), inner)
  return found


def merged(spans: list[schedule.Span], finest: float) -> list[dict[str, Any]]:
  """Spans as they are drawn: short neighbours of one kind are one."""
  found = []
  for span in sorted(spans, key=lambda span: (span.lane, span.start)):
    one = {
      'name': _name(span),
      'kind': _kind(span),
      'lane': span.lane,
      'start': span.start,
      'seconds': span.seconds,
    }
    last = found[-1] if found else None
    follows = last and all(last[key] == one[key] for key in ('lane', 'kind'))
    end = last['start'] + last['seconds'] if follows else 0.0
    short = follows and min(last['seconds'], one['seconds']) < finest
    if short and span.start - end < finest:
      name = max(last, one, key=lambda part: part['seconds'])['name']
      last |= {'name': name, 'seconds': span.start + span.seconds
               - last['start']}  # fmt: skip
    else:
      found.append(one)
  return found


def _kind(span: schedule.Span) -> str:
  if span.lane != 'core':
    return 'collective'
  return 'kernel' if span.op.target == 'tpu_custom_call' else span.kind


def _name(span: schedule.Span) -> str:
  """What was traced, 'attention/TD,DHK->THK', else the instruction's name."""
  parts = [part for part in span.op.path.split('/') if part]
  while parts and parts[-1] in ('dot_general', 'closed_call', 'body'):
    parts.pop()
  name = '/'.join(parts[-2:]) or span.op.name
  return name if span.lane == 'core' else f'{span.kind} of {name}'


def _title(loop: hlo.Op) -> str:
  """'Layers, backward' where the path says so."""
  path = loop.path
  if 'jvp(' not in path and '._scanned' not in path:
    return 'Loop'
  way = 'backward' if 'transpose(' in path else 'forward'
  return f'{"Layers" if "._scanned" in path else "Outside layers"}, {way}'


def _told_apart(titles: list[str], n: int) -> str:
  """The n-th title, with a number where there are several of it."""
  number = titles[: n + 1].count(titles[n])
  return titles[n] + (f' ({number})' if titles.count(titles[n]) > 1 else '')
