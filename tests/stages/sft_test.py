import jax
import numpy as np
import pytest
import tiny

from tpu_lm import stage
from tpu_lm.models import transformer


def rows():
  """A prompt of 2 and an answer of 4 tokens, then of 3 and 2."""
  return tiny.packed(np.random.default_rng(3), [[(2, 4), (3, 2)]], 16)


def test_only_the_answers_count_their_stop_tokens_included():
  model = tiny.model()
  params, row = tiny.params(model), rows()
  made = stage.make('sft', model, None, {})
  mean, _ = made.loss(params, row, None)
  x = model.apply(
    {'params': params},
    *(row[k][:, :-1] for k in ('tokens', 'positions', 'segment_ids')),
  )
  logps = jax.nn.log_softmax(transformer.logits(model.config, params, x))[0]
  # Slots 2 to 5 and 9 to 10; 5 and 10 are the stop tokens.
  answers = [2, 3, 4, 5, 9, 10]
  each = [-float(logps[slot - 1, row['tokens'][0, slot]]) for slot in answers]
  assert mean.weight == len(answers)
  np.testing.assert_allclose(mean.total, sum(each), rtol=1e-5)


@pytest.mark.parametrize('slot', [5, 10])
def test_the_stop_token_is_trained(slot):
  model = tiny.model()
  params, row = tiny.params(model), rows()
  made = stage.make('sft', model, None, {})
  before = made.loss(params, row, None)[0].total
  row['tokens'][0, slot] = (row['tokens'][0, slot] + 1) % tiny.VOCAB
  assert made.loss(params, row, None)[0].total != before
