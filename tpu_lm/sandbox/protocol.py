"""The parent's side: servers, their pool, and what came back of a run.

What the sandbox says is data. A run's output is read as values (or as the
text that a program printed) and nothing in it can say that a test passed, or
that the sandbox failed: failures are read from the server's own channel,
which the answer does not hold.
"""

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import queue
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from tpu_lm.sandbox import values
from tpu_lm.sandbox.child import write_message

LAYERS = ('namespaces', 'uid', 'landlock', 'seccomp')
_MODULES = ('values', 'layers', 'child')
_OUTPUT = 1 << 20  # bytes that are read of a run
_START = 60  # seconds in which a server must be there, on a busy machine
_GRACE = 10  # seconds beyond its limit in which a server must answer
# No site packages, nothing of the working directory, no files written.
_OPTIONS = ('-P', '-s', '-S', '-B', '-X', 'utf8', '-c')
# All that a server's process is given; the answer finds it empty. The order of
# a set of strings, and so what an answer is worth, is the same in every run.
_ENVIRONMENT = {'PYTHONHASHSEED': '0'}
# Reads the modules from the standard input: nothing of the parent's file
# system has to be visible inside. (os.read: nothing more may be read ahead.)
_BOOT = """
import json, os, sys, types
def take(n):
  b = b''
  while len(b) < n:
    p = os.read(0, n - len(b))
    if not p: sys.exit(3)
    b += p
  return b
boot = json.loads(take(int.from_bytes(take(8), 'big')))
for name in ('tpu_lm', 'tpu_lm.sandbox'):
  sys.modules[name] = types.ModuleType(name)
package = sys.modules['tpu_lm.sandbox']
for name, text in boot['modules']:
  module = types.ModuleType(package.__name__ + '.' + name)
  sys.modules[module.__name__] = module
  setattr(package, name, module)
  exec(compile(text, name, 'exec'), module.__dict__)
package.child.serve(boot['config'])
"""


class SandboxError(Exception):
  """The sandbox failed, by no fault of the answer."""


class Outcome(NamedTuple):
  """What one step gave."""

  ok: bool  # it gave a value
  value: Any = None
  note: str = 'nothing came back'  # why there is none


class Run(NamedTuple):
  """What came of one answer.

  `status` is ended, late (killed at the time limit), flood (too much output),
  crashed (it takes the sandbox down with it) or failed: ours, to be masked.
  """

  status: str
  output: bytes  # of a program: what it printed
  outcomes: list[Outcome]  # one for every step
  note: str = ''


def _public(path: pathlib.Path) -> bool:
  """Whether any uid can execute this file."""
  folders = [path.parent, *path.parent.parents]
  return bool(path.stat().st_mode & 0o001) and all(
    folder.stat().st_mode & 0o001 for folder in folders
  )


@functools.cache
def interpreter(namespaces: bool) -> pathlib.Path:
  """The Python to run inside: this one, unless a dropped uid cannot reach it.

  Namespaces bind its prefix, so it is always this one there. Without them and
  as root, a Python under a private home gives way to the system's.
  """
  here = pathlib.Path(getattr(sys, '_base_executable', sys.executable))
  here = here.resolve()
  system = pathlib.Path('/usr/bin/python3')
  if namespaces or os.getuid() != 0 or _public(here) or not system.exists():
    return here
  check = 'import sys; sys.exit(sys.version_info < (3, 11))'
  done = subprocess.run([system, '-I', '-S', '-c', check], env={})
  return system.resolve() if done.returncode == 0 else here


