"""Batches depend on manifest, seed and step alone."""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tpu_lm import config as config_lib
from tpu_lm.data import loader, manifest, prepare
from tpu_lm.errors import UserError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('loader')
  texts = [f'document number {i} ' * (1 + i % 7) for i in range(120)]
  (path / 'a.jsonl').write_text(
    ''.join(json.dumps({'text': text}) + '\n' for text in texts)
  )
  config = config_lib.base()
  config.data.source = str(path / 'a.jsonl')
  config.data.tokenizer = 'byte'
  config.data.length = 64
  return prepare.prepare(config, path / 'data').directory


RECORDS = {
  'pairs': ('dpo', ('chosen_', 'rejected_'), 'margins'),
  'rated': ('kto', ('', 'mismatched_'), 'scores'),
}


@pytest.fixture(scope='module', params=RECORDS)
def records(request, tmp_path_factory):
  """A folder of rows of records, and what is known of it."""
  path = tmp_path_factory.mktemp(request.param)
  found = [
    {
      'prompt': f'{i}',
      'chosen': 'a' * (1 + i % 9),
      'rejected': 'no',
      'margin': i,
    }
    if request.param == 'pairs'
    else {'prompt': f'{i}', 'completion': 'a' * (1 + i % 9), 'score': i}
    for i in range(1, 120)
  ]
  (path / 'a.jsonl').write_text('\n'.join(map(json.dumps, found)))
  config = config_lib.base()
  config.stage_name, prefixes, values = RECORDS[request.param]
  config.data.source = str(path / 'a.jsonl')
  config.data.tokenizer = 'byte'
  config.data.length = 64
  made = prepare.prepare(config, path / 'data')
  return made.directory, prefixes, values


def train(folder, batch_size=8, seed=0, **more):
  return loader.Loader(folder, 'train', batch_size, seed, 260, **more)


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


def test_contract_of_a_batch(folder):
  batch = train(folder).batch(0)
  dtypes = {key: array.dtype for key, array in batch.items()}
  assert dtypes == {
    'tokens': np.int32,
    'loss_mask': bool,
    'segment_ids': np.int32,
    'positions': np.int32,
  }
  assert {array.shape for array in batch.values()} == {(8, 65)}
  np.testing.assert_array_equal(batch['loss_mask'], batch['segment_ids'] > 0)
  # Here every segment begins a document, so its first token says so.
  begins = (batch['positions'] == 0) & (batch['segment_ids'] > 0)
  for row in range(8):
    for number in range(1, batch['segment_ids'][row].max() + 1):
      held = batch['segment_ids'][row] == number
      np.testing.assert_array_equal(
        batch['positions'][row][held], np.arange(held.sum())
      )
  assert begins.sum() == batch['segment_ids'].max(axis=1).sum()
  assert not batch['positions'][batch['segment_ids'] == 0].any()


def test_batch_is_a_function_of_seed_and_step(folder):
  one, two = train(folder), train(folder)
  assert_equal(one.batch(31), two.batch(31))
  two.batch(3)
  assert_equal(one.batch(7), two.batch(7))
  assert one.rows(7) == two.rows(7)
  assert one.rows(7) != train(folder, seed=1).rows(7)


def test_far_steps_cost_no_more(folder):
  rows = train(folder)
  rows.batch(0)
  began = time.process_time()
  rows.batch(10_000_000)
  assert time.process_time() - began < 1


def test_an_epoch_is_a_permutation(folder):
  rows = train(folder, batch_size=1)
  count = rows.num_rows
  epochs = [
    [rows.rows(step)[0] for step in range(e * count, (e + 1) * count)]
    for e in range(2)
  ]
  for epoch in epochs:
    assert len(set(epoch)) == count
  assert epochs[0] != epochs[1]
  assert epochs[0] != sorted(epochs[0])


def test_names_say_which_row_it_is(folder):
  rows = train(folder)
  for (shard, row), tokens in zip(
    rows.rows(5), rows.batch(5)['tokens'], strict=True
  ):
    array = np.load(folder / f'{shard}.tokens.npy')
    np.testing.assert_array_equal(array[row], tokens)


