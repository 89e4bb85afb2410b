"""Where the records of plans are kept: NAME.plan/ beside a configuration."""

import json
import pathlib
from typing import Any

from tpu_lm import config as configs


def beside(spec: str) -> pathlib.Path:
  """configs/a.plan for configs/a.py, configs/a_tiny.plan for a.py:tiny."""
  path, variant = configs.split_spec(spec)
  stem = path.stem + (f'_{variant}' if variant else '')
  return path.with_name(f'{stem}.plan')


def path_of(folder: pathlib.Path, topology: str) -> pathlib.Path:
  """The record of a topology in a folder."""
  return folder / f'{topology.replace(":", "_")}.json'


def read_all(folder: pathlib.Path) -> list[dict[str, Any]]:
  """All records of a folder, which need not be there."""
  paths = sorted(folder.glob('*.json'))
  return [json.loads(path.read_text()) for path in paths]


def read(folder: pathlib.Path, topology: str) -> dict[str, Any] | None:
  """The record of a topology; None: it was not planned."""
  path = path_of(folder, topology)
  return json.loads(path.read_text()) if path.is_file() else None
