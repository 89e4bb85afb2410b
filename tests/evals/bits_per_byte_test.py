import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_lm import config as configs
from tpu_lm import models, run, start, tokenizer
from tpu_lm.data import prepare
from tpu_lm.errors import UserError
from tpu_lm.evals import bits_per_byte
from tpu_lm.models import transformer

# Ids 0 and 1 are special; 2, 3, 4 stand for 1, 2 and 5 bytes.
TOKEN_BYTES = np.array([0, 0, 1, 2, 5], np.int32)
NATS = np.array([0.25, 9.0, 0.5, 1.0, 2.0])  # what each target costs


def batch(tokens, segment_ids, loss_mask=None):
  tokens = np.array(tokens, np.int32)
  mask = np.ones(tokens.shape, bool) if loss_mask is None else loss_mask
  return {
    'tokens': tokens,
    'segment_ids': np.array(segment_ids, np.int32),
    'loss_mask': np.array(mask, bool),
  }


# Targets that count: row 1: 2, 3, 0 (document 1), 4 (document 2; not its
# first token); row 2: 3 and 0 (padding does not), but 3 is masked.
FIRST = batch(
  [[0, 2, 3, 0, 0, 4], [0, 3, 0, 1, 1, 1]],
  [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]],
  [[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0]],
)
SECOND = batch([[4, 4, 4]], [[3, 3, 3]])


def totals(rows):
  counts = bits_per_byte.counted(rows)
  nats = NATS[rows['tokens'][:, 1:]][counts].sum()
  return jnp.float32(nats), jnp.float32(counts.sum())


def test_hand_computed():
  scores = bits_per_byte.evaluate(totals, [FIRST, SECOND], TOKEN_BYTES)
  nats = (0.5 + 1.0 + 0.25 + 2.0 + 0.25) + (2.0 + 2.0)
  size = (1 + 2 + 0 + 5 + 0) + (5 + 5)
  assert scores == {
    'loss': nats / 7,
    'perplexity': pytest.approx(math.exp(nats / 7)),
    'bits_per_byte': pytest.approx(nats / math.log(2) / size),
    'tokens': 7,
    'bytes': size,
  }


def test_the_order_and_the_cut_into_batches_do_not_matter():
  rows = [
    {name: column[i : i + 1] for name, column in FIRST.items()}
    for i in range(2)
  ]
  once = bits_per_byte.evaluate(totals, [FIRST, SECOND], TOKEN_BYTES)
  parts = bits_per_byte.evaluate(totals, [SECOND, *rows[::-1]], TOKEN_BYTES)
  assert once == parts


def test_many_batches_do_not_lose_precision():
  cost, num_batches = np.float32(16777.217), 5000

  def many(rows):
    del rows
    return jnp.float32(cost), jnp.float32(1)

  scores = bits_per_byte.evaluate(many, [SECOND] * num_batches, TOKEN_BYTES)
  assert scores['loss'] == pytest.approx(float(cost), rel=1e-12)
  assert scores['perplexity'] == math.inf


def test_a_stopped_evaluation_has_no_result():
  asked = iter([False, True])
  scores = bits_per_byte.evaluate(
    totals, [FIRST, SECOND, FIRST], TOKEN_BYTES, stop=lambda: next(asked)
  )
  assert scores is None


@pytest.mark.parametrize(
  'batches',
  [[], [batch([[0, 1, 1]], [[1, 0, 0]])], [batch([[0, 0]], [[1, 1]])]],
)
def test_rows_without_text_are_a_users_mistake(batches):
  with pytest.raises(UserError, match=r'held-out data: .* to score'):
    bits_per_byte.evaluate(totals, batches, TOKEN_BYTES)


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
  """(working directory, what start.load gives) of a model by chance."""
  workdir = tmp_path_factory.mktemp('run')
  config = configs.base()
  config.batch_size = 6  # eight devices must share the rows all the same
  config.data.source = str(tiny.write_text(workdir / 'text.txt'))
  config.data.length = tiny.LENGTH
  config.data.tokenizer = 'byte'
  found = prepare.prepare(config, run.data_dir(config, workdir), lambda _: 0)
  tokens = tokenizer.load(found.directory)
  tokens.save(workdir / 'tokenizer')
  model = models.make('qwen3', tiny.SHAPE, tokens.vocab_size, tiny.LENGTH)
  params = tiny.params(model)
  mesh = tiny.mesh(data=8)
  return workdir, start.Loaded(config, tokens, model, params, 0, mesh)


def scores_of_text(loaded, text):
  """(nats, bytes) of a document by rows of its own, without the loader."""
  eot = loaded.tokenizer.eot_id
  ids = [eot, *loaded.tokenizer.encode(text), eot]
  nats = 0.0
  for first in range(0, len(ids) - 1, tiny.LENGTH):
    row = np.full((1, tiny.LENGTH + 1), eot)
    part = ids[first : first + tiny.LENGTH + 1]
    row[0, : len(part)] = part
    logps = log_probabilities(loaded.model, loaded.params, row[:, :-1])
    nats -= sum(logps[0, i, token] for i, token in enumerate(part[1:]))
  return nats, len(text.encode())


def log_probabilities(model, params, tokens_BL):
  def compute(params, tokens_BL):
    hidden_BLD = model.apply({'params': params}, tokens_BL)
    logits_BLV = transformer.logits(model.config, params, hidden_BLD)
    return jax.nn.log_softmax(logits_BLV)

  return np.asarray(tiny.jit(compute)(params, tokens_BL), np.float64)


def test_a_text_is_scored_whole_and_once(loaded, tmp_path, capsys):
  workdir, loaded = loaded
  text = 'Ada saw an oak — größer.\nBo saw a cat on day 7.\n'
  (tmp_path / 'other.txt').write_text(text)
  source = str(tmp_path / 'other.txt')
  scores = tiny.figures(bits_per_byte, loaded, workdir, source)
  nats, size = scores_of_text(loaded, text)
  assert scores['bytes'] == size
  assert scores['tokens'] == size + 1
  assert scores['loss'] == pytest.approx(nats / (size + 1), rel=1e-5)
  assert capsys.readouterr().out == ''  # what is printed there is the result


def test_the_heldout_split_is_the_default(loaded):
  workdir, loaded = loaded
  scores = tiny.figures(bits_per_byte, loaded, workdir)
  text = (workdir / 'text.txt').read_bytes()
  assert 0 < scores['bytes'] < 0.2 * len(text)


def test_device_and_host_count_the_same_targets(loaded):
  _, loaded = loaded
  rows = tiny.batch()
  totals = bits_per_byte.totals_of(loaded.model, loaded.mesh)
  _, weight = totals(loaded.params, rows)
  assert weight == bits_per_byte.counted(rows).sum()


def test_a_changed_text_with_another_tokenizer_is_refused(loaded, tmp_path):
  workdir, loaded = loaded
  other = tokenizer.train(['some other text'], 'bpe', 270)
  with pytest.raises(UserError, match=r'has changed since .* --source=PATH'):
    tiny.figures(bits_per_byte, loaded._replace(tokenizer=other), workdir)
