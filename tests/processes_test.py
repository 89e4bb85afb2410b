"""Runs of several processes, and of a number of devices that changes.

Each process simulates devices on the CPU; they meet by `jax.distributed`.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tiny
from rollouts_test import CONFIG, REWARDS, answers
from run_test import SIGNALLED, assert_alike, assert_same, lines, opened, quiet

from tpu_lm import config as configs
from tpu_lm import peers, processes, run
from tpu_lm.errors import UserError
from tpu_lm.phases import KILL_AT

ROOT = pathlib.Path(__file__).parents[1]
PLAIN = {'mesh.data': 1, 'optimizer.schedule': 'constant'}
MAIN = 'import sys; from tpu_lm.__main__ import run; run()'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('processes')
  tiny.write_config(folder)
  return folder


def config(folder, **overrides):
  shared = {'data.dir': folder / 'rows'}
  return tiny.config(folder, **(shared | PLAIN | overrides))


@pytest.fixture(scope='module')
def whole(folder):
  """8 steps of one process on one device."""
  workdir = folder / 'whole'
  run.execute(config(folder), workdir, quiet)
  return workdir


class Job:
  """Processes that train together; the overrides are those of `config`."""

  def __init__(
    self, folder, workdir, count=2, devices=2, codes=None, at=None, **overrides
  ):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    given = {'data.dir': folder / 'rows'} | PLAIN | {'mesh.data': -1}
    given |= overrides
    path = given.pop('config', folder / 'tiny.py')
    words = [
      'train', f'--config={path}', f'--workdir={workdir}',
      f'--devices={devices}',
      *(f'--config.{key}={value}' for key, value in given.items()),
    ]  # fmt: skip
    if count > 1:
      words += [f'--coordinator=localhost:{port}', f'--processes={count}']
    self.processes = []
    for i in range(count):
      code, environment = (codes or {}).get(i, MAIN), (at or {}).get(i, {})
      number = [f'--process={i}'] if count > 1 else []
      self.processes.append(
        subprocess.Popen(
          [sys.executable, '-c', code, *words, *number],
          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
          cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)} | environment,
        )
      )  # fmt: skip

  def finish(self, seconds=400):
    """[(status, output, errors, when it ended)] of all processes."""
    found = [None] * len(self.processes)

    def wait(i):
      out, err = self.processes[i].communicate(timeout=seconds)
      found[i] = self.processes[i].returncode, out, err, time.monotonic()

    threads = [
      threading.Thread(target=wait, args=(i,)) for i in range(len(found))
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    for process in self.processes:
      process.kill()
    return found

  def succeed(self):
    found = self.finish()
    for status, _, err, _ in found:
      assert status == 0, err[-3000:]
    return found[0][1]


def assert_ends_alike(folder, workdir, whole):
  assert_alike(lines(workdir), lines(whole))
  a, b = (opened(config(folder), w).state for w in (workdir, whole))
  a, b = jax.device_get((a.params, b.params))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), a, b
  )


@pytest.fixture(scope='module')
def half(folder):
  """What 2 processes of 2 devices leave after 4 steps."""
  workdir = folder / 'half'
  Job(folder, workdir, steps=4, **{'mesh.data': 2, 'mesh.fsdp': 2}).succeed()
  return workdir


def test_two_processes_are_one_and_one_goes_on_from_them(
  folder, whole, half, tmp_path
):
  """Batches (rows_crc) equal, losses to 1e-5."""
  expected = [line for line in lines(whole) if line['step'] <= 4]
  assert_alike(lines(half), expected)
  shutil.copytree(half, tmp_path / 'w')
  run.execute(config(folder), tmp_path / 'w', quiet)
  assert_ends_alike(folder, tmp_path / 'w', whole)


@pytest.mark.slow
def test_four_processes_go_on_from_two(folder, whole, half, tmp_path):
  shutil.copytree(half, tmp_path / 'w')
  Job(folder, tmp_path / 'w', 4, 2, **{'mesh.fsdp': 2}).succeed()
  assert_ends_alike(folder, tmp_path / 'w', whole)


@pytest.mark.slow
def test_processes_that_share_rows_give_them_once(folder, whole, tmp_path):
  """`tensor` goes across the two: both hold all rows."""
  overrides = {'mesh.data': 1, 'mesh.tensor': 2, 'steps': 3, 'eval_every': 3}
  Job(folder, tmp_path / 'w', 2, 1, **overrides).succeed()
  found = lines(tmp_path / 'w')
  train = [line for line in lines(whole) if line['step'] <= 3]
  assert_alike(found[:3], train)
  run.execute(config(folder, steps=3, eval_every=3), tmp_path / 'one', quiet)
  assert_alike(found, lines(tmp_path / 'one'))


@pytest.mark.slow
@pytest.mark.parametrize('gone', [1, 0])
def test_where_one_is_killed_all_end_and_go_on(folder, whole, tmp_path, gone):
  workdir = tmp_path / 'w'
  options = {'checkpoint.every': 2}
  killed = Job(folder, workdir, at={gone: {KILL_AT: 'step:6'}}, **options)
  found = killed.finish()
  assert found[gone][0] == -signal.SIGKILL
  status, _, err, when = found[1 - gone]
  assert status not in (0, -signal.SIGKILL)
  assert when - found[gone][3] < 60
  if gone:  # else JAX may abort it before
    assert status == peers.GONE
    told = err.strip().splitlines()[-1]
    assert re.match(r'error: process 1 is gone .*; start the same', told), err
  out = Job(folder, workdir, **options).succeed()
  assert re.search('continues from step [246] ', out)
  assert_ends_alike(folder, workdir, whole)


@pytest.mark.slow
def test_sigterm_to_one_stops_all_with_a_checkpoint(folder, whole, tmp_path):
  workdir = tmp_path / 'w'
  job = Job(folder, workdir, codes={1: SIGNALLED}, at={1: {'AT': 'step'}})
  assert 'stopped by' in job.succeed()
  saved = [int(p.name) for p in (workdir / 'checkpoints').iterdir()
           if p.name.isdecimal()]  # fmt: skip
  assert saved
  assert saved == [lines(workdir)[-1]['step']]
  assert saved[0] < 8
  run.execute(config(folder), workdir, quiet)
  assert_ends_alike(folder, workdir, whole)


def test_a_mistake_that_one_finds_is_told_by_all(folder, tmp_path):
  job = Job(folder, tmp_path / 'w', 2, 1, **{
    'data.source': tmp_path / 'none.txt', 'data.dir': tmp_path / 'rows',
  })  # fmt: skip
  first, second = job.finish()
  assert first[0] == 2
  assert first[2].strip().splitlines()[-1].startswith('error: ')
  assert second[0] == peers.GONE
  told = second[2].strip().splitlines()[-1]
  assert told.startswith('error: process 0 ended: ')
  assert 'none.txt' in told


def test_what_a_mesh_must_hold():
  mesh = tiny.mesh(data=2, fsdp=4)
  assert processes.share(mesh) == (0, 1)
  with pytest.raises(UserError, match=r'leaves devices out.*mesh\.data=-1'):
    processes.share(tiny.mesh(data=2))


def test_work_is_shared_out():
  spans = [processes.span(6, (i, 4)) for i in range(4)]
  assert [n for span in spans for n in span] == list(range(6))
  assert {len(span) for span in spans} == {1, 2}
  assert processes.span(6) == range(6)


# Stages whose host work is shared out.


@pytest.fixture(scope='module')
def rl(folder):
  run.execute(config(folder, steps=4), folder / 'base', quiet)
  (folder / 'tune.py').write_text(CONFIG)
  (folder / 'rewards.py').write_text(REWARDS)
  (folder / 'prompts.jsonl').write_text(
    ''.join(
      json.dumps({'prompt': f'What is {n}?', 'answer': str(n)}) + '\n'
      for n in range(40)
    )
  )
  return {
    'config': folder / 'tune.py', 'steps': 2,
    'data.source': folder / 'prompts.jsonl', 'data.dir': folder / 'prompts',
    'init_from': folder / 'base', 'stage.reward': f'{folder}/rewards.py:odd',
  }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
  'more',
  [
    {},
    {
      'stage.resample': 1, 'stage.updates': 2, 'stage.beta': 0.05,
      'evals': "('rewards',)", 'eval_rows': 3,
    },
  ],
  ids=['plain', 'all'],
)  # fmt: skip
def test_two_processes_answer_and_learn_as_one(folder, rl, tmp_path, more):
  """The same answers, rewards and losses; groups drawn again included."""
  rl = rl | more
  Job(folder, tmp_path / 'two', 2, 1, **rl).succeed()
  given = {k: str(v) for k, v in (PLAIN | rl).items() if k != 'config'}
  one = configs.load(str(rl['config']), list(given.items()))
  run.execute(one, tmp_path / 'one', quiet)
  for step in (1, 2):
    found, expected = (answers(tmp_path / n, step) for n in ('two', 'one'))
    assert found == expected
  found, expected = (lines(tmp_path / name) for name in ('two', 'one'))
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    for key in a.keys() - {'stage', 'split'}:
      assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (key, a, b)


@pytest.mark.slow
def test_two_processes_keep_columns_as_one(folder, tmp_path):
  teacher, _ = tiny.teacher()
  options = {
    'stage_name': 'distill', 'stage.teacher': teacher, 'stage.top_k': 4,
    'steps': 4, 'evals': "('heldout',)",
  }  # fmt: skip
  run.execute(config(folder, **options), tmp_path / 'one', quiet)
  Job(folder, tmp_path / 'two', 2, 2, **options).succeed()
  assert_alike(lines(tmp_path / 'two'), lines(tmp_path / 'one'))
  found = sorted((tmp_path / 'two/kept').rglob('*.npy'))
  assert len(found) == 2 * 3  # two splits, of each two columns and what is done
  for path in found:
    other = tmp_path / 'one' / path.relative_to(tmp_path / 'two')
    np.testing.assert_allclose(np.load(path), np.load(other), rtol=1e-4)


# A number of devices that changes.


def test_a_run_goes_on_with_other_numbers_of_devices(folder, whole, tmp_path):
  """1, then 4, then 2: the same batches and, to 1e-5, losses."""
  workdir = tmp_path / 'w'
  for steps, devices, mesh in (
    (3, 1, {'mesh.data': 1}),
    (6, 4, {'mesh.data': 2, 'mesh.fsdp': 2}),
    (8, 2, {'mesh.data': 1, 'mesh.fsdp': 2}),
  ):
    Job(folder, workdir, 1, devices, steps=steps, **mesh).succeed()
  ours = [x for x in lines(workdir) if x['split'] == 'train']
  assert_alike(ours, [x for x in lines(whole) if x['split'] == 'train'])
  with pytest.raises(UserError, match='was made with batch_size=8, not 4'):
    run.execute(config(folder, batch_size=4), workdir, quiet)
  assert_same(lines(workdir)[-1]['step'], 8)
