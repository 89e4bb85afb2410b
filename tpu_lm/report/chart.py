"""Charts as SVG: lines over steps, points, a reliability diagram, rows.

A drawing is WIDTH x HEIGHT units and takes the width that it is given; colours
and sizes of text are those of style.css. A point tells its values when it is
pointed at; `alt` says in words what is drawn.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from tpu_lm.report.axes import (
  BOTTOM,
  HEIGHT,
  LETTER,
  TOP,
  WIDTH,
  Scale,
  frame,
  margin,
  spread,
  tick_text,
  ticks,
)
from tpu_lm.report.markup import html, is_number, join, number

_APART = 14  # units between two labels
_LONGEST = 17  # letters of a label at the end of a line
_MOST = 100  # points of a line; more are averaged
_TOLD = 24  # points of a line that tell their values


class Series(NamedTuple):
  """A line. `None` for y: the value there was not finite."""

  label: str
  points: Sequence[tuple[float, float | None]]
  colour: str
  style: str = 'line'  # line, faint, dotted (a dot a point) or dashed
  named: bool = True  # at its end; else only where it is pointed at


class Spot(NamedTuple):
  """A labelled point; `size` is its radius in units."""

  label: str
  x: float
  y: float
  colour: str
  size: float = 5.0


class Row(NamedTuple):
  """A name and the values on its line, hollow ones first."""

  label: str
  colour: str
  values: Sequence[tuple[str, float, bool]]  # name, value, hollow


def thinned(
  points: Sequence[tuple[float, float | None]], most: int = _MOST
) -> list[tuple[float, float | None]]:
  """At most about `most` points: means over equal stretches of them."""
  if len(points) <= most:
    return list(points)
  width = math.ceil(len(points) / most)
  found = []
  for start in range(0, len(points), width):
    part = points[start : start + width]
    good = [(x, y) for x, y in part if y is not None]
    if len(good) < len(part):
      found.append((next(x for x, y in part if y is None), None))
    if good:
      sums = [sum(values) / len(good) for values in zip(*good, strict=True)]
      found.append((sums[0], sums[1]))
  return sorted(found, key=lambda point: point[0])


def _drawing(alt: str, parts: Iterable[Markup], height: int = HEIGHT) -> Markup:
  return html(
    '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>',
    WIDTH,
    height,
    alt,
    join(parts),
  )


def _empty(alt: str) -> Markup:
  return html('<p class="none">{}: nothing to draw.</p>', alt)


def _apart(heights: Sequence[float]) -> list[float]:
  """Heights of labels, moved as little as keeps them from touching."""
  order = sorted(range(len(heights)), key=heights.__getitem__)
  placed = list(heights)
  for before, here in itertools.pairwise(order):
    placed[here] = max(placed[here], placed[before] + _APART)
  low = HEIGHT - BOTTOM
  for here in reversed(order):  # back up, where the last ones fell out
    placed[here] = min(placed[here], low)
    low = placed[here] - _APART
  return [round(h, 1) for h in placed]


def _path(x: Scale, y: Scale, points, closed: str = '') -> str:
  """Moves and lines; a value that is not finite breaks the line."""
  text, pen = [], 'M'
  for at, value in points:
    if value is None:
      pen = 'M'
      continue
    text.append(f'{pen}{x(at):g} {y(value):g}')
    pen = 'L'
  return ''.join(text) + closed


def _told(x: Scale, y: Scale, one: Series, points, percent) -> Markup:
  """Points that tell their values, seen or not."""
  kind = 'percent' if percent else 'number'
  good = [(a, b) for a, b in points if b is not None]
  apart = max(1, math.ceil(len(good) / _TOLD))
  chosen = good[::-1][::apart][::-1]
  dotted = one.style == 'dotted' or len(good) == 1
  return join(
    (
      html(
        '<circle class="{}" cx="{:g}" cy="{:g}" r="{}"><title>{}</title>'
        '</circle>',
        'dot' if dotted else 'hit',
        x(at),
        y(value),
        3.2 if dotted else 7,
        f'{one.label}: {number(value, kind)} ({number(at, "count")})',
      )
      for at, value in chosen
    ),
    '',
  )


def _line(x: Scale, y: Scale, one: Series, points, percent) -> Markup:
  bad = join(
    (
      html(
        '<text class="bad" x="{}" y="{}" text-anchor="middle">×<title>{}'
        '</title></text>',
        x(at),
        y.start - 2,
        f'{one.label}: not finite ({number(at, "count")})',
      )
      for at, value in points
      if value is None
    ),
    '',
  )
  return html(
    '<g class="c-{}"><path class="line {}" d="{}"/>{}{}</g>',
    one.colour,
    one.style,
    _path(x, y, points),
    _told(x, y, one, points, percent),
    bad,
  )


def _labels(x: Scale, wanted: Sequence[tuple[str, str, float]]) -> Markup:
  """Names at the right end: (classes, text, height)."""
  heights = _apart([height for _, _, height in wanted])
  return join(
    (
      html(
        '<text class="label {}" x="{}" y="{}" dy=".35em">{}</text>',
        kind,
        x.end + 7,
        height,
        text if len(text) <= _LONGEST else f'{text[: _LONGEST - 1]}…',
      )
      for (kind, text, _), height in zip(wanted, heights, strict=True)
    ),
    '',
  )


def _words(name: str, series: Sequence[Series], x_label: str, kind) -> str:
  """What a reader who cannot see the lines is told."""
  said = [f'{name}, by {x_label}.']
  for one in series:
    good = [point for point in one.points if point[1] is not None]
    if not good:
      continue
    (x0, y0), (x1, y1) = good[0], good[-1]
    said.append(
      f'{one.label}: {number(y0, kind)} at {number(x0, "count")}'
      + (f', {number(y1, kind)} at {number(x1, "count")}.' if good[1:] else '.')
    )
  return ' '.join(said)


def lines(
  name: str,
  series: Sequence[Series],
  *,
  x_label: str = 'step',
  percent: bool = False,
  floors: Sequence[tuple[str, float]] = (),
  zero: bool = False,
) -> Markup:
  """Values over steps, each line named at its end.

  Args:
    name: what is drawn, for the alternative text.
    series: the lines; those without a finite point are left out.
    x_label: the name of the x-axis.
    percent: values are shares, written as percentages.
    floors: (name, value) of level lines.
    zero: the y-axis holds 0.
  """
  kept = [
    one._replace(points=[p for p in one.points if is_number(p[0])])
    for one in series
    if any(y is not None for _, y in one.points)
  ]
  if not kept:
    return _empty(name)
  drawn = [thinned(one.points) for one in kept]
  xs = [x for points in drawn for x, _ in points]
  ys = [y for points in drawn for _, y in points if y is not None]
  ys += [value for _, value in floors]
  labels = [one.label for one in kept if one.named] + [f[0] for f in floors]
  longest = max(map(len, labels), default=0)
  right = WIDTH - min(max(24, 12 + longest * LETTER), 150)
  low, high = min(xs), max(xs)
  low = low if high > low else min(0.0, low)
  y = Scale(*spread(ys, zero, percent), HEIGHT - BOTTOM, TOP)
  left = margin(y, percent)
  x = Scale(low, high if high > low else low + 1, left, right)
  parts = [frame(x, y, x_label, (False, percent))]
  wanted = []
  for label, value in floors:
    parts.append(
      html(
        '<line class="floor" x1="{}" x2="{}" y1="{y}" y2="{y}"/>',
        x.start,
        x.end,
        y=y(value),
      )
    )
    wanted.append(('c-floor', label, y(value)))
  for one, points in zip(kept, drawn, strict=True):
    parts.append(_line(x, y, one, points, percent))
    last = [value for _, value in points if value is not None][-1]
    if one.named:
      weak = ' weak' if one.style == 'faint' else ''
      wanted.append((f'c-{one.colour}{weak}', one.label, y(last)))
  parts.append(_labels(x, wanted))
  return _drawing(
    _words(name, kept, x_label, 'percent' if percent else 'number'), parts
  )


def _spot(x: Scale, y: Scale, spot: Spot, told: str) -> Markup:
  left = x(spot.x) > x.start + 0.7 * (x.end - x.start)
  label = html(
    '<text class="label" x="{}" y="{}" text-anchor="{}">{}</text>',
    round(x(spot.x) + (-1 if left else 1) * (spot.size + 4), 1),
    y(spot.y) - 5,
    'end' if left else 'start',
    spot.label,
  )
  return html(
    '<g class="c-{}"><circle class="dot" cx="{}" cy="{}" r="{:g}">'
    '<title>{}</title></circle>{}</g>',
    spot.colour,
    x(spot.x),
    y(spot.y),
    round(spot.size, 1),
    told,
    label if spot.label else '',
  )


def scatter(
  name: str,
  spots: Sequence[Spot],
  *,
  x_label: str,
  y_label: str,
  percent: tuple[bool, bool] = (False, False),
  floors: Sequence[tuple[str, float]] = (),
) -> Markup:
  """Labelled points, x from 0; `percent` says which axes are shares."""
  spots = [s for s in spots if is_number(s.x) and is_number(s.y)]
  if not spots:
    return _empty(name)
  ys = [s.y for s in spots] + [value for _, value in floors]
  y = Scale(*spread(ys, False, percent[1]), HEIGHT - BOTTOM, TOP + 18)
  left = margin(y, percent[1])
  x = Scale(*spread([s.x for s in spots], True, False), left, WIDTH - 14)
  parts = [frame(x, y, x_label, (percent[0], percent[1]))]
  parts.append(html('<text class="axis" x="4" y="13">{}</text>', y_label))
  parts += [
    html(
      '<line class="floor" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text '
      'class="label c-floor" x="{x}" y="{ty}" text-anchor="end">{label}</text>',
      x.start,
      x.end,
      y=y(value),
      x=x.end,
      ty=y(value) - 5,
      label=label,
    )
    for label, value in floors
  ]
  kinds = ['percent' if one else 'number' for one in percent]
  told = [
    f'{s.label}: {x_label} {number(s.x, kinds[0])}, '
    f'{y_label} {number(s.y, kinds[1])}'
    for s in spots
  ]
  parts += [_spot(x, y, s, t) for s, t in zip(spots, told, strict=True)]
  return _drawing(f'{name}. {"; ".join(told)}.', parts)


def reliability(
  name: str, bins: Sequence[tuple[float, float, float]], colour: str
) -> Markup:
  """Share that is right over how sure the model was; the diagonal is ideal.

  Args:
    name: what is drawn, for the alternative text.
    bins: (confidence, accuracy, count), each in [0, 1] but the count; the
      area of a dot is its share of all.
    colour: of the dots.
  """
  bins = sorted(b for b in bins if all(map(is_number, b)) and b[2] > 0)
  if not bins:
    return _empty(name)
  low = 0.5 if min(bins)[0] >= 0.5 else 0.0
  bottom = min(low, *(b[1] for b in bins))
  y = Scale(math.floor(bottom * 10) / 10, 1.0, HEIGHT - BOTTOM, TOP + 18)
  x = Scale(low, 1.0, margin(y, True), WIDTH - 22)
  total = sum(count for _, _, count in bins)
  parts = [
    frame(x, y, 'how sure it was', (True, True)),
    html('<text class="axis" x="4" y="13">how often it was right</text>'),
    html(
      '<line class="floor" x1="{}" y1="{}" x2="{}" y2="{}"/>',
      x(low),
      y(low),
      x(1),
      y(1),
    ),
    html(
      '<g class="c-{}"><path class="line faint" d="{}"/></g>',
      colour,
      _path(x, y, [(a, b) for a, b, _ in bins]),
    ),
  ]
  told = [
    f'sure {number(a, "percent")}, right {number(b, "percent")}'
    + (f', {number(count, "count")} pairs' if bins[1:] else '')
    for a, b, count in bins
  ]
  for (a, b, count), text in zip(bins, told, strict=True):
    radius = max(2.5, 16 * math.sqrt(count / total)) if bins[1:] else 6
    parts.append(_spot(x, y, Spot('', a, b, colour, radius), text))
  return _drawing(f'{name}. {"; ".join(told)}.', parts)


def rows(name: str, found: Sequence[Row], *, percent: bool = False) -> Markup:
  """Names one below another, each with its values on a line."""
  found = [
    row._replace(values=[v for v in row.values if is_number(v[1])])
    for row in found
  ]
  found = [row for row in found if row.values]
  if not found:
    return _empty(name)
  values = [v for row in found for _, v, _ in row.values]
  low, high = spread(values, percent, percent)
  if percent and low >= 0 and high <= 1:
    low, high = 0.0, 1.0
  left = 14 + max(len(row.label) for row in found) * LETTER
  x = Scale(low, high, min(left, 170), WIDTH - 40)
  height = 30 + 27 * len(found)
  kind = 'percent' if percent else 'number'
  marks = ticks(low, high, 4)
  parts = [
    html(
      '<line class="rule" x1="{x}" x2="{x}" y1="4" y2="{}"/><text '
      'class="tick" x="{x}" y="{}" text-anchor="middle">{}</text>',
      height - 24,
      height - 8,
      tick_text(value, marks, percent),
      x=x(value),
    )
    for value in marks
  ]
  said = []
  for i, row in enumerate(found):
    parts.append(_row(x, 20 + 27 * i, row, kind))
    text = ', '.join(f'{n} {number(v, kind)}' for n, v, _ in row.values)
    said.append(f'{row.label}: {text}')
  return _drawing(f'{name}. {"; ".join(said)}.', parts, height)


def _row(x: Scale, height: float, row: Row, kind: str) -> Markup:
  places = [x(value) for _, value, _ in row.values]
  dots = join(
    (
      html(
        '<circle class="{}" cx="{}" cy="{}" r="5"><title>{}</title></circle>',
        'hollow' if hollow else 'dot',
        x(value),
        height,
        f'{row.label}, {name}: {number(value, kind)}',
      )
      for name, value, hollow in row.values
    ),
    '',
  )
  return html(
    '<g class="c-{}"><text class="label" x="0" y="{y}" dy=".35em">{}</text>'
    '<line class="span" x1="{}" x2="{}" y1="{y}" y2="{y}"/>{}</g>',
    row.colour,
    row.label,
    min(places),
    max(places),
    dots,
    y=height,
  )
