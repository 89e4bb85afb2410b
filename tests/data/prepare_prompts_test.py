"""Prompts become rows of their own, in step with their records."""

import datetime
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import record_cases
from record_cases import (
  PAD,
  START,
  column,
  prepared,
  refused,
  text,
  turn,
  write,
)

from tpu_lm.data import loader, manifest, preparation, prepare_records
from tpu_lm.data.prompts import Prompts
from tpu_lm.errors import UserError

DATA = pathlib.Path(__file__).parents[2] / '../shared/data/verifiable'
BEGIN = [START, *text('assistant\n')]  # of the answer
USER = {'role': 'user', 'content': 'q'}
GOOD = {'role': 'assistant', 'content': 'good'}
SYSTEM = {'role': 'system', 'content': 's'}
HELD = {'question': 'held', 'answer': '#### 0'}


@pytest.fixture(autouse=True)
def stage(monkeypatch):
  asked = {'stage_name': 'grpo', 'data.rows': 'prompts'}
  monkeypatch.setitem(record_cases.STAGES, 'prompts', asked)


def made_up(count=60):
  """Of the shortest to the longest that fits into 64 tokens, none twice."""
  return [
    {'question': f'{i} ' + 'é' * (i % 15), 'answer': f'#### {i}', 'id': i}
    for i in range(count)
  ]


def apart(tmp_path, found, **data):
  """All of `found` as the training split, one record held out."""
  return prepared(
    write(tmp_path / 'a.jsonl', found),
    tmp_path / 'data',
    'prompts',
    heldout_source=str(write(tmp_path / 'held.jsonl', [HELD])),
    **data,
  )


def asked_by(made, split):
  return [prompt.messages for prompt in Prompts(made.directory, split)]


def test_a_row_and_its_record_by_hand(tmp_path):
  record = {'question': 'é?', 'answer': '1 + 1\n#### 2', 'level': 3}
  made, lines = apart(tmp_path, [record])
  ids = [*turn('user', 'é?'), *BEGIN]
  batch = loader.Loader(made.directory, 'train', 1, 0, 260).batch(0)
  assert batch['tokens'].tolist() == [ids + [PAD] * (65 - len(ids))]
  wanted = [1] * len(ids) + [0] * (65 - len(ids))
  assert batch['segment_ids'].tolist() == [wanted]
  assert batch['positions'][0, : len(ids)].tolist() == list(range(len(ids)))
  assert batch['loss_mask'].dtype == bool
  assert batch['loss_mask'].shape == (1, 65)
  assert not batch['loss_mask'].any()
  (prompt,) = Prompts(made.directory, 'train')
  assert prompt.messages == [{'role': 'user', 'content': 'é?'}]
  assert prompt.tools is None
  assert prompt.record == record
  assert list(prompt.record) == list(record)
  assert made.rows == 'prompts'
  assert made.total('train', 'targets') == 0
  assert made.total('train', 'tokens') == len(ids)
  assert made.total('train', 'text_bytes') == len('user\né?\nassistant\n') + 1
  assert 'train: 1 prompt(s), 0 cut, in 1 rows of 64' in '\n'.join(lines)


def test_a_prompt_is_what_comes_before_the_answer_in_training(tmp_path):
  """System turns, tools and earlier answers included."""
  tools = [{'name': 'add', 'parameters': {'type': 'object'}}]
  call = {'function': {'name': 'add', 'arguments': {'a': 1}}}
  called = {'role': 'assistant', 'content': '', 'tool_calls': [call]}
  tool = {'role': 'tool', 'content': '3'}
  chats = [
    {'messages': [SYSTEM, USER, GOOD], 'tools': tools},
    {'messages': [USER, called, tool, GOOD], 'tools': tools},
    {'messages': [SYSTEM, USER, GOOD, USER, GOOD]},
    {'system': 's', 'prompt': 'q', 'completion': 'good'},
  ]
  for number, chat in enumerate(chats):
    (tmp_path / str(number)).mkdir()
    made, _ = apart(tmp_path / str(number), [chat], length=900)
    ids = column(made, 'train', 'tokens')[0]
    ids = ids[column(made, 'train', 'segment_ids')[0] > 0].tolist()
    held = str(write(tmp_path / 'held.jsonl', [chats[3]]))
    path = tmp_path / str(number) / 'a.jsonl'
    data = {'length': 900, 'heldout_source': held}
    trained, _ = prepared(path, tmp_path / 'chat', 'chat', **data)
    whole = column(trained, 'train', 'tokens')[0]
    mask = column(trained, 'train', 'loss_mask')[0]
    answer = [*text('good'), record_cases.END]
    last = int(np.flatnonzero(mask)[-1]) + 1
    assert whole[:last].tolist() == ids + answer
    (prompt,) = Prompts(made.directory, 'train')
    assert prompt.record == chat
    assert prompt.tools == (tools if number < 2 else None)
    assert prompt.messages[-1]['role'] == ('tool' if number == 1 else 'user')
    shown = made.tokenizer().decode(ids)
    assert ('# Tools' in shown) == (number < 2)


