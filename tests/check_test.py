import io

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
    (mean_of_rows, {'2 microbatches', '4 microbatches', '8 microbatches'}),
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
