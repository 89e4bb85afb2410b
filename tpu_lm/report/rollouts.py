"""A few answers of a run that learns from rewards, early and late.

Rollouts are `rollouts/*.jsonl`: {prompt, text, reward, step, …} a line.
"""

import json
import pathlib
import re
from typing import Any, NamedTuple

from markupsafe import Markup

from tpu_lm.report.markup import clipped, html, is_number, join, number

_READ = 4 << 20  # bytes of a file
_SHOWN = 1200  # characters of a text


class Rollout(NamedTuple):
  """An answer and what it earned."""

  prompt: str
  text: str
  reward: float
  step: float
  note: str


def _said(value: Any) -> str:
  """The text of a prompt: itself, or what the last message says."""
  if isinstance(value, list) and value and isinstance(value[-1], dict):
    value = value[-1].get('content', '')
  return value if isinstance(value, str) else json.dumps(value)


def _rollout(text: str) -> Rollout | None:
  try:
    line = json.loads(text)
    found = Rollout(
      _said(line['prompt']),
      str(line['text']),
      line.get('reward'),
      line.get('step', 0),
      '; '.join(map(str, line.get('notes', {}).values())),
    )
  except (ValueError, KeyError, TypeError, AttributeError):
    return None
  good = is_number(found.reward) and is_number(found.step)
  return found if good else None


def _read(path: pathlib.Path, end: bool) -> list[Rollout]:
  """Rollouts at the start or the end of a file; other lines are passed over."""
  try:
    with open(path, 'rb') as file:
      if end:
        file.seek(max(0, path.stat().st_size - _READ))
      text = file.read(_READ).decode('utf-8', 'replace')
  except OSError:
    return []
  found = map(_rollout, text.split('\n'))
  return [one for one in found if one is not None]


def _in_order(path: pathlib.Path) -> tuple:
  """Sorts step-20 before step-100."""
  digits = re.findall(r'\d+', path.stem)
  return [int(d) for d in digits], path.name


def _chosen(found: list[Rollout]) -> list[Rollout]:
  """The best, the middle and the worst of some rollouts."""
  ordered = sorted(found, key=lambda one: (-one.reward, one.prompt, one.text))
  places = dict.fromkeys([0, len(ordered) // 2, len(ordered) - 1])
  return [ordered[place] for place in places if ordered]


def samples(folder: pathlib.Path) -> list[Rollout]:
  """Answers of the first step and of the last, best first."""
  files = sorted((folder / 'rollouts').glob('*.jsonl'), key=_in_order)
  if not files:
    return []
  early, late = _read(files[0], False), _read(files[-1], True)
  steps = [one.step for one in early + late]
  if not steps:
    return []
  first, last = min(steps), max(steps)
  found = _chosen([one for one in early if one.step == first])
  if last > first:
    found += _chosen([one for one in late if one.step == last])
  return found


def shown(folder: pathlib.Path) -> Markup:
  """The samples as a list; nothing where there are none."""
  found = samples(folder)
  if not found:
    return Markup()
  items = [
    html(
      '<li><p class="earned"><span class="much">{}</span> step {}</p>'
      '<p class="asked said">{}</p><p class="said">{}</p>{}</li>',
      number(one.reward),
      number(one.step, 'count'),
      clipped(one.prompt, _SHOWN),
      clipped(one.text, _SHOWN) or '(nothing)',
      html('<p class="note">{}</p>', clipped(one.note, 300))
      if one.note
      else '',
    )
    for one in found
  ]
  return html(
    '<p>Best, middle and worst of the first step that was kept and of the '
    'last.</p>\n<ol class="rollouts">\n{}\n</ol>',
    join(items),
  )
