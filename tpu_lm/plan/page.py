"""The record of a plan as a page: does it fit, and where does the time go?"""

import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tpu_lm.plan import gantt, memory
from tpu_lm.report import page
from tpu_lm.report.markup import code, figure, html, join, number, spell, table

_GIB = 2**30
_STYLE = pathlib.Path(__file__).with_name('page.css')
_SIZES = ((1e12, 'TB'), (1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB'))
# What the parts of the analytic model are (memory.py).
_PARTS = {
  'parameters': 'the weights that a device holds',
  'optimizer': 'its moments of them',
  'batch': 'the rows of a step',
  'copies': 'the weights of the layers, in the dtype of the products',
  'gradients': 'of its weights, summed over microbatches or slices',
  'activations': 'what the backward pass finds kept of all layers',
  'layer': 'one layer at work: its gathered weights, and all gradients',
  'loss': 'the head, its gradient, logits',
}
_TIMES = {
  'matmul': 'matrix products and kernels',
  'memory': 'traffic to memory',
  'interconnect': 'waiting for collectives',
}


def of(record: dict[str, Any]) -> str:
  """The page of one record (estimate.update, command.plan)."""
  found = [('memory', 'What fills the memory', _memory(record))]
  if record['fits']:
    found += [
      ('time', 'Where the time of a step goes', _time(record)),
      ('schedule', 'The schedule', _schedule(record)),
    ]
  if record.get('programs'):
    found.append(('programs', 'The other programs', _programs(record)))
  found.append(('how', 'What was planned, and how to run it', _how(record)))
  title = f'PLAN of {record["config"]} on {record["topology"]}'
  return page.framed(
    title, _lead(record), found, 'tpu_lm plan', _STYLE.read_text('utf-8')
  )


def _lead(record: dict[str, Any]) -> Markup:
  """What it is, and the figures that one asks for first."""
  said = html('<p class="lead">This is {}.</p>', record['note'])
  refusal = record['refusal']
  if refusal:
    refusal = html('<p class="refusal">The compiler refuses: {}</p>', refusal)
  return join([said, _tiles(record), refusal])


def _tiles(record: dict[str, Any]) -> Markup:
  tiles = [('Fits', 'yes' if record['fits'] else 'no')]
  if record['fits']:
    tiles += [
      ('MFU, estimated', number(record['mfu'], 'percent')),
      ('Tokens a second', number(record['tokens_per_second'], 'count')),
      ('A step', gantt.spoken(record['seconds'])),
      ('Days', f'{record["days"]:,.1f}'),
      ('Chip-hours', number(record['chip_hours'])),
    ]
  if 'price' in record:
    tiles.append(('Price', number(record['price'])))
  return _definitions(tiles, 'tiles')


def _definitions(found: Sequence[tuple[str, Any]], kind: str) -> Markup:
  items = join(
    html('<div><dt>{}</dt><dd>{}</dd></div>', *pair) for pair in found
  )
  return html('<dl class="{}">\n{}\n</dl>', kind, items)


def _key(kind: str, text: str) -> Markup:
  """A word behind its colour."""
  return html('<span class="stage c-{}">{}</span>', kind, text)


def _stack(
  said: str, parts: Sequence[tuple[str, float]], whole: float, limit: float = 0
) -> Markup:
  """Parts side by side, `whole` as wide as the page; a mark at `limit`."""
  spans = join(
    (
      html('<span class="c-{}" style="--share:{:.5f}"></span>', kind, x / whole)
      for kind, x in parts
    ),
    '',
  )
  return html(
    '<div class="stack{}" role="img" aria-label="{}" style="--limit:{:.5f}">{}'
    '</div>',
    ' limited' if limit else '',
    said,
    limit / whole,
    spans,
  )


def _gib(num_bytes: float) -> str:
  return f'{num_bytes / _GIB:.2f} GiB'


def _size(num_bytes: float) -> str:
  """'27.8 GB', '134 MB', '2.1 kB'."""
  scale, unit = next((one for one in _SIZES if num_bytes >= one[0]), _SIZES[-1])
  return f'{num_bytes / scale:,.3g} {unit}'


def _memory(record: dict[str, Any]) -> Markup:
  """The analytic model and the compiler's figure, against what there is."""
  bars = record['memory']
  limit, analytic = bars['limit'], bars['analytic']
  compiled = bars.get('compiled')
  whole = max(limit, analytic, compiled or 0.0)
  idle = min('layer', 'loss', key=bars.get)  # these two take turns
  shown = [(name, bars[name]) for name in memory.NAMES if name != idle]
  told = ', '.join(f'{name} {_gib(x)}' for name, x in shown)
  lines = [
    html('<p>The analytic model: {}</p>', _against(analytic, limit)),
    _stack(f'The analytic model: {told}.', shown, whole, limit),
  ]
  if compiled is not None:
    text = f'{_against(compiled, limit)}; {_difference(analytic, compiled)}'
    lines += [
      html('<p>The compiler: {}</p>', text),
      _stack(f'The compiler: {text}', [('compiled', compiled)], whole, limit),
    ]
  rows = [
    (
      _key(name, name),
      _gib(bars[name]),
      f'{bars[name] / limit:.1%}',
      what + (f'; takes turns with {shown[-1][0]}' if name == idle else ''),
    )
    for name, what in _PARTS.items()
  ]
  heads = ('part', 'a device', 'of its memory', 'what it is')
  return html(
    '<div class="bars">{}</div>\n<p class="note">The dashed line is what a '
    'program may use of a chip: {}. Of the last two parts the smaller one is '
    'not in the bar.</p>\n{}',
    join(lines),
    _gib(limit),
    table('Parts of the memory', heads, rows, (1, 2), 'folds'),
  )


def _against(num_bytes: float, limit: float) -> str:
  return f'{_gib(num_bytes)}, {num_bytes / limit:.1%} of what there is'


def _difference(analytic: float, compiled: float) -> str:
  share = analytic / compiled - 1
  if abs(share) < 0.0005:
    return 'the model says the same'
  return f'the model says {abs(share):.1%} {"more" if share > 0 else "less"}'


def _time(record: dict[str, Any]) -> Markup:
  whole = record['seconds']
  by = dict(record['by'])
  rest = whole - sum(by.values())
  if rest > 0.001 * whole:
    by['rest'] = rest
  names = _TIMES | {'rest': 'anything else'}
  told = {
    kind: f'{names[kind]} {gantt.spoken(x)}, {x / whole:.1%}'
    for kind, x in by.items()
  }
  return html(
    '<div class="bars"><p>{} a step, bound by {}</p>\n{}\n'
    '<div class="keys">{}</div></div>\n<p>{}</p>',
    gantt.spoken(whole),
    names[record['bound']],
    _stack('; '.join(told.values()), list(by.items()), whole),
    join(_key(kind, text) for kind, text in told.items()),
    f'The model needs {record["model_flops"] / 1e12:,.2f} TFLOP of a device a '
    f'step; the program does {record["hardware_flops"] / 1e12:,.2f}, what is '
    'computed again included.',
  )


def _schedule(record: dict[str, Any]) -> Markup:
  """Collectives by kind, then one pass of each loop."""
  rows = [
    (
      f'{one["kind"]} over {one["over"]}',
      number(one['count'], 'count'),
      _size(one['bytes']),
      f'{one["overlapped_bytes"] / (one["bytes"] or 1):.0%}',
      gantt.spoken(one['seconds']),
    )
    for one in record['collectives']
  ]
  heads = (
    'collective', 'a step', 'received by a device', 'overlapped', 'on the links'
  )  # fmt: skip
  told = (
    table('Collectives', heads, rows, (1, 2, 3, 4), 'folds')
    if rows
    else html('<p class="none">No collectives.</p>')
  )
  return html(
    '<p>Of the bytes of collectives within loops, {:.0%} are asynchronous: '
    'they run beside other work.</p>\n{}\n{}',
    record['overlapped'],
    told,
    _passes(record.get('timeline', [])),
  )


def _passes(spans: list[dict[str, Any]]) -> Markup:
  """A chart a loop."""
  loops = {}
  for span in spans:
    title = span.get('loop', 'One pass'), span.get('times', 1)
    loops.setdefault(title, []).append(span)
  if not loops:
    return Markup()
  kinds = dict.fromkeys(span['kind'] for span in spans)
  keys = join(_key(kind, kind) for kind in kinds)
  drawn = [
    figure(f'{title}: {times:,} times a step', gantt.drawing(own), '', 'hero')
    for (title, times), own in loops.items()
  ]
  return html(
    '<h3 class="passes">One pass of each loop</h3>\n<p>What runs on the core, '
    'and what is on its way on the links between chips meanwhile.</p>\n'
    '<div class="keys">{}</div>\n{}',
    keys,
    join(drawn),
  )


def _programs(record: dict[str, Any]) -> Markup:
  heads = (
    'program', 'a call', 'tokens a second', 'memory', 'parameters', 'cache',
    'bound by',
  )  # fmt: skip
  rows, refused = [], []
  for one in record['programs']:
    if not one['fits']:
      rows.append((one['program'], 'does not fit', *[''] * 5))
      text = f'{one["program"]}: {one["refusal"]}'
      refused.append(html('<p class="refusal">{}</p>', text))
      continue
    rows.append(
      (
        one['program'],
        gantt.spoken(one['seconds']),
        number(one['tokens_per_second'], 'count'),
        _gib(one['compiled']),
        _gib(one['parameters']),
        _gib(one['cache']) if 'cache' in one else '',
        _TIMES[one['bound']],
      )
    )
  return html(
    '<p>What this stage runs beside its update.</p>\n{}\n{}',
    table('Other programs', heads, rows, (1, 2, 3, 4, 5), 'folds'),
    join(refused),
  )


def _how(record: dict[str, Any]) -> Markup:
  mesh = ' × '.join(f'{axis} {n}' for axis, n in record['mesh'].items())
  slices = record['slices']
  chips = f'{record["devices"]:,} of {record["chip"]}'
  facts = [
    ('Stage', record['stage']),
    ('Devices', chips + (f', {slices} slices' if slices > 1 else '')),
    ('Mesh', mesh or 'one device'),
    ('Rows a step', number(record['batch_size'], 'count')),
    ('Tokens a row', number(record['length'], 'count')),
    ('Microbatches', number(record['microbatches'], 'count')),
    ('Remat', record['remat']),
    ('Compiled in', spell(record['compile_s'])),
    ('Versions', record['versions']),
  ]
  if record['fits']:
    facts.insert(5, ('Steps', number(record['steps'], 'count')))
  given = record['overrides'].items()
  words = [f'--config={record["config"]}']
  words += [f'--config.{key}={value}' for key, value in given]
  command = ' \\\n  '.join(['tpu_lm train', *map(shlex.quote, words)])
  return html('{}\n{}', _definitions(facts, 'facts'), code(command))
