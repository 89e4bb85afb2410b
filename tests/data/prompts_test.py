"""Records of prompts are read by number, and shown."""

import io

import numpy as np
import pytest
import record_cases
from record_cases import START, column, made_up, prepared, text, turn, write

from tpu_lm import check
from tpu_lm.data import loader, manifest
from tpu_lm.data.prompts import Prompt, Prompts
from tpu_lm.errors import UserError

TOOLS = [{'name': 'add', 'parameters': {}}]
CHAT = [
  {'role': 'system', 'content': 's'},
  {'role': 'user', 'content': 'Wie heißt\u2028du?'},
]


@pytest.fixture(autouse=True)
def stage(monkeypatch):
  asked = {'stage_name': 'grpo', 'data.rows': 'prompts'}
  monkeypatch.setitem(record_cases.STAGES, 'prompts', asked)


def apart(tmp_path, found, rows='prompts', **data):
  held = {'prompt': 'held', 'completion': 'out'}
  return prepared(
    write(tmp_path / 'a.jsonl', found),
    tmp_path / 'data',
    rows,
    heldout_source=str(write(tmp_path / 'held.jsonl', [held])),
    **data,
  )[0]


def test_records_come_whole(tmp_path):
  record = {
    'messages': CHAT,
    'tools': TOOLS,
    'tests': ['assert f(1) == "ä"\r\n', 'x\ny'],
    'record': {'messages': None, 'lines': [1.5, True, -(2**70)]},
    'none': None,
  }
  made = apart(tmp_path, [record], length=500)
  prompts = Prompts(made.directory, 'train')
  assert len(prompts) == 1
  assert prompts[0] == Prompt(CHAT, TOOLS, record)
  assert prompts[np.int64(0)] == prompts[0]
  assert Prompts(made.directory, 'heldout')[0].record == {
    'prompt': 'held',
    'completion': 'out',
  }
  for number in (-1, 1):
    with pytest.raises(IndexError, match=f'row {number} of 1 prompts'):
      prompts[number]
  with pytest.raises(ValueError, match="split='test'"):
    Prompts(made.directory, 'test')


def test_line_ends_change_in_what_is_asked_alone(tmp_path):
  record = {'question': 'a\r\nb', 'test': 'x\r\ny'}
  made = apart(tmp_path, [record])
  ids = [*turn('user', 'a\nb'), START, *text('assistant\n')]
  assert column(made, 'train', 'tokens')[0, : len(ids)].tolist() == ids
  (prompt,) = Prompts(made.directory, 'train')
  assert prompt.messages[0]['content'] == 'a\nb'
  assert prompt.record == record
  assert made.content['counts']['line_ends_changed'] == 1


def test_any_order_reads_the_same(tmp_path):
  found = [{'prompt': f'{n}', 'tests': ['x' * n]} for n in range(300)]
  made = apart(tmp_path, found)
  prompts = Prompts(made.directory, 'train')
  told = list(prompts)
  assert sorted(len(one.record['tests'][0]) for one in told) == list(range(300))
  for number in np.random.default_rng(0).permutation(300):
    assert prompts[number] == told[number]
  # Mapped, not read.
  assert isinstance(prompts._lines, np.memmap)
  assert isinstance(prompts._starts, np.memmap)


def test_other_rows_hold_no_prompts(tmp_path):
  made = apart(tmp_path, made_up('chat', 9), 'chat')
  with pytest.raises(UserError, match='holds rows of chat, not prompts; prep'):
    Prompts(made.directory, 'train')
  with pytest.raises(UserError, match='no such file; delete the folder'):
    Prompts(tmp_path, 'train')


def test_damage_of_the_same_size_is_told_where_it_is_met(tmp_path):
  found = [{'prompt': f'{n}'} for n in range(9)]
  made = apart(tmp_path, found)
  file = made.directory / 'train.records.jsonl'
  lines = file.read_bytes().splitlines(keepends=True)
  file.write_bytes(b''.join([*lines[:4], b'#' * len(lines[4]), *lines[5:]]))
  prompts = Prompts(made.directory, 'train')
  assert prompts[3].record in found
  with pytest.raises(UserError, match=r'jsonl: line 5 is damaged .*; delete'):
    prompts[4]
  with pytest.raises(UserError, match='jsonl: damaged'):
    manifest.check(made, contents=True)
  file.write_bytes(b''.join(lines))
  file = made.directory / 'train.records.npy'
  starts, size = np.load(file), file.stat().st_size
  for wrong in (starts + 1, starts.astype(np.float64)):
    np.save(file, wrong)
    assert file.stat().st_size == size
    with pytest.raises(UserError, match=r'records.npy: damaged; delete'):
      Prompts(made.directory, 'train')
  file.write_bytes(b'#' * size)
  with pytest.raises(UserError, match=r'records.npy: damaged; delete'):
    Prompts(made.directory, 'train')


def shown(made, tokens, rows=1):
  batches = loader.Loader(made.directory, 'train', 1, 0, 260)
  out = io.StringIO()
  asked = check.prompts_of(batches, 0)
  check.show(batches.batch(0), tokens, rows, out, 'prompts', asked)
  return out.getvalue()


def test_a_row_is_shown_with_its_record(tmp_path):
  record = {
    'system': 's',
    'question': 'Why?',
    'problem': 'another field',
    'answer': 'first\n' + 'word ' * 50 + '\n#### 42',
    'tests': ['f(1)', 2],
    'none': None,
  }
  made = apart(tmp_path, [record], length=100)
  told = shown(made, made.tokenizer())
  assert '\nrow 0\n‹⟦<|im_start|>⟧system\ns⟦<|im_end|>⟧\n' in told
  assert 'user\nWhy?⟦<|im_end|>⟧\n⟦<|im_start|>⟧assistant\n› … ' in told
  fields = told[told.index('of padding') :].splitlines()[1:4]
  assert fields[0] == 'problem: another field'
  name, answer = fields[1].split(': ')
  assert name == 'answer'
  assert len(answer) == 103
  assert answer.startswith('first word')
  assert answer.endswith('word #### 42')
  assert fields[2] == 'tests: ["f(1)", 2]'
  assert 'question:' not in told
  assert 'system:' not in told
  assert 'none' not in told
  assert '0 of 100 positions are trained (0.0%), 1 prompts in 1 rows' in told
  assert told.endswith('what is trained are the answers to them\n')


def test_only_prompts_have_records(tmp_path):
  made = apart(tmp_path, made_up('chat', 9), 'chat')
  batches = loader.Loader(made.directory, 'train', 1, 0, 260)
  assert check.prompts_of(batches, 0) == []
