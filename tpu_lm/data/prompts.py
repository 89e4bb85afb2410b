"""The records of prepared prompts, by the number of their row.

  prompts = Prompts(directory, 'train')
  numbers = loader.row_numbers(step)
  asked = [prompts[number] for number in numbers]

The files are mapped, not read: a record costs what it is long.
"""

import json
import operator
import os
from typing import Any, NamedTuple

import numpy as np

from tpu_lm.data import manifest
from tpu_lm.data.messages import Message
from tpu_lm.data.records import Tools
from tpu_lm.errors import UserError


class Prompt(NamedTuple):
  """What is asked, and what judges the answer."""

  messages: list[Message]  # as the row's tokens spell them
  tools: Tools
  record: dict[str, Any]  # whole, as it was read


class Prompts:
  """The prompts of a split; number n is that of row n of a Loader.

  Args:
    directory: a folder of rows of prompts that `prepare` made.
    split: 'train' or 'heldout'.

  Raises:
    UserError: the folder holds other rows, or its files are not as they were
      written. Whether every byte is, `manifest.check` tells, as of shards.
  """

  def __init__(self, directory: str | os.PathLike, split: str):
    if split not in manifest.SPLITS:
      raise ValueError(f'{split=} is not one of {manifest.SPLITS}')
    made = manifest.read(directory)
    if made.rows != 'prompts':
      raise UserError(
        f'{made.directory}: holds rows of {made.rows}, not prompts; prepare '
        'them with a stage_name that trains on prompts'
      )
    manifest.check(made)
    parts = made.splits(split)
    if not parts:
      raise UserError(f'{made.directory}: has no {split} rows')
    (part,) = parts
    lines, starts = (
      made.directory / part.records[name]['file']
      for name in ('lines', 'starts')
    )
    self._path = lines
    self._lines = np.memmap(lines, np.uint8, 'r')
    self._starts = self._mapped(starts, part.rows)

  def _mapped(self, path: os.PathLike, rows: int) -> np.ndarray:
    try:
      starts = np.load(path, mmap_mode='r')
      is_sound = starts.shape == (rows + 1,) and starts.dtype == np.int64
      is_sound = is_sound and starts[-1] == len(self._lines)
    except ValueError:
      is_sound = False
    if not is_sound:
      raise UserError(f'{path}: damaged; {self._again}')
    return starts

  @property
  def _again(self) -> str:
    return f'delete {self._path.parent} and run `tpu_lm prepare` again'

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __getitem__(self, number: int) -> Prompt:
    number = operator.index(number)
    if not 0 <= number < len(self):  # -1 is a row of padding
      raise IndexError(f'row {number} of {len(self)} prompts')
    begin, end = self._starts[number : number + 2].tolist()
    try:
      found = json.loads(self._lines[begin:end].tobytes())
      return Prompt(found['messages'], found['tools'], found['record'])
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f'{self._path}: line {number + 1} is damaged ({error}); {self._again}'
      ) from error
