"""The program inside: a fork server, and the process that runs one answer.

The server forks a keeper for every request. That reads it, forks the process
that runs the answer, and writes back whatever bytes that process left in its
pipe. It believes none of them; the parent reads them as values at most. The
process closes the keeper's descriptors before a line of the answer runs, so
the answer holds one descriptor that leads out: its own pipe.

A request is JSON: `source`; `steps` with `nonce`, or `stdin`; `seconds` of
processor time, `memory` in MiB and `output`, the most bytes that are read. A
reply is JSON with the `status`, the bytes, and a last message, which is empty:

- ended: the process is gone; late: killed at the limit; flood: killed for
  more output than that;
- broken: it was never started. This is our failure, not the answer's.

A step is `do`, a statement, or `give`, an expression whose value is told, or
`call`, a function, with `args` and `named`, encoded values. They see the
answer's names, and keep their own in `scope`, which starts as a copy of the
scope `under` it. After a statement that raised, nothing more is told of a
scope: its names may be those of an earlier test.

This file runs inside, with layers.py and values.py alone.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import random
import select
import signal
import sys
import time
import types

from tpu_lm.sandbox import layers, values

# Imported once, before the files may be out of reach; a fork has them.
_READY = (
  *('abc', 'array', 'ast', 'base64', 'bisect', 'calendar', 'cmath'),
  *('collections', 'collections.abc', 'contextlib', 'copy', 'csv'),
  *('dataclasses', 'datetime', 'decimal', 'difflib', 'enum', 'fractions'),
  *('functools', 'hashlib', 'heapq', 'inspect', 'io', 'itertools', 'json'),
  *('keyword', 'math', 'numbers', 'operator', 'pprint', 'queue', 'random'),
  *('re', 'secrets', 'statistics', 'string', 'struct', 'sys', 'textwrap'),
  *('threading', 'time', 'traceback', 'types', 'typing', 'unicodedata', 'uuid'),
)
_THREADS = 64  # a run may have
_POLL = 0.02  # seconds between looks at the processor time of a run


def read_exactly(fd, count):
  """`count` bytes; fewer where the descriptor ends."""
  found = bytearray()
  while len(found) < count:
    piece = os.read(fd, min(count - len(found), 1 << 20))
    if not piece:
      break
    found += piece
  return bytes(found)


def read_message(fd):
  """The bytes after a length of eight bytes; None at the end."""
  head = read_exactly(fd, 8)
  if len(head) < 8:
    return None
  length = int.from_bytes(head, 'big')
  body = read_exactly(fd, length)
  return body if len(body) == length else None


def write_message(fd, body):
  """The body after its length."""
  rest = memoryview(len(body).to_bytes(8, 'big') + body)
  while rest:
    rest = rest[os.write(fd, rest) :]


def _readable():
  """What the interpreter needs: its library, shared objects, no more."""
  found = [path for path in sys.path if path]
  found += ['/lib', '/lib64', '/usr/lib', '/usr/lib64', '/usr/share/zoneinfo']
  return [*found, os.path.join(sys.base_prefix, 'lib'), '/dev/urandom']


def harden(config):
  """Binds the server itself; returns which layers hold.

  `layers` of the configuration names those to be tried: a test, or a machine
  of which the grade is asked, leaves some out.
  """
  os.environ.clear()  # of what Python and bubblewrap add
  for name in _READY:
    with contextlib.suppress(ImportError):
      importlib.import_module(name)
  wanted = config['layers']
  held = {'namespaces': config['namespaces']}
  was_root = os.getuid() == 0
  uid = layers.drop_uid() if 'uid' in wanted else os.getuid()
  held['uid'] = uid is not None and uid != 0
  held['user'] = os.getuid()
  held['alone'] = (was_root and held['uid']) or held['namespaces']
  kernel = {'landlock', 'seccomp'} & set(wanted)  # both ask for the first
  held['no_new_privs'] = bool(kernel) and layers.no_new_privs()
  held['landlock'] = 0
  if held['no_new_privs'] and 'landlock' in wanted:
    held['landlock'] = layers.landlock(_readable(), ['/dev/null'])
  held['seccomp'] = 'seccomp' in wanted and _holds(layers.seccomp)
  held['tasks'] = _THREADS + (0 if held['alone'] else layers.num_tasks(uid))
  held['python'] = sys.version.split()[0]
  if layers.linux():  # orphans of a run come to the server
    layers.adopt_orphans()
  return held


def _holds(layer):
  """Whether a layer that cannot be undone holds, tried in a fork."""
  pid = os.fork()
  if pid == 0:
    code = 1
    with contextlib.suppress(BaseException):
      code = 0 if layer() else 1
    os._exit(code)
  return os.waitpid(pid, 0)[1] == 0


def serve(config):
  """Answers requests until the standard input ends."""
  held = harden(config)
  write_message(1, json.dumps(held).encode())
  gc.freeze()  # collections in a fork would copy every page
  while select.select([0], [], [])[0]:
    keeper = os.fork()
    if keeper == 0:
      code = 1
      try:
        code = keep(held)
      finally:
        os._exit(code)
    code = os.waitpid(keeper, 0)[1]
    if not held['seccomp']:  # else an answer could start nothing
      end_all(held)
    if code:
      return
    write_message(1, b'')  # nothing of the answer is left


def keep(held):
  """Runs one request and replies; 0, or 1 at the end of the input.

  In a process of its own: what it read, and what the answer gave, goes with
  it. The next answer, a fork of the server, finds nothing of this one.
  """
  body = read_message(0)
  if body is None:
    return 1
  status, output = run_one(json.loads(body), held)
  write_message(1, json.dumps({'status': status}).encode())
  write_message(1, output)
  return 0


def run_one(request, held):
  """Forks for one request; its status and the bytes of its pipe."""
  read_end, write_end = os.pipe()
  ready, starting = os.pipe()
  pid = os.fork()
  if pid == 0:
    try:
      os.close(read_end)
      os.close(ready)
      _begin(request, held, write_end, starting)
    finally:
      os._exit(1)
  os.close(write_end)
  os.close(starting)
  try:
    began = os.read(ready, 1) == b'1'
    status, output = _listen(pid, read_end, request)
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
  return (status, output) if began else ('broken', b'')


def _listen(pid, fd, request):
  """Reads until the pipe ends, time is up or there is too much."""
  seconds, most = request['seconds'], request['output']
  # A machine that is busy elsewhere is not the answer's fault.
  deadline = time.monotonic() + 2 * seconds
  output = bytearray()
  while True:
    left = deadline - time.monotonic()
    if left <= 0 or _processor_time(pid) > seconds:
      return 'late', bytes(output)
    # What it started may hold the pipe, but is not the answer.
    gone = _gone(pid)
    wait = 0 if gone else min(left, _POLL)
    found = select.select([fd, 0], [], [], wait)[0]
    if 0 in found:  # nothing is asked meanwhile: the parent has gone
      raise SystemExit
    if fd not in found:
      if gone:
        return 'ended', bytes(output)
      continue
    piece = os.read(fd, 1 << 16)
    if not piece:
      return 'ended', bytes(output)
    output += piece
    if len(output) > most:
      return 'flood', b''


def _gone(pid):
  """Whether a child has ended, which is waited for later."""
  if not hasattr(os, 'waitid'):
    return False
  return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _processor_time(pid):
  """Seconds of all threads of a process; 0 where that is unknown."""
  try:
    return time.clock_gettime((~pid << 3) | 2)  # its CPUCLOCK_SCHED
  except OSError:
    return 0.0


def end_all(held):
  """Kills what an answer started, and waits until all of it has gone."""
  while True:
    if held['alone']:
      with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # all of this uid, or of this namespace
    else:
      for other in _children():
        with contextlib.suppress(ProcessLookupError):
          os.kill(other, signal.SIGKILL)
    try:
      os.waitpid(-1, 0)
    except ChildProcessError:
      return


def _children():
  """The pids whose parent this process is: a run's orphans."""
  found = []
  for name in os.listdir('/proc') if os.path.isdir('/proc') else ():
    with (
      contextlib.suppress(OSError, ValueError),
      open(f'/proc/{name}/stat') as f,
    ):
      if int(f.read().rsplit(')', 1)[1].split()[1]) == os.getpid():
        found.append(int(name))
  return found


