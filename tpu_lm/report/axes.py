"""The axes of a chart: from values to units, round ticks, the grid."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from tpu_lm.report.markup import html, join

WIDTH, HEIGHT = 400, 236  # units of a drawing
TOP, BOTTOM = 14, 42  # units above and below what is drawn
LETTER = 8.0  # units: the width of a letter of a label
_LEVELS = 5  # lines of the grid, at most


class Scale(NamedTuple):
  """From values to units, linear."""

  low: float
  high: float
  start: float
  end: float

  def __call__(self, value: float) -> float:
    share = (value - self.low) / (self.high - self.low)
    return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
  """Round values from `low` to `high`, about `most` of them at most."""
  rough = (high - low) / max(most, 1)
  unit = 10.0 ** math.floor(math.log10(rough))
  step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def tick_text(value: float, marks: Sequence[float], percent: bool) -> str:
  apart = marks[1] - marks[0] if len(marks) > 1 else abs(value) or 1
  if percent:
    value, apart = 100 * value, 100 * apart
  if abs(value) >= 1e4:
    units = ((1e9, ' B'), (1e6, ' M'), (1e3, ' k'))
    unit, name = next((u, n) for u, n in units if abs(value) >= u)
    text = f'{value / unit:.10g}'[:5].rstrip('.') + name
    text = f'{value:.1e}' if abs(value) >= 1e12 else text
  elif 0 < apart < 1e-4:
    text = f'{value:.2g}' if abs(value) > 1e-9 * apart else '0'
  else:
    # As many places as the steps between ticks need, 2.5 included.
    places = max(0, -math.floor(math.log10(apart) + 1e-9))
    if round(apart, places) != round(apart, places + 1):
      places += 1
    text = f'{value:,.{places}f}'
  return text.replace('-', '−') + ('%' if percent else '')


def spread(
  values: Iterable[float], zero: bool, percent: bool
) -> tuple[float, float]:
  """The range to draw, with some room at its ends."""
  values = list(values)
  low, high = min(values), max(values)
  if zero:
    low, high = min(low, 0.0), max(high, 0.0)
  if high - low <= 1e-9 * max(abs(low), abs(high)):
    room = abs(high) * 0.1 or 1.0
    return low - (0 if zero and low == 0 else room), high + room
  room = 0.06 * (high - low)
  inside = percent and low >= 0 and high <= 1
  low = low if zero and low == 0 else low - room
  high = high if zero and high == 0 else high + room
  return (max(low, 0.0), min(high, 1.0)) if inside else (low, high)


def margin(y: Scale, percent: bool) -> float:
  """Room for the ticks of the y-axis."""
  marks = ticks(y.low, y.high, _LEVELS)
  longest = max(len(tick_text(value, marks, percent)) for value in marks)
  return 10 + longest * LETTER


def frame(
  x: Scale, y: Scale, x_label: str, percent: tuple[bool, bool]
) -> Markup:
  """Grid, ticks and the name of the x-axis."""
  marks = ticks(y.low, y.high, _LEVELS)
  parts = [
    html(
      '<line class="rule" x1="{}" x2="{}" y1="{y}" y2="{y}"/>'
      '<text class="tick" x="{}" y="{y}" dy=".35em" text-anchor="end">{}'
      '</text>',
      x.start,
      x.end,
      x.start - 6,
      tick_text(value, marks, percent[1]),
      y=y(value),
    )
    for value in marks
  ]
  bottom = HEIGHT - BOTTOM
  marks = ticks(x.low, x.high, 4)
  if x_label == 'step':  # there is none between two
    marks = [value for value in marks if value == round(value)]
  parts += [
    html(
      '<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>',
      x(value),
      bottom + 16,
      tick_text(value, marks, percent[0]),
    )
    for value in marks
  ]
  parts.append(
    html(
      '<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>',
      (x.start + x.end) / 2,
      HEIGHT - 7,
      x_label,
    )
  )
  return join(parts, '')
