"""The page of one run; its parts also stand in the story of a life."""

import pathlib
from typing import Any

from markupsafe import Markup

from tpu_lm import goodput, metrics
from tpu_lm.report import chart, curves, glossary, records, rollouts
from tpu_lm.report.command import command
from tpu_lm.report.markup import (
  clipped,
  code,
  figure,
  folded,
  html,
  is_number,
  join,
  number,
  size,
  spell,
  table,
)
from tpu_lm.report.records import Record

_LONGEST = 100_000  # characters of a configuration


def network(record: Record) -> str:
  """'qwen3, 4 layers of 128', as far as it is recorded."""
  model = record.config.model
  text = str(record.config.model_name)
  if 'num_layers' in model and 'dim' in model:
    text += f', {model.num_layers} layers of width {model.dim}'
  return text


def parameters(record: Record) -> str:
  """How many, and how many of them were trained; '' if it is unknown."""
  whole, trained = records.sizes(record)
  if whole and trained and trained != whole:
    return f'{size(whole)}, of which {size(trained)} trained'
  if whole:
    return size(whole)
  return f'{size(trained)} trained' if trained else ''


def about(record: Record) -> list[tuple[str, str]]:
  """What a run is: names and values."""
  config = record.config
  data = records.data(record)
  source = str(config.data.source)
  if data:
    source += (
      f': {data.documents:,} documents, {size(data.tokens)} tokens in '
      f'{data.rows:,} rows of {config.data.length:,}'
    )
  done = f'{record.steps:,}'
  if record.steps < config.steps:
    done += f' of {config.steps:,}: not finished'
  found = [
    ('Stage', str(config.stage_name)),
    ('Network', network(record)),
    ('Parameters', parameters(record)),
    ('Weights', str(config.transforms)),
    ('Starts from', folder_name(config.init_from)),
    ('Teacher', folder_name(config.stage.get('teacher', ''))),
    ('Data', source),
    ('Steps', f'{done}, {config.batch_size:,} rows each'),
    ('Tokens', number(record.tokens, 'count') if record.tokens else ''),
    ('Time', spell(record.seconds) if record.seconds else ''),
    ('Seed', str(config.seed)),
  ]
  return [(name, value) for name, value in found if value]


def folder_name(path: Any) -> str:
  """The last part of a path; '' of none."""
  return pathlib.Path(str(path)).name if path else ''


def facts(record: Record) -> Markup:
  """`about` as a list of definitions."""
  items = [
    html('<div><dt>{}</dt><dd>{}</dd></div>', name, clipped(value, 400))
    for name, value in about(record)
  ]
  return html('<dl class="facts">\n{}\n</dl>', join(items))


def last_figures(record: Record) -> Markup:
  """The last value of every metric, a column a split."""
  splits = curves.splits(record)
  rows = []
  for name in curves.in_order(record):
    known = glossary.metric(name, record.compares_pairs)
    values = [number(record.last(name, s), known.kind) for s in splits]
    rows.append((known.title, *values, known.meaning))
  if not rows:
    return Markup()
  heads = ['figure', *(curves.spoken(s) for s in splits), 'what it is']
  return table(
    'The last figures', heads, rows, range(1, len(heads) - 1), 'wide'
  )


def time_spent(record: Record) -> Markup:
  """Where the wall time went; nothing where that was not recorded."""
  lines = metrics.ledger(record.folder / 'metrics.jsonl')
  parts = lines[-1]['parts'] if lines else {}
  parts = {k: v for k, v in parts.items() if is_number(v) and v > 0}
  if not parts:
    return Markup()
  wall, found = sum(parts.values()), []
  for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
    label = goodput.spoken(name)
    share = (label, seconds / wall, False)
    found.append(chart.Row(label, record.colour, [share]))
  useful = number(goodput.goodput(parts), 'percent')
  return figure(
    f'Goodput {useful}',
    chart.rows('Share of the wall time', found, percent=True),
    f'Of {spell(wall)} over all starts of the run, {useful} went into steps '
    'that count: sampling and rewards are among them; what was lost by a '
    'kill is not.',
  )


def repeat(record: Record) -> Markup:
  """The command and the configuration."""
  text = command(record)
  said = (
    code(text)
    if text
    else html(
      '<p class="none">No file of configs/ is at hand that leads to this '
      'configuration; here is the whole.</p>'
    )
  )
  recorded = clipped(record.recorded, _LONGEST)
  return html('{}\n{}', said, folded('The whole configuration', code(recorded)))


def missing(record: Record) -> list[str]:
  """What a reader would look for and not find."""
  found = []
  if not record.lines:
    found.append('metrics.jsonl has no line yet: no step was reported.')
  elif not record.of('heldout'):
    found.append('No held-out figures were reported.')
  bad = sum(bool(line.get('nonfinite')) for line in record.lines)
  if bad:
    found.append(
      f'{bad:,} line(s) of metrics.jsonl hold values that are not finite; × '
      'marks them in the charts.'
    )
  skipped = max(
    (y for _, y in record.points('skipped', 'train') if y), default=0
  )
  if skipped:
    found.append(f'{number(skipped, "count")} step(s) were skipped.')
  if record.learns_from_rewards and not rollouts.samples(record.folder):
    found.append('No rollouts are kept in rollouts/*.jsonl.')
  return found


def notes(found: list[str]) -> Markup:
  """What is missing, as a list; nothing if nothing is."""
  if not found:
    return Markup()
  items = join(html('<li>{}</li>', text) for text in found)
  return html('<ul class="missing">\n{}\n</ul>', items)


def sections(record: Record) -> list[tuple[str, str, Markup]]:
  """The page of one run: (anchor, heading, content)."""
  found = [
    ('what', 'What it is', html('{}{}', facts(record), notes(missing(record)))),
    ('curves', 'Learning', curves.grid(record)),
  ]
  answers = rollouts.shown(record.folder)
  if answers:
    found.append(('answers', 'Answers and what they earned', answers))
  figures = last_figures(record)
  if figures:
    found.append(('figures', 'The last figures', figures))
  spent = time_spent(record)
  if spent:
    found.append(('time', 'Where the time went', spent))
  return [*found, ('repeat', 'To repeat it', repeat(record))]


def lead(record: Record) -> Markup:
  """The first sentence of the page."""
  whole = records.sizes(record).whole
  said = f'A network of {size(whole)} parameters' if whole else 'A network'
  said += f' ({network(record)}) trained for {record.steps:,} steps'
  if record.tokens:
    said += f' on {size(record.tokens)} tokens'
  if record.config.data.source:
    said += f' of {clipped(str(record.config.data.source), 200)}'
  if record.seconds:
    said += f', in {spell(record.seconds)}'
  return html('<p class="lead">{}.</p>', said)
