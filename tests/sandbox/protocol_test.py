"""Runs, their limits, failures that are ours, and what is left behind."""

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import boxes
import pytest

from tpu_lm.sandbox import protocol


@pytest.fixture(scope='module', params=list('AB'))
def sandbox(request):
  with boxes.box(request.param) as found:
    yield found


def give(sandbox, source, *expressions, **options):
  steps = [{'give': text} for text in expressions]
  return sandbox.run(source, steps=steps, **options)


def values(run):
  return [x.value for x in run.outcomes]


def test_calls_give_values_and_errors_stand_alone(sandbox):
  source = 'def f(x, k=1): return 10 / x * k'
  steps = [
    {'call': 'f', 'args': [5], 'named': {}},
    {'call': 'f', 'args': [0], 'named': {}},
    {'call': 'f', 'args': [5], 'named': {'k': {'tuple': [1]}}},
    {'call': 'f', 'args': [5], 'named': {'k': 3}},
  ]
  run = sandbox.run(source, steps=steps)
  assert run.status == 'ended'
  assert [x.note for x in run.outcomes] == [
    '',
    'raised ZeroDivisionError',
    'raised TypeError',
    '',
  ]
  assert values(run) == [2.0, None, None, 6.0]


def test_an_answer_that_does_not_load_gives_nothing(sandbox):
  run = give(sandbox, 'def f(:', '1', '2')
  assert [x.note for x in run.outcomes] == ['raised SyntaxError'] * 2


def test_a_scope_that_raised_tells_nothing_more(sandbox):
  steps = [
    {'do': 'x = 1'},
    {'do': 'y = x', 'scope': 1},
    {'do': 'y = 1 / 0', 'scope': 1},
    {'give': 'y', 'scope': 1},
    {'give': 'x'},
    {'do': 'y = x + 1', 'scope': 2},
    {'give': 'y', 'scope': 2},
  ]
  run = sandbox.run('', steps=steps)
  assert [run.outcomes[i].ok for i in (3, 4, 6)] == [False, True, True]
  assert run.outcomes[6].value == 2


def test_names_of_the_answer_stay_apart_from_the_tests(sandbox):
  source = 'x = 5\ndef f(): return x'
  run = sandbox.run(source, steps=[{'do': 'x = 1'}, {'give': 'f()'}])
  assert run.outcomes[1].value == 5


def test_classes_of_an_answer_know_their_module(sandbox):
  source = (
    'import dataclasses, typing\n'
    '@dataclasses.dataclass\n'
    'class A:\n'
    '  x: "int" = 3\n'
    'if __name__ == "__main__": raise ValueError\n'
  )
  assert values(give(sandbox, source, 'A().x')) == [3]


@pytest.mark.parametrize('kind', ['A', 'B'])
def test_an_answer_gives_the_same_in_every_run_and_server(kind):
  source = (
    'import random\n'
    'def f(): return [*{"a", "b", "c", "d", "e"}, random.random()]'
  )
  found = []
  for _ in range(2):
    with boxes.box(kind) as sandbox:
      found += [values(give(sandbox, source, 'f()')) for _ in range(2)]
  assert found == [found[0]] * 4
  assert len(found[0][0]) == 6


def test_programs_read_and_print(sandbox):
  source = 'import sys\nprint(input())\nprint(len(sys.stdin.read()), "ü")'
  run = sandbox.run(source, stdin='a\n' + 'b' * 300_000)
  assert run.output.decode() == 'a\n300000 ü\n'
  run = sandbox.run('if __name__ == "__main__": print(1)\nexit(3)')
  assert (run.status, run.output) == ('ended', b'1\n')


def test_nothing_is_left_of_the_run_before(sandbox):
  give(sandbox, 'import json\njson.x = 1\njson.dumps = None', '1')
  assert values(give(sandbox, 'import json', 'hasattr(json, "x")')) == [False]


@pytest.mark.parametrize(
  ('source', 'status', 'least', 'most'),
  [
    ('while True: pass', 'late', 0.3, 2.0),
    ('import time; time.sleep(9)', 'late', 0.6, 2.0),
    ('import threading, time\n'
     'for _ in range(9): threading.Timer(9, print).start()\n'
     'while True: pass', 'late', 0.3, 2.0),
    ('print("x" * 10**7)\nwhile True: pass', 'late', 0.3, 2.0),
  ],
)  # fmt: skip
def test_time_is_up(sandbox, source, status, least, most):
  began = time.monotonic()
  run = give(sandbox, source, '1', seconds=0.3)
  assert least <= time.monotonic() - began < most
  assert run.status == status
  assert not run.outcomes[0].ok


def test_values_before_the_end_are_kept(sandbox):
  source = 'def f(x):\n  while x: pass\n  return x'
  run = give(sandbox, source, 'f(0)', 'f(1)', 'f(0)', seconds=0.2)
  assert [x.ok for x in run.outcomes] == [True, False, False]


