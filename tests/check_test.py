import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import check, cli, tokenizer
from tpu_lm.stage import Mean


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  return tiny.write_config(tmp_path_factory.mktemp('check'))


def test_the_command_shows_and_proves(config, tmp_path, capsys):
  status = cli.main(
    ['check', f'--config={config}', f'--workdir={tmp_path}', '--rows=2',
     '--config.model.dtype=bfloat16', '--config.batch_size=2']
  )  # fmt: skip
  told = capsys.readouterr().out
  assert status == 0, told
  assert 'row 0' in told
  assert 'row 1' in told
  assert 'row 2' not in told
  for what in ('2 microbatches', '2 devices', 'documents unpacked'):
    assert f'{what:<28}  the same' in told
  assert 'saw' in told  # the text itself
  assert 'DIFFERS' not in told


def test_a_row_shows_what_is_trained_by_hand(capsys):
  tokens = tokenizer.train([], 'byte', 0)
  text = [tokens.eot_id, *tokens.encode('ab'), tokens.eot_id]
  row = np.array(text + text + [tokens.pad_id] * 2, np.int32)
  segments = np.array([1, 1, 1, 1, 2, 2, 2, 2, 0, 0])
  mask = np.ones(10, bool)
  mask[2] = False  # the b of the first document
  batch = {
    'tokens': row[None], 'segment_ids': segments[None],
    'loss_mask': mask[None], 'positions': np.zeros((1, 10), np.int32),
  }  # fmt: skip
  out = io.StringIO()
  check.show(batch, tokens, 1, out)
  end = '⟦<|endoftext|>⟧'
  assert f'‹{end}›a‹b›{end} │ ‹{end}›ab{end}' in out.getvalue()
  assert '2 of padding' in out.getvalue()
  # Targets: a and end of the first, a, b and end of the second.
  assert '5 of 9 positions are trained (55.6%), 2 documents' in out.getvalue()

  class Terminal(io.StringIO):
    def isatty(self):
      return True

  out = Terminal()
  check.show(batch, tokens, 1, out)
  assert '\033[32ma\033[0m\033[2mb\033[0m' in out.getvalue()


def test_unpack_gives_each_document_a_row():
  batch = tiny.batch(4)
  rows = check.unpack(batch)
  documents = [
    (r, s)
    for r, segments in enumerate(batch['segment_ids'])
    for s in np.unique(segments[segments > 0])
  ]
  assert len(rows['tokens']) == len(documents)
  for row, (r, s) in enumerate(documents):
    at = batch['segment_ids'][r] == s
    size = at.sum()
    for name in ('tokens', 'loss_mask', 'positions'):
      np.testing.assert_array_equal(rows[name][row, :size], batch[name][r, at])
    assert rows['segment_ids'][row].sum() == size


def leaky(params, batch, key):
  """Each document is predicted from its neighbours in the row, too."""
  del key
  x = params['table'][batch['tokens']].mean(axis=1)
  weight = (batch['segment_ids'] > 0).sum(axis=1)
  total = ((x**2).sum(axis=1) * weight).sum()
  return Mean(total, weight.sum().astype(jnp.float32)), {}


PARTS = ('microbatches', 'devices')


def mean_of_rows(params, batch, key):
  """A mean of means: what a row counts does not depend on its targets."""
  del key
  weight = (batch['segment_ids'] > 0).astype(jnp.float32)
  x = (params['table'][batch['tokens']] ** 2).sum(-1) * weight
  return Mean(x.sum() / weight.sum(), jnp.float32(1)), {}


@pytest.mark.parametrize(
  ('loss', 'differing'),
  [
    (leaky, {'documents unpacked'}),
    # Each microbatch divides by itself, and so does each device.
    (mean_of_rows, {f'{n} {of}' for n in (2, 4, 8) for of in PARTS}),
  ],
)
def test_what_depends_on_the_computation_is_found(loss, differing):
  params = {'table': np.random.default_rng(0).normal(size=(64, 4))}
  params = jax.tree.map(lambda x: x.astype(np.float32), params)
  batch = tiny.batch(8)
  found = {
    what
    for what, apart, gradient in check.prove(loss, params, batch)
    if apart > check.LOSS_TOLERANCE or gradient > check.GRADIENT_TOLERANCE
  }
  assert found == differing


def pairs():
  """Two rows of pairs; in the first, two of them, of different lengths."""
  batch = {}
  for prefix, sizes in (('chosen_', (3, 2, 4)), ('rejected_', (2, 3, 3))):
    segments = np.zeros((2, 9), np.int32)
    for number, (row, at) in enumerate([(0, 0), (0, 4), (1, 0)]):
      segments[row, at : at + sizes[number]] = 1 + (number == 1)
    batch[f'{prefix}segment_ids'] = segments
    batch[f'{prefix}tokens'] = np.arange(18, dtype=np.int32).reshape(2, 9) + 10
    batch[f'{prefix}loss_mask'] = segments > 0
    batch[f'{prefix}positions'] = np.zeros((2, 9), np.int32)
  batch['margins'] = np.array([[0.5, 2.0], [1.5, 0.0]], np.float32)
  return batch


