"""Processes that hang, die or eat memory are replaced; the others go on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from tpu_lm.verifier import Verdict, Verifier, _Worker

RIGHT, WRONG = Verdict(True, True, True), Verdict(True, True, False)
LOST = Verdict(reference=True, answer=False, equal=False)
ENDLESS = '9^{9^{9^9}}'


@pytest.fixture
def verifier():
  made = Verifier(2, 2.0)
  yield made
  made.close()


def workers(verifier):
  return list(verifier._idle.queue)


def test_verdicts_come_in_their_order(verifier):
  pairs = [('4', r'\sqrt{16}'), ('4', r'\sqrt{17}'), ('4', r'\frac{')]
  assert verifier.verdicts(pairs)[:2] == [RIGHT, WRONG]
  assert not verifier.verdicts(pairs)[2].equal
  assert verifier.verdicts([]) == []
  assert 1 <= len(workers(verifier)) <= 2


def test_an_endless_comparison_ends_its_worker_alone(verifier):
  pairs = [('4', r'\sqrt{16}'), ('4', ENDLESS), ('4', r'\sqrt{16}')] * 2
  start = time.perf_counter()
  assert verifier.verdicts(pairs) == [RIGHT, LOST, RIGHT] * 2
  assert time.perf_counter() - start < 60
  assert verifier.verdicts(pairs[:1]) == [RIGHT]


def test_a_worker_that_was_killed_while_idle_is_replaced(verifier):
  assert verifier.verdicts([('4', '2^2')]) == [RIGHT]
  (worker,) = workers(verifier)
  worker._process.send_signal(signal.SIGKILL)
  worker._process.wait()
  assert verifier.verdicts([('4', '2^2')]) == [RIGHT]


def test_a_worker_that_is_stopped_is_given_up(verifier):
  assert verifier.verdicts([('4', '2^2')]) == [RIGHT]
  (worker,) = workers(verifier)
  worker._process.send_signal(signal.SIGSTOP)
  start = time.perf_counter()
  assert verifier.verdicts([('4', '2^2')]) == [LOST]
  assert time.perf_counter() - start < 40
  assert verifier.verdicts([('4', '2^2')]) == [RIGHT]


def test_an_endless_comparison_ends_also_without_anyone_who_waits():
  worker = _Worker()
  line = json.dumps([1.0, '4', ENDLESS])
  print(line, file=worker._process.stdin, flush=True)
  try:
    assert worker._process.wait(60) == -signal.SIGALRM
  finally:
    worker.close()


def test_workers_end_with_the_process_that_started_them():
  program = (
    'import os, signal; from tpu_lm.verifier import _Worker; worker = _Worker()'
    '; print(worker._process.pid, flush=True); os.kill(os.getpid(), 9)'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], stdout=subprocess.PIPE, timeout=60
  )
  for _ in range(100):
    try:
      os.kill(int(done.stdout), 0)
    except ProcessLookupError:
      return
    # A zombie has ended, too: nobody may be there to collect it.
    status = pathlib.Path(f'/proc/{int(done.stdout)}/status')
    if status.is_file() and 'State:\tZ' in status.read_text():
      return
    time.sleep(0.1)
  pytest.fail('a worker outlived its parent')


def test_closing_leaves_no_process_and_no_thread():
  made = Verifier(1, 5.0)
  made.verdicts([('4', '2^2')])
  (worker,) = workers(made)
  made.close()
  with pytest.raises(ProcessLookupError):
    os.kill(worker._process.pid, 0)
  assert not [x for x in threading.enumerate() if x.name.startswith('verifier')]


def test_no_worker_can_be_started(verifier, monkeypatch):
  monkeypatch.setattr('tpu_lm.verifier._PROGRAM', 'raise SystemExit(1)')
  assert verifier.verdicts([('4', '2^2')]) == [None]
