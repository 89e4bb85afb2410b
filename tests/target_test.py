import types

import jax

from tpu_lm import target


def test_programs_are_for_what_is_here_or_what_is_planned():
  assert target.platform() == jax.default_backend() == 'cpu'
  tpu = types.SimpleNamespace(platform='tpu')
  gpu = types.SimpleNamespace(platform='gpu')
  with target.planned(tpu):
    assert target.platform() == 'tpu'
    with target.planned(gpu):
      assert target.platform() == 'gpu'
    assert target.platform() == 'tpu'
  assert target.platform() == 'cpu'
