import functools

import jax
import numpy as np
import pytest
import tiny

from tpu_lm import stage, start
from tpu_lm.errors import UserError
from tpu_lm.models import transformer


@functools.cache
def student():
  model = tiny.model(vocab_size=tiny.teacher()[1])
  return model, tiny.params(model)


def made(**hparams):
  hparams = {'teacher': tiny.teacher()[0]} | hparams
  return stage.make('distill', student()[0], None, hparams)


def losses(**hparams):
  stage_, (_, params), batch = made(**hparams), student(), tiny.batch(4)
  (part,) = stage_.prepare(params, batch, None)
  mean, metrics = tiny.jit(stage_.loss)(params, part, None)
  found = {name: m.total / m.weight for name, m in metrics.items()}
  return found | {'loss': mean.total / mean.weight}


def test_forward_kl_by_hand():
  model, params = student()
  batch = tiny.batch(4)
  loaded = start.load(tiny.teacher()[0])
  names = ('tokens', 'positions', 'segment_ids')

  def logps(model, params, temperature):
    x = model.apply({'params': params}, *(batch[k][:, :-1] for k in names))
    logits = transformer.logits(model.config, params, x) / temperature
    return np.asarray(jax.nn.log_softmax(logits), np.float64)

  device = jax.devices()[0]
  theirs = jax.device_put(loaded.params, device)
  p, q = logps(loaded.model, theirs, 2.0), logps(model, params, 2.0)
  weights = np.asarray(stage.target_weights(batch))
  expected = 4 * ((np.exp(p) * (p - q)).sum(-1) * weights).sum()
  targets = batch['tokens'][:, 1:, None]
  plain = np.take_along_axis(logps(model, params, 1.0), targets, -1)[..., 0]
  found = losses(temperature=2.0, alpha=0.3)
  divergence, nll = expected / weights.sum(), -(plain * weights).sum()
  np.testing.assert_allclose(found['divergence'], divergence, rtol=1e-4)
  np.testing.assert_allclose(found['nll'], nll / weights.sum(), rtol=1e-5)
  np.testing.assert_allclose(
    found['loss'], 0.3 * found['divergence'] + 0.7 * found['nll'], rtol=1e-5
  )


def test_alpha_0_is_plain_cross_entropy():
  model, params = student()
  mean, _ = stage.make('pretrain', model, None, {}).loss(
    params, tiny.batch(4), None
  )
  found = losses(alpha=0.0)
  np.testing.assert_allclose(found['loss'], mean.total / mean.weight, rtol=1e-5)


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
  loaded = start.load(tiny.teacher()[0])
  params = jax.device_put(loaded.params, jax.devices()[0])
  for hparams in ({}, {'top_k': 5}):
    with jax.set_mesh(tiny.mesh()):
      stage_ = stage.make(
        'distill', loaded.model, None,
        {'teacher': tiny.teacher()[0], 'alpha': 1.0} | hparams,
      )  # fmt: skip
      (part,) = stage_.prepare(params, tiny.batch(4), None)
      mean, _ = stage_.loss(params, part, None)
    assert abs(mean.total / mean.weight) < 1e-5


def test_what_is_kept_and_what_is_not():
  assert made().kept == ()
  assert made(top_k=4).kept == ('teacher_ids', 'teacher_logps')
  assert made(top_k=4, on_the_fly=True).kept == ()


def test_stored_columns_need_no_teacher():
  (part,) = made(top_k=4).prepare(None, tiny.batch(4), None)
  assert part['teacher_ids'].shape == (4, tiny.LENGTH, 4)
  assert part['teacher_logps'].shape == (4, tiny.LENGTH, 5)
  np.testing.assert_allclose(
    np.exp(part['teacher_logps']).sum(-1), 1, rtol=1e-5
  )
  (again,) = made(top_k=4, teacher='/nowhere').prepare(None, part, None)
  assert again is part


def test_mistakes_are_named():
  with pytest.raises(UserError, match=r"stage\.teacher='': name a working"):
    made(teacher='')
  with pytest.raises(UserError, match=r'/nowhere: no config\.json'):
    made(teacher='/nowhere')
  with pytest.raises(UserError, match=r'stage\.alpha=1\.5: from 0 to 1'):
    made(alpha=1.5)
  small = tiny.model()
  with pytest.raises(UserError, match='260 tokens, and the student 64'):
    stage.make('distill', small, None, {'teacher': tiny.teacher()[0]})
