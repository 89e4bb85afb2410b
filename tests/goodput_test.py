"""Where the wall time of a run went."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny

from tpu_lm import drill, goodput, metrics
from tpu_lm.phases import Phases

ROOT = pathlib.Path(__file__).parents[1]


def writer(workdir, resume_step=0):
  settings = {'total_steps': 9, 'tokens_per_step': 1, 'flops_per_step': 0}
  return metrics.Writer(
    workdir, resume_step, stage='pretrain', out=io.StringIO(), **settings
  )


def ledger_of(workdir, spent, before=0.0):
  """A ledger whose process has spent these seconds in its phases."""
  (workdir / 'config.json').touch()
  phases = Phases(watchdog_seconds=0)
  phases.seconds |= spent
  began = time.monotonic() - sum(spent.values()) - before
  return goodput.Ledger(workdir, phases, began)


def test_what_no_phase_has_is_start_up_and_then_other(tmp_path):
  ledger = ledger_of(tmp_path, {'init': 2.0, 'compile': 3.0}, before=1.5)
  assert ledger.parts()['start_up'] == pytest.approx(3.5, abs=0.05)
  ledger.started()
  ledger._began -= 0.25  # a quarter of a second in no phase
  found = ledger.parts()
  assert found['start_up'] == pytest.approx(3.5, abs=0.05)
  assert found['other'] == pytest.approx(0.25, abs=0.05)
  assert sum(found.values()) == pytest.approx(6.75, abs=0.05)


def test_steps_beyond_the_checkpoint_are_lost_once(tmp_path):
  """By hand: 4 s of steps saved, 3 s and 1 s of them lost by two kills."""
  with ledger_of(tmp_path, {'step': 4.0, 'data': 1.0}) as one:
    one.started()
    with writer(tmp_path) as out:
      one.mark(out, 4)
      one._phases.seconds['step'] += 3.0
      one._began -= 3.0
      one.mark(out, 6)  # a save that was not committed
  two = ledger_of(tmp_path, {'step': 1.0})
  two.resume(4)
  assert two.parts()['lost'] == pytest.approx(3, abs=0.05)
  assert two.parts()['step'] == pytest.approx(4 + 1, abs=0.05)
  with two, writer(tmp_path, 4):
    pass  # killed before its first save
  three = ledger_of(tmp_path, {})
  three.resume(4)
  found = three.parts()
  assert found['lost'] == pytest.approx(3 + 1, abs=0.05)
  assert found['step'] == pytest.approx(4, abs=0.05)
  assert found['data_wait'] == pytest.approx(1, abs=0.05)
  assert sum(found.values()) == pytest.approx(4 + 1 + 3 + 1, abs=0.1)
  nothing_saved = ledger_of(tmp_path, {})
  nothing_saved.resume(0)
  assert nothing_saved.parts()['lost'] == pytest.approx(9, abs=0.1)


def test_a_compilation_is_taken_out_of_the_phase_it_is_in():
  with Phases(watchdog_seconds=0) as phases, phases('evaluate'):
    time.sleep(0.1)
    phases.move(0.06, 'compile')
  assert phases.seconds['compile'] == pytest.approx(0.06)
  assert 0.04 <= phases.seconds['evaluate'] < 0.1


def test_what_is_told():
  parts = {'step': 58.2, 'start_up': 1.2, 'data_wait': 3.1, 'save': 0.01}
  assert goodput.told(parts) == (
    'goodput 93.1 % of 62.5 s: step 58.2 s, data wait 3.1 s, start-up 1.2 s'
  )


# Real runs.


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('goodput')
  tiny.write_config(folder)
  return folder


def started(folder, workdir, **overrides):
  given = {
    'data.dir': folder / 'rows', 'steps': 4000, 'log_every': 20,
    'eval_every': 400, 'checkpoint.every': 400, 'mesh.data': 1,
  } | overrides  # fmt: skip
  return subprocess.Popen(
    [
      sys.executable, '-m', 'tpu_lm', 'train',
      f'--config={folder / "tiny.py"}', f'--workdir={workdir}', '--devices=1',
      *(f'--config.{key}={value}' for key, value in given.items()),
    ],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
  )  # fmt: skip


def timed(process, begin):
  out, err = process.communicate(timeout=300)
  return time.monotonic() - begin, out, err


def wait_for_step(workdir, step):
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:
    path = workdir / 'metrics.jsonl'
    if (
      path.exists()
      and max((line['step'] for line in metrics.read(path)), default=0) >= step
    ):
      return
    time.sleep(0.01)
  raise AssertionError(f'no step {step}')


@pytest.mark.slow
def test_parts_add_up_to_the_wall_time_of_killed_and_resumed(folder):
  """Of one process, and over a SIGKILL of two; drill sees no difference."""
  begin = time.monotonic()
  wall, out, err = timed(started(folder, folder / 'whole'), begin)
  last = metrics.ledger(folder / 'whole/metrics.jsonl')[-1]
  parts = last['parts']
  assert sum(parts.values()) == pytest.approx(wall, rel=0.01), err
  assert last['seconds'] == pytest.approx(wall, rel=0.01)
  assert 'lost' not in parts
  assert min(parts.values()) >= 0
  assert parts['compile'] > 0 < parts['checkpoint']
  assert parts['start_up'] > 1 < parts['step']
  assert out.splitlines()[-1].startswith(
    f'goodput {100 * last["goodput"]:.1f} % of '
  )

  begin = time.monotonic()
  killed = started(folder, folder / 'cut')
  wait_for_step(folder / 'cut', 1100)
  killed.send_signal(signal.SIGKILL)
  first = timed(killed, begin)[0]
  at_kill = json.loads((folder / 'cut/goodput.json').read_text())['parts']
  assert sum(at_kill.values()) == pytest.approx(first, rel=0.02)
  begin = time.monotonic()
  second, out, err = timed(started(folder, folder / 'cut'), begin)
  assert 'continues from step' in out, err
  path = folder / 'cut/metrics.jsonl'
  found = metrics.ledger(path)[-1]['parts']
  assert sum(found.values()) == pytest.approx(first + second, rel=0.01)
  # It had gone on for 300 of 1,100 steps, or 700 if 800 was not committed.
  trained = at_kill['step'] + at_kill['data_wait']
  assert 0.1 * trained < found['lost'] < 0.9 * trained
  assert not list(
    drill._metric_differences(folder / 'whole/metrics.jsonl', path)
  )