def test_a_program_that_floods_is_ended(sandbox):
  run = sandbox.run('while True: print("x" * 10000)', seconds=5.0)
  assert (run.status, run.output) == ('flood', b'')


def test_memory_is_bounded(sandbox):
  run = give(sandbox, '', 'len(bytearray(300 << 20))', memory=256)
  assert [x.note for x in run.outcomes] == ['raised MemoryError']
  run = give(sandbox, '', 'len(bytearray(300 << 20))', memory=512)
  assert values(run) == [300 << 20]


def test_a_failure_of_the_sandbox_is_no_answer(sandbox):
  # No such limit can be set, so the process is never made ready.
  run = give(sandbox, '', '1', memory=1 << 50)
  assert run.status == 'failed'
  assert not run.outcomes[0].ok
  assert values(give(sandbox, '', '1')) == [1]


def test_a_server_that_was_ended_is_replaced():
  with boxes.box('B') as sandbox:
    server = sandbox._idle.get()
    sandbox._idle.put(server)
    os.kill(server._process.pid, signal.SIGKILL)
    assert values(give(sandbox, 'def f(): return 4', 'f()')) == [4]


def test_who_ends_every_server_has_crashed_and_is_not_masked():
  with boxes.box('C') as sandbox:
    source = 'import os\nos.kill(os.getppid(), 9)\ndef f(): return 4'
    run = give(sandbox, source, 'f()')
    assert run.status == 'crashed'
    assert not run.outcomes[0].ok


def test_where_no_server_starts_all_runs_fail():
  sandbox = protocol.Sandbox(1, layers=('namespaces',))
  path = os.environ['PATH']
  os.environ['PATH'] = '/nowhere'
  try:
    run = give(sandbox, '', '1')
  finally:
    os.environ['PATH'] = path
  assert run.status == 'failed'
  assert 'cannot start bwrap' in run.note
  sandbox.close()


def test_threads_share_the_servers(sandbox):
  with (
    boxes.box('B', num_servers=2) as pool,
    concurrent.futures.ThreadPoolExecutor(4) as threads,
  ):
    runs = threads.map(
      lambda i: give(pool, f'def f(): return {i}', 'f()'), range(40)
    )
    assert [values(run) for run in runs] == [[i] for i in range(40)]


def test_two_servers_have_two_uids():
  if os.getuid() != 0:
    pytest.skip('needs root')
  with boxes.box('B') as one, boxes.box('B') as other:
    assert one.held()['user'] != other.held()['user'] != 0


def descendants(pid):
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      words = path.read_text().rpartition(')')[2].split()
    except OSError:
      continue
    if int(words[1]) == pid and words[0] != 'Z':
      child = int(path.parent.name)
      found += [child, *descendants(child)]
  return found


def gone(pids, seconds):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if not any(pathlib.Path(f'/proc/{pid}').exists() for pid in pids):
      return True
    time.sleep(0.05)
  return False


@pytest.mark.parametrize('kind', ['A', 'B', 'C'])
def test_nothing_outlives_a_close(kind):
  sandbox = boxes.box(kind)
  server = sandbox._idle.get()
  sandbox._idle.put(server)
  pids = [server._process.pid, *descendants(server._process.pid)]
  sandbox.close()
  assert gone(pids, 5)


@pytest.mark.parametrize('kind', ['A', 'B'])
def test_nothing_outlives_a_parent_that_was_killed(kind):
  boxes.box(kind).close()
  code = """
    import sys
    from tpu_lm.sandbox import protocol
    box = protocol.Sandbox(1, layers=sys.argv[1].split(','))
    box.held()
    print('up', flush=True)
    box.run('import time; time.sleep(60)', steps=[], seconds=60.0)
  """
  parent = subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(code), ','.join(boxes.KINDS[kind])],
    stdout=subprocess.PIPE,
  )
  try:
    assert parent.stdout.readline() == b'up\n'
    deadline = time.monotonic() + 10
    # The server, its keeper and the answer; bubblewrap adds two.
    while len(pids := descendants(parent.pid)) < (5 if kind == 'A' else 3):
      assert time.monotonic() < deadline, pids
      time.sleep(0.05)
  finally:
    parent.kill()
    parent.wait()
    parent.stdout.close()
  assert gone(pids, 10)


@pytest.mark.slow
def test_fifty_runs_a_second(sandbox):
  steps = [{'call': 'f', 'args': [i], 'named': {}} for i in range(3)]
  began = time.monotonic()
  for _ in range(100):
    run = sandbox.run('def f(x): return x + 1', steps=steps)
    assert values(run) == [1, 2, 3]
  assert 100 / (time.monotonic() - began) > 50