def test_rows_and_records_are_in_step_whatever_the_order(tmp_path, monkeypatch):
  found = made_up()
  found += [{**found[30 + i], 'answer': '', 'id': 60 + i} for i in range(9)]
  one = write(tmp_path / 'a.jsonl', found)
  (tmp_path / 'two').mkdir()
  write(tmp_path / 'two' / 'b.jsonl', found[30:][::-1])
  write(tmp_path / 'two' / 'a.jsonl', found[:30][::-1])
  first, _ = prepared(one, tmp_path / 'x', 'prompts')
  # In many shards, and in batches of a few records.
  monkeypatch.setattr(preparation, 'SHARD_BYTES', 1500)
  monkeypatch.setattr(prepare_records, '_BATCH', 300)
  other, _ = prepared(tmp_path / 'two', tmp_path / 'x', 'prompts')
  assert len(other.splits('train')[0].shards) > 3
  assert other.directory != first.directory
  assert not list(other.directory.glob('*.tmp'))
  seen = []
  for split in manifest.SPLITS:
    prompts = Prompts(first.directory, split)
    tokens = column(first, split, 'tokens')
    assert (tokens == column(other, split, 'tokens')).all()
    assert len(prompts) == len(tokens) == first.total(split, 'rows')
    assert list(prompts) == list(Prompts(other.directory, split))
    for number, row in enumerate(tokens.tolist()):
      record = prompts[number].record
      ids = [*turn('user', record['question']), *BEGIN]
      assert row == ids + [PAD] * (65 - len(ids))
      seen.append(record)
  assert sorted(seen, key=lambda record: record['id']) == found
  assert [record['id'] for record in seen] != list(range(69))
  names = [path.name for path in other.directory.glob('*.records.*')]
  for name in names:
    same = (first.directory / name).read_bytes()
    assert (other.directory / name).read_bytes() == same
  assert len(names) == 4
  again, _ = prepared(one, tmp_path / 'y', 'prompts')
  assert again.directory.name == first.directory.name
  assert again.fingerprint == other.fingerprint  # of as many shards
  assert again.fingerprint != first.fingerprint


def test_every_batch_finds_its_records(tmp_path):
  """Shuffled, begun anywhere, and shared by two processes."""
  path = write(tmp_path / 'a.jsonl', made_up())
  made, _ = prepared(path, tmp_path / 'data', 'prompts')
  prompts = Prompts(made.directory, 'train')
  whole = loader.Loader(made.directory, 'train', 4, 7, 260, verify=True)
  for step in (40, 3):
    numbers = []
    for process in range(2):
      part = loader.Loader(
        made.directory, 'train', 4, 7, 260,
        part=(process, 2),
      )  # fmt: skip
      batch = part.batch(step)['tokens'].tolist()
      for number, row in zip(part.row_numbers(step), batch, strict=True):
        ids = [*turn('user', prompts[number].record['question']), *BEGIN]
        assert row[: len(ids)] == ids
        numbers.append(int(number))
    assert numbers == whole.row_numbers(step).tolist()
  assert len({int(n) for s in range(15) for n in whole.row_numbers(s)}) > 40


def held_out(made):
  train, held = (asked_by(made, split) for split in manifest.SPLITS)
  assert not any(question in train for question in held)
  return {question[-1]['content'] for question in held}


