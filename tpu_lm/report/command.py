"""The command that repeats a run, from the configuration that it recorded."""

import ast
import os
import pathlib
import shlex
from typing import Any

from ml_collections import ConfigDict

from tpu_lm import config as configs
from tpu_lm.errors import UserError
from tpu_lm.report.records import Record

FOLDER = pathlib.Path(__file__).parent.parent.parent / 'configs'


def command(record: Record) -> str | None:
  """`tpu_lm train …` with the configuration file that needs least changes.

  A run does not record its file. Of the files in `configs/` and their variants
  (`tiny`, the name of the stage or of the folder), the one is taken from which
  fewest overrides lead to the recorded configuration; they lead to it exactly.

  Returns:
    The command; None if no file is there that leads to the configuration.
  """
  names = dict.fromkeys(['', record.name, record.config.stage_name, 'tiny'])
  found = []
  for path in sorted(FOLDER.glob('*.py')):
    for variant in names:
      changes = _changes(f'{path}{variant and ":"}{variant}', record.config)
      if changes is not None:
        # Of equals, the file of the same stage.
        other = path.stem not in (record.config.stage_name, 'quickstart')
        found.append((len(changes), other, path.name, variant, changes))
  if not found:
    return None
  _, _, file, variant, changes = min(found, key=lambda one: one[:4])
  spec = f'configs/{file}{variant and ":"}{variant}'
  options = [f'--config={spec}']
  options += [f'--config.{key}={text}' for key, text in changes]
  options.append(f'--workdir={os.fspath(record.folder)}')
  return ' \\\n  '.join(['tpu_lm train', *map(shlex.quote, options)])


def _changes(spec: str, wanted: ConfigDict) -> list[tuple[str, str]] | None:
  """Overrides from a file to `wanted`; None if none lead there."""
  try:
    config = configs.load_file(spec)
    config.init_from = wanted.init_from
    if 'teacher' in wanted.stage:
      config.stage.teacher = wanted.stage.teacher
    before = configs.flatten(configs.load_file(spec))
    _adopt(config)
  except UserError:
    return None
  there, here = configs.flatten(config), configs.flatten(wanted)
  if there.keys() - here.keys():
    return None  # a key cannot be taken away
  first = [
    (key, here[key])
    for key in ('init_from', 'stage.teacher')
    if key in here and before.get(key) != here[key]
  ]
  rest = [
    (key, value)
    for key, value in sorted(here.items())
    if key not in there or there[key] != value
  ]
  return [(key, _spelt(key, value)) for key, value in first + rest]


def _adopt(config: ConfigDict) -> None:
  """What `train` takes from `init_from`, where that is still there."""
  try:
    configs.adopt(config)
  except (UserError, OSError, ValueError, TypeError, AttributeError):
    return


def _spelt(key: str, value: Any) -> str:
  """A value as the command line takes it."""
  if isinstance(value, bool):
    return str(value).lower()
  if not isinstance(value, str):
    return repr(value)
  # Sections without a schema read what looks like a literal as one.
  if key.startswith('stage.') and _is_literal(value):
    return repr(value)
  return value


def _is_literal(text: str) -> bool:
  try:
    ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text.lower() in ('true', 'false')
  return True
