"""The grade is proven: a layer that lacks is seen by what gets out."""

import os
import shutil

import boxes
import pytest

from tpu_lm import sandbox
from tpu_lm.errors import UserError
from tpu_lm.sandbox.layers import linux


def test_rlimits_alone_are_grade_c_and_the_canaries_get_out():
  boxes.box('C').close()
  found = sandbox.grade(('uid',))
  assert found.letter == 'C'
  assert {
    'wrote a file',
    'connected a socket',
    'killed a neighbour',
    "read a neighbour's environment",
  } <= set(found.escapes)
  assert 'forked without bound' not in found.escapes
  assert 'took memory without bound' not in found.escapes
  assert str(found).startswith('sandbox grade C: no namespaces, uid, ')


def test_seccomp_without_a_wall_for_files_is_seen():
  if not linux() or os.getuid() != 0:
    pytest.skip('needs Linux, and root for a uid of its own')
  found = sandbox.grade(('uid', 'seccomp'))
  assert found.letter == 'C'
  assert set(found.escapes) == {
    'wrote a file',
    "read a neighbour's environment",
  }


@pytest.mark.parametrize('kind', ['A', 'B'])
def test_all_layers_contain_all_canaries(kind):
  boxes.box(kind).close()
  found = sandbox.grade(boxes.KINDS[kind])
  if not found.held['landlock']:
    pytest.skip('the kernel has no Landlock')
  assert found.letter == kind
  assert found.escapes == ()


def test_root_without_a_uid_of_its_own_is_grade_c():
  if not linux() or os.getuid() != 0:
    pytest.skip('needs Linux and root')
  assert sandbox.grade(('landlock', 'seccomp')).letter == 'C'


def test_grade_c_is_refused_unless_the_user_says_unsafe():
  boxes.box('C').close()
  with pytest.raises(UserError, match='unsafe=True'):
    sandbox.sandbox(layers=('uid',))
  with sandbox.sandbox(layers=('uid',), unsafe=True) as found:
    run = found.run('def f(): return 1', steps=[{'give': 'f()'}])
    assert run.outcomes[0].value == 1


def test_where_bubblewrap_is_refused_the_rest_is_taken(tmp_path, monkeypatch):
  boxes.box('B').close()
  refusing = tmp_path / 'bwrap'
  refusing.write_text('#!/bin/sh\necho No permissions >&2\nexit 1\n')
  refusing.chmod(0o755)
  monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
  with pytest.raises(sandbox.SandboxError, match=r'does not start|was refused'):
    sandbox.grade()
  found = sandbox.strongest.__wrapped__()  # the kept one is of another PATH
  assert 'namespaces' not in found.layers
  assert found.letter in 'BC'


def test_many_open_files_do_no_harm():
  held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
  try:
    with boxes.box('B') as found:
      run = found.run('', steps=[{'give': '1'}])
  finally:
    for fd in held:
      os.close(fd)
  assert run.outcomes[0].value == 1


def test_the_strongest_is_taken():
  found = sandbox.strongest()
  for kind in 'AB':
    if kind == 'A' and not shutil.which('bwrap'):
      continue
    if linux() and found.held['landlock'] and found.held['uid']:
      assert found.letter <= kind or kind == 'A'
  assert sandbox.strongest() is found
