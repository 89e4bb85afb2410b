"""From text to rows: exact, the same every time, and nothing half-written."""

import concurrent.futures
import gzip
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from record_cases import column

from tpu_lm import config as config_lib
from tpu_lm.data import manifest, preparation, prepare, prepare_text
from tpu_lm.errors import UserError


def asked(source, **data):
  config = config_lib.base()
  config.data.source = str(source)
  config.data.tokenizer = 'byte'
  config.data.length = 32
  for key, value in data.items():
    config.data[key] = value
  return config


def prepared(source, directory, **data):
  lines = []
  made = prepare.prepare(asked(source, **data), directory, lines.append)
  return made, lines


def refused(source, directory, **data):
  """The message; nothing but the lock may be left behind."""
  with pytest.raises(UserError) as caught:
    prepare.prepare(asked(source, **data), directory, lambda line: None)
  assert '\n' not in str(caught.value)
  if directory.is_dir():
    assert {path.name for path in directory.iterdir()} <= {'.lock'}
  return str(caught.value)


def write_records(path, texts, field='text'):
  path.write_text(''.join(json.dumps({field: t}) + '\n' for t in texts))
  return path


def texts_of(count, seed=0):
  rng = random.Random(seed)
  words = ['one', 'two', 'é', '<|endoftext|>', '漢字', 'end.\n', '…']
  return [
    f'{i}: ' + ' '.join(rng.choices(words, k=rng.randrange(1, 60)))
    for i in range(count)
  ]


def documents_in(made, split):
  """The texts that a split's rows hold, where none is longer than a row."""
  tokenizer = made.tokenizer()
  found = []
  for row, numbers in zip(
    column(made, split, 'tokens'),
    column(made, split, 'segment_ids'),
    strict=True,
  ):
    for number in range(1, numbers.max() + 1):
      first, *ids, last = row[numbers == number]
      assert first == last == tokenizer.eot_id
      found.append(tokenizer.decode(ids))
  return found


@pytest.mark.parametrize('packing', ['best_fit', 'concat'])
@pytest.mark.parametrize('tokenizer', ['byte', 'bpe'])
def test_no_token_is_lost_or_doubled(tmp_path, packing, tokenizer):
  texts = texts_of(60)
  path = write_records(tmp_path / 'a.jsonl', texts)
  made, _ = prepared(
    path, tmp_path / 'data', packing=packing, tokenizer=tokenizer
  )
  own = made.tokenizer()
  expected = sorted(
    t for text in texts for t in [*own.encode(text), own.eot_id]
  )
  found = []
  for split in manifest.SPLITS:
    tokens = column(made, split, 'tokens')
    segments = column(made, split, 'segment_ids')
    counts = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    found += tokens[:, 1:][counts].tolist()
    assert counts.sum() == made.total(split, 'targets')
  assert sorted(found) == expected
  sizes = sum(made.total(split, 'text_bytes') for split in manifest.SPLITS)
  assert sizes == sum(len(text.encode()) for text in texts)


def test_rows_hold_the_documents_whole(tmp_path):
  texts = texts_of(60)
  path = write_records(tmp_path / 'a.jsonl', texts)
  made, _ = prepared(path, tmp_path / 'data', length=2000)
  found = [t for s in manifest.SPLITS for t in documents_in(made, s)]
  assert sorted(found) == sorted(texts)


def test_order_of_records_and_files_changes_nothing(tmp_path):
  texts = texts_of(80)
  one = write_records(tmp_path / 'a.jsonl', texts)
  (tmp_path / 'two').mkdir()
  write_records(tmp_path / 'two' / 'b.jsonl', texts[40:][::-1])
  write_records(tmp_path / 'two' / 'a.jsonl', texts[:40][::-1])
  for data in ({'tokenizer': 'bpe', 'vocab_size': 300}, {'packing': 'concat'}):
    first, _ = prepared(one, tmp_path / 'x', **data)
    again, _ = prepared(one, tmp_path / 'y', **data)
    other, _ = prepared(tmp_path / 'two', tmp_path / 'x', **data)
    assert first.fingerprint == again.fingerprint == other.fingerprint
    assert first.directory != other.directory
    for split in manifest.SPLITS:
      for name in ('tokens', 'segment_ids'):
        np.testing.assert_array_equal(
          column(first, split, name), column(other, split, name)
        )


def test_rows_of_text_stay_what_they_were(tmp_path):
  """Else manifest.FORMAT must be raised: what was prepared is prepared anew."""
  path = write_records(tmp_path / 'a.jsonl', texts_of(40))
  made, _ = prepared(path, tmp_path / 'data')
  shard = made.splits('train')[0].shards[0]
  assert {name: file['sha256'][:16] for name, file in shard.files.items()} == {
    'tokens': '51adc27a63ba8105',
    'segment_ids': '3d76824b6b7052b5',
  }
  assert made.rows == 'text'
  assert {'rows', 'chat_template'}.isdisjoint(made.content['asked'])


