"""Of a life: the stages that sample answers and have them judged."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tpu_lm.report import chart, glossary
from tpu_lm.report.markup import colour, figure, html, is_number, join, swatch
from tpu_lm.report.records import Record

_PAIRS = (  # before and after of a figure: stage, name, what it is
  ('grpo', 'exact', 'exact answers'),
  ('grpo', 'pass8', 'one of eight right'),
)


def _before_and_after(life: Any) -> list[Markup]:
  rows = []
  for stage, name, label in _PAIRS:
    ends = [life.figure(stage, f'{name}_{end}') for end in ('before', 'after')]
    if all(map(is_number, ends)):
      values = [('before', ends[0], True), ('after', ends[1], False)]
      rows.append(chart.Row(label, stage, values))
  if not rows:
    return []
  drawing = chart.rows('Before and after GRPO', rows, percent=True)
  text = (
    'Held-out problems of sizes that SFT never showed. Hollow: before; filled: '
    'after. If the second row fell, the model would only be surer, not abler.'
  )
  return [figure('Before and after GRPO', drawing, text)]


def _against_truth(record: Record) -> list[Markup]:
  """The proxy that is paid, and the truth beside it."""
  series = []
  for name, label, style in (
    ('reward', 'proxy', 'dashed'),
    ('true_reward', 'truth', 'line'),
  ):
    points = record.points(name, 'train')
    series.append(chart.Series(label, points, colour(record.name), style))
  if not all(one.points for one in series):
    return []
  drawing = chart.lines('Proxy and true reward', series)
  text = (
    'Dashed: what training is paid. Full: what the world’s own rule says of '
    'the same answers. Where they part, the proxy is being gamed.'
  )
  title = f'{record.name}: proxy against true reward'
  return [figure(title, drawing, text)]


def _together(found: Sequence[Record], name: str) -> list[Markup]:
  """One metric of several runs, a line each."""
  series = [
    chart.Series(r.name, r.points(name, 'train'), colour(r.name)) for r in found
  ]
  values = [y for one in series for _, y in one.points if y is not None]
  if not values:
    return []
  known = glossary.metric(name)
  shares = known.kind == 'percent' and min(values) >= 0 and max(values) <= 1
  drawing = chart.lines(known.title, series, percent=shares, zero=True)
  return [figure(known.title, drawing, known.meaning)]


def shown(life: Any) -> Markup:
  """The section; nothing if no stage of it is there."""
  pieces = _before_and_after(life)
  found = [r for r in life.runs.values() if r.learns_from_rewards]
  for record in found:
    pieces += _against_truth(record)
  blind = [r for r in found if not r.points('true_reward', 'train')]
  pieces += _together(blind, 'reward')
  for name in ('dead_groups', 'kl', 'entropy'):
    pieces += _together(found, name)
  if not pieces:
    return Markup()
  names = join((swatch(r.name) for r in found), ' ')
  return html(
    '<p>The model writes answers, a rule or a model judges them, and it learns '
    'from what they earned. {}</p>\n<div class="grid two">\n{}\n</div>',
    names,
    join(pieces),
  )
