"""Sandboxes of every grade that this machine allows, for the tests of many."""

import os
import shutil

import pytest

from tpu_lm.sandbox import protocol
from tpu_lm.sandbox.layers import linux

KINDS = {
  'A': protocol.LAYERS,
  'B': ('uid', 'landlock', 'seccomp'),
  'C': ('uid',),
}


def box(kind: str, num_servers: int = 1) -> protocol.Sandbox:
  """A sandbox with the layers of a grade; skips where it cannot be."""
  if kind == 'A' and not shutil.which('bwrap'):
    pytest.skip('bubblewrap is not installed')
  if kind in 'AB' and not linux():
    pytest.skip('no Landlock, no seccomp')
  if kind == 'C' and os.getuid() != 0:
    # Without seccomp an answer could end what else its user runs.
    pytest.skip('without root there is no uid of its own')
  sandbox = protocol.Sandbox(num_servers, layers=KINDS[kind])
  try:
    sandbox.held()
  except protocol.SandboxError as error:
    pytest.skip(f'the sandbox does not start: {error}')
  return sandbox