def test_unpack_moves_what_belongs_to_a_record():
  batch = pairs()
  batch['row'] = np.array([7, 8])
  rows = check.unpack(batch)
  assert rows['margins'].tolist() == [[0.5, 0.0], [2.0, 0.0], [1.5, 0.0]]
  assert rows['row'].tolist() == [7, 7, 8]
  assert rows['chosen_tokens'][1].tolist() == [14, 15, 0, 0, 0, 0, 0, 0, 0]
  assert rows['rejected_tokens'][1].tolist() == [14, 15, 16, 0, 0, 0, 0, 0, 0]
  assert rows['rejected_segment_ids'].sum(axis=1).tolist() == [2, 3, 3]
  assert rows['rejected_segment_ids'].max() == 1


def test_unpack_moves_what_a_teacher_says():
  batch = tiny.batch(4)
  shape = (4, tiny.LENGTH, 3)
  batch['teacher_ids'] = np.arange(np.prod(shape)).reshape(shape)
  rows = check.unpack(batch)
  at = 0
  for r, segments in enumerate(batch['segment_ids']):
    for segment in np.unique(segments[segments > 0]):
      held = np.flatnonzero(segments[:-1] == segment)
      np.testing.assert_array_equal(
        rows['teacher_ids'][at, : len(held)], batch['teacher_ids'][r, held]
      )
      assert not rows['teacher_ids'][at, len(held) :].any()
      at += 1


def test_pairs_are_shown_one_under_the_other():
  tokens = tokenizer.train([], 'byte', 0)
  batch = pairs()
  for prefix in ('chosen_', 'rejected_'):
    batch[f'{prefix}tokens'] += ord('A') - 10 + 4  # the byte A
    batch[f'{prefix}loss_mask'][:, 1::4] = False
  out = io.StringIO()
  check.show(batch, tokens, 1, out, 'records')
  lines = out.getvalue().splitlines()
  assert lines[2:9] == [
    'row 0',
    'record 1, margin 0.5',
    'chosen: ‹AB›C',
    'rejected: ‹AB›',
    'record 2, margin 2',
    'chosen: ‹EF›',
    'rejected: ‹EF›G',
  ]
  assert '5 of 32 positions are trained (15.6%), 3 records in 2' in lines[-1]


def test_a_value_of_the_wrong_record_is_found():
  """A loss that takes the first margin of a row for all of its pairs."""

  def loss(params, batch, key, right):
    del key
    total = weight = jnp.float32(0)
    for slot in range(batch['margins'].shape[1]):
      held = batch['chosen_segment_ids'] == slot + 1
      counts = held.any(axis=1)
      x = params['table'][batch['chosen_tokens']].sum(-1)
      x = jnp.where(held, x, 0).sum(axis=1)
      margins = batch['margins'][:, slot if right else 0]
      total += jnp.where(counts, x * margins, 0).sum()
      weight += counts.sum()
    return Mean(total, weight), {}

  params = {'table': np.random.default_rng(0).normal(size=(64, 4))}
  params = jax.tree.map(lambda x: x.astype(np.float32), params)
  found = []
  for right in (True, False):
    lines = check.prove(functools.partial(loss, right=right), params, pairs())
    found.append({what for what, apart, _ in lines if apart > 1e-5})
  assert found == [set(), {'documents unpacked'}]


@pytest.mark.parametrize(
  ('name', 'answers', 'told'),
  [
    ('dpo', {'chosen': 'an oak', 'rejected': 'a key'}, 'rejected: ‹'),
    ('kto', {'completion': 'an oak', 'label': True}, 'score 0'),
  ],
)
def test_stages_of_records(config, tmp_path, capsys, name, answers, told):
  path = tmp_path / 'a.jsonl'
  path.write_text(
    ''.join(
      json.dumps(
        {'prompt': f'Day {n}?', **answers}
        | ({'completion': f'{n} keys', 'label': False} if n % 2 else {})
      )
      + '\n'
      for n in range(40)
    )
  )
  status = cli.main(
    ['check', f'--config={config}', f'--workdir={tmp_path / "run"}',
     f'--config.stage_name={name}', f'--config.data.source={path}',
     '--config.batch_size=2', '--config.data.length=80', '--rows=1']
  )  # fmt: skip
  shown = capsys.readouterr().out
  assert status == 0, shown
  assert told in shown
  assert 'an oak⟦<|im_end|>⟧' in shown
  assert f'{"documents unpacked":<28}  the same' in shown
