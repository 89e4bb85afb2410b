"""Every kind of source gives its documents; every mistake is one line."""

import gzip
import hashlib
import json
import pathlib
import random

import pyarrow
import pyarrow.parquet
import pytest

from tpu_lm import tokenizer
from tpu_lm.data import files, sources
from tpu_lm.errors import UserError


def texts(path, field='text', tolerant=False):
  reading = files.Reading(tolerant=tolerant)
  source = sources.open(str(path), field)
  found = [''.join(d.pieces()) for d in source.documents(reading)]
  return found, reading


def refused(path, field='text'):
  with pytest.raises(UserError) as caught:
    texts(path, field)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def write_lines(path, records):
  lines = ''.join(json.dumps(record) + '\n' for record in records)
  path.write_text(lines)


@pytest.mark.parametrize('zipped', [False, True])
def test_every_kind_of_file(tmp_path, zipped):
  records = [{'text': 'ä one', 'id': 1}, {'text': 'two\n', 'id': 2}]
  contents = {
    'a.txt': 'some text\nof two lines',
    'a.md': '# title',
    'a.jsonl': '\n'.join(json.dumps(r) for r in records) + '\n\n',
    'a.json': json.dumps(records, indent=1),
  }
  for name, content in contents.items():
    data = content.encode()
    path = tmp_path / (name + '.gz' * zipped)
    path.write_bytes(gzip.compress(data) if zipped else data)
    wanted = ['ä one', 'two\n'] if 'json' in name else [content]
    assert texts(path)[0] == wanted
  path = tmp_path / 'a.parquet'
  table = pyarrow.table({'text': ['ä one', 'two\n'], 'id': [1, 2]})
  pyarrow.parquet.write_table(table, path)
  assert texts(path)[0] == ['ä one', 'two\n']


def test_whole_records_of_every_kind_of_file(tmp_path):
  records = [{'a': 'ä', 'b': [{'c': 1}]}, {'a': 'é', 'b': []}]
  write_lines(tmp_path / 'a.jsonl', records)
  (tmp_path / 'b.json').write_text(json.dumps(records))
  table = pyarrow.Table.from_pylist(records)
  pyarrow.parquet.write_table(table, tmp_path / 'c.parquet')
  reading = files.Reading()
  found = list(sources.open(str(tmp_path), '').records(reading))
  assert [record for _, record in found] == records * 3
  assert [origin.split('/')[-1] for origin, _ in found] == [
    'a.jsonl:1', 'a.jsonl:2', 'b.json: record 1', 'b.json: record 2',
    'c.parquet: row 1', 'c.parquet: row 2',
  ]  # fmt: skip
  assert reading.records == 6
  (tmp_path / 'd.md').write_text('text')
  with pytest.raises(UserError, match=r'd\.md: is text, where records'):
    list(sources.open(str(tmp_path), '').records(files.Reading()))


def test_folder_and_glob(tmp_path):
  (tmp_path / 'deep').mkdir()
  (tmp_path / 'b.txt').write_text('b')
  (tmp_path / 'deep' / 'a.txt').write_text('deep a')
  (tmp_path / '.hidden.txt').write_text('hidden')
  (tmp_path / 'a.md').write_text('a')
  (tmp_path / 'image.png').write_bytes(b'\x89')
  source = sources.open(str(tmp_path), 'text')
  assert texts(tmp_path)[0] == ['a', 'b', 'deep a']
  assert [name.split('/')[-1] for name in source.unknown] == ['image.png']
  assert texts(tmp_path / '*.txt')[0] == ['b']
  assert texts(tmp_path / '**' / '*.txt')[0] == ['b', 'deep a']


