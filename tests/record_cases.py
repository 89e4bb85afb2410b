"""Records, and the rows that they become, by hand."""

import json
import random

import numpy as np
import pytest

from tpu_lm import config as config_lib
from tpu_lm.data import prepare, record_rows
from tpu_lm.errors import UserError

EOT, START, END, PAD = range(4)  # of the byte tokenizer; a byte b is b + 4
STAGES = {
  'chat': {'stage_name': 'sft'},
  'pairs': {'stage_name': 'dpo'},
  'rated': {'stage_name': 'kto'},
  'scored': {'stage_name': 'reward', 'data.rows': 'scored'},
}


def asked(source, rows, **data):
  config = config_lib.base()
  config.data.source = str(source)
  config.data.tokenizer = 'byte'
  config.data.length = 64
  config.update_from_flattened_dict(STAGES[rows])
  for key, value in data.items():
    config.data[key] = value
  return config


def prepared(source, directory, rows='chat', **data):
  lines = []
  made = prepare.prepare(asked(source, rows, **data), directory, lines.append)
  return made, lines


def refused(source, directory, rows='chat', **data):
  """The message; nothing but the lock may be left behind."""
  with pytest.raises(UserError) as caught:
    prepare.prepare(asked(source, rows, **data), directory, lambda line: None)
  assert '\n' not in str(caught.value)
  if directory.is_dir():
    assert {path.name for path in directory.iterdir()} <= {'.lock'}
  return str(caught.value)


def write(path, found):
  path.write_text(''.join(json.dumps(record) + '\n' for record in found))
  return path


def column(made, split, name):
  arrays = [
    np.load(made.directory / shard.files[name]['file'])
    for part in made.splits(split)
    for shard in part.shards
  ]
  return np.concatenate(arrays)


def text(words):
  return [byte + 4 for byte in words.encode()]


def turn(role, words):
  return [START, *text(f'{role}\n{words}'), END, *text('\n')]


def answer(prompt, words, length=64):
  """Ids and mask of one question and its answer, by hand."""
  before = [*turn('user', prompt), START, *text('assistant\n')]
  ids = [*before, *text(words), END]
  mask = [False] * len(before) + [True] * (len(words.encode()) + 1)
  return ids[:length], mask[:length]


def row_of(placed, slots=65):
  """Tokens, segment ids and mask with (column, ids, mask) laid into them."""
  tokens, segments, mask = [PAD] * slots, [0] * slots, [False] * slots
  for number, (at, (ids, trained)) in enumerate(placed, start=1):
    tokens[at : at + len(ids)] = ids
    segments[at : at + len(ids)] = [number] * len(ids)
    mask[at : at + len(ids)] = trained
  return tokens, segments, mask


def assert_row(made, prefix, row, wanted, split='train'):
  for name, expected in zip(record_rows.COLUMNS, wanted, strict=True):
    found = column(made, split, prefix + name)[row].tolist()
    assert found == expected, (prefix, name)


def apart(tmp_path, found, rows='chat', **data):
  """All of `found` as the training split, one record held out."""
  other = {'prompt': 'not', 'chosen': 'a', 'rejected': 'b'}
  if rows != 'pairs':
    other = {'prompt': 'not', 'completion': 'seen'}
  if rows in ('rated', 'scored'):
    other['label'] = True
  held = [other, other | {'completion': 'at all'}] if rows == 'rated' else [
    other
  ]  # fmt: skip
  return prepared(
    write(tmp_path / 'a.jsonl', found),
    tmp_path / 'data',
    rows,
    heldout_source=str(write(tmp_path / 'held.jsonl', held)),
    **data,
  )


def made_up(rows, count, seed=0):
  """Records of every length, some longer than a row."""
  rng = random.Random(seed)

  def words(most):
    return ''.join(rng.choices('abcdé <|im_end|>\n', k=rng.randrange(1, most)))

  found = []
  for number in range(count):
    record = {'prompt': f'{number} {words(20)}'}
    if rows == 'pairs':
      record |= {'chosen': words(40), 'rejected': words(40) + '.'}
      record['margin'] = number / 2
    else:
      record['completion'] = rng.choice(('yes', 'no', words(40)))
    if rows in ('rated', 'scored'):
      record['score'] = float(number)
    found.append(record)
  return found


def segments_in(made, split, prefix):
  """Every record of a split: (ids, mask, row, number)."""
  tokens, segments, mask = (
    column(made, split, prefix + name) for name in record_rows.COLUMNS
  )
  for row in range(len(tokens)):
    for number in range(1, segments[row].max() + 1):
      at = segments[row] == number
      assert (np.diff(np.flatnonzero(at)) == 1).all()
      yield tokens[row, at].tolist(), mask[row, at].tolist(), row, number - 1