@pytest.mark.parametrize('split', ['train', 'heldout'])
def test_processes_share_the_global_batch(folder, split):
  shuffle = split == 'train'
  whole = loader.Loader(folder, split, 8, 0, 260, shuffle)
  for count in (2, 4, 8):
    parts = [
      loader.Loader(folder, split, 8, 0, 260, shuffle, (i, count))
      for i in range(count)
    ]
    for step in range(min(3, whole.num_batches)):
      batches = [part.batch(step) for part in parts]
      joined = {
        key: np.concatenate([batch[key] for batch in batches])
        for key in batches[0]
      }
      assert_equal(joined, whole.batch(step))
      sums = {part.crc(step, part.batch(step)) for part in (whole, *parts)}
      assert len(sums) == 1
  with pytest.raises(UserError, match='multiple of the 3 parts'):
    loader.Loader(folder, split, 8, 0, 260, shuffle, (0, 3))


def test_heldout_gives_each_row_once(folder):
  held = loader.Loader(folder, 'heldout', 7, 0, 260, shuffle=False)
  assert held.num_rows % 7  # so that the last batch is not full
  names = [n for step in range(held.num_batches) for n in held.rows(step)]
  real = [name for name in names if name[0] != 'padding']
  assert len(real) == len(set(real)) == held.num_rows
  assert len(names) == held.num_batches * 7
  last = held.batch(held.num_batches - 1)
  filled = held.num_rows % 7
  assert not last['segment_ids'][filled:].any()
  assert not last['loss_mask'][filled:].any()
  assert last['loss_mask'][:filled].any(axis=1).all()
  with pytest.raises(IndexError):
    held.batch(held.num_batches)
  assert len(list(held.prefetch(0))) == held.num_batches


def test_prefetch_gives_the_same_batches(folder):
  rows = train(folder)
  ahead = rows.prefetch(5)
  for step in range(5, 12):
    assert_equal(next(ahead), rows.batch(step))
  ahead.close()
  assert len(list(rows.prefetch(5, 8))) == 4
  assert not [t for t in threading.enumerate() if t.name == 'loader']


def test_an_error_ahead_comes_where_its_batch_would(folder):
  def make(step):
    if step == 3:
      raise UserError('at 3')
    return step

  ahead = loader._ahead(make, 0, None)
  assert [next(ahead) for _ in range(3)] == [0, 1, 2]
  with pytest.raises(UserError, match='at 3'):
    next(ahead)


def test_columns_of_records(records):
  folder, prefixes, values = records
  rows = train(folder)
  batch = rows.batch(3)
  wanted = {values: (np.float32, (8, rows.manifest.slots))}
  for prefix in prefixes:
    for name, dtype in (
      ('tokens', np.int32), ('loss_mask', bool),
      ('segment_ids', np.int32), ('positions', np.int32),
    ):  # fmt: skip
      wanted[prefix + name] = (dtype, (8, 65))
  found = {name: (x.dtype, x.shape) for name, x in batch.items()}
  assert found == wanted
  for at, (shard, row) in enumerate(rows.rows(3)):
    for name in wanted:
      if name.endswith('positions'):
        continue
      array = np.load(folder / f'{shard}.{name}.npy')
      np.testing.assert_array_equal(batch[name][at], array[row])
  for prefix in prefixes:
    segments, begins = (
      batch[f'{prefix}segment_ids'],
      batch[f'{prefix}positions'],
    )
    np.testing.assert_array_equal(begins, loader.positions(segments))
    # A slot counts where its segment has targets, and has a number there.
    for row in range(8):
      counted = np.unique(segments[row][batch[f'{prefix}loss_mask'][row]])
      assert counted.tolist() == list(range(1, segments[row].max() + 1))
      assert (np.flatnonzero(batch[values][row]) + 1).tolist() == (
        counted.tolist()
      )


def test_rows_by_number(records, folder):
  for where in (folder, records[0]):
    rows = train(where)
    numbers = rows.row_numbers(5)
    assert numbers.dtype == np.int64
    assert_equal(rows.rows_at(numbers), rows.batch(5))
    assert_equal(
      rows.rows_at(numbers[::-1]),
      {name: x[::-1] for name, x in rows.batch(5).items()},
    )
    padded = rows.rows_at(np.array([-1, numbers[0]]))
    for name, column in padded.items():
      if not name.endswith('tokens'):
        assert not column[0].any(), name
      np.testing.assert_array_equal(column[1], rows.batch(5)[name][0])
  held = loader.Loader(records[0], 'heldout', 5, 0, 260, shuffle=False)
  numbers = [held.row_numbers(step) for step in range(held.num_batches)]
  numbers = np.concatenate(numbers)
  assert numbers[: held.num_rows].tolist() == list(range(held.num_rows))
  assert (numbers[held.num_rows :] == -1).all()
  parts = [train(folder, part=(i, 2)) for i in range(2)]
  np.testing.assert_array_equal(
    np.concatenate([part.row_numbers(4) for part in parts]),
    train(folder).row_numbers(4),
  )


