import importlib.util
import os

import pytest

from tpu_lm.errors import UserError
from tpu_lm.plan import chips, topology


@pytest.fixture
def nothing_installed(monkeypatch):
  """No compiler for devices that are not here."""
  found = importlib.util.find_spec

  def find_spec(name, *rest):
    if name.startswith('jax_plugins.'):  # as where there is no jax_plugins
      raise ModuleNotFoundError(name)
    return None if name == 'libtpu' else found(name, *rest)

  monkeypatch.setattr(importlib.util, 'find_spec', find_spec)


@pytest.mark.parametrize(
  ('name', 'extra'), [('v5e-256', 'plan'), ('h100-8', 'cuda')]
)
def test_a_missing_compiler_names_the_extra(nothing_installed, name, extra):
  with pytest.raises(UserError) as caught:
    topology.devices(chips.find(name))
  assert str(caught.value).startswith(f'--topology={name}: needs the ')
  assert f"pip install 'tpu_lm[{extra}]'" in str(caught.value)


def test_the_extras_are_there():
  setup = os.path.join(os.path.dirname(__file__), '../../setup.py')
  with open(setup) as file:
    text = file.read()
  for extra in ('plan', 'cuda'):
    assert f"    '{extra}': [" in text


def test_a_process_that_plans_looks_for_no_tpu(monkeypatch):
  given = {'TPU_MIN_LOG_LEVEL': '0', 'JAX_PLATFORMS': 'tpu'}
  monkeypatch.setattr(topology.os, 'environ', given)
  topology.set_up()
  assert given['JAX_PLATFORMS'] == 'cpu'
  assert given['TPU_SKIP_MDS_QUERY'] == '1'
  assert given['ALLOW_MULTIPLE_LIBTPU_LOAD'] == '1'
  assert given['TPU_MIN_LOG_LEVEL'] == '0'  # what the user says stays
