"""Records are read, divided, guarded and told of; every mistake is one line."""

import os
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from record_cases import (
  END,
  answer,
  apart,
  assert_row,
  column,
  made_up,
  prepared,
  refused,
  row_of,
  segments_in,
  turn,
  write,
)

from tpu_lm import config as config_lib
from tpu_lm.data import loader, manifest, packing, prepare, record_rows
from tpu_lm.data import preparation as preparation_lib
from tpu_lm.data import prepare_records as records_lib
from tpu_lm.errors import UserError


@pytest.mark.parametrize('rows', record_rows.PREFIXES)
def test_order_of_records_and_files_changes_nothing(tmp_path, rows):
  found = made_up(rows, 60)
  one = write(tmp_path / 'a.jsonl', found)
  (tmp_path / 'two').mkdir()
  write(tmp_path / 'two' / 'b.jsonl', found[30:][::-1])
  write(tmp_path / 'two' / 'a.jsonl', found[:30][::-1])
  data = {'tokenizer': 'bpe', 'vocab_size': 300, 'length': 200}
  first, _ = prepared(one, tmp_path / 'x', rows, **data)
  again, _ = prepared(one, tmp_path / 'y', rows, **data)
  other, _ = prepared(tmp_path / 'two', tmp_path / 'x', rows, **data)
  assert first.fingerprint == again.fingerprint == other.fingerprint
  assert first.directory != other.directory
  for split in manifest.SPLITS:
    for name in first.splits(split)[0].shards[0].files:
      np.testing.assert_array_equal(
        column(first, split, name), column(other, split, name)
      )


def questions(made, split):
  prefix = record_rows.PREFIXES[made.rows][0]
  found = set()
  for ids, _, _, _ in segments_in(made, split, prefix):
    found.add(tuple(ids[: ids.index(END)]))
  return found


def test_a_question_is_on_one_side_in_every_stage(tmp_path):
  data = {'heldout_share': 0.3, 'length': 100}
  held = []
  for rows in record_rows.PREFIXES:
    found = made_up(rows, 90)
    for number, record in enumerate(found):
      record['prompt'] = f'q{number % 45}'  # each twice
    path = write(tmp_path / f'{rows}.jsonl', found)
    made, _ = prepared(path, tmp_path / 'data', rows, **data)
    train, heldout = (questions(made, split) for split in manifest.SPLITS)
    assert not train & heldout
    assert len(train | heldout) == 45
    held.append(heldout)
  assert held[0] == held[1] == held[2] == held[3]
  assert 5 < len(held[0]) < 25


def test_tail_holds_out_the_last_records(tmp_path):
  found = [{'prompt': f'{i:02}', 'completion': 'a'} for i in range(21)]
  made, _ = prepared(
    write(tmp_path / 'a.jsonl', found), tmp_path / 'data', heldout_by='tail'
  )
  wanted = {tuple(turn('user', f'{i:02}')[:-2]) for i in (18, 19, 20)}
  assert questions(made, 'heldout') == wanted


def test_what_is_too_long(tmp_path):
  # The header and one letter take 21 tokens and the answer's begins at 20.
  fits = [{'prompt': 'p' * i, 'completion': 'word ' * 40} for i in range(1, 45)]
  made, lines = apart(tmp_path, fits)
  assert made.content['counts']['records_cut'] == 44
  assert '  44 records longer than a row, their ends cut' in lines
  assert made.total('train', 'documents_chunked') == 44
  longest = answer('p' * 44, 'word')[0]
  assert sum(longest[:64] == ids for ids, *_ in segments_in(made, 'train', ''))
  # One letter more and the prompt alone takes the 64 tokens.
  too_long = {'prompt': 'p' * 45, 'completion': 'word'}
  path = write(tmp_path / 'b.jsonl', [*fits[:20], too_long, *fits[20:]])
  message = refused(path, tmp_path / 'data2')
  assert message.startswith(
    f'{path}:21: its prompt of 64 tokens leaves no target within data.length=64'
  )
  made, lines = prepared(path, tmp_path / 'data2', max_bad_share=0.05)
  assert made.content['counts']['bad_skipped'] == 1
  assert made.content['counts']['documents'] == 44
  told = '\n'.join(lines)
  assert f'1 bad records skipped, the first: {path}:21: its prompt' in told


