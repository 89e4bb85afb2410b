"""Every loss and its gradient against TRL's own functions.

Runs where TPU_LM_PEER_PYTHON names a python that has torch and TRL:
  TPU_LM_PEER_PYTHON=/path/to/bin/python python -m pytest tests/parity
"""

import json
import os
import pathlib
import subprocess

import losses_cases
import numpy as np
import pytest

PYTHON = os.environ.get('TPU_LM_PEER_PYTHON', '')
pytestmark = pytest.mark.skipif(
  not PYTHON, reason='TPU_LM_PEER_PYTHON names no python with torch and TRL'
)
CASES = losses_cases.cases()


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
  """What TRL makes of all cases."""
  folder = tmp_path_factory.mktemp('trl')
  arrays = {
    f'{case}/{name}': value
    for case, (_, _, batch, params) in CASES.items()
    for name, value in (batch | params).items()
  }
  arrays |= {f'{case}/teacher': losses_cases.RAW_TEACHER for case in CASES}
  names = {
    case: (stage, hparams) for case, (stage, hparams, *_) in CASES.items()
  }
  np.savez(folder / 'in.npz', cases=json.dumps(names), **arrays)
  script = pathlib.Path(__file__).with_name('trl_losses.py')
  done = subprocess.run(
    [PYTHON, script, folder / 'in.npz', folder / 'out.npz'],
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return np.load(folder / 'out.npz')


@pytest.mark.parametrize('case', CASES)
def test_loss_and_gradient_are_those_of_trl(case, theirs):
  loss, gradient = losses_cases.ours(case)
  wanted, slopes = theirs[f'{case}/loss'], theirs[f'{case}/gradient']
  assert np.abs(slopes).max() > 1e-4
  np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=1e-6)
  # Relative to the largest entry, which is below 5 everywhere.
  np.testing.assert_allclose(
    gradient, slopes, rtol=0, atol=1e-5 * np.abs(slopes).max()
  )
  worst = np.abs(gradient - slopes).max() / np.abs(slopes).max()
  print(
    f'{case}: loss {wanted:.9g}, {abs(loss / wanted - 1):.1e}; '
    f'gradient {worst:.1e}'
  )