def test_a_question_is_on_one_side_in_every_stage(tmp_path):
  questions = [f'q{i}' for i in range(45)] * 2
  forms = [
    lambda q, n: {'question': q, 'answer': f'#### {n}'},
    lambda q, n: {'prompt': q, 'chosen': f'{n}', 'rejected': 'b'},
    lambda q, n: {'messages': [{**USER, 'content': q}, GOOD], 'tests': [n]},
    lambda q, n: {
      'chosen': [{**USER, 'content': q}, GOOD, USER, GOOD],
      'rejected': [{**USER, 'content': q}, {**GOOD, 'content': f'{n}'}],
    },
  ]
  found = []
  for number, form in enumerate(forms):
    records = [form(q, n) for n, q in enumerate(questions)]
    path = write(tmp_path / f'{number}.jsonl', records)
    data = {'heldout_share': 0.3}
    made, lines = prepared(path, tmp_path / 'data', 'prompts', **data)
    found.append(held_out(made))
    assert '  45 prompts that were there before, kept' in lines
    assert made.content['counts']['prompts_repeated'] == 45
    assert sum(made.total(split, 'rows') for split in manifest.SPLITS) == 90
  assert found[0] == found[1] == found[2] == found[3]
  assert 5 < len(found[0]) < 25
  # As in fine-tuning on the answers.
  path = write(
    tmp_path / 'chat.jsonl',
    [{'prompt': q, 'completion': 'a'} for q in questions],
  )
  made, _ = prepared(path, tmp_path / 'data', 'chat', heldout_share=0.3)
  tokens = column(made, 'heldout', 'tokens')
  segments = column(made, 'heldout', 'segment_ids')
  own = made.tokenizer()
  shown = '\n'.join(
    own.decode(row[held > 0].tolist())
    for row, held in zip(tokens, segments, strict=True)
  )
  assert {q for q in questions if f'user\n{q}\n' in shown} == found[0]


def test_a_prompt_of_length_fits_and_no_longer_one(tmp_path):
  room = 64 - len(turn('user', '')) - len(BEGIN)
  fits = [{'question': f'{i:02}'.ljust(room, 'x')} for i in range(20)]
  made, lines = apart(tmp_path, fits)
  assert (column(made, 'train', 'segment_ids').sum(axis=1) == 64).all()
  assert 'cut' not in ''.join(lines).replace('0 cut', '')
  longer = {'question': 'x' * (room + 1), 'answer': '1'}
  path = write(tmp_path / 'b.jsonl', [*fits[:9], longer, *fits[9:]])
  message = refused(path, tmp_path / 'data2', 'prompts')
  assert message.startswith(
    f'{path}:10: its prompt of 65 tokens is longer than data.length=64; raise'
  )
  made, lines = prepared(
    path, tmp_path / 'data2', 'prompts', max_bad_share=0.05
  )
  assert made.content['counts']['bad_skipped'] == 1
  assert f'  1 bad records skipped, the first: {path}:10: its' in (
    '\n'.join(lines)
  )
  kept = [p for split in manifest.SPLITS for p in asked_by(made, split)]
  assert len(kept) == 20
  assert [{**USER, 'content': longer['question']}] not in kept


BAD = [
  ({'answer': '1', 'id': 3}, 'asks nothing, .*; its fields are answer, id;'),
  ({}, 'asks nothing, .* it is empty'),
  ({'text': 'once'}, 'asks nothing, .*its fields are text'),
  ({'question': None, 'answer': '1'}, 'its fields are answer'),
  ({'question': ' ', 'answer': '1'}, 'turn 1, of the user, is empty'),
  ({'question': 3}, r"'question' holds 3 \(int\), not text or messages"),
  ({'messages': [GOOD]}, "'messages' asks nothing"),
  ({'messages': [SYSTEM]}, "'messages' asks nothing"),
  ({'prompt': [USER, USER]}, 'turn 2 is of the user, but after the user'),
  ({'prompt': [USER, GOOD, SYSTEM, USER]}, 'turn 3 is of the system'),
  ({'prompt': [{'role': 'me', 'content': 'q'}]}, "unknown role 'me'"),
  ({'question': 'q', 'tools': ['add']}, "'tools' holds 'add'"),
  ({'question': '\ud800'}, "'question' is no valid text"),
  ({'question': 'q', 'answer': '\ud800'}, "'answer' holds .* JSON cannot"),
  ('no object', 'must be a JSON object, not str'),
]


@pytest.mark.parametrize(('record', 'line'), BAD)
def test_bad_records_are_named(tmp_path, record, line):
  good = made_up(20)
  path = write(tmp_path / 'a.jsonl', [*good[:9], record, *good[9:]])
  message = refused(path, tmp_path / 'data', 'prompts')
  assert message.startswith(f'{path}:10: ')
  assert re.search(line, message), message
  data = {'max_bad_share': 0.05}
  made, _ = prepared(path, tmp_path / 'data', 'prompts', **data)
  assert made.content['counts']['bad_skipped'] == 1
  assert made.content['counts']['documents'] == 20
  for split in manifest.SPLITS:  # rows and records are still in step
    prompts = Prompts(made.directory, split)
    for row, prompt in zip(column(made, split, 'tokens'), prompts, strict=True):
      ids = [*turn('user', prompt.record['question']), *BEGIN]
      assert row[: len(ids)].tolist() == ids