def test_pairs_that_differ_beyond_the_row(tmp_path):
  same = 'word ' * 40
  found = [{'prompt': '1', 'chosen': f'{same}a', 'rejected': f'{same}b'}]
  path = write(tmp_path / 'a.jsonl', [*made_up('pairs', 20), *found])
  message = refused(path, tmp_path / 'data', 'pairs')
  assert f"{path}:21: 'chosen' and 'rejected' are the same within" in message


def test_bad_records_are_named_counted_and_limited(tmp_path):
  good = made_up('chat', 30)
  bad = [
    {'messages': []},
    {'messages': [{'content': 'no role'}]},
    {'messages': [{'role': 'user', 'content': 'unanswered'}]},
    {'prompt': 'a', 'completion': '\ud800'},
    'no object',
  ]
  data = tmp_path / 'data'
  for number, record in enumerate(bad):
    path = write(tmp_path / f'{number}.jsonl', [*good[:9], record, *good[9:]])
    assert refused(path, data).startswith(f'{path}:10: ')
  path = write(tmp_path / 'all.jsonl', [*bad, *good])
  message = refused(path, data, max_bad_share=0.1)
  assert '5 of 35 records are bad, above data.max_bad_share=0.1' in message
  assert f'the first: {path}:1: ' in message
  assert message.endswith('--config.data.max_bad_share=0.143')
  made, lines = prepared(path, data, max_bad_share=0.143)
  counts = made.content['counts']
  assert counts['bad_skipped'] == 5
  assert counts['documents'] == 30
  assert f'  5 bad records skipped, the first: {path}:1: ' in '\n'.join(lines)
  assert len(made.content['bad_records']) == 3