def _begin(request, held, pipe, starting):
  """In the forked process: binds it, then runs the answer."""
  os.setsid()
  steps = 'steps' in request
  null = os.open(os.devnull, os.O_RDWR)
  given = null if steps else _file_of(request['stdin'].encode())
  os.dup2(given, 0)
  os.dup2(null if steps else pipe, 1)
  os.dup2(null, 2)
  if steps:  # not by a number that is easily guessed
    pipe = os.dup2(pipe, 20 + os.urandom(1)[0] % 40, inheritable=False)
  keep = {0, 1, 2, starting} | ({pipe} if steps else set())
  for fd in range(3, 64):
    if fd not in keep:
      with contextlib.suppress(OSError):
        os.close(fd)
  layers.limit(request['memory'], int(request['seconds']) + 2, held['tasks'])
  if held['seccomp'] and not layers.seccomp():
    return
  for fd, name in enumerate(('stdin', 'stdout', 'stderr')):
    file = io.FileIO(fd, 'w' if fd else 'r', closefd=False)
    buffer = io.BufferedReader(file) if fd == 0 else io.BufferedWriter(file)
    setattr(sys, name, io.TextIOWrapper(buffer, 'utf-8'))
  random.seed(0)  # an answer is worth the same in every run
  os.write(starting, b'1')
  os.close(starting)
  if steps:
    _run_steps(request, pipe)
  else:
    _run_program(request)


