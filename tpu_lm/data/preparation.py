"""What the preparing of text and of whole records have in common.

Sources are opened, a tokenizer is found or trained, splits are written by the
kind of rows, and what was read, left out and made of it goes into the manifest
and is told to the user.
"""

import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

import tpu_lm
from tpu_lm import tokenizer as tokenizer_lib
from tpu_lm.data import files, heldout, manifest, sources
from tpu_lm.errors import UserError

SHARD_BYTES = 64 << 20  # of a shard's tokens
SAY_EVERY = 10.0  # seconds between lines of progress
TOLD = (
  ('empty_skipped', 'empty documents skipped'),
  ('bad_skipped', 'bad records skipped'),
  ('prompts_repeated', 'prompts that were there before, kept'),
  ('records_cut', 'records longer than a row, their ends cut'),
  ('line_ends_changed', 'line ends changed from CR LF to LF'),
  ('byte_order_marks', 'byte-order marks taken away'),
)
Report = Callable[[str], Any]


class Preparation:
  """One run of `prepare`; a subclass for text, and one for records.

  Args:
    data: the section `data` of the configuration.
    folder: where the rows are written; empty.
    request: what decides the rows, stored with them.
    asked: the keys of `data` that these rows depend on, stored too.
    report: is given each line that a user may want to see.
  """

  things = 'document(s)'
  holds = 'text'
  num_arrays = 1  # of tokens, in a row
  counts: dict[str, Any]  # what was read and left out

  def __init__(
    self,
    data: ConfigDict,
    folder: pathlib.Path,
    request: dict[str, Any],
    asked: dict[str, Any],
    report: Report,
  ):
    self.data, self.folder, self.report = data, folder, report
    self.request, self.asked = request, asked
    self.bad: list[str] = []
    self._began = self._said = time.monotonic()
    self.source = sources.open(data.source, self.field())
    self.heldout = None
    self.rule = None
    if data.heldout_source:
      self.heldout = sources.open(data.heldout_source, self.field())
    else:
      self.rule = heldout.check(data.heldout_share, data.heldout_by)

  # What a kind of rows says of itself.

  def field(self) -> str:
    """The field of records that is read; '' reads all."""
    raise NotImplementedError

  def samples(self) -> Iterable[str]:
    """The text to train on, for a tokenizer to be trained on."""
    raise NotImplementedError

  def parts(self) -> list[dict[str, Any]]:
    """Writes the rows, and describes them."""
    raise NotImplementedError

  def about(self, counts: dict[str, Any], total: dict[str, int]) -> str:
    """What was read, in words."""
    raise NotImplementedError

  def more(self) -> dict[str, Any]:
    """What the manifest holds besides."""
    return {}

  # What they share.

  def run(self) -> manifest.Manifest:
    self.tokenizer = self._make_tokenizer()
    parts = self.parts()
    self._check_rows(parts)
    self.tokenizer.save(self.folder)
    content = self._content(parts)
    for line in self._summary(content, time.monotonic() - self._began):
      self.report(line)
    return manifest.write(self.folder, content)

  def _make_tokenizer(self) -> tokenizer_lib.Tokenizer:
    kind = self.data.tokenizer
    if kind not in tokenizer_lib.KINDS:
      return tokenizer_lib.load(kind)
    sample = tokenizer_lib.Sample()
    if kind == 'bpe':
      for text in self.samples():
        sample.add(text)
    return tokenizer_lib.train(sample.texts(), kind, self.data.vocab_size)

  def reading(self) -> files.Reading:
    return files.Reading(tolerant=self.data.max_bad_share > 0)

  def check_share(self, source: sources.Source, reading: files.Reading) -> None:
    """Refuses too many bad records, once all are read."""
    share, bad, of = self.data.max_bad_share, reading.num_bad, reading.records
    if bad > share * of:
      needed = math.ceil(1000 * bad / of) / 1000
      skip = f', or skip them with --config.data.max_bad_share={needed}'
      raise UserError(
        f'{source.name}: {bad} of {of} records are bad, above '
        f'data.max_bad_share={share}; the first: {_without_hint(reading.bad)}'
        f'{skip if needed < 1 else ""}'
      )

  def count(self, reading: files.Reading) -> None:
    """Adds up what one pass over a source has found."""
    self.counts['documents'] += reading.records - reading.num_bad
    self.counts['bad_skipped'] += reading.num_bad
    self.counts['line_ends_changed'] += sum(reading.crlf.values())
    self.counts['byte_order_marks'] += len(reading.bom)
    self.bad += reading.bad

  def progress(self, done: Callable[[], str]) -> None:
    if time.monotonic() - self._said > SAY_EVERY:
      self._said = time.monotonic()
      self.report(f'data: {done()}')

  def rows_a_shard(self, itemsize: int) -> int:
    return max(1, SHARD_BYTES // ((self.data.length + 1) * itemsize))

  def _check_rows(self, parts: list[dict[str, Any]]) -> None:
    """Refuses a part to train on without rows, and a held-out split of none."""
    name = self.data.source
    documents = self.counts['documents']
    if not documents:
      raise UserError(f'{name}: holds no {self.holds}; name a source that does')
    for part in parts:
      if part['weight'] and not part['splits']['train']['rows']:
        where = f'{name}: {part["name"]}' if part['name'] else name
        raise UserError(
          f'{where}: leaves no rows to train on; give more {self.holds}, or '
          'hold out less with --config.data.heldout_share='
        )
    if not any(part['splits']['heldout']['rows'] for part in parts):
      if self.data.heldout_source:
        raise UserError(f'{self.data.heldout_source}: holds no {self.holds}')
      raise UserError(
        f'{name}: data.heldout_share={self.data.heldout_share} of {documents} '
        f'{self.things.replace("(s)", "s")} leaves no held-out rows; raise it, '
        f'give more {self.holds}, or name a source of its own with '
        '--config.data.heldout_source=PATH'
      )

  def _content(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
    data = self.data
    opened = [s for s in (self.source, self.heldout) if s is not None]
    content = {
      'format': manifest.FORMAT,
      'code_version': tpu_lm.__version__,
      'asked': self.asked,
      'request': self.request,
      'tokenizer': {
        'digest': self.tokenizer.digest,
        'vocab_size': self.tokenizer.vocab_size,
        'kind': data.tokenizer,
      },
      'length': data.length,
      'packing': self.asked['packing'],
      'heldout': {'source': data.heldout_source}
      if data.heldout_source
      else self.rule._asdict(),
      'sources': [f for s in opened for f in s.fingerprints()],
      'unknown_files': [name for s in opened for name in s.unknown],
      'counts': self.counts,
      'bad_records': self.bad[:10],
      'parts': parts,
    } | self.more()
    return content | {'fingerprint': manifest.fingerprint(content)}

  def _summary(self, content: dict[str, Any], seconds: float) -> Iterator[str]:
    """What the user is told: what was read, left out, and became of it."""
    made = manifest.Manifest(self.folder, content)
    counts, unknown = content['counts'], content['unknown_files']
    total = {
      key: sum(made.total(split, key) for split in manifest.SPLITS)
      for key in ('text_bytes', 'tokens')
    }
    yield (
      f'data: {self.source.name}: {self.about(counts, total)}, '
      f'{total["tokens"]:,} tokens of {made.vocab_size:,} kinds, '
      f'{seconds:.1f} s'
    )
    for key, what in TOLD:
      if counts.get(key):
        first = ''
        if key == 'bad_skipped':
          first = f', the first: {_without_hint(self.bad)}'
        yield f'  {counts[key]:,} {what}{first}'
    if unknown:
      names = ', '.join(os.path.basename(name) for name in unknown[:3])
      more = ', …' if len(unknown) > 3 else ''
      yield f'  {len(unknown):,} files of unknown kinds left out: {names}{more}'
    for split in manifest.SPLITS:
      rows = made.total(split, 'rows')
      slots = rows * (made.length + 1) * self.num_arrays
      padding = made.total(split, 'padding') / slots
      yield (
        f'  {split}: {made.total(split, "documents"):,} {self.things}, '
        f'{made.total(split, "documents_chunked"):,} cut, in {rows:,} '
        f'rows of {made.length}, {padding:.1%} padding'
      )
    yield f'  in {self.folder}'


def _without_hint(bad: list[str]) -> str:
  """The first message, without the advice to skip such records."""
  return bad[0].removesuffix(f', {files.SKIP}')
