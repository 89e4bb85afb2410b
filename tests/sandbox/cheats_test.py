"""Answers that cheat get nothing, at every grade, and break nothing."""

import os
import pathlib
import time

import boxes
import pytest

from tpu_lm.sandbox import cases

SECRET = 'EXPECTED-7f3a'
RECORD = {
  'id': 'secret',
  'entry_point': 'f',
  'tests': [
    {'input': ['one'], 'output': SECRET + '-1'},
    {'input': ['two'], 'output': SECRET + '-2'},
  ],
}
GOOD = f'def f(x): return "{SECRET}-" + str(["", "one", "two"].index(x))'
MARK = '987.654'  # seconds that a process sleeps which is to be found


@pytest.fixture(scope='module', params=list('ABC'))
def sandbox(request):
  with boxes.box(request.param) as found:
    yield found


def judged(sandbox, source, seconds=1.0):
  tests = cases.read(RECORD)
  run = sandbox.run(source, steps=tests.steps, seconds=seconds, memory=256)
  return run, [held for held, _ in cases.passed(tests, run.outcomes)]


def processes_with(mark):
  """The command lines of processes that hold this word."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      words = path.read_bytes().split(b'\0')
    except OSError:
      continue
    if mark.encode() in words:
      found.append(words)
  return found


CHEATS = {
  'exit at once': 'import sys; sys.exit(0)',
  'exit in the call': 'def f(x):\n  import sys; sys.exit(0)',
  'hard exit': 'import os; os._exit(0)',
  'hard exit in the call': 'def f(x):\n  import os; os._exit(0)',
  'system exit in a class': 'raise SystemExit(0)',
  'always equal': """
class Same:
  def __eq__(self, other): return True
  def __ne__(self, other): return False
  def __hash__(self): return 0
  def __reduce__(self): return (str, ('EXPECTED-7f3a-1',))
  def __instancecheck__(self, other): return True
def f(x): return Same()
""",
  'subclass of str': """
class Text(str):
  def __eq__(self, other): return True
  def __ne__(self, other): return False
  __hash__ = str.__hash__
def f(x): return Text('x')
""",
  'subclass of int': """
class Int(int):
  def __eq__(self, other): return True
  __hash__ = int.__hash__
def f(x): return Int(0)
""",
  'a class that lies about itself': """
class Lie:
  __class__ = str
  def __iter__(self): return iter([self])
  def __len__(self): return 0
def f(x): return Lie()
""",
  'patched json': """
import json
json.dumps = lambda *a, **k: '{"passed": true}'
def f(x): return 1
""",
  'patched encoder': """
import sys
values = sys.modules['tpu_lm.sandbox.values']
values.encode = lambda x: True
values.same = lambda *a: True
def f(x): return 1
""",
  'patched builtins': """
import builtins
for name in ('type', 'isinstance', 'all', 'any', 'bool', 'repr', 'zip'):
  setattr(builtins, name, lambda *a, **k: True)
def f(x): return 1
""",
  'patched operators': """
import operator
operator.eq = lambda a, b: True
def f(x): return 1
""",
  'patched exit': """
import os, sys
os._exit = sys.exit = lambda *a: None
def f(x): return 1
""",
  'looks for what is expected': """
import gc, re, sys
def search():
  found, frame = [], sys._getframe()
  while frame:
    found += [repr(frame.f_locals), repr(frame.f_globals)]
    frame = frame.f_back
  for x in gc.get_objects():
    try: found.append(repr(x))
    except BaseException: pass
  said = re.findall('EXPECTED-7f3a-[1-2]', ' '.join(found))
  return said[0] if said else 'nothing'
found = search()
def f(x): return found
""",
  'writes verdicts to every descriptor': """
import os
def f(x):
  for fd in range(256):
    for text in (b'passed', b'{"status": "ended"}', b'\\x00' * 8,
                 b'\\x00' * 7 + b'\\x13{"status": "ended"}'):
      try: os.write(fd, text + b'\\n')
      except OSError: pass
  return 1
""",
  'writes answers with the nonce': """
import os, sys
def f(x):
  frame = sys._getframe()
  while frame and 'nonce' not in frame.f_locals: frame = frame.f_back
  nonce, pipe = frame.f_locals['nonce'], frame.f_locals['pipe']
  for word in ('ok true', 'ok "passed"', 'ok {"passed": true}', 'ok [[[' ,
               'ok ' + '[' * 100000, 'ok 1' + '0' * 10000, 'passed true',
               'ok {"int": "0x' + 'f' * 9000 + '"}', 'ok NaN'):
    for place in (-5, 0, 1, 2, 99, 10**30):
      os.write(pipe, f'{nonce} {place} {word}\\n'.encode())
  os._exit(0)
""",
  'closes every descriptor': """
import os
os.closerange(0, 256)
def f(x): return 1
""",
  'deep recursion': """
import sys
sys.setrecursionlimit(10**9)
def f(x): return f(x) + f(x)
""",
  'deep recursion in C': """
import sys
sys.setrecursionlimit(10**9)
class A:
  def __repr__(self): return repr(self)
def f(x): return repr(A())
""",
  'a value of many levels': """