def test_every_array_of_tokens_is_checked(records, tmp_path):
  folder, prefixes, values = records
  for prefix in prefixes:
    damaged = copy(folder, tmp_path / f'x{prefix}')
    shard = damaged / f'train-00000.{prefix}tokens.npy'
    array = np.load(shard)
    array[:, 0] = 300
    np.save(shard, array)
    with pytest.raises(UserError, match=r'token id 300 is not below'):
      train(damaged).batch(0)
  damaged = copy(folder, tmp_path / 'y')
  shard = damaged / f'train-00000.{values}.npy'
  array = np.load(shard)
  np.save(shard, np.ascontiguousarray(array.T))
  with pytest.raises(UserError, match=rf'{values}\.npy: has the shape'):
    train(damaged).batch(0)


def test_ids_beyond_the_vocabulary_are_refused(folder):
  rows = loader.Loader(folder, 'train', 8, 0, 110)
  with pytest.raises(UserError, match=r'train-00000: row \d+: token id 1\d\d'):
    rows.batch(0)


def copy(folder, target):
  target.mkdir()
  for path in folder.iterdir():
    (target / path.name).write_bytes(path.read_bytes())
  return target


def test_damaged_shards_are_refused(folder, tmp_path):
  damaged = copy(folder, tmp_path / 'a')
  shard = damaged / 'train-00000.tokens.npy'
  data = bytearray(shard.read_bytes())
  data[-5] ^= 1
  shard.write_bytes(data)
  with pytest.raises(UserError, match='sha256'):
    train(damaged, verify=True)
  shard.write_bytes(data[:-8])
  with pytest.raises(UserError, match=r'train-00000\.tokens\.npy: has'):
    train(damaged)
  shard.unlink()
  with pytest.raises(UserError, match=r'train-00000\.tokens\.npy: missing'):
    train(damaged)
  with pytest.raises(UserError, match=r'manifest\.json: no such file'):
    train(tmp_path / 'nothing')


def mixture(folder, target, weights):
  """The same rows as two parts, and a loss mask of their own in the second."""
  copy(folder, target)
  content = json.loads((folder / manifest.FILE).read_text())
  one = content['parts'][0]
  two = json.loads(json.dumps(one))
  shard = two['splits']['train']['shards'][0]
  mask = np.zeros((shard['rows'], 65), bool)
  mask[:, ::2] = True
  (described,) = manifest.write_shards(target, '1-train', [{'loss_mask': mask}])
  shard['name'] = '1-train-00000'
  shard['files'] |= described['files']
  content['parts'] = [one, two]
  one['weight'], two['weight'] = weights
  content['fingerprint'] = manifest.fingerprint(content)
  manifest.write(target, content)
  return target


def test_parts_are_mixed_by_weight(folder, tmp_path):
  mixed = train(mixture(folder, tmp_path / 'a', (3.0, 1.0)))
  names = [name for step in range(100) for name in mixed.rows(step)]
  second = sum(shard.startswith('1-') for shard, _ in names)
  assert abs(second / len(names) - 0.25) < 0.01
  batch = mixed.batch(0)
  for (shard, _), mask, ids in zip(
    mixed.rows(0), batch['loss_mask'], batch['segment_ids'], strict=True
  ):
    wanted = ids > 0
    if shard.startswith('1-'):
      wanted = wanted & (np.arange(65) % 2 == 0)
    np.testing.assert_array_equal(mask, wanted)
  only = train(mixture(folder, tmp_path / 'b', (1.0, 0.0)))
  assert not any(n[0].startswith('1-') for s in range(9) for n in only.rows(s))


def test_training_imports_no_tensorflow(folder):
  code = f"""
import sys
from tpu_lm.data import loader, prepare
loader.Loader({str(folder)!r}, 'train', 8, 0, 260).batch(0)
heavy = {{'tensorflow', 'tensorflow_datasets', 'seqio', 'datasets', 'pyarrow'}}
print(heavy & set(sys.modules))
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == 'set()'
