"""A folder of prepared rows: shards, the tokenizer, and a manifest over them.

    manifest.json              written last: a folder without it is not finished
    tokenizer.json             with tokenizer_config.json
    chat_template.jinja        where rows are of records
    train-00000.tokens.npy     uint16, or uint32 for large vocabularies
    train-00000.segment_ids.npy  uint16; 0 is padding, documents count from 1
    heldout-00000.…
    train.records.jsonl        where rows are prompts: a line a row (prompts.py)
    train.records.npy          int64 [rows + 1]: where each begins

Every array is [rows, length + 1]. A split of a mixture has its part's number
before its name. A column `loss_mask` (bool) is there only where the mask is not
simply "not padding". Rows of records have the columns of record_rows.py; those
that are of the records, not of tokens, are [rows, slots]. The fingerprint
covers what decides the batches (the rows, their order, tokenizer, length,
packing, weights, kind of rows, chat template, records of prompts), not where
they lie or what they were made from.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tpu_lm import tokenizer as tokenizer_lib
from tpu_lm.errors import UserError

FORMAT = 1  # raised when the same request would give other rows or files
FILE = 'manifest.json'
SPLITS = ('train', 'heldout')


class Shard(NamedTuple):
  """`files` maps a column to its {file, bytes, sha256}."""

  name: str
  rows: int
  files: dict[str, dict[str, Any]]


class Split(NamedTuple):
  """`records`, of prompts, are the files `lines` and `starts`."""

  part: str
  weight: float
  rows: int
  shards: list[Shard]
  records: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a folder of prepared rows holds; `content` is its manifest.json."""

  directory: pathlib.Path
  content: dict[str, Any]

  @property
  def fingerprint(self) -> str:
    return self.content['fingerprint']

  @property
  def length(self) -> int:
    """Inputs, and targets, in a row; arrays have one slot more."""
    return self.content['length']

  @property
  def vocab_size(self) -> int:
    return self.content['tokenizer']['vocab_size']

  @property
  def rows(self) -> str:
    """The kind of rows: text, chat, pairs, rated, scored or prompts."""
    records = 'records' in self.content
    return self.content['records']['rows'] if records else 'text'

  @property
  def slots(self) -> int:
    """The most records in any row; 0 of text."""
    records = 'records' in self.content
    return self.content['records']['slots'] if records else 0

  @property
  def tokenizer_digest(self) -> str:
    return self.content['tokenizer']['digest']

  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    return tokenizer_lib.load(self.directory)

  def splits(self, split: str) -> list[Split]:
    """The parts that have rows of this split."""
    found = []
    for part in self.content['parts']:
      described = part['splits'][split]
      shards = [Shard(**shard) for shard in described['shards']]
      if described['rows']:
        found.append(
          Split(
            part['name'],
            part['weight'],
            described['rows'],
            shards,
            described.get('records', {}),
          )
        )
    return found

  def total(self, split: str, count: str) -> int:
    """Sum over parts of `rows`, `documents`, `tokens`, `targets`,
    `text_bytes`, …"""
    return sum(part['splits'][split][count] for part in self.content['parts'])