def test_marks_and_line_ends_are_counted(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes(b'\xef\xbb\xbfone\r\ntwo\rthree\r\n')
  found, reading = texts(path)
  assert found == ['one\ntwo\rthree\n']
  assert sum(reading.crlf.values()) == 2
  assert len(reading.bom) == 1
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\xef\xbb\xbf{"text": "\\ufeffone\\r\\ntwo"}\n')
  found, reading = texts(path)
  assert found == ['one\ntwo']
  assert sum(reading.crlf.values()) == 1


def test_long_text_is_read_in_pieces(tmp_path, monkeypatch):
  rng = random.Random(0)
  words = ['é', 'the', 'end.', "it's", '12', '(a)', '漢字']
  text = ''.join(rng.choice(words) + rng.choice('   \n') for _ in range(9000))
  text += 'x' * 3000 + ' \n\n  y\n'
  path = tmp_path / 'a.txt'
  path.write_bytes(text.replace('\n', '\r\n').encode())
  whole = text
  for size in (64, 1000, 4096):
    monkeypatch.setattr(files, 'PIECE', size)
    source = sources.open(str(path), 'text')
    (document,) = source.documents(files.Reading())
    pieces = list(document.pieces())
    assert ''.join(pieces) == whole
    assert all(0 < len(piece) <= size for piece in pieces)
    assert list(document.pieces()) == pieces
    if size > 3000:  # else the run of x is cut within
      own = tokenizer.train([whole], 'bpe', 400)
      split = [i for piece in pieces for i in own.encode(piece)]
      assert split == own.encode(whole)


def test_fingerprint_is_of_the_file(tmp_path):
  table = pyarrow.table({'text': ['one']})
  pyarrow.parquet.write_table(table, tmp_path / 'c.parquet')
  (tmp_path / 'a.txt').write_text('some text')
  (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(b'{"text": "b"}'))
  source = sources.open(str(tmp_path), 'text')
  for document in source.documents(files.Reading()):
    list(document.pieces())
  for described in source.fingerprints():
    data = pathlib.Path(described['path']).read_bytes()
    assert described['sha256'] == hashlib.sha256(data).hexdigest()
    assert described['size'] == len(data)


def test_broken_line(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "one"}\n{"text": "two"\n{"text": "three"}\n')
  message = refused(path)
  assert message.startswith(f'{path}:2: not a JSON object')
  assert 'max_bad_share' in message
  found, reading = texts(path, tolerant=True)
  assert found == ['one', 'three']
  assert (reading.records, reading.num_bad) == (3, 1)
  assert reading.bad == [message]


def test_missing_field_names_the_nearest(tmp_path):
  path = tmp_path / 'a.jsonl'
  write_lines(path, [{'text': 'a'}, {'body': 'b', 'texts': 'c'}])
  message = refused(path)
  assert message.startswith(f"{path}:2: has no field 'text'")
  assert "did you mean 'texts'" in message
  assert '--config.data.field=' in message
  path = tmp_path / 'a.parquet'
  pyarrow.parquet.write_table(pyarrow.table({'content': ['x']}), path)
  message = refused(path, 'contents')
  assert "no column 'contents' (did you mean 'content'?)" in message


@pytest.mark.parametrize(
  ('record', 'what'),
  [
    ('{"text": 3}', "field 'text' holds 3 (int), not text"),
    ('{"text": null}', "field 'text' holds null, not text"),
    ('["text"]', 'a record must be a JSON object, not list'),
    ('{"text": "\\ud800"}', "field 'text' is no valid text"),
    ('[' * 100_000, 'not a JSON object'),
  ],
)
def test_bad_records(tmp_path, record, what):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "one"}\n' + record)
  assert refused(path).startswith(f'{path}:2: {what}')
  assert texts(path, tolerant=True)[0] == ['one']


def test_bad_list(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text('[\n{"text": "a"},\n{"text": }]')
  assert refused(path).startswith(f'{path}:3: not JSON (')
  path.write_text('{"text": "a"}\n{"text": "b"}')
  assert 'name the file .jsonl' in refused(path)
  path.write_text('{"text": "a"}')
  assert 'must hold a list of objects' in refused(path)
  path.write_text('[{"text": "a"}, 3]')
  assert refused(path).startswith(f'{path}: record 2: ')


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.json'])
def test_wrong_encoding(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b'\n\n' + b'{"text": "caf\xe9"}\n')
  message = refused(path)
  assert message.startswith(f'{path}:3: byte 0xe9 is not UTF-8')
  assert 'iconv -f latin1 -t utf-8' in message


def test_wrong_encoding_far_into_a_file(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'PIECE', 100)
  path = tmp_path / 'a.txt'
  path.write_bytes(b'caf\xc3\xa9 ol\xc3\xa9\r\n' * 499 + b'bad \xff')
  assert refused(path).startswith(f'{path}:500: byte 0xff')
  path.write_bytes('text'.encode('utf-16'))
  assert 'iconv -f utf-16' in refused(path)
  path.write_bytes(b'cut off: \xc3')
  assert refused(path).startswith(f'{path}:1: byte 0xc3')


def test_damaged_files(tmp_path):
  data = gzip.compress(random.Random(0).randbytes(5000).hex().encode())
  path = tmp_path / 'a.txt.gz'
  for damaged in (
    data[:3000],
    data[:-4],
    b'plain text',
    data[:1000] + b'x' * 9,
  ):
    path.write_bytes(damaged)
    assert refused(path).startswith(f'{path}: not a whole gzip file')
  path = tmp_path / 'a.parquet'
  for damaged in (b'', b'PAR1 no PAR1'):
    path.write_bytes(damaged)
    assert refused(path).startswith(f'{path}: not a whole Parquet file')


def test_what_is_not_there(tmp_path):
  (tmp_path / 'shakespeare.txt').write_text('a')
  message = refused(tmp_path / 'shakespear.txt')
  assert "no such file or folder (did you mean 'shakespeare.txt'?)" in message
  assert 'nor is there a folder' in refused(tmp_path / 'a' / 'b.txt')
  (tmp_path / 'empty').mkdir()
  assert 'empty: is empty; known are .txt' in refused(tmp_path / 'empty')
  assert 'nosuch*.txt: no file matches' in refused(tmp_path / 'nosuch*.txt')
  (tmp_path / 'a.pdf').write_text('a')
  assert 'unknown kind of file' in refused(tmp_path / 'a.pdf')
  assert 'none of its 1 files is of a known kind' in refused(tmp_path / '*.pdf')
  assert 'data.source: is empty' in refused('')