def test_fingerprint_tells_what_differs(tmp_path):
  path = write_records(tmp_path / 'a.jsonl', texts_of(80))
  variants = [{}, {'length': 40}, {'packing': 'concat'}, {'heldout_share': 0.3}]
  variants += [{'tokenizer': 'bpe', 'vocab_size': size} for size in (270, 280)]
  found = {
    prepared(path, tmp_path / 'x', **data)[0].fingerprint for data in variants
  }
  assert len(found) == len(variants)


def test_tail_of_a_text_file_is_exact(tmp_path):
  text = ''.join(random.Random(0).choices('abc é\n', k=10_007))
  path = tmp_path / 'a.txt.gz'
  path.write_bytes(gzip.compress(text.encode()))
  made, _ = prepared(path, tmp_path / 'data', length=20_000)
  assert documents_in(made, 'train') == [text[:9006]]
  assert documents_in(made, 'heldout') == [text[9006:]]


def test_tail_of_records_is_the_last_of_them(tmp_path):
  texts = texts_of(21)
  path = write_records(tmp_path / 'a.jsonl', texts)
  made, _ = prepared(path, tmp_path / 'data', length=2000, heldout_by='tail')
  assert sorted(documents_in(made, 'heldout')) == sorted(texts[18:])


def test_documents_stay_on_their_side(tmp_path):
  texts = texts_of(300)
  path = write_records(tmp_path / 'a.jsonl', texts + texts[:100])
  data = {'length': 2000, 'heldout_share': 0.3}
  made, _ = prepared(path, tmp_path / 'data', **data)
  train, held = (set(documents_in(made, s)) for s in manifest.SPLITS)
  assert train | held == set(texts)
  assert not train & held
  assert 60 < len(held) < 120
  path = write_records(tmp_path / 'b.jsonl', texts[::2])
  fewer, _ = prepared(path, tmp_path / 'data', **data)
  assert set(documents_in(fewer, 'heldout')) == held & set(texts[::2])


@pytest.mark.parametrize('share', [0.001, 0.999])
def test_few_documents_are_divided_all_the_same(tmp_path, share):
  path = write_records(tmp_path / 'a.jsonl', texts_of(3))
  made, _ = prepared(path, tmp_path / 'data', heldout_share=share)
  one, two = ('heldout', 'train') if share < 0.5 else ('train', 'heldout')
  assert made.total(one, 'documents') == 1
  assert made.total(two, 'documents') == 2


def test_heldout_source_of_its_own(tmp_path):
  path = write_records(tmp_path / 'a.jsonl', ['to train on', 'this too'])
  (tmp_path / 'b.txt').write_text('held out')
  made, _ = prepared(
    path, tmp_path / 'data', heldout_source=str(tmp_path / 'b.txt')
  )
  assert documents_in(made, 'heldout') == ['held out']
  assert sorted(documents_in(made, 'train')) == ['this too', 'to train on']


def test_second_time_nothing_is_read(tmp_path):
  path = tmp_path / 'a.jsonl'
  write_records(path, texts_of(50))
  made, _ = prepared(path, tmp_path / 'data')
  before = sorted(p.stat().st_mtime_ns for p in made.directory.iterdir())
  again, lines = prepared(path, tmp_path / 'data')
  assert again.content == made.content
  assert len(lines) == 1
  assert before == sorted(
    p.stat().st_mtime_ns for p in made.directory.iterdir()
  )
  write_records(path, texts_of(51))
  other, _ = prepared(path, tmp_path / 'data')
  assert other.fingerprint != made.fingerprint
  # The shards are enough once the text is gone.
  path.unlink()
  assert prepared(path, tmp_path / 'data')[0].fingerprint in (
    made.fingerprint,
    other.fingerprint,
  )


def test_unfinished_folder_is_done_anew(tmp_path):
  path = write_records(tmp_path / 'a.jsonl', texts_of(50))
  made, _ = prepared(path, tmp_path / 'data')
  (made.directory / manifest.FILE).unlink()
  (made.directory / 'train-00007.tokens.npy').write_bytes(b'left over')
  again, _ = prepared(path, tmp_path / 'data')
  assert again.fingerprint == made.fingerprint
  assert not (again.directory / 'train-00007.tokens.npy').exists()


def test_large_splits_have_several_shards(tmp_path, monkeypatch):
  path = write_records(tmp_path / 'a.jsonl', texts_of(50))
  whole, _ = prepared(path, tmp_path / 'x')
  monkeypatch.setattr(preparation, 'SHARD_BYTES', 1000)
  parts, _ = prepared(path, tmp_path / 'y')
  assert len(parts.splits('train')[0].shards) > 3
  np.testing.assert_array_equal(
    column(whole, 'train', 'tokens'), column(parts, 'train', 'tokens')
  )
  assert not list(parts.directory.glob('*.tmp'))


def test_small_batches_give_the_same(tmp_path, monkeypatch):
  text = '\n'.join(texts_of(300))
  (tmp_path / 'a.txt').write_text(text)
  data = {'tokenizer': 'bpe', 'vocab_size': 300, 'length': 20_000}
  whole, _ = prepared(tmp_path / 'a.txt', tmp_path / 'x', **data)
  monkeypatch.setattr(prepare_text.files, 'PIECE', 500)
  monkeypatch.setattr(prepare_text, '_BATCH', 900)
  parts, _ = prepared(tmp_path / 'a.txt', tmp_path / 'y', **data)
  np.testing.assert_array_equal(
    column(whole, 'train', 'tokens'), column(parts, 'train', 'tokens')
  )


