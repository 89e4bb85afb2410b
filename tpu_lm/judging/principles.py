"""Principles of a constitution, out of a user's file.

{"constitutions": [{"critic", "revision"}, …]}, a list of such objects, such
objects one a line, or texts in their place ({"principle"} or a plain string);
or a Markdown or text file with a principle for each item of its lists (a text
file without any list: for each line).
"""

import gzip
import json
import pathlib
import re
import zlib
from typing import Any, NamedTuple

from tpu_lm.errors import UserError, nearest

_ITEM = re.compile(r' {0,1}(?:[-*+•]|\d{1,3}[.)])\s+(?=\S)')
_FENCE = re.compile(r' {0,3}(```|~~~)')


class Principle(NamedTuple):
  """What an answer shall keep to, in the words of three requests."""

  critique: str  # asks for a critique of an answer
  revision: str  # asks for a better one
  choice: str  # says which of two is better


def stated(text: str) -> Principle:
  """The requests for a principle that is one text."""
  return Principle(
    'Criticise your last answer by this principle alone: '
    f'{text}\nName each place that goes against it, and say why. If there is '
    'none, say so.',
    f'Write your last answer anew, so that it keeps to this principle: {text}',
    f'The better answer is the one that keeps better to this principle: {text}',
  )


def asked(critic: str, revision: str) -> Principle:
  """The requests for a principle that is a critic's and a reviser's."""
  return Principle(
    critic,
    revision,
    'The better answer is the one that gives less cause for what a critic and '
    f'a reviser were told.\nThe critic: {critic}\nThe reviser: {revision}',
  )


def read(path: str | pathlib.Path) -> list[Principle]:
  """The principles of a file, in its order, each once.

  Raises:
    UserError: it cannot be read, or holds none.
  """
  path = pathlib.Path(path).expanduser()
  name = path.name.lower().removesuffix('.gz')
  try:
    content = path.read_bytes()
    if path.name.lower().endswith('.gz'):
      content = gzip.decompress(content)
    text = content.decode('utf-8-sig')
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
    raise UserError(
      f'principles={path}: cannot be read ({error}); name a .json, .jsonl, .md '
      'or .txt file'
    ) from error
  if name.endswith('.jsonl'):
    found = [
      _principle(_json(line, f'{path}:{number}'), f'{path}:{number}')
      for number, line in enumerate(text.splitlines(), start=1)
      if line.strip()
    ]
  elif name.endswith('.json'):
    found = _listed(_json(text, str(path)), path)
  else:
    found = [stated(item) for item in _items(text, name.endswith('.txt'))]
  if not found:
    raise UserError(
      f'principles={path}: holds none; write each as an item of a list, '
      '"- The answer is honest."'
    )
  return list(dict.fromkeys(found))


def _json(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{where}: is not valid JSON ({error})') from error


def _listed(value: Any, path: pathlib.Path) -> list[Principle]:
  if isinstance(value, dict):
    if 'constitutions' not in value:
      raise UserError(
        f"{path}: has no 'constitutions'{nearest('constitutions', value)}, a "
        'list of {"critic", "revision"}'
      )
    value = value['constitutions']
  if not isinstance(value, list):
    raise UserError(f'{path}: holds no list of principles')
  return [
    _principle(one, f'{path}: principle {number}')
    for number, one in enumerate(value, start=1)
  ]


def _principle(one: Any, where: str) -> Principle:
  fields = one if isinstance(one, dict) else {'principle': one}
  critic = fields.get('critic', fields.get('critique'))
  texts = (critic, fields.get('revision'))
  if all(isinstance(text, str) and text.strip() for text in texts):
    return asked(*(text.strip() for text in texts))
  text = fields.get('principle')
  if isinstance(text, str) and text.strip():
    return stated(text.strip())
  raise UserError(
    f"{where}: needs the texts 'critic' and 'revision', or 'principle'; it has "
    f'{", ".join(map(repr, fields)) or "nothing"}'
  )


def _items(text: str, or_lines: bool) -> list[str]:
  """Items of lists, each with the lines and the lists inside it."""
  found: list[list[str]] = []
  is_open = fenced = False
  for line in text.splitlines():
    if _FENCE.match(line):
      fenced, is_open = not fenced, False
    elif fenced:
      continue
    elif item := _ITEM.match(line):
      found.append([line[item.end() :]])
      is_open = True
    elif not line.strip():
      # A paragraph of the item is indented; anything else ends it.
      is_open = is_open and 'blank'
    elif is_open == 'blank' and not line.startswith('  '):
      is_open = False
    elif is_open:
      found[-1].append(line)
  if not found and or_lines:
    found = [[line] for line in text.splitlines()]
  joined = (' '.join(' '.join(lines).split()) for lines in found)
  return [one for one in joined if one]
