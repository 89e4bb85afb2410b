"""Prompts to be answered while training, and records that judge the answers.

A row is the tokens of one prompt, up to where the assistant begins; nothing of
it is trained. Beside the rows of a split lie the records, in the same order:
the question as messages, and the whole record as it was read, with all that a
reward may need (prompts.py reads them).

Prompts are in the order of their md5, then of the record's, and are held out
as records of every other kind are (prepare_records.py). One that is longer than
`length` tokens is refused, for without its end it asks something else. The
same prompt may come several times.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tpu_lm.data import manifest, packing, prepare_records, record_rows
from tpu_lm.data.messages import plain, spoken
from tpu_lm.data.prepare_records import Record
from tpu_lm.errors import UserError

_MD5 = 16  # bytes


class Prompts(prepare_records.Records):
  """Rows of `prompts`."""

  things = 'prompt(s)'
  holds = 'prompts'
  format = 1  # raised when the same request would give other rows
  prefixes = ('',)
  value_column = ''

  def read(self, origin: str, raw: Mapping, crlf: dict) -> Record:
    one = super().read(origin, raw, crlf)
    ((messages, _, tools),) = one.texts
    line = _line({'messages': messages, 'tools': tools}, raw)
    key = one.key + prepare_records.md5(line)
    # Lines wait in memory, too, and may be much longer than what is asked.
    return one._replace(key=key, line=line, size=one.size + len(line))

  def parts(self) -> list[dict[str, Any]]:
    self._lines = _Lines(self.folder)
    try:
      parts = super().parts()
    finally:
      self._lines.close()
    different = {key[:_MD5] for key in self._keys}
    self.counts['prompts_repeated'] = len(self._keys) - len(different)
    return parts

  def _add(self, one: Record, sequences: list[Any], laid: list[int]) -> None:
    super()._add(one, sequences, laid)
    self._lines.add(one.line)

  def _sequences(self, batch: list[Record]) -> Iterator[list[Any]]:
    for one in batch:
      ((messages, _, tools),) = one.texts
      try:
        ids = np.array(self.template.prompt(messages, tools), np.int32)
      except UserError:  # of the template, whatever the record
        raise
      except ValueError as error:
        yield [error]
      else:
        yield [(ids, np.zeros(len(ids), bool))]

  def _fitted(self, sequences: list[Any]) -> list[int]:
    ((ids, _),) = sequences
    if len(ids) > self.data.length:
      raise ValueError(
        f'its prompt of {len(ids):,} tokens is longer than data.length='
        f'{self.data.length}; raise that'
      )
    return [len(ids)]

  def _split(
    self,
    split: str,
    chosen: np.ndarray,
    arrays: list[record_rows.Array],
    plan: packing.Whole,
  ) -> dict[str, Any]:
    described = super()._split(split, chosen, arrays, plan)
    lines = self._lines.read(chosen[plan.order])
    name = f'{split}.records'
    return described | {
      'records': manifest.write_lines(self.folder, name, lines)
    }


def _line(question: dict[str, Any], raw: Mapping) -> bytes:
  """The question and the whole record, as one line of JSON.

  Raises:
    ValueError: the record holds what JSON cannot.
  """
  record = plain(raw)
  try:
    # Fields as they stand, not sorted: they are shown to people.
    return prepare_records.json_of(question | {'record': record}, False)
  except (TypeError, ValueError) as error:
    name, value = next(filter(_is_unsound, record.items()))
    raise ValueError(
      f"'{name}' holds {spoken(value)}, which JSON cannot; write it as text or "
      'leave it out'
    ) from error


def _is_unsound(field: tuple[str, Any]) -> bool:
  try:
    prepare_records.json_of(field)
  except (TypeError, ValueError):
    return True
  return False


class _Lines:
  """Lines in a file, in the order in which they are read."""

  def __init__(self, folder: pathlib.Path):
    self._path = folder / 'lines.stream.tmp'
    self._file = self._path.open('wb')
    self._ends = [0]

  def add(self, line: bytes) -> None:
    self._file.write(line)
    self._ends.append(self._ends[-1] + len(line))

  def read(self, numbers: np.ndarray) -> Iterator[bytes]:
    """The lines of these numbers, after the last has been added."""
    self._file.close()
    with self._path.open('rb') as file:
      for number in numbers.tolist():
        begin, end = self._ends[number : number + 2]
        file.seek(begin)
        yield file.read(end - begin)

  def close(self) -> None:
    self._file.close()
    self._path.unlink(missing_ok=True)