def test_records_of_another_kind_are_refused(tmp_path):
  data = tmp_path / 'data'
  pairs = write(tmp_path / 'pairs.jsonl', made_up('pairs', 20))
  chats = write(tmp_path / 'chats.jsonl', made_up('chat', 20))
  message = refused(pairs, data)
  assert message.startswith(f'{pairs}:1: these are pairs')
  assert 'stage_name=dpo' in message
  assert 'stage_name=sft' in refused(chats, data, 'pairs')
  assert '20 of 20 records are bad' in refused(pairs, data, max_bad_share=0.5)
  same = {'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}
  path = write(tmp_path / 'same.jsonl', [same])
  assert f'{path}:1: ' in refused(path, data, 'pairs')
  story = tmp_path / 'story.txt'
  story.write_text('once upon a time')
  message = refused(story, data)
  assert message.startswith(f'{story}: is text, where records')
  message = refused('seqio:some_task', data)
  assert message.startswith('seqio:some_task: seqio gives text')


def test_what_else_can_be_wrong(tmp_path):
  data = tmp_path / 'data'
  path = write(tmp_path / 'a.jsonl', made_up('chat', 20))
  message = refused(path, data, packing='concat')
  assert 'data.packing=concat: not for rows of chat' in message
  assert 'best_fit, none' in message
  empty = write(tmp_path / 'empty.jsonl', [])
  assert 'holds no records' in refused(empty, data)
  assert 'holds no records' in refused(path, data, heldout_source=str(empty))
  one = write(tmp_path / 'one.jsonl', made_up('chat', 1))
  assert 'no held-out rows' in refused(one, data)
  config = config_lib.base()
  config.data.source, config.data.packing = str(path), 'none'
  with pytest.raises(UserError, match='packing=none: not for rows of text'):
    prepare.prepare(config, data)


def test_the_template_decides_the_rows(tmp_path):
  path = write(tmp_path / 'a.jsonl', made_up('chat', 30))
  made, _ = prepared(path, tmp_path / 'data')
  template = tmp_path / 'mine.jinja'
  template.write_text(
    (made.directory / 'chat_template.jinja').read_text() + '{# mine #}'
  )
  mine = {'chat_template': str(template)}
  other, _ = prepared(path, tmp_path / 'data', **mine)
  assert other.fingerprint != made.fingerprint
  assert other.directory != made.directory
  template.write_text(template.read_text() + '{# again #}')
  third, _ = prepared(path, tmp_path / 'data', **mine)
  assert len({m.fingerprint for m in (made, other, third)}) == 3
  again, lines = prepared(path, tmp_path / 'data', **mine)
  assert again.content == third.content
  assert len(lines) == 1
  path.unlink()  # the rows are enough once the records are gone
  assert prepared(path, tmp_path / 'data', **mine)[0].directory == (
    third.directory
  )


def test_the_tokenizer_is_trained_on_what_is_trained(tmp_path, monkeypatch):
  path = write(tmp_path / 'a.jsonl', made_up('pairs', 60))
  seen = []
  sample = preparation_lib.tokenizer_lib.Sample
  monkeypatch.setattr(
    sample, 'add', lambda self, text, add=sample.add: (
      seen.append(text), add(self, text)
    )
  )  # fmt: skip
  made, _ = prepared(
    path, tmp_path / 'data', 'pairs', tokenizer='bpe', length=200
  )
  own = made.tokenizer()
  for split in manifest.SPLITS:
    for ids, mask, _, _ in segments_in(made, split, 'chosen_'):
      said = own.decode(
        i for i, m in zip(ids, mask, strict=True) if m and i != END
      )
      assert (said in seen) == (split == 'train') or len(said) < 4
  assert len(seen) == 3 * made.total('train', 'documents')


def test_line_ends_are_those_of_text(tmp_path):
  found = [{'prompt': 'a\r\nb', 'completion': 'c\r\nd\re'}]
  made, lines = apart(tmp_path, found)
  assert_row(made, '', 0, row_of([(0, answer('a\nb', 'c\nd\re'))]))
  assert '  2 line ends changed from CR LF to LF' in lines


def test_large_splits_have_several_shards(tmp_path, monkeypatch):
  path = write(tmp_path / 'a.jsonl', made_up('rated', 60))
  whole, _ = prepared(path, tmp_path / 'x', 'rated')
  monkeypatch.setattr(preparation_lib, 'SHARD_BYTES', 1500)
  monkeypatch.setattr(packing, 'BLOCK', 200)
  monkeypatch.setattr(records_lib, '_BATCH', 300)
  parts, _ = prepared(path, tmp_path / 'y', 'rated')
  assert len(parts.splits('train')[0].shards) > 3
  for name in whole.splits('train')[0].shards[0].files:
    np.testing.assert_array_equal(
      column(whole, 'train', name), column(parts, 'train', name)
    )
  assert not list(parts.directory.glob('*.tmp'))


def test_every_column_is_guarded(tmp_path):
  path = write(tmp_path / 'a.jsonl', made_up('pairs', 40))
  made, _ = prepared(path, tmp_path / 'data', 'pairs')
  assert manifest.read(made.directory).fingerprint == made.fingerprint
  for name in ('margins', 'rejected_loss_mask', 'chosen_segment_ids'):
    shard = made.directory / f'train-00000.{name}.npy'
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=rf'{name}.npy: damaged'):
      manifest.check(made, contents=True)
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf'{name}.npy: has \d+ bytes'):
      loader.Loader(made.directory, 'train', 4, 0, 260)
    shard.write_bytes(whole)
  file = made.directory / manifest.FILE
  content = file.read_text()
  file.write_text(content.replace('"rows": "pairs"', '"rows": "rated"'))
  with pytest.raises(UserError, match='does not fit its own fingerprint'):
    manifest.read(made.directory)


def test_parquet_gives_whole_records(tmp_path):
  found = made_up('pairs', 30)
  columns = {name: [r[name] for r in found] for name in found[0]}
  pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / 'a.parquet')
  made, _ = prepared(tmp_path / 'a.parquet', tmp_path / 'x', 'pairs')
  path = write(tmp_path / 'a.jsonl', found)
  assert (
    made.fingerprint == prepared(path, tmp_path / 'x', 'pairs')[0].fingerprint
  )


WORLD = """
import sys
from tpu_lm import config
from tpu_lm.data import prepare
for stage, kind in (('sft', 'chat'), ('dpo', 'preference')):
  c = config.base()
  c.stage_name, c.data.source = stage, f'tfds:world/{kind}@train[:40]'
  c.data.tokenizer, c.data.length = 'byte', 512
  made = prepare.prepare(c, sys.argv[1], lambda line: None)
  print(made.rows, made.content['counts']['documents'])
print('tensorflow' in sys.modules)
"""


def test_the_world_by_name(tmp_path):
  """TFDS gives bytes, and lists of messages as JSON."""
  done = subprocess.run(
    [sys.executable, '-c', WORLD, str(tmp_path / 'data')],
    env=os.environ
    | {'TFDS_DATA_DIR': str(tmp_path / 'tfds'), 'NO_GCE_CHECK': 'true'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ['chat', '40', 'pairs', '40', 'False']