def _bubblewrap(python: pathlib.Path, info: int) -> list[str]:
  """The command that makes the namespaces; `info` is told the inner pid."""
  prefix = python.parent.parent
  folders = ['/lib', '/lib64', '/usr/lib', '/usr/lib64']
  folders += ['/usr/share/zoneinfo', '/etc/ld.so.cache']
  bound = [word for path in folders for word in ('--ro-bind-try', path, path)]
  for path in (prefix / 'lib', python):
    # Made here, they can be entered; else they are as private as outside.
    for parent in list(reversed(path.parents))[1:]:
      bound += ['--dir', str(parent)]
    bound += ['--ro-bind', str(path), str(path)]
  kinds = ['ipc', 'pid', 'net', 'uts']
  if os.getuid() == 0:
    # The server leaves uid 0 by itself: with a uid that is only mapped to
    # another, RLIMIT_NPROC would not bind it.
    user = ['--cap-add', 'CAP_SETUID', '--cap-add', 'CAP_SETGID']
  else:
    user, kinds = [], ['user', *kinds]
  return [
    *('bwrap', *(f'--unshare-{kind}' for kind in kinds)),
    *('--unshare-cgroup-try', '--die-with-parent', '--new-session'),
    *('--cap-drop', 'ALL', *user, '--hostname', 'sandbox', '--clearenv'),
    *(x for pair in _ENVIRONMENT.items() for x in ('--setenv', *pair)),
    *('--info-fd', str(info), *bound, '--dev', '/dev', '--chdir', '/', '--'),
  ]


class Server:
  """One sandboxed interpreter that forks for every answer."""

  def __init__(self, wanted: Sequence[str] = LAYERS):
    """Starts it. Errors: SandboxError where it does not come up."""
    namespaces = 'namespaces' in wanted
    python = interpreter(namespaces)
    command = [str(python), *_OPTIONS, _BOOT]
    self._inner = 0
    told, telling = os.pipe()
    try:
      path = shutil.which('bwrap') or 'bwrap'
      if namespaces:
        command = [path, *_bubblewrap(python, telling)[1:], *command]
      self._process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_ENVIRONMENT,
        cwd='/',
        start_new_session=True,
        pass_fds=(telling,) if namespaces else (),
      )
    except OSError as error:
      os.close(told)
      raise SandboxError(f'cannot start {command[0]}: {error}') from error
    finally:
      os.close(telling)
    try:
      self._write(json.dumps(_boot(namespaces, wanted)).encode())
      if namespaces:
        self._inner = _inner_pid(told)
      self.held = json.loads(self._read(time.monotonic() + _START))
    except (OSError, ValueError) as error:
      self.close()
      raise SandboxError(f'the sandbox does not start: {error}') from error
    except BaseException:
      self.close()
      raise
    finally:
      os.close(told)

  def run(self, request: dict) -> tuple[str, bytes]:
    """The status and the bytes of one run. Errors: SandboxError."""
    try:
      self._write(json.dumps(request).encode())
      deadline = time.monotonic() + 2 * request['seconds'] + _GRACE
      status = json.loads(self._read(deadline))['status']
      output = self._read(deadline)
      self._read(deadline)  # once all that it started has ended
    except (OSError, ValueError) as error:
      raise SandboxError(f'the sandbox broke: {error}') from error
    if status == 'broken':
      raise SandboxError('the sandbox could not start a process')
    return status, output

  def close(self) -> None:
    """Kills it and all that is in it, and waits."""
    if self._inner:  # the first process of the namespace: all others go too
      with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.kill(self._inner, signal.SIGKILL)
        self._process.wait(5)  # bubblewrap waits for it, and ends
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    for file in (self._process.stdin, self._process.stdout):
      with contextlib.suppress(OSError):
        file.close()

  def _write(self, body: bytes) -> None:
    write_message(self._process.stdin.fileno(), body)

  def _read(self, deadline: float) -> bytes:
    """One message. Errors: SandboxError at the end, or at the deadline."""
    head = self._take(8, deadline)
    return self._take(int.from_bytes(head, 'big'), deadline)

  def _take(self, count: int, deadline: float) -> bytes:
    fd, found = self._process.stdout.fileno(), bytearray()
    while len(found) < count:
      left = max(deadline - time.monotonic(), 0)
      if not _ready(fd, left):
        raise SandboxError('the sandbox does not answer')
      piece = os.read(fd, count - len(found))
      if not piece:
        raise SandboxError('the sandbox has gone')
      found += piece
    return bytes(found)


def _boot(namespaces: bool, wanted: Sequence[str]) -> dict:
  """What a server is started with: its modules' text and what to try."""
  found = []
  for name in _MODULES:
    spec = importlib.util.find_spec(f'tpu_lm.sandbox.{name}')
    found.append((name, spec.loader.get_source(spec.name)))
  config = {'namespaces': namespaces, 'layers': list(wanted)}
  return {'modules': found, 'config': config}


