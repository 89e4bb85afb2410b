"""Of a life: every figure of its summary, and what was asked of it."""

from typing import Any

from markupsafe import Markup

from tpu_lm.report import glossary
from tpu_lm.report.markup import html, is_number, join, number, swatch, table


def _verdict(entry: glossary.Figure, value: Any, summary: dict) -> Any:
  """The target of a figure, and whether it is reached."""
  if not entry.target:
    return ''
  reached = entry.reached(value, summary) if is_number(value) else None
  if reached is None:
    return entry.target
  return html(
    '{} <span class="{}">{}</span>',
    entry.target,
    'reached' if reached else 'open',
    'reached' if reached else 'not reached',
  )


def asked(life: Any) -> list[tuple[str, str, bool]]:
  """Figures of which something is asked, and whether they reach it."""
  found = []
  for stage in life.stages:
    for name, value in life.summary[stage].items():
      entry = glossary.figure(stage, name)
      if entry.target and is_number(value):
        reached = entry.reached(value, life.summary)
        if reached is not None:
          told = f'{stage}.{name} is {number(value, entry.kind)}'
          found.append((told, entry.target, reached))
  return found


def judged(life: Any) -> Markup:
  """How many targets are reached, and those that are not."""
  found = asked(life)
  if not found:
    return Markup()
  missed = [f'{told}, asked: {target}' for told, target, ok in found if not ok]
  if not missed:
    return html('<p>All {} targets are reached.</p>', len(found))
  return html(
    '<p>{} of {} targets are reached. Not reached: {}.</p>',
    len(found) - len(missed),
    len(found),
    '; '.join(missed),
  )


def _named(name: str) -> Markup:
  """A key that may break after its underscores."""
  return join(name.split('_'), Markup('_<wbr>'))


def shown(life: Any) -> Markup:
  """Every figure of the summary, a table a stage."""
  pieces = []
  for stage in life.stages:
    rows = []
    for name, value in sorted(life.summary[stage].items()):
      entry = glossary.figure(stage, name)
      verdict = _verdict(entry, value, life.summary)
      shown = number(value, entry.kind)
      rows.append((_named(name), shown, entry.meaning, verdict))
    heads = ('figure', 'value', 'what it is', 'asked for')
    name = f'Figures of {stage}'
    pieces.append(
      html(
        '<h3>{}</h3>\n{}',
        swatch(stage),
        table(name, heads, rows, (1,), 'folds figures'),
      )
    )
  if not pieces:
    return Markup()
  return html(
    '<p>What stands in summary.json, measured on text, questions and pairs '
    'that no stage has trained on.</p>\n{}\n{}',
    judged(life),
    join(pieces),
  )
