"""Records that stay whole laid into rows: conversations, pairs, ratings.

A record becomes one token sequence, or two of a pair, through the chat
template; the mask says which tokens are trained. What is longer than `length`
tokens loses its end, and nothing is kept after the last trained token. Several
records share a row (record_rows.py).

Records are laid out in the order of their md5. What is held out is decided by
the md5 of what comes before the first answer, so that a question is on the
same side in every stage that is trained on it.
"""

import collections
import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from tpu_lm import tokenizer as tokenizer_lib
from tpu_lm.data import (
  chat,
  files,
  heldout,
  manifest,
  packing,
  record_rows,
  records,
)
from tpu_lm.data import sources as sources_lib
from tpu_lm.data.preparation import Preparation
from tpu_lm.errors import UserError

FORMAT = 1  # raised when the same request would give other rows
_CRLF = b'\\r\\n'  # in JSON
_BATCH = 2 << 20  # characters that are tokenised at once


def template(
  data: ConfigDict, tokenizer: tokenizer_lib.Tokenizer | None = None
) -> chat.Template:
  """The chat template that `data` asks for."""
  folder = data.tokenizer
  if folder in tokenizer_lib.KINDS:
    # All that are trained here have the same special tokens.
    folder, tokenizer = '', tokenizer or tokenizer_lib.train([], 'byte')
  tokenizer = tokenizer or tokenizer_lib.load(folder)
  return chat.load(data.chat_template, tokenizer, folder)


class Record(NamedTuple):
  """A record as it was read; the three md5 are of its canonical JSON.

  Attributes:
    origin: where it stands.
    form: how it was spelled.
    texts: (messages, first trained message, tools) of each token sequence.
    value: margin or score; 0 where there is none.
    key: md5 of the whole, or several, by which records are ordered.
    opening: md5 of what comes before the first answer.
    completion: md5 of what is rated.
    size: characters.
    line: JSON of what is kept beside the rows; empty where nothing is.
  """

  origin: str
  form: str
  texts: list[tuple]
  value: float
  key: bytes
  opening: bytes
  completion: bytes
  size: int
  line: bytes = b''


def _read(origin: str, raw: Mapping, rows: str, crlf: dict) -> Record:
  """Brings a record into its canonical form.

  Args:
    origin: where it stands.
    raw: as it was read.
    rows: the kind that is asked for.
    crlf: counts the line ends that were changed, by origin.

  Raises:
    ValueError: what is wrong with it, on one line.
  """
  form, record = records.canonical(raw, rows)
  data = json_of(record)
  found = data.count(_CRLF)
  if found:
    record = type(record)(*_unix(list(record)))
    data = json_of(record)
    crlf[origin] = found - data.count(_CRLF)  # a spelled \\r may stay
  value, completion = 0.0, None
  if rows in ('chat', 'prompts'):
    before, answers = record.messages, [[]]
  else:
    before = record.prompt
    if rows == 'pairs':
      answers, value = [record.chosen, record.rejected], record.margin
    else:
      answers, value = [record.completion], record.score
      completion = record.completion
  first = 0 if rows == 'chat' else len(before)
  turns = itertools.takewhile(lambda turn: turn['role'] != 'assistant', before)
  return Record(
    origin=origin,
    form=form,
    texts=[([*before, *answer], first, record.tools) for answer in answers],
    value=value,
    key=md5(data),
    opening=md5(json_of(list(turns) or record)),
    completion=md5(json_of(completion)),
    size=len(data),
  )


def json_of(value: Any, sort_keys: bool = True) -> bytes:
  """The value as one line of UTF-8.

  Raises:
    ValueError: it holds what cannot be written so.
  """
  text = json.dumps(value, sort_keys=sort_keys, ensure_ascii=False)
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'holds no valid text ({error})') from error


def md5(data: bytes) -> bytes:
  return hashlib.md5(data).digest()


def _unix(value: Any) -> Any:
  """`value` with LF line ends in every text."""
  if isinstance(value, str):
    return files.unix(value)[0]
  if isinstance(value, dict):
    return {key: _unix(held) for key, held in value.items()}
  return [_unix(held) for held in value] if isinstance(value, list) else value


def _rendered(sequences: list[Any]) -> list[Any]:
  """The sequences; raises what there is in place of one."""
  for found in sequences:
    if isinstance(found, ValueError):
      raise ValueError(f'{found}; mend it') from found
  return sequences


