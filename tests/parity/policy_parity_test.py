"""Every policy loss and its gradient against TRL's own trainers.

Runs where TPU_LM_PEER_PYTHON names a python that has torch and TRL; see
losses_test.py. PPO is compared where TPU_LM_PEER_PPO names a folder with an
older TRL besides; see trl_ppo.py.
"""

import json
import os
import pathlib
import subprocess

import numpy as np
import policy_cases
import pytest

PYTHON = os.environ.get('TPU_LM_PEER_PYTHON', '')
PPO = os.environ.get('TPU_LM_PEER_PPO', '')
pytestmark = pytest.mark.skipif(
  not PYTHON, reason='TPU_LM_PEER_PYTHON names no python with torch and TRL'
)
CASES = policy_cases.cases()


def run(script: str, folder: pathlib.Path, arrays: dict, path: str = ''):
  """What a script makes of arrays, in the other python."""
  np.savez(folder / 'in.npz', **arrays)
  done = subprocess.run(
    [PYTHON, pathlib.Path(__file__).with_name(script), 'in.npz', 'out.npz'],
    cwd=folder,
    env=os.environ | {'PYTHONPATH': path},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return np.load(folder / 'out.npz')


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
  """What TRL makes of all cases."""
  arrays = {
    f'{name}/{key}': array
    for name, case in CASES.items()
    for key, array in policy_cases.rollout(case).items()
  }
  names = {name: (case.trainer, case.trl) for name, case in CASES.items()}
  arrays['cases'] = json.dumps(names)
  return run('trl_policy.py', tmp_path_factory.mktemp('trl'), arrays)


@pytest.mark.parametrize('name', CASES)
def test_loss_and_gradient_are_those_of_trl(name, theirs):
  loss, gradient = policy_cases.ours(name)
  wanted, slopes = theirs[f'{name}/loss'], theirs[f'{name}/gradient']
  norm = np.sqrt(np.square(slopes.astype(np.float64)).sum())
  print(f"  '{name}': ({wanted:.7g}, {norm:.7g}),")
  assert np.abs(slopes).max() > 1e-4
  if name not in policy_cases.GRADIENT_ONLY:
    np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=1e-6)
  # Relative to the largest entry, which is below 5 everywhere.
  np.testing.assert_allclose(
    gradient, slopes, rtol=0, atol=1e-5 * np.abs(slopes).max()
  )


@pytest.mark.skipif(not PPO, reason='TPU_LM_PEER_PPO names no folder')
def test_ppo_is_that_of_trl(tmp_path):
  given = policy_cases.rollout(CASES['grpo'])
  options = json.dumps([policy_cases.PPO, policy_cases.VALUE_WEIGHT])
  arrays = given | {
    'mask': policy_cases.answer_mask(given), 'options': options,
  }  # fmt: skip
  theirs = run('trl_ppo.py', tmp_path, arrays, PPO)
  for whiten in (False, True):
    for name, found in policy_cases.ours_ppo(whiten).items():
      wanted = theirs[f'{whiten}/{name}']
      norm = np.sqrt(np.square(wanted.astype(np.float64)).sum())
      print(f"  ({whiten}, '{name}'): {norm:.7g},")
      np.testing.assert_allclose(
        found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name
      )
