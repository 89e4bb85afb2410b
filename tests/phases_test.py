import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from tpu_lm.phases import HUNG, KILL_AT, Phases

ROOT = pathlib.Path(__file__).parents[1]


def start(workdir, *args: str, **environment: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, 'tests/toy_train.py', f'--workdir={workdir}', *args],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)} | environment,
  )


def steps(workdir) -> list[int]:
  folder = pathlib.Path(workdir) / 'checkpoints'
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def lines(workdir) -> list[dict]:
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for_step(workdir, step: int) -> None:
  deadline = time.monotonic() + 60
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  while not path.exists() or len(path.read_text().splitlines()) < step:
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_seconds_are_charged_to_the_innermost_phase():
  with Phases(watchdog_seconds=0) as phases:
    with phases('step'):
      time.sleep(0.05)
      with phases('compile'):
        assert phases.current == 'compile'
        time.sleep(0.1)
    with phases('step'):
      time.sleep(0.05)
  assert 0.1 <= phases.seconds['step'] < 0.19
  assert 0.1 <= phases.seconds['compile'] < 0.19


def test_without_the_main_thread_there_are_no_handlers():
  found = []

  def run():
    with Phases(watchdog_seconds=0) as phases:
      found.append((phases.install(), phases.stop_requested))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert found == [(False, False)]


def test_signals_mean_what_they_meant_after_close():
  before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  with Phases(watchdog_seconds=0) as phases:
    assert phases.install()
    phases.boundary(None)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 5
    while not phases.stop_requested and time.monotonic() < deadline:
      time.sleep(0.01)
    assert phases.stop_requested
    assert phases.signal_name == 'SIGTERM'
  after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  assert after == before
  assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_boundary(tmp_path, number):
  with start(tmp_path, '--steps=10000') as process:
    wait_for_step(tmp_path, 9)
    process.send_signal(number)
    began = time.monotonic()
    assert process.wait(timeout=20) == 0
    assert time.monotonic() - began < 10
  assert steps(tmp_path)[-1] == lines(tmp_path)[-1]['step'] > 8


@pytest.mark.parametrize('slow', ['compile', 'evaluate', 'save'])
def test_a_signal_in_a_long_phase(tmp_path, slow):
  with start(tmp_path, f'--slow={slow}') as process:
    words = {'compile': 'compiling', 'evaluate': 'evaluating', 'save': 'saving'}
    while words[slow] not in process.stdout.readline():
      assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(timeout=60) == 0
    assert time.monotonic() - began < 10
    told = process.stderr.read()
  # Compilation comes in step 9: step 8 had been saved by nobody.
  assert steps(tmp_path)[-1] == lines(tmp_path)[-1]['step']
  if slow == 'compile':
    assert steps(tmp_path)[-1] == 8
    assert 'stopped by SIGTERM while in compile' in told


def test_a_second_interrupt_ends_at_once(tmp_path):
  with start(tmp_path, '--slow=compile') as process:
    while 'compiling' not in process.stdout.readline():
      assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130


HANG = """
import time
from tpu_lm.phases import Phases
phases = Phases(watchdog_seconds=0.5)
for _ in range(4):
  with phases('step'):
    time.sleep(0.3)
print('alive', flush=True)
with phases('evaluate'):
  time.sleep(30)
"""


def test_the_watchdog_ends_a_run_that_hangs():
  done = subprocess.run(
    [sys.executable, '-c', HANG],
    capture_output=True,
    text=True,
    check=False,
    timeout=20,
    cwd=ROOT,
  )
  assert done.returncode == HUNG
  assert done.stdout == 'alive\n'
  assert "in phase 'evaluate'" in done.stderr
  assert 'File "<string>", line 10' in done.stderr  # where it hangs


@pytest.mark.parametrize(
  ('point', 'last_line', 'left_over'),
  [
    ('data:3', 2, None),
    ('step:3', 2, None),
    ('evaluate:2', 12, None),
    ('save:2', None, '12.orbax-checkpoint-tmp'),
    ('commit:2', None, '12.orbax-checkpoint-tmp-sealed'),
  ],
)
def test_kill_points_hit_what_they_name(tmp_path, point, last_line, left_over):
  with start(tmp_path, **{KILL_AT: point}) as process:
    assert process.wait(timeout=60) == -signal.SIGKILL
  if last_line:
    assert lines(tmp_path)[-1]['step'] == last_line
  if left_over:
    assert steps(tmp_path) == [6]
    folder = tmp_path / 'checkpoints' / left_over
    assert any(folder.glob('*/ocdbt*/d/*'))
    assert (folder / 'seal.json').exists() == point.startswith('commit')
