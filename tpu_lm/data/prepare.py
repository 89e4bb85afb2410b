"""From the user's data to rows that a trainer reads by number.

Sources are read, divided into what is trained on and what is held out,
tokenised, and packed into rows of one length, which are written as shards and,
last of all, a manifest. Which kind of rows that is, the stage says: `text`
(prepare_text.py), records that stay whole: `chat`, `pairs`, `rated`, `scored`
(prepare_records.py), or `prompts` with their records (prepare_prompts.py). The
rows do not depend on the order of files or records. Nothing here imports
TensorFlow, unless the source is read through it.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from tpu_lm import stage
from tpu_lm import tokenizer as tokenizer_lib
from tpu_lm.data import (
  heldout,
  manifest,
  packing,
  prepare_prompts,
  prepare_records,
  prepare_text,
  sources,
)
from tpu_lm.data.preparation import Report
from tpu_lm.errors import UserError

_NAMED = ('tfds', 'hf', 'seqio')
# Keys of `data` that rows of text do not depend on, and rows of records.
_NOT_TEXT = ('rows', 'chat_template')
_NOT_RECORDS = ('field',)
_KINDS = {'text': prepare_text.Text, 'prompts': prepare_prompts.Prompts}


def prepare(
  config: ConfigDict, directory: str | os.PathLike, report: Report = print
) -> manifest.Manifest:
  """Prepares the rows that `config.data` asks for, unless they are there.

  Every request has a folder of its own in `directory`, named by its hash, so
  that several live side by side.

  Args:
    config: a whole configuration; only its section `data` and the kind of
      rows that its stage trains on matter.
    directory: local folder, made where missing.
    report: is given each line that a user may want to see.

  Returns:
    The manifest; its `directory` is what a Loader takes.

  Raises:
    UserError: a mistake in source or configuration, or a full or read-only
      disk. Nothing half-written is left.
  """
  data, rows = config.data, stage.rows_of(config)
  directory = pathlib.Path(directory)
  _check(data, rows)
  asked, kept = _asked(data, rows), None
  try:
    kept = _kept(data, asked)
    request = _request(data, kept)
  except UserError:
    found = _without_source(data.source, asked, kept, directory)
    if found is None:
      raise
    report(
      f'data: {data.source} is not there; using the rows prepared from it in '
      f'{found.directory}'
    )
    return found
  folder = directory / manifest.digest(request)[:12]
  if _is_ready(folder):
    return _reuse(folder, report)
  with _writing(directory, folder):
    # Another process may have been faster.
    if _is_ready(folder):
      return _reuse(folder, report)
    if folder.exists():
      report(f'data: {folder} was left unfinished; doing it anew')
      shutil.rmtree(folder)
    try:
      folder.mkdir(parents=True)
      kind = _KINDS.get(rows, prepare_records.Records)
      return kind(data, folder, request, asked, report).run()
    except BaseException:
      shutil.rmtree(folder, ignore_errors=True)
      raise


def _check(data: ConfigDict, rows: str) -> None:
  packing.check(data.packing, rows)
  if not data.heldout_source:
    heldout.check(data.heldout_share, data.heldout_by)
  if not 0 <= data.max_bad_share < 1:
    raise UserError(
      f'data.max_bad_share={data.max_bad_share}: must be at least 0 and below 1'
    )
  for source in (data.source, data.heldout_source):
    if rows != 'text' and source.startswith('seqio:'):
      raise UserError(
        f'{source}: seqio gives text, and the stage trains on rows of {rows}; '
        'name a file of records, tfds:NAME or hf:NAME'
      )


def _asked(data: ConfigDict, rows: str) -> dict[str, Any]:
  """The keys of `data` that decide the rows."""
  left_out = _NOT_TEXT if rows == 'text' else _NOT_RECORDS
  kept = {k: v for k, v in data.items() if k not in ('dir', *left_out)}
  if rows == 'prompts':
    kept['packing'] = 'none'  # whatever it says, each has a row of its own
  return kept if rows == 'text' else kept | {'rows': rows}


def _kept(data: ConfigDict, asked: dict[str, Any]) -> dict[str, Any]:
  """What is asked, but for the sources, by content where that is quick."""
  kept = {k: v for k, v in asked.items() if not k.endswith('source')}
  if data.tokenizer != 'bpe':
    kept['vocab_size'] = 0
  if data.tokenizer not in tokenizer_lib.KINDS:
    kept['tokenizer'] = tokenizer_lib.load(data.tokenizer).digest
  if 'rows' in asked:
    kept['chat_template'] = prepare_records.template(data).digest
    kind = _KINDS.get(asked['rows'], prepare_records.Records)
    kept['rows_format'] = kind.format
  return kept


def _request(data: ConfigDict, kept: dict[str, Any]) -> dict[str, Any]:
  """All that decides the rows and can be known without reading the text."""
  field = '' if 'rows' in kept else data.field
  return {
    'format': manifest.FORMAT,
    'data': kept,
    'sources': _stats(data.source, field),
    'heldout_sources': data.heldout_source
    and _stats(data.heldout_source, field),
  }


def _stats(source: str, field: str) -> list[dict[str, Any]]:
  # Datasets known by name are taken to keep what they hold: to ask them
  # would import TensorFlow.
  if source.startswith('tfds:world'):
    from tpu_lm.data import world

    return [{'name': source, 'version': world.version()}]
  if source.partition(':')[0] in _NAMED:
    return [{'name': source}]
  return sources.open(source, field).stats()


def _without_source(
  source: str,
  asked: dict[str, Any],
  kept: dict[str, Any] | None,
  directory: pathlib.Path,
) -> manifest.Manifest | None:
  """Rows once prepared as asked whose source is gone, as on a new machine."""
  if not source or os.path.exists(source):
    return None
  for file in sorted(directory.glob(f'*/{manifest.FILE}')):
    with contextlib.suppress(UserError):
      found = manifest.read(file.parent)
      same = kept in (None, found.content['request']['data'])
      if same and found.content['asked'] == asked:
        return found
  return None


def _is_ready(folder: pathlib.Path) -> bool:
  return (folder / manifest.FILE).is_file()


def _reuse(folder: pathlib.Path, report: Report) -> manifest.Manifest:
  found = manifest.read(folder)
  report(f'data: {found.total("train", "rows"):,} rows are there in {folder}')
  return found


@contextlib.contextmanager
def _writing(directory: pathlib.Path, folder: pathlib.Path) -> Iterator[None]:
  """One process at a time prepares; a disk's refusal is told to the user."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / '.lock').open('a') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      yield
  except OSError as error:
    raise UserError(
      f'{folder}: cannot be written ({error.strerror or error}); free space '
      'there, or choose another folder with --config.data.dir=DIR'
    ) from error