def test_what_else_can_be_wrong(tmp_path):
  path = write(tmp_path / 'a.jsonl', made_up())
  data = tmp_path / 'data'
  message = refused(path, data, 'prompts', packing='concat')
  assert 'data.packing=concat: not for rows of prompts' in message
  message = refused('seqio:some_task', data, 'prompts')
  assert 'the stage trains on rows of prompts' in message
  empty = write(tmp_path / 'empty.jsonl', [])
  assert 'holds no prompts' in refused(empty, data, 'prompts')
  one = write(tmp_path / 'one.jsonl', [HELD])
  assert 'leaves no held-out rows' in refused(one, data, 'prompts')
  bad = write(tmp_path / 'bad.jsonl', [{'answer': '1'}] * 3)
  message = refused(bad, data, 'prompts', max_bad_share=0.5)
  assert '3 of 3 records are bad' in message


def test_packing_says_nothing(tmp_path):
  path = write(tmp_path / 'a.jsonl', made_up())
  made, _ = prepared(path, tmp_path / 'data', 'prompts', packing='best_fit')
  assert made.content['packing'] == 'none'
  assert made.slots == 1
  assert column(made, 'train', 'segment_ids').max() == 1
  again, lines = prepared(path, tmp_path / 'data', 'prompts', packing='none')
  assert again.directory == made.directory
  assert len(lines) == 1


def test_other_answers_are_other_rows(tmp_path):
  found = made_up()
  first, _ = prepared(
    write(tmp_path / 'a.jsonl', found), tmp_path / 'data', 'prompts'
  )
  for record in found:
    record['answer'] += '0'
  other, _ = prepared(
    write(tmp_path / 'b.jsonl', found), tmp_path / 'data', 'prompts'
  )
  tokens = (column(made, 'train', 'tokens') for made in (first, other))
  np.testing.assert_array_equal(*tokens)
  assert first.fingerprint != other.fingerprint


def test_the_template_decides_the_rows(tmp_path):
  path = write(tmp_path / 'a.jsonl', made_up())
  made, _ = prepared(path, tmp_path / 'data', 'prompts')
  template = tmp_path / 'mine.jinja'
  stored = (made.directory / 'chat_template.jinja').read_text()
  template.write_text(stored.replace("+ '\\n'", "+ ':'"))
  mine = {'chat_template': str(template)}
  other, _ = prepared(path, tmp_path / 'data', 'prompts', **mine)
  assert other.directory != made.directory
  row = column(other, 'train', 'tokens')[0].tolist()
  assert row[: len(text('user:')) + 1] == [START, *text('user:')]
  path.unlink()  # the rows are enough once the records are gone
  again, lines = prepared(path, tmp_path / 'data', 'prompts', **mine)
  assert again.directory == other.directory
  assert 'is not there; using the rows prepared from it' in lines[0]


def test_parquet(tmp_path):
  found = made_up()
  columns = {name: [r[name] for r in found] for name in found[0]}
  table = pyarrow.table(columns)
  pyarrow.parquet.write_table(table, tmp_path / 'a.parquet')
  made, _ = prepared(tmp_path / 'a.parquet', tmp_path / 'data', 'prompts')
  path = write(tmp_path / 'a.jsonl', found)
  same, _ = prepared(path, tmp_path / 'data', 'prompts')
  assert made.fingerprint == same.fingerprint
  dates = [datetime.date(2020, 1, 1)] * len(found)
  table = table.append_column('day', pyarrow.array(dates))
  pyarrow.parquet.write_table(table, tmp_path / 'b.parquet')
  message = refused(tmp_path / 'b.parquet', tmp_path / 'data2', 'prompts')
  assert message.startswith(f"{tmp_path / 'b.parquet'}: row 1: 'day' holds dat")


def test_a_tokenizer_can_be_trained_on_prompts(tmp_path):
  path = write(tmp_path / 'a.jsonl', made_up())
  data = {'tokenizer': 'bpe', 'vocab_size': 300}
  made, _ = prepared(path, tmp_path / 'data', 'prompts', **data)
  assert made.vocab_size > 261
  own, prompts = made.tokenizer(), Prompts(made.directory, 'heldout')
  template = prepare_records.template(
    record_cases.asked(path, 'prompts', tokenizer=str(made.directory)).data
  )
  for row, prompt in zip(
    column(made, 'heldout', 'tokens'), prompts, strict=True
  ):
    ids = template.prompt(prompt.messages)
    assert row[: len(ids)].tolist() == ids
    assert prompt.record['question'] in own.decode(ids)