def _file_of(data):
  """A descriptor from which these bytes are read, of any length."""
  if hasattr(os, 'memfd_create'):
    fd = os.memfd_create('stdin')
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
  read_end, write_end = os.pipe()
  os.write(write_end, data[:65536])
  os.close(write_end)
  return read_end


def _module(name, source):
  """The answer, executed as a module of this name."""
  module = types.ModuleType(name)
  sys.modules[name] = module
  exec(compile(source, '<answer>', 'exec'), module.__dict__)
  return module.__dict__


def _run_program(request):
  """The answer as a program: what it prints is the output."""
  out = sys.stdout
  sys.argv = ['answer']
  with contextlib.suppress(BaseException):  # what was printed before counts
    _module('__main__', request['source'])
  with contextlib.suppress(BaseException):
    sys.stdout.flush()
  out.flush()
  os._exit(0)


def _run_steps(request, pipe):
  """One line for every call, `nonce place ok JSON` or `nonce place error`."""
  nonce, leave, write = request['nonce'], os._exit, os.write

  def tell(place, word, text):
    rest = f'{nonce} {place} {word} {text}\n'.encode('ascii', 'replace')
    while rest:
      rest = rest[write(pipe, rest) :]

  try:
    names = _module('answer', request['source'])
  except BaseException as error:
    tell(-1, 'error', type(error).__name__)
    leave(0)
  scopes, spoilt = {}, set()
  for place, step in enumerate(request['steps']):
    scope, under = step.get('scope', 0), step.get('under', 0)
    if scope not in scopes:
      scopes[scope] = dict(scopes.get(under, names))
      if under in spoilt:
        spoilt.add(scope)
    try:
      if scope in spoilt:
        raise RuntimeError
      if 'do' in step:
        spoilt.add(scope)  # unless it ends
        exec(compile(step['do'], '<test>', 'exec'), scopes[scope])
        spoilt.discard(scope)
        continue
      if 'give' in step:
        value = eval(compile(step['give'], '<test>', 'eval'), scopes[scope])
      else:
        args = [values.decode(x) for x in step['args']]
        named = {key: values.decode(x) for key, x in step['named'].items()}
        function = eval(compile(step['call'], '<test>', 'eval'), scopes[scope])
        value = function(*args, **named)
      text = json.dumps(values.encode(value))
    except BaseException as error:
      tell(place, 'error', type(error).__name__)
      continue
    tell(place, 'ok', text)
  leave(0)