def digest(value: Any) -> str:
  """sha256 of a JSON value."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(content: dict[str, Any]) -> str:
  """One digest over all that decides the batches."""
  parts = [
    [
      part['weight'],
      {
        split: [
          [shard['rows'], {k: f['sha256'] for k, f in shard['files'].items()}]
          for shard in described['shards']
        ]
        for split, described in part['splits'].items()
      },
    ]
    for part in content['parts']
  ]
  kept = [content[key] for key in ('format', 'length', 'packing')]
  if 'records' in content:
    about = content['records']
    kept += [about[key] for key in ('rows', 'slots', 'template')]
  beside = [
    {split: {k: f['sha256'] for k, f in described['records'].items()}}
    for part in content['parts']
    for split, described in part['splits'].items()
    if 'records' in described
  ]
  kept += [beside] if beside else []
  return digest([*kept, content['tokenizer']['digest'], parts])


def write_shards(
  directory: pathlib.Path, name: str, blocks: Iterable[dict[str, np.ndarray]]
) -> list[dict[str, Any]]:
  """Writes each block of columns as a shard; returns their descriptions."""
  shards = []
  for number, columns in enumerate(blocks):
    shard = f'{name}-{number:05d}'
    files = {
      column: _write_array(directory / f'{shard}.{column}.npy', array)
      for column, array in columns.items()
    }
    rows = len(next(iter(columns.values())))
    shards.append({'name': shard, 'rows': rows, 'files': files})
  return shards


def write_lines(
  directory: pathlib.Path, name: str, lines: Iterable[bytes]
) -> dict[str, dict[str, Any]]:
  """Writes lines, and where they begin, to be read by number.

  Returns:
    the {file, bytes, sha256} of `lines` and of `starts`.
  """
  starts = [0]

  def write(out: '_Out') -> None:
    for line in lines:
      out.write(line + b'\n')
      starts.append(starts[-1] + len(line) + 1)

  return {
    'lines': _written(directory / f'{name}.jsonl', write),
    'starts': _write_array(
      directory / f'{name}.npy', np.array(starts, np.int64)
    ),
  }


def _write_array(path: pathlib.Path, array: np.ndarray) -> dict[str, Any]:
  def write(out: '_Out') -> None:
    np.lib.format.write_array_header_1_0(
      out, np.lib.format.header_data_from_array_1_0(array)
    )
    out.write(memoryview(np.ascontiguousarray(array)).cast('B'))

  return _written(path, write)


class _Out:
  """A plain file, and the sha256 of what is written to it.

  Not numpy's own writing of arrays, which names no cause when the disk is full.
  """

  def __init__(self, file: Any):
    self._file = file
    self.sha256 = hashlib.sha256()

  def write(self, data: Any) -> int:
    self.sha256.update(data)
    return self._file.write(data)


def _written(
  path: pathlib.Path, write: Callable[[_Out], None]
) -> dict[str, Any]:
  """Writes a file in one atomic step; returns its {file, bytes, sha256}."""
  partial = path.with_name(f'{path.name}.tmp')
  with partial.open('wb') as file:
    out = _Out(file)
    write(out)
    file.flush()
    os.fsync(file.fileno())
  partial.replace(path)
  return {
    'file': path.name,
    'bytes': path.stat().st_size,
    'sha256': out.sha256.hexdigest(),
  }


def write(directory: pathlib.Path, content: dict[str, Any]) -> Manifest:
  """Writes manifest.json in one atomic step."""
  partial = directory / f'{FILE}.tmp'
  with partial.open('w', encoding='utf-8') as file:
    json.dump(content, file, indent=1, ensure_ascii=False)
    file.flush()
    os.fsync(file.fileno())
  partial.replace(directory / FILE)
  return Manifest(directory, content)


def read(directory: str | os.PathLike) -> Manifest:
  """Reads the manifest of a prepared folder.

  Raises:
    UserError: there is none, it is damaged, or of another format.
  """
  directory = pathlib.Path(directory)
  file = directory / FILE
  again = 'delete the folder and run `tpu_lm prepare` again'
  if not file.is_file():
    raise UserError(f'{file}: no such file; {again}')
  try:
    content = json.loads(file.read_text(encoding='utf-8'))
    found, kept = content['format'], content['fingerprint']
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise UserError(f'{file}: damaged ({error}); {again}') from error
  if found != FORMAT:
    raise UserError(
      f'{file}: of format {found}, this program reads {FORMAT}; {again}'
    )
  if kept != fingerprint(content):
    raise UserError(f'{file}: does not fit its own fingerprint; {again}')
  return Manifest(directory, content)


def check(manifest: Manifest, contents: bool = False) -> None:
  """Refuses shards that are missing or not as they were written.

  Args:
    manifest: of the folder.
    contents: whether to read every file and compare its sha256, too; else
      only its size.
  """
  for file in files(manifest):
    path = manifest.directory / file['file']
    again = f'delete {manifest.directory} and run `tpu_lm prepare` again'
    if not path.is_file():
      raise UserError(f'{path}: missing; {again}')
    size = path.stat().st_size
    if size != file['bytes']:
      raise UserError(
        f'{path}: has {size} bytes, not the {file["bytes"]} written; {again}'
      )
    if contents:
      with path.open('rb') as opened:
        found = hashlib.file_digest(opened, 'sha256').hexdigest()
      if found != file['sha256']:
        raise UserError(f'{path}: damaged (its sha256 differs); {again}')


def files(manifest: Manifest) -> Iterator[dict[str, Any]]:
  """The {file, bytes, sha256} of all that holds rows or their records."""
  for split in SPLITS:
    for part in manifest.splits(split):
      yield from part.records.values()
      for shard in part.shards:
        yield from shard.files.values()