def test_what_is_skipped_is_told(tmp_path):
  texts = [*texts_of(50), '', ' \n']
  write_records(tmp_path / 'a.jsonl', texts)
  with (tmp_path / 'a.jsonl').open('a') as file:
    file.write('{"text": \n')
  (tmp_path / 'b.txt').write_bytes(b'\xef\xbb\xbfa line\r\nanother\r\n' * 9)
  (tmp_path / 'c.pdf').write_text('')
  made, lines = prepared(tmp_path, tmp_path / '.data', max_bad_share=0.1)
  counts = made.content['counts']
  assert counts == {
    'documents': 51,
    'empty_skipped': 2,
    'bad_skipped': 1,
    'line_ends_changed': 18,
    'byte_order_marks': 1,
  }
  told = '\n'.join(lines)
  assert '2 empty documents skipped' in told
  assert f'1 bad records skipped, the first: {tmp_path}/a.jsonl:53: ' in told
  assert '18 line ends changed' in told
  assert '1 files of unknown kinds left out: c.pdf' in told


def test_bad_input_leaves_nothing_behind(tmp_path):
  data = tmp_path / 'data'
  path = write_records(tmp_path / 'a.jsonl', texts_of(9))
  assert 'data.heldout_by=head' in refused(path, data, heldout_by='head')
  assert 'data.heldout_share=1.0' in refused(path, data, heldout_share=1.0)
  assert 'data.packing=best' in refused(path, data, packing='best')
  assert 'no such tokenizer' in refused(path, data, tokenizer='/no/such.json')
  assert "no field 'txt'" in refused(path, data, field='txt')
  with path.open('a') as file:
    file.write('{"text": 3}\n{"text": 4}\n')
  assert f'{path}:10: ' in refused(path, data)
  message = refused(path, data, max_bad_share=0.1)
  assert '2 of 11 records are bad' in message
  assert f'{path}:10: ' in message
  empty = tmp_path / 'empty.txt'
  for content in ('', ' \n\n'):
    empty.write_text(content)
    assert 'holds no text' in refused(empty, data)
  one = write_records(tmp_path / 'one.jsonl', ['a single document'])
  assert 'no held-out rows' in refused(one, data)
  assert 'heldout_source' in refused(one, data)
  (tmp_path / 'short.txt').write_text('a')
  assert 'no rows to train on' in refused(tmp_path / 'short.txt', data)
  assert 'holds no text' in refused(
    path, data, max_bad_share=0.5, heldout_source=str(empty)
  )
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot be written .*data\.dir'):
    prepare.prepare(asked(one), tmp_path / 'file')


def test_full_disk_leaves_nothing_behind(tmp_path):
  """A limit on the size of files stands in for the disk's end."""
  write_records(tmp_path / 'a.jsonl', texts_of(3000))
  code = f"""
import resource
from tpu_lm import config
from tpu_lm.data import prepare
from tpu_lm.errors import UserError
c = config.base()
c.data.source, c.data.tokenizer = {str(tmp_path / 'a.jsonl')!r}, 'byte'
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
  prepare.prepare(c, {str(tmp_path / 'data')!r})
except UserError as error:
  print(error)
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert 'cannot be written (File too large); free space' in done.stdout
  assert os.listdir(tmp_path / 'data') == ['.lock']


def test_damage_is_found(tmp_path):
  path = write_records(tmp_path / 'a.jsonl', texts_of(50))
  made, _ = prepared(path, tmp_path / 'data')
  manifest.check(made, contents=True)
  shard = made.directory / 'train-00000.tokens.npy'
  data = bytearray(shard.read_bytes())
  data[-9] ^= 4
  shard.write_bytes(data)
  manifest.check(made)
  with pytest.raises(UserError, match=r'train-00000.tokens.npy: damaged'):
    manifest.check(made, contents=True)
  shard.write_bytes(data[:-1])
  with pytest.raises(UserError, match=r'bytes, not the \d+ written'):
    manifest.check(made)
  shard.unlink()
  with pytest.raises(UserError, match='missing'):
    manifest.check(made)
  file = made.directory / manifest.FILE
  file.write_text(file.read_text().replace('"length": 32', '"length": 33'))
  with pytest.raises(UserError, match='does not fit its own fingerprint'):
    manifest.read(made.directory)
  file.write_text('{')
  with pytest.raises(UserError, match='damaged'):
    manifest.read(made.directory)


def test_two_at_once_do_it_once(tmp_path):
  path = write_records(tmp_path / 'a.jsonl', texts_of(300))
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    runs = [
      pool.submit(prepared, path, tmp_path / 'data', vocab_size=400)
      for _ in range(2)
    ]
  (one, told), (two, told_too) = (run.result() for run in runs)
  assert one.content == two.content
  assert sorted([len(told) == 1, len(told_too) == 1]) == [False, True]
