"""Rows of answers, alone and together, and what losses make of them."""

import jax
import numpy as np
import pytest
import tiny
from stages_test import assert_close, gradient

from tpu_lm import check, stage
from tpu_lm.data import answer_rows
from tpu_lm.models.attention import SHARED

KINDS = {
  'token': {'beta': 0.1, 'sampler_cap': 2.0},
  'sequence': {'level': 'sequence', 'aggregation': 'sequence'},
  'constant': {'aggregation': 'constant', 'length': 8},
}


def test_two_answers_behind_one_prompt():
  found = answer_rows.rows(
    [[5, 6, 7]] * 2, [[1, 2], [3]], pad_id=9, together=2, most=4
  )
  ends = {
    'tokens': [5, 6, 7, 1, 2, 7, 3, 9],
    'segment_ids': [SHARED, SHARED, 1, 1, 1, 2, 2, 0],
    'positions': [0, 1, 2, 3, 4, 2, 3, 0],
    'loss_mask': [False] * 3 + [True, True, False, True, False],
  }
  for name, expected in ends.items():
    assert found[name].shape == (1, 33)
    assert found[name][0, :8].tolist() == expected
  targets = found['tokens'][0, 1:]
  at = found['answer_at']
  assert at.shape == (1, 2, 4)
  assert targets[at[0, 0, :2]].tolist() == [1, 2]
  assert targets[at[0, 1, :1]].tolist() == [3]
  rest = [*at[0, 0, 2:], *at[0, 1, 1:]]
  assert not found['loss_mask'][0, 1:][rest].any()

  values = answer_rows.beside(found, [[0.1, 0.2], [0.3]])
  np.testing.assert_allclose(values[0, at[0, 1, 0]], 0.3)
  answer_rows.keep(found, np.array([False, True]))
  assert np.flatnonzero(found['loss_mask']).tolist() == [6]


def batch(together: int) -> dict[str, np.ndarray]:
  """Four answers to each of two prompts, and what GRPO adds."""
  draw = np.random.default_rng(0)
  prompts = [draw.integers(0, tiny.VOCAB, n).tolist() for n in (5, 1)]
  prompts = [prompt for prompt in prompts for _ in range(4)]
  answers = [
    draw.integers(0, tiny.VOCAB, n).tolist() for n in (3, 6, 1, 2, 4, 4, 7, 1)
  ]
  found = answer_rows.rows(prompts, answers, 0, together)
  for name in ('old_logps', 'sampler_logps', 'reference_logps'):
    numbers = [-3.5 + 0.1 * draw.normal(size=len(a)) for a in answers]
    found[name] = answer_rows.beside(found, numbers)
  advantages = draw.normal(size=8).astype(np.float32)
  found['advantages'] = advantages
  if together > 1:
    found['advantages'] = advantages.reshape(-1, together)
  answer_rows.keep(found, np.arange(8) != 2)
  return found


@pytest.mark.parametrize('kind', KINDS)
def test_a_loss_is_the_same_whatever_stands_together(kind):
  model = tiny.model()
  params = tiny.params(model)
  hparams = {'reward': 'exact', 'group': 4} | KINDS[kind]
  made = stage.make('grpo', model, lambda: params, hparams)
  made = stage.Stage(made.loss)
  expected = gradient(made, params, batch(1))
  assert np.isfinite(expected[0])
  for together in (2, 4):
    loss, grads = gradient(made, params, batch(together))
    assert loss == pytest.approx(expected[0], abs=1e-6)
    assert_close((expected[0], grads), expected)
  dirty = batch(4)
  padding = dirty['segment_ids'] == 0
  dirty['tokens'][padding] = 2**31 - 1
  for name in ('old_logps', 'sampler_logps', 'reference_logps'):
    dirty[name][~dirty['loss_mask'][:, 1:]] = np.nan
  found = gradient(made, params, dirty)
  assert found[0] == loss
  jax.tree.map(np.testing.assert_array_equal, found[1], grads)


def test_check_proves_rows_of_several_answers():
  model = tiny.model()
  params = tiny.params(model)
  hparams = {'reward': 'exact', 'group': 4, 'beta': 0.1}
  made = stage.make('grpo', model, lambda: params, hparams)
  lines = check.prove(made.loss, params, batch(4))
  assert {what for what, *_ in lines} == {
    '2 microbatches', '2 devices', 'documents unpacked',
  }  # fmt: skip
  for what, loss, slope in lines:
    assert loss < check.LOSS_TOLERANCE, what
    assert slope < check.GRADIENT_TOLERANCE, what
  found = check.unpack(batch(4))
  alone = batch(1)
  for name in ('tokens', 'positions', 'loss_mask'):
    kept = alone['segment_ids'] != 0
    for row in range(8):
      own = alone[name][row][kept[row]]
      np.testing.assert_array_equal(found[name][row, : len(own)], own)
  np.testing.assert_array_equal(found['advantages'], alone['advantages'])
