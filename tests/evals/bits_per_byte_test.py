import math

import jax.numpy as jnp
import numpy as np
import pytest

from tpu_lm.errors import UserError
from tpu_lm.evals import bits_per_byte

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