def _ready(fd: int, seconds: float) -> bool:
  """Waits until something can be read, or the other end has gone."""
  # Not select: a trainer may have more than a thousand open files.
  waiting = select.poll()
  waiting.register(fd, select.POLLIN)
  return bool(waiting.poll(seconds * 1000))


def _inner_pid(fd: int) -> int:
  """The first process of the namespace, as bubblewrap tells it."""
  text = b''
  while b'}' not in text:
    if not _ready(fd, _START):
      raise SandboxError('bubblewrap does not answer')
    piece = os.read(fd, 4096)
    if not piece:
      raise SandboxError('bubblewrap was refused')
    text += piece
  return json.loads(text)['child-pid']


class Sandbox:
  """A pool of servers; `run` may be called from several threads."""

  def __init__(self, num_servers: int = 1, *, layers: Sequence[str] = LAYERS):
    """Servers are started when they are first needed."""
    self._layers = tuple(layers)
    self._idle: queue.LifoQueue[Server | None] = queue.LifoQueue()
    self._num_servers = num_servers
    for _ in range(num_servers):
      self._idle.put(None)

  def run(
    self,
    source: str,
    *,
    steps: Sequence[dict] | None = None,
    stdin: str = '',
    seconds: float = 2.0,
    memory: int = 512,
  ) -> Run:
    """Runs an answer: the steps of its tests, or as a program without them.

    seconds: of processor time; twice that by the clock. memory: MiB of
    address space.
    """
    nonce = secrets.token_hex(16)
    request = {'source': source, 'seconds': seconds, 'memory': memory}
    request['output'] = _OUTPUT
    if steps is None:
      request['stdin'] = stdin
    else:
      request |= {'steps': list(steps), 'nonce': nonce}
    count = 0 if steps is None else len(steps)
    try:
      status, output = self._run(request)
    except SandboxError as error:
      return Run('failed', b'', [Outcome(False)] * count, str(error))
    outcomes = _outcomes(output, nonce, count) if count else []
    return Run(status, output if steps is None else b'', outcomes)

  def _run(self, request: dict) -> tuple[str, bytes]:
    """Once more on a fresh server after a failure; then it is judged."""
    with contextlib.suppress(SandboxError):
      return self._run_once(request)
    try:
      return self._run_once(request)
    except SandboxError:
      # An answer that takes every server down would else be masked, which is
      # better for it than wrong. An empty one tells whose fault it is.
      self._run_once(request | {'source': '', 'steps': [], 'nonce': ''})
      return 'crashed', b''

  def _run_once(self, request: dict) -> tuple[str, bytes]:
    server = self._idle.get()
    try:
      server = server or Server(self._layers)
      answer = server.run(request)
    except BaseException:
      if server is not None:
        server.close()
      self._idle.put(None)
      raise
    self._idle.put(server)
    return answer

  def held(self) -> dict[str, Any]:
    """Which layers hold, as a server says. Errors: SandboxError."""
    server = self._idle.get()
    try:
      server = server or Server(self._layers)
      return server.held
    finally:
      self._idle.put(server)

  def close(self) -> None:
    """Ends all servers, once their runs are done."""
    for _ in range(self._num_servers):
      server = self._idle.get()
      if server is not None:
        server.close()
    for _ in range(self._num_servers):
      self._idle.put(None)

  def __enter__(self) -> 'Sandbox':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _outcomes(output: bytes, nonce: str, count: int) -> list[Outcome]:
  """The values of the steps; the first that is told of a step counts."""
  found: dict[int, Outcome] = {}
  for line in output.decode('ascii', 'replace').split('\n'):
    words = line.split(' ', 3)
    if len(words) < 4 or words[0] != nonce or len(words[1]) > 9:
      continue
    try:
      place = int(words[1])
    except ValueError:
      continue
    if place not in found and -1 <= place < count:
      found[place] = _outcome(words[2], words[3])
  missing = found.get(-1, Outcome(False))
  return [found.get(place, missing) for place in range(count)]


def _outcome(word: str, text: str) -> Outcome:
  if word != 'ok':
    return Outcome(False, note=f'raised {text[:60]}')
  try:
    return Outcome(True, values.decode(json.loads(text)), '')
  except (ValueError, TypeError, RecursionError, AttributeError, OverflowError):
    return Outcome(False, note='gave what is no value')
