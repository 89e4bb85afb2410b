"""Who is at work when, in one pass of a loop: lanes over time, as SVG."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tpu_lm.report.axes import LETTER, WIDTH, Scale, tick_text, ticks
from tpu_lm.report.markup import html, join, number

LANES = ('core', 'links', 'slices')
_UNITS = ((1.0, 's'), (1e-3, 'ms'), (1e-6, 'µs'))
_TALL, _APART = 22, 30  # units: a lane, and from one to the next


def spoken(seconds: float) -> str:
  """'3.497 s', '24.85 ms', '1.2 µs'."""
  size, unit = _unit(seconds)
  return f'{number(seconds / size)} {unit}'


def _unit(seconds: float) -> tuple[float, str]:
  return next((one for one in _UNITS if seconds >= one[0]), _UNITS[-1])


def drawing(spans: Sequence[dict[str, Any]]) -> Markup:
  """Lanes of one pass.

  Args:
    spans: as timeline.py makes them, of one loop.
  """
  end = max(span['start'] + span['seconds'] for span in spans)
  size, unit = _unit(end)
  lanes = [lane for lane in LANES if any(s['lane'] == lane for s in spans)]
  left = max(map(len, LANES)) * LETTER + 6
  x = Scale(0.0, end / size, left, WIDTH - 4)
  bottom = _APART * len(lanes)
  marks = ticks(0.0, end / size, 5)
  parts = [
    html(
      '<line class="rule" x1="{x}" x2="{x}" y1="0" y2="{}"/><text '
      'class="tick" x="{x}" y="{}" text-anchor="middle">{}</text>',
      bottom,
      bottom + 14,
      tick_text(value, marks, False),
      x=x(value),
    )
    for value in marks
  ]
  for n, lane in enumerate(lanes):
    own = [span for span in spans if span['lane'] == lane]
    parts.append(_lane(x, n * _APART + 2, lane, own, size))
  parts.append(
    html(
      '<text class="axis" x="{}" y="{}" text-anchor="middle">{} of one pass'
      '</text>',
      (x.start + x.end) / 2,
      bottom + 30,
      unit,
    )
  )
  return html(
    '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>',
    WIDTH,
    bottom + 36,
    _words(spans, lanes, end),
    join(parts),
  )


def _lane(x: Scale, top: float, name: str, spans: list, size: float) -> Markup:
  found = [
    html(
      '<text class="label c-ink" x="0" y="{}" dy=".35em">{}</text><rect '
      'class="lane" x="{}" y="{}" width="{}" height="{}"/>',
      top + _TALL / 2,
      name,
      x.start,
      top,
      round(x.end - x.start, 1),
      _TALL,
    )
  ]
  for span in spans:
    start = x.start + _wide(x, span['start'] / size)
    wide = max(_wide(x, span['seconds'] / size), 0.3)
    found.append(
      html(
        '<rect class="work c-{}" x="{:.2f}" y="{}" width="{:.2f}" height="{}">'
        '<title>{}</title></rect>',
        span['kind'],
        start,
        top,
        wide,
        _TALL,
        f'{span["name"]}: {span["kind"]}, {spoken(span["seconds"])} from '
        f'{spoken(span["start"])} on',
      )
    )
  return join(found, '')


def _wide(x: Scale, value: float) -> float:
  """Units of a length; finer than the scale's, of which many follow."""
  return (x.end - x.start) * value / x.high


def _words(spans: Sequence[dict], lanes: list[str], end: float) -> str:
  """What a reader who cannot see the lanes is told."""
  said = [f'One pass of {spoken(end)}.']
  for lane in lanes:
    own = [span for span in spans if span['lane'] == lane]
    kinds = dict.fromkeys(span['kind'] for span in own)
    shares = (
      (kind, sum(s['seconds'] for s in own if s['kind'] == kind) / end)
      for kind in kinds
    )
    text = ', '.join(f'{kind} {share:.0%}' for kind, share in shares)
    said.append(f'{lane}: {text}.')
  return ' '.join(said)
