"""What a working directory tells of its run."""

import json
import math
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tpu_lm import config as configs
from tpu_lm import metrics, rollouts
from tpu_lm.errors import UserError
from tpu_lm.report.markup import colour, is_number


class Record(NamedTuple):
  """A run as it lies in its directory."""

  name: str  # of the directory
  folder: pathlib.Path  # as the user named it
  config: ConfigDict
  recorded: str  # config.json itself
  lines: tuple[dict[str, Any], ...]  # of metrics.jsonl, oldest first
  colour: str  # that it is drawn with

  def of(self, split: str) -> list[dict[str, Any]]:
    return [line for line in self.lines if line['split'] == split]

  @property
  def steps(self) -> int:
    """The last step that was reported."""
    return int(max((line['step'] for line in self.lines), default=0))

  @property
  def seconds(self) -> float | None:
    return _largest(self.lines, 'seconds')

  @property
  def tokens(self) -> float | None:
    """Positions trained on; of answers, as the steps that were logged say."""
    told = _largest(self.of('train'), 'tokens')
    how = None if told else rollouts.sampling_of(self.config)
    targets = [y for _, y in self.points('targets', 'train') if y is not None]
    if how is None or not targets:
      return told
    return sum(targets) / len(targets) * how.num_updates * self.steps

  @property
  def compares_pairs(self) -> bool:
    return any('margin' in line for line in self.lines)

  @property
  def learns_from_rewards(self) -> bool:
    """Whether it samples answers and has them judged."""
    names = {name for line in self.lines for name in line}
    return self.config.stage_name in ('ppo', 'grpo') or bool(
      names & {'true_reward', 'dead_groups'}
    )

  def points(self, name: str, split: str) -> list[tuple[float, float | None]]:
    """(step, value) of a metric; None: it was not finite there."""
    found = []
    for line in self.of(split):
      value = line.get(name)
      if is_number(value):
        found.append((line['step'], float(value)))
      elif name in _nonfinite(line) or isinstance(value, float):
        found.append((line['step'], None))
    return found

  def last(self, name: str, split: str = 'heldout') -> float | None:
    values = [y for _, y in self.points(name, split) if y is not None]
    return values[-1] if values else None


def _nonfinite(line: dict[str, Any]) -> list:
  names = line.get('nonfinite')
  return names if isinstance(names, list) else []


def _largest(lines: Any, name: str) -> float | None:
  values = [line[name] for line in lines if is_number(line.get(name))]
  return max(values, default=None)


def read(folder: pathlib.Path, alone: bool = True) -> Record:
  """Reads a working directory.

  Args:
    folder: that `train` made.
    alone: whether it has a page of its own; it is then drawn with the colour
      of its stage, whatever the folder is called.

  Raises:
    UserError: its config.json or metrics.jsonl cannot be read.
  """
  path = folder / 'config.json'
  try:
    recorded = path.read_text(encoding='utf-8')
    config = configs.read(path)
  except UserError:
    raise
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise UserError(
      f'{path}: no configuration of a run ({_one_line(error)}); give a folder '
      'that `tpu_lm train` made'
    ) from error
  found = folder / 'metrics.jsonl'
  try:
    lines = metrics.read(found) if found.is_file() else []
  except OSError as error:
    raise UserError(
      f'{found}: cannot be read ({error.strerror}); make it readable'
    ) from error
  good = tuple(line for line in lines if is_number(line['step']))
  name = folder.resolve().name
  kind = str(config.stage_name) if alone and colour(name) == 'other' else name
  return Record(name, folder, config, recorded, good, colour(kind))


def _one_line(error: Exception) -> str:
  if isinstance(error, OSError):
    return str(error.strerror)
  return ' '.join(str(error).split())[:200]


def json_of(path: pathlib.Path) -> Any:
  """A JSON file; None where there is none.

  Raises:
    UserError: it is not JSON.
  """
  if not path.is_file():
    return None
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path}: is not JSON ({_one_line(error)}); write it again, or move it '
      'away'
    ) from error


class Sizes(NamedTuple):
  """Parameters of the network, and those that the run trained."""

  whole: int | None
  trained: int | None


def sizes(record: Record) -> Sizes:
  """Counts parameters in the newest checkpoints, as far as they are there."""
  saved = _saved(record.folder)
  if not (record.config.transforms or record.config.trainable):
    return Sizes(saved, saved)
  base = record.config.init_from
  if not base:  # held in another form: its arrays are no measure
    return Sizes(None, None)
  return Sizes(_saved(pathlib.Path(base)), saved)


def _saved(folder: pathlib.Path) -> int | None:
  """Parameters in the newest checkpoint; None if that cannot be told."""
  try:
    steps = [int(p.name) for p in folder.glob('checkpoints/*') if _is_step(p)]
    path = folder / 'checkpoints' / str(max(steps)) / 'meta' / 'metadata'
    arrays = json.loads(path.read_bytes())['arrays']
    shapes = [about[0] for n, about in arrays.items() if n[:7] == 'params/']
    return sum(math.prod(shape) for shape in shapes) or None
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None


def _is_step(path: pathlib.Path) -> bool:
  return path.name.isdecimal() and (path / 'meta' / 'metadata').is_file()


class Data(NamedTuple):
  """What was prepared for a run, in the training split."""

  rows: int
  documents: int
  tokens: int


def data(record: Record) -> Data | None:
  """Reads the manifest of the rows; None if it is not there."""
  config = record.config.data
  folder = pathlib.Path(config.dir) if config.dir else record.folder / 'data'
  for path in sorted(folder.glob('*/manifest.json')):
    try:
      content = json.loads(path.read_bytes())
      asked = content['asked']
      if (asked['source'], asked['length']) != (config.source, config.length):
        continue
      parts = [part['splits']['train'] for part in content['parts']]
      return Data(*(sum(p[name] for p in parts) for name in Data._fields))
    except (OSError, ValueError, KeyError, TypeError):
      continue
  return None
