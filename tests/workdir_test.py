import json
import os
import pathlib
import subprocess
import sys

import pytest

from tpu_lm import workdir
from tpu_lm.errors import UserError

HOLD = """
import sys, time
from tpu_lm import workdir
with workdir.lock(sys.argv[1]):
  print('held', flush=True)
  time.sleep(60)
"""


def test_one_writer_at_a_time_and_none_after_its_death(tmp_path):
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(tmp_path / 'run')],
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
  )
  with holder:
    try:
      assert holder.stdout.readline() == 'held\n'
      with (
        pytest.raises(UserError, match=f'process {holder.pid} on '),
        workdir.lock(tmp_path / 'run'),
      ):
        pass
    finally:
      holder.kill()
    holder.wait()
    with workdir.lock(tmp_path / 'run') as path:
      assert path == tmp_path / 'run'
      assert f'process {os.getpid()} on' in (path / 'lock').read_text()
  with workdir.lock(tmp_path / 'run'):  # and again in the same process
    pass


@pytest.mark.parametrize('below', ['', 'a/b'])
def test_a_file_in_the_way(tmp_path, below):
  (tmp_path / 'file').write_text('mine')
  with (
    pytest.raises(UserError, match='is a file'),
    workdir.lock(tmp_path / 'file' / below),
  ):
    pass
  assert (tmp_path / 'file').read_text() == 'mine'


def test_json_is_whole_or_the_old_one(tmp_path):
  path = tmp_path / 'config.json'
  workdir.write_json(path, {'b': 1, 'a': 'ä'})
  assert json.loads(path.read_text()) == {'a': 'ä', 'b': 1}
  with pytest.raises(TypeError):
    workdir.write_json(path, {'b': object()})
  assert json.loads(path.read_text()) == {'a': 'ä', 'b': 1}
  with pytest.raises(UserError, match='cannot be written'):
    workdir.write_json(tmp_path / 'no' / 'such.json', {})
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']


def test_a_mistake_leaves_no_new_directory(tmp_path):
  with (
    pytest.raises(UserError, match='a mistake'),
    workdir.lock(tmp_path / 'new'),
  ):
    raise UserError('a mistake')
  assert not (tmp_path / 'new').exists()
  (tmp_path / 'old').mkdir()
  with (
    pytest.raises(UserError, match='a mistake'),
    workdir.lock(tmp_path / 'old'),
  ):
    raise UserError('a mistake')
  assert (tmp_path / 'old').exists()
