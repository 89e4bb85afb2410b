"""The cloud that the tests of `scripts/tpu` reach."""

import os
import subprocess

import pytest
import stub_cloud


@pytest.fixture
def cloud(tmp_path):
  made = stub_cloud.Cloud(tmp_path)
  yield made
  pid = made.home / 'tpu_lm_run' / 'pid'
  if pid.exists() and not (pid.parent / 'status').exists():
    with open(os.devnull, 'w') as nothing:
      subprocess.run(
        ['kill', '-KILL', '--', f'-{pid.read_text().strip()}'],
        check=False, stderr=nothing,
      )  # fmt: skip