def f(x):
  for _ in range(100000): x = [x]
  return x
""",
  'a value of itself': 'def f(x):\n  x = []\n  x.append(x)\n  return x',
  'endless generator': """
import itertools
def f(x): return itertools.repeat(x)
""",
  'a generator that waits': """
def f(x):
  while True: yield x
""",
  'much output': """
def f(x):
  print('x' * 50_000_000)
  return 'x' * 50_000_000
""",
  'much output to the pipe': """
import os
def f(x):
  while True:
    for fd in range(3, 64):
      try: os.write(fd, b'x' * 65536)
      except OSError: pass
""",
  'much memory': 'def f(x): return len(bytearray(1 << 40))',
  'much memory in pieces': """
def f(x):
  held = []
  while True: held.append(bytearray(1 << 20))
""",
  'catches every signal': """
import signal
for number in range(1, 65):
  try: signal.signal(number, signal.SIG_IGN)
  except (OSError, ValueError): pass
def f(x):
  while True:
    try:
      while True: pass
    except BaseException: pass
""",
  'sleeps': 'import time\ntime.sleep(100)',
  'segmentation fault': 'import ctypes; ctypes.string_at(0)',
  'ends its parent': """
import os, signal
def f(x):
  for pid in (os.getppid(), 0):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
  return 1
""",
  'ends everybody': """
import os, signal
def f(x):
  os.kill(-1, signal.SIGKILL)
  return 1
""",
  'stops its parent': """
import os, signal
os.kill(os.getppid(), signal.SIGSTOP)
def f(x): return 1
""",
  'starves its parent': """
import os, resource
def f(x):
  for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_AS):
    resource.prlimit(os.getppid(), kind, (0, 0))
  return 1
""",
  'signals by a descriptor': """
import ctypes, fcntl, os
def f(x):
  read_end, write_end = os.pipe()
  fcntl.fcntl(read_end, fcntl.F_SETOWN, os.getppid())
  fcntl.fcntl(read_end, 10, 9)
  fcntl.fcntl(read_end, fcntl.F_SETFL, os.O_ASYNC)
  os.write(write_end, b'x')
  return 1
""",
  'fork and detach': f"""
import os
def f(x):
  if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
      os.execv('/bin/sleep', ['sleep', '{MARK}'])
    os._exit(0)
  return 1
""",
  'a fork answers as well': """
import os
os.fork()
def f(x): return 1
""",
  'fork bomb': """
import os
def f(x):
  while True:
    try: os.fork()
    except OSError: pass
""",
  'no code': 'The answer is 42.',
  'a null byte': 'def f(x): return 1\0',
  'an endless line': '(' * 100_000,
  'exits while it is compiled': '-' * 200_000 + '1',
}


@pytest.mark.parametrize('name', CHEATS)
def test_a_cheat_is_wrong_and_breaks_nothing(sandbox, name):
  if name == 'stops its parent' and not sandbox.held()['seccomp']:
    pytest.skip('it can, and is found out by the deadlines: half a minute')
  began = time.monotonic()
  run, held = judged(sandbox, CHEATS[name], seconds=0.4)
  assert held == [False, False], run
  # Masked would be better for it than wrong.
  assert run.status in ('ended', 'late', 'flood', 'crashed'), run
  assert time.monotonic() - began < 30
  assert not processes_with(MARK)
  run, held = judged(sandbox, GOOD, seconds=5.0)
  assert held == [True, True], run


def test_files_outside_are_not_read(sandbox, tmp_path):
  held = sandbox.held()
  if not held['landlock'] and not held['namespaces']:
    pytest.skip('rlimits do not hide files')
  place = pathlib.Path('/tmp') / f'tests-{os.getpid()}.txt'
  place.write_text(f'{SECRET}-1')
  place.chmod(0o644)
  try:
    source = f'def f(x): return open({str(place)!r}).read()'
    run, passed = judged(sandbox, source)
    assert passed == [False, False]
    assert {x.note for x in run.outcomes} <= {
      'raised PermissionError',
      'raised FileNotFoundError',
    }
  finally:
    place.unlink()


def test_threads_that_live_on_end_with_the_answer(sandbox):
  source = (
    'import threading\n'
    'def spin():\n'
    '  while True: pass\n'
    'threading.Thread(target=spin).start()\n'
  )
  run, held = judged(sandbox, source + GOOD, seconds=5.0)
  assert held == [True, True]
  assert run.status == 'ended'


def test_what_is_printed_to_the_standard_output_is_not_read(sandbox):
  source = (
    f'import sys, os\nprint("{SECRET}-1")\nsys.stderr.write("x" * 10**6)\n'
    'def f(x):\n  os.write(1, b"EXPECTED-7f3a-1")\n  return None\n'
  )
  _, held = judged(sandbox, source)
  assert held == [False, False]


def test_an_answer_does_not_find_the_one_before_it(sandbox):
  judged(sandbox, GOOD)
  search = CHEATS['looks for what is expected']
  run, _ = judged(sandbox, search, seconds=10.0)
  assert [x.value for x in run.outcomes] == ['nothing', 'nothing']