def test_every_file_is_guarded(tmp_path):
  path = write(tmp_path / 'a.jsonl', made_up())
  made, _ = prepared(path, tmp_path / 'data', 'prompts')
  manifest.check(made, contents=True)
  names = ('train.records.jsonl', 'heldout.records.npy', 'train-00000.tokens')
  for name in names:
    (file,) = made.directory.glob(f'{name}*')
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    with pytest.raises(UserError, match=rf'{file.name}: damaged \(its sha'):
      loader.Loader(made.directory, 'train', 4, 0, 260, verify=True)
    file.write_bytes(whole[:-1])
    for opened in (
      lambda: loader.Loader(made.directory, 'train', 4, 0, 260),
      lambda: Prompts(made.directory, 'train'),
    ):
      with pytest.raises(UserError, match=rf'{file.name}: has \d+ bytes'):
        opened()
    file.unlink()
    with pytest.raises(UserError, match=f'{file.name}: missing; delete'):
      Prompts(made.directory, 'train')
    file.write_bytes(whole)
  file = made.directory / manifest.FILE
  content = json.loads(file.read_text())
  records = content['parts'][0]['splits']['train']['records']
  records['lines']['sha256'] = '0' * 64
  file.write_text(json.dumps(content))
  with pytest.raises(UserError, match='does not fit its own fingerprint'):
    Prompts(made.directory, 'train')


def shared(name):
  if not (DATA / name).is_file():
    pytest.skip(f'needs ../shared/data/verifiable/{name} beside the checkout')
  return DATA / name


@pytest.mark.parametrize(
  ('name', 'rows', 'form', 'field'),
  [
    ('gsm8k_train.jsonl.gz', 7473, 'question', 'answer'),
    ('mawps_addsub.jsonl.gz', 395, 'input', 'target'),
    ('mawps_multiarith.jsonl.gz', 600, 'input', 'target'),
    ('mbpp.shared.jsonl.gz', 474, 'prompt', 'test'),
    ('ifeval_input_data.jsonl.gz', 541, 'prompt', 'kwargs'),
  ],
)
def test_real_records(tmp_path, name, rows, form, field):
  data = {'length': 2500}
  made, _ = prepared(shared(name), tmp_path, 'prompts', **data)
  counts = made.content['counts']
  assert counts['documents'] == rows
  assert counts['forms'] == {form: rows}
  assert sum(made.total(split, 'rows') for split in manifest.SPLITS) == rows
  prompts = Prompts(made.directory, 'heldout')
  assert len(prompts) > rows // 20
  tokens = column(made, 'heldout', 'tokens')
  for number in range(0, len(prompts), 20):
    messages, _, record = prompts[number]
    assert messages == [{'role': 'user', 'content': record[form]}]
    ids = [*turn('user', record[form]), *BEGIN]
    assert tokens[number, : len(ids)].tolist() == ids
    assert (tokens[number, len(ids) :] == PAD).all()
    assert field in record
    if form == 'question':
      float(record[field].split('\n#### ')[1].replace(',', ''))


@pytest.mark.parametrize(
  'name', ['quixbugs_python.jsonl.gz', 'cruxeval.shared.jsonl.gz']
)
def test_real_records_that_ask_nothing(tmp_path, name):
  message = refused(shared(name), tmp_path, 'prompts')
  assert f'{name}:1: asks nothing' in message
  assert 'its fields are ' in message


WORLD = """
import sys
from tpu_lm import config
from tpu_lm.data import prepare, prompts
c = config.base()
c.stage_name, c.data.source = 'grpo', 'tfds:world/problems@train[:40]'
c.data.tokenizer, c.data.length = 'byte', 512
made = prepare.prepare(c, sys.argv[1], lambda line: None)
one = prompts.Prompts(made.directory, 'train')[0]
print(made.rows, made.content['counts']['documents'])
print(*one.record, type(one.record['level']).__name__)
print(one.messages[0]['role'], 'tensorflow' in sys.modules)
"""


def test_the_world_by_name(tmp_path):
  """TFDS gives bytes, numbers of numpy, and messages as JSON."""
  done = subprocess.run(
    [sys.executable, '-c', WORLD, str(tmp_path / 'data')],
    env=os.environ
    | {'TFDS_DATA_DIR': str(tmp_path / 'tfds'), 'NO_GCE_CHECK': 'true'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    'prompts 40',
    'answer id kind level prompt int',
    'user False',
  ]
