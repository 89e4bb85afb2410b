"""Pieces of HTML, and numbers as they are written.

A piece is a `markupsafe.Markup`. `html` fills a template and escapes whatever
is not one, so that text of a model or a user cannot become part of the page.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from tpu_lm.progress import duration

_CONTROL = re.compile(r'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]')
_NOTHING = '–'


def _clean(part: Any) -> Any:
  """Text without what a page cannot hold: controls and half characters."""
  if isinstance(part, Markup) or not isinstance(part, str):
    return part
  return _CONTROL.sub('\N{REPLACEMENT CHARACTER}', part)


def html(template: str, *parts: Any, **named: Any) -> Markup:
  """Fills `{}` and `{name}`; what is not Markup is escaped."""
  return Markup(template).format(
    *map(_clean, parts), **{name: _clean(part) for name, part in named.items()}
  )


def join(pieces: Iterable[Any], between: str = '\n') -> Markup:
  """Pieces in a row; what is not Markup is escaped."""
  return Markup(between).join(_clean(piece) for piece in pieces)


def clipped(text: str, most: int) -> str:
  """At most so many characters, and how many were left out."""
  if len(text) <= most:
    return text
  return f'{text[:most]} … ({len(text) - most:,} more characters)'


def is_number(value: Any) -> bool:
  """A finite number that can be drawn."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and abs(value) < 1e300
  )


def number(value: Any, kind: str = 'number') -> str:
  """A value as it is read: '0.4434', '22,362', '94.5%', '2:24'.

  Args:
    value: of a figure; what is no finite number is shown as '–'.
    kind: number, percent, count or seconds.
  """
  if not is_number(value):
    return _NOTHING
  if kind == 'percent':
    text = f'{value:.1%}'
  elif kind == 'seconds':
    text = duration(value)
  elif kind == 'count' or abs(value) >= 1000:
    text = f'{value:,.0f}' if abs(value) < 1e15 else f'{value:.3g}'
  else:
    text = f'{value:.4g}'
  return text.replace('-', '−')


def spell(seconds: float) -> str:
  """A time in a sentence: '28 s', '12 min 15 s', '2 h 3 min'."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds} s'
  if seconds < 3600:
    return f'{seconds // 60} min {seconds % 60} s'
  return f'{seconds // 3600:,} h {seconds // 60 % 60} min'


def size(count: float) -> str:
  """A large number in a few letters: '1.06 M', '22.3 k'."""
  for unit, name in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if count >= unit:
      digits = max(0, 2 - int(math.log10(count / unit)))
      return f'{count / unit:.{digits}f} {name}'
  return f'{count:,.0f}'


def swatch(stage: str, text: str | None = None) -> Markup:
  """The name of a stage behind its colour."""
  return html(
    '<span class="stage c-{}">{}</span>', colour(stage), text or stage
  )


# Stages with a colour of their own in style.css; the others share one.
_COLOURS = (
  'untrained', 'pretrain', 'sft', 'reward', 'dpo', 'ppo', 'grpo', 'lora',
  'qlora', 'student', 'distill',
)  # fmt: skip


def colour(stage: str) -> str:
  """The class that a stage is drawn with, the same in all charts."""
  return stage if stage in _COLOURS else 'other'


def table(
  caption: str,
  heads: Sequence[str],
  rows: Iterable[Sequence[Any]],
  numeric: Sequence[int] = (),
  kind: str = '',
) -> Markup:
  """A table that scrolls by itself, or folds up on a phone.

  Args:
    caption: what it holds, for a reader who hears the page.
    heads: of the columns.
    rows: cells; the first of a row is its heading.
    numeric: the columns that are set flush right.
    kind: 'folds' turns each row into a block where the page is narrow.
  """

  def cell(column: int, value: Any) -> Markup:
    place = Markup(' class="number"') if column in numeric else Markup()
    if column == 0:
      return html('<th scope="row"{}>{}</th>', place, value)
    return html('<td{} data-head="{}">{}</td>', place, heads[column], value)

  lines = [
    html('<tr>{}</tr>', join((cell(i, v) for i, v in enumerate(row)), ''))
    for row in rows
  ]
  top = [
    html(
      '<th scope="col"{}>{}</th>',
      Markup(' class="number"') if i in numeric else Markup(),
      head,
    )
    for i, head in enumerate(heads)
  ]
  return html(
    '<div class="scroll" role="region" aria-label="{caption}"{focus}>'
    '<table class="{kind}"><caption>{caption}</caption>\n'
    '<thead><tr>{top}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>',
    caption=caption,
    kind=kind,
    # What scrolls can be reached by the keyboard; the others fold.
    focus=Markup(' tabindex="0"') if kind == 'wide' else '',
    top=join(top, ''),
    lines=join(lines),
  )


def figure(
  title: str, drawing: Markup, text: Any = '', kind: str = ''
) -> Markup:
  """A chart with its title and, below, what it shows."""
  below = html('<figcaption>{}</figcaption>', text) if text else ''
  return html(
    '<figure class="chart {}"><h3>{}</h3>\n{}\n{}</figure>',
    kind,
    title,
    drawing,
    below,
  )


def folded(summary: Any, inside: Any) -> Markup:
  """What is there for those who ask."""
  return html('<details><summary>{}</summary>\n{}\n</details>', summary, inside)


def code(text: str) -> Markup:
  """A command or a file, to be copied."""
  return html('<pre class="code"><code>{}</code></pre>', text)
