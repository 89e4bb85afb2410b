"""Which charts a run has, from the names of its metrics."""

from collections.abc import Iterable
from typing import NamedTuple

from markupsafe import Markup

from tpu_lm.report import chart, glossary
from tpu_lm.report.markup import figure, html, join
from tpu_lm.report.records import Record

# Metrics that are drawn together: (title, names); a name that ends in / stands
# for all that begin so. What is not named here has a chart of its own.
_GAMED = 'Proxy against true reward'
_GROUPS = (
  ('Loss', ('loss',)),
  ('Bits per byte', ('bits_per_byte',)),
  (_GAMED, ('reward', 'true_reward')),
  ('Each reward alone', ('reward/',)),
  (
    'Right answers',
    (
      'accuracy',
      'facts_accuracy',
      'sums_accuracy',
      'well_formed',
      'exact',
      'pass8',
    ),
  ),
  ('Rewards of a pair', ('chosen_reward', 'rejected_reward', 'margin')),
  ('Certainty', ('confidence', 'brier')),
  ('KL from the reference', ('kl',)),
  ('Entropy', ('entropy',)),
  ('Dead groups and answers cut off', ('dead_groups', 'truncated')),
  ('Answer length', ('length', 'length_mean', 'length_max')),
  ('Divergence from the teacher', ('divergence',)),
  ('Next-token loss', ('nll',)),
  ('Sampler against trainer', ('sampler_',)),
  ('Clipped share', ('clip_low', 'clip_high', 'value_clip')),
  ('Ratio to the sampling policy', ('ratio', 'ratio_max')),
  ('Value head', ('value', 'return', 'value_error')),
)
_LAST = (
  ('Gradient norm', ('gradient_norm',)),
  ('Learning rate', ('learning_rate',)),
  ('Tokens a second', ('tokens_per_second',)),
  ('Utilisation', ('utilisation',)),
)
_ALONE = frozenset(('perplexity',))  # the loss over again
_MOST = 24  # charts of a run
_SPLITS = {'heldout': 'held out'}


class Chart(NamedTuple):
  """A chart of a run: its title and what is drawn."""

  title: str
  series: list[chart.Series]
  names: tuple[str, ...]


def _named(patterns: Iterable[str], there: Iterable[str]) -> list[str]:
  """The names that patterns stand for, in their order."""
  found: dict[str, None] = {}
  for pattern in patterns:
    for name in there:
      prefix = pattern[-1] in '/_' and name.startswith(pattern)
      if name == pattern or prefix:
        found[name] = None
  return list(found)


def names(record: Record) -> list[str]:
  """Metrics that are numbers, by the alphabet."""
  found = {
    name
    for line in record.lines
    for name, value in line.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
  }
  found |= {name for line in record.lines for name in _bad(line)}
  return sorted(found - glossary.LEFT_OUT)


def _bad(line: dict) -> list[str]:
  value = line.get('nonfinite')
  if not isinstance(value, list):
    return []
  return [name for name in value if isinstance(name, str)]


def splits(record: Record) -> list[str]:
  """The splits of a run; the trained one first."""
  found = {str(line['split']) for line in record.lines}
  return sorted(found, key=lambda split: (split != 'train', split))


def _one(record: Record, name: str) -> list[chart.Series]:
  """A metric by itself: a line a split."""
  found = {split: record.points(name, split) for split in splits(record)}
  if record.compares_pairs and name == 'accuracy':
    # Before the first step all pairs tie, which is neither right nor wrong.
    found = {s: [p for p in points if p[0] > 0] for s, points in found.items()}
  found = {split: points for split, points in found.items() if points}
  several = len(found) > 1
  return [
    chart.Series(
      spoken(split),
      points,
      record.colour,
      'dotted' if split != 'train' else 'faint' if several else 'line',
      named=several or split != 'train',
    )
    for split, points in found.items()
  ]


def _several(
  record: Record, group: list[str], patterns: Iterable[str]
) -> list[chart.Series]:
  """Metrics together: a tone and a dash each, dots where held out."""
  found = []
  prefix = next((p for p in patterns if p[-1] in '/_'), '')
  for i, name in enumerate(group):
    tone = (record.colour, 'ink')[i % 2]
    label = glossary.metric(name.removeprefix(prefix)).title
    named = True
    for split in splits(record):
      points = record.points(name, split)
      style = ('line', 'dashed')[i // 2 % 2] if split == 'train' else 'dotted'
      if points:
        said = label if split == 'train' else f'{label}, {spoken(split)}'
        said = said if not named or split == 'train' else label
        found.append(chart.Series(said, points, tone, style, named))
        named = False
  return found


def charts(record: Record) -> list[Chart]:
  """The charts of a run, what matters most first."""
  there = names(record)
  used = {*_ALONE}
  found = []

  late = [name for _, names_ in _LAST for name in names_]
  rest = tuple(('', (name,)) for name in there if name not in late)
  for title, patterns in (*_GROUPS, *rest, *_LAST):
    group = [name for name in _named(patterns, there) if name not in used]
    used.update(group)
    if len(group) == 1:
      title = glossary.metric(group[0], record.compares_pairs).title
      series = _one(record, group[0])
    else:
      series = _several(record, group, patterns)
    if title == _GAMED and series:  # as everywhere: what is paid is dashed
      series = [s._replace(colour=record.colour) for s in series]
      series[0] = series[0]._replace(style='dashed')
    if series:
      found.append(Chart(title, series, tuple(group)))
  return found


def in_order(record: Record) -> list[str]:
  """Metrics in the order of the charts, and those that have none."""
  drawn = [name for one in charts(record) for name in one.names]
  return [*drawn, *(name for name in names(record) if name not in drawn)]


def drawn(one: Chart, kind: str = '') -> Markup:
  """A chart as a figure."""
  values = [y for s in one.series for _, y in s.points if y is not None]
  percent = all(glossary.metric(n).kind == 'percent' for n in one.names)
  percent = percent and all(-1e-9 <= v <= 1 + 1e-9 for v in values)
  text = ''
  if len(one.names) == 1:
    text = glossary.metric(one.names[0], one.title.startswith('Pairs')).meaning
  elif any(series.style == 'dotted' for series in one.series):
    text = 'Dots: held out.'
  if one.title == _GAMED:
    text = (
      'Dashed: what training is paid. Full: what the world’s own rule says of '
      'the same answers. Where they part, the proxy is being gamed.'
    )
  drawing = chart.lines(one.title, one.series, percent=percent)
  return figure(one.title, drawing, text, kind)


def grid(record: Record) -> Markup:
  """All charts of a run."""
  found = charts(record)
  if not found:
    return html(
      '<p class="none">metrics.jsonl has no figures yet: the run reported '
      'nothing.</p>'
    )
  return html('<div class="grid">\n{}\n</div>', join(map(drawn, found[:_MOST])))


def spoken(split: str) -> str:
  """The name of a split as it is read."""
  return _SPLITS.get(split, split)