class Records(Preparation):
  """Rows of `chat`, `pairs`, `rated` or `scored`, which `asked` says."""

  things = 'record(s)'
  holds = 'records'
  format = FORMAT

  def field(self) -> str:
    return ''

  @property
  def rows(self) -> str:
    return self.asked['rows']

  @property
  def num_arrays(self) -> int:
    return len(self.prefixes)

  @property
  def prefixes(self) -> tuple[str, ...]:
    """Of the columns of each array."""
    return record_rows.PREFIXES[self.rows]

  @property
  def value_column(self) -> str:
    """The column of what is of the records, not of their tokens, or ''."""
    return record_rows.VALUES[self.rows]

  def read(self, origin: str, raw: Mapping, crlf: dict) -> Record:
    """A record in its canonical form; raises ValueError as `_read` does."""
    return _read(origin, raw, self.rows, crlf)

  def samples(self) -> Iterable[str]:
    """What is said in the records that are trained on."""
    reading = self.reading()
    openings = [one.opening for one in self._records(self.source, reading)]
    self.check_share(self.source, reading)
    marks = heldout.marks(openings, self.rule)
    again = self._records(self.source, self.reading())
    for one, held in zip(again, marks, strict=True):
      for number, (messages, first, _) in enumerate(one.texts):
        for turn in () if held else messages[first if number else 0 :]:
          yield turn['content'] or ''

  def about(self, counts: dict[str, Any], total: dict[str, int]) -> str:
    forms = counts['forms']
    told = ', '.join(
      f'{form} {count:,}' if len(forms) > 1 else form
      for form, count in forms.items()
    )
    return f'{counts["documents"]:,} records ({told})'

  def more(self) -> dict[str, Any]:
    return {
      'records': {
        'rows': self.rows,
        'slots': self._slots,
        'template': self.template.digest,
        'template_origin': self.template.origin,
      }
    }

  def parts(self) -> list[dict[str, Any]]:
    self.counts = {'documents': 0, 'bad_skipped': 0, 'records_cut': 0}
    self.counts |= {'line_ends_changed': 0, 'byte_order_marks': 0}
    self.counts['forms'] = collections.Counter()
    self.template = template(self.data, self.tokenizer)
    self._keys: list[bytes] = []
    self._completions: list[bytes] = []
    self._values: list[float] = []
    self._held: list[bool] = []
    self._cut: list[bool] = []
    small = self.tokenizer.vocab_size <= 1 << 16
    with contextlib.ExitStack() as stack:
      self._stores = [
        record_rows.Store(
          self.folder, prefix, np.uint16 if small else np.uint32
        )
        for prefix in self.prefixes
        if prefix != 'mismatched_'
      ]
      for store in self._stores:
        stack.callback(store.close)
      self._tokenise(self.source, self.rule)
      if self.heldout is not None:
        self._tokenise(self.heldout, None)
      splits = self._write()
    self.template.save(self.folder)
    return [{'name': '', 'weight': 1.0, 'splits': splits}]

  def _records(
    self, source: sources_lib.Source, reading: files.Reading
  ) -> Iterator[Record]:
    """The records that can be understood."""
    for origin, raw in source.records(reading):
      try:
        found = self.read(origin, raw, reading.crlf)
      except ValueError as error:
        reading.refuse(f'{origin}: {error}; mend it, {files.SKIP}')
      else:
        yield found

  def _tokenise(
    self, source: sources_lib.Source, rule: heldout.Rule | None
  ) -> None:
    """Adds the records of a source to the stores, and marks those held out."""
    reading = self.reading()
    openings: list[bytes] = []
    sound: list[bool] = []
    batch: list[Record] = []
    size = 0
    for one in self._records(source, reading):
      batch.append(one)
      openings.append(one.opening)
      size += one.size
      if size >= _BATCH:
        sound += self._encode(batch, reading)
        size = 0
        self.progress(lambda: f'{len(self._keys):,} records tokenised')
    sound += self._encode(batch, reading)
    self.check_share(source, reading)
    self.count(reading)
    marks = heldout.marks(openings, rule)
    if source is self.heldout:
      marks = ~marks
    self._held += marks[np.array(sound, bool)].tolist()

  def _encode(self, batch: list[Record], reading: files.Reading) -> list[bool]:
    """Tokenises the records and empties `batch`; says which were sound."""
    sound = []
    for one, sequences in zip(batch, self._sequences(batch), strict=True):
      try:
        laid = self._fitted(_rendered(sequences))
      except ValueError as error:
        reading.refuse(f'{one.origin}: {error}, {files.SKIP}')
        sound.append(False)
        continue
      sound.append(True)
      self._add(one, sequences, laid)
    batch.clear()
    return sound

  def _add(self, one: Record, sequences: list[Any], laid: list[int]) -> None:
    """Takes a record of which rows take `laid` tokens."""
    for store, (ids, mask), size in zip(
      self._stores, sequences, laid, strict=True
    ):
      store.add(ids, mask, size)
    self._keys.append(one.key)
    self._completions.append(one.completion)
    self._values.append(one.value)
    self._cut.append(any(s.laid[-1] < s.sizes[-1] for s in self._stores))
    self.counts['forms'][one.form] += 1
    self.counts['records_cut'] += self._cut[-1]

  def _sequences(self, batch: list[Record]) -> Iterator[list[Any]]:
    """The (ids, mask) pairs of each record, or why there is none."""
    texts = [text for one in batch for text in one.texts]
    encoded = iter(self.template.encode_batch(texts))
    for one in batch:
      yield [next(encoded) for _ in one.texts]

  def _fitted(self, sequences: list[Any]) -> list[int]:
    """How much of each sequence a row takes.

    Raises:
      ValueError: nothing is left to train on.
    """
    length = self.data.length
    laid = [record_rows.laid(mask, length) for _, mask in sequences]
    for (_, mask), size in zip(sequences, laid, strict=True):
      if not size:
        raise ValueError(
          f'its prompt of {np.argmax(mask):,} tokens leaves no target within '
          f'data.length={length}; raise that'
        )
    if len(sequences) == 2:
      (one, _), (other, _) = sequences
      if np.array_equal(one[: laid[0]], other[: laid[1]]):
        raise ValueError(
          "'chosen' and 'rejected' are the same within data.length="
          f'{length}; raise that'
        )
    return laid

  def _write(self) -> dict[str, Any]:
    """Packs and writes both splits; returns their descriptions."""
    if not self._keys:
      return {}
    streams = [store.finish() for store in self._stores]
    keys = np.frombuffer(b''.join(self._keys), '>u8')
    order = np.lexsort(keys.reshape(len(self._keys), -1).T[::-1])
    held = np.array(self._held)[order]
    plans = {}
    for split, chosen in zip(
      manifest.SPLITS, (order[~held], order[held]), strict=True
    ):
      arrays = self._arrays(chosen, order, streams)
      sizes = record_rows.sizes(arrays)
      plan = packing.whole(sizes, self.data.length, self.asked['packing'])
      plans[split] = chosen, arrays, plan
    self._slots = max(
      int(plan.number.max(initial=0)) for _, _, plan in plans.values()
    )
    return {split: self._split(split, *plan) for split, plan in plans.items()}

  def _arrays(
    self, chosen: np.ndarray, order: np.ndarray, streams: list[tuple]
  ) -> list[record_rows.Array]:
    """What the rows of these records are laid from; `order` is of all."""
    prefixes = self.prefixes
    arrays = [
      record_rows.array(prefix, store, stream, chosen)
      for prefix, store, stream in zip(
        prefixes, self._stores, streams, strict=False
      )
    ]
    if len(arrays) < len(prefixes):
      # A split of one completion, as of one record, borrows from the other.
      found = self._mismatched(chosen, chosen, streams)
      found = found or self._mismatched(chosen, order, streams)
      if found is None:
        raise UserError(
          f'{self.source.name}: all completions are the same, and rows of '
          'rated compare each with another; give more records'
        )
      arrays.append(found)
    return arrays

  def _mismatched(
    self, chosen: np.ndarray, among: np.ndarray, streams: list[tuple]
  ) -> record_rows.Array | None:
    completions = [self._completions[i] for i in among]
    found = record_rows.mismatched(
      self._stores[0], streams[0], among, completions, self.data.length
    )
    if found is None or among is chosen:
      return found
    at = np.flatnonzero(np.isin(among, chosen))
    return found._replace(starts=found.starts[at], sizes=found.sizes[at])

  def _split(
    self,
    split: str,
    chosen: np.ndarray,
    arrays: list[record_rows.Array],
    plan: packing.Whole,
  ) -> dict[str, Any]:
    """Writes one split; returns its description."""
    length = self.data.length
    size = self.rows_a_shard(arrays[0].tokens.dtype.itemsize * len(arrays))
    numbers = np.array(self._values, np.float32)[chosen]
    total = collections.Counter()

    def blocks() -> Iterator[dict[str, np.ndarray]]:
      for first in range(0, plan.num_rows, size):
        last = min(first + size, plan.num_rows)
        columns = {}
        for array in arrays:
          laid = record_rows.rows(
            array, plan, first, last, length, self.tokenizer.pad_id
          )
          total.update(self._counted(*laid))
          for name, column in zip(record_rows.COLUMNS, laid, strict=True):
            columns[array.prefix + name] = column
        if self.value_column:
          columns[self.value_column] = record_rows.values(
            numbers, plan, first, last, self._slots
          )
        yield columns

    shards = manifest.write_shards(self.folder, split, blocks())
    slots = plan.num_rows * (length + 1) * len(arrays)
    return {
      'rows': plan.num_rows,
      'documents': len(chosen),
      'documents_chunked': sum(self._cut[i] for i in chosen),
      'tokens': total['tokens'],
      'targets': total['targets'],
      'text_bytes': total['text_bytes'],
      'padding': slots - total['tokens'],
      'shards': shards,
    }

  def _counted(
    self, tokens: np.ndarray, segments: np.ndarray, mask: np.ndarray
  ) -> dict[str, int]:
    same = segments[:, 1:] == segments[:, :-1]
    held = segments > 0
    return {
      'tokens': int(held.sum()),
      'targets': int((same & mask[:, 1:]).sum()),
      'text_bytes': int(self.tokenizer.token_bytes[tokens[held]].sum()),
    }
