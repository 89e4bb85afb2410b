"""How strong the sandbox of this machine is, proven with canaries.

Each canary tries to break out, from inside and as an answer would; what it
reached is looked up here, outside. The grade:

- A: namespaces, Landlock, seccomp and a uid other than 0; nothing got out;
- B: seccomp and that uid, and one of Landlock and namespaces; nothing got out;
- C: less, or something got out. rlimits, a fresh process and an empty
  environment are left.
"""

import contextlib
import functools
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tpu_lm.errors import UserError
from tpu_lm.sandbox.protocol import LAYERS, Sandbox, SandboxError

_MOST_FORKS = 150  # tried; more than are allowed with threads counted in
_CANARIES = """
import ctypes, glob, os, signal, socket
def write(paths):
  for path in paths:
    try:
      open(path, 'w').close()
    except OSError: pass
def connect(port, name):
  for family, where in ((socket.AF_INET, ('127.0.0.1', port)),
                        (socket.AF_UNIX, name)):
    try:
      socket.socket(family).connect(where)
    except OSError: pass
def trace(pid):
  libc = ctypes.CDLL(None, use_errno=True)
  return libc.ptrace(16, pid, None, None) == 0
def signals(pid):
  os.kill(pid, signal.SIGKILL)
  return True
def environments():
  found = [str(dict(os.environ))] if os.environ else []
  for path in glob.glob('/proc/[0-9]*/environ'):
    try:
      if path.split('/')[2] != str(os.getpid()):
        found.append(open(path, errors='replace').read())
    except OSError: pass
  return [text for text in found if text][:100]
def forks(most):
  count = 0
  try:
    while count < most:
      if os.fork() == 0:
        signal.pause()
        os._exit(0)
      count += 1
  except OSError: pass
  return count
def memory(count):
  return len(bytearray(count))
"""


class Grade(NamedTuple):
  """What holds here."""

  letter: str  # A, B or C
  layers: tuple[str, ...]  # to start servers with
  held: dict[str, Any]  # layer: whether it holds
  escapes: tuple[str, ...]  # canaries that got out

  def __str__(self) -> str:
    names = ('namespaces', 'uid', 'no_new_privs', 'landlock', 'seccomp')
    parts = [name if self.held[name] else f'no {name}' for name in names]
    out = f'; got out: {", ".join(self.escapes)}' if self.escapes else ''
    return f'sandbox grade {self.letter}: {", ".join(parts)}{out}'


def grade(layers: Sequence[str] = LAYERS) -> Grade:
  """The grade of a sandbox of these layers, proven now (about a second).

  Errors: SandboxError where it does not start.
  """
  with Sandbox(1, layers=layers) as sandbox:
    held = sandbox.held()
    escapes = tuple(_escapes(sandbox, held))
  held_by = held['seccomp'] and held['uid'] and held['no_new_privs']
  walls = bool(held['landlock']) + bool(held['namespaces'])
  letter = 'CBA'[walls] if held_by and not escapes else 'C'
  return Grade(letter, tuple(layers), held, escapes)


@functools.cache
def strongest() -> Grade:
  """The best grade of this machine: with bubblewrap, or without it."""
  found = []
  if shutil.which('bwrap'):
    with contextlib.suppress(SandboxError):  # user namespaces may be refused
      found.append(grade())
  if not found or found[0].letter != 'A':
    found.append(grade([name for name in LAYERS if name != 'namespaces']))
  return min(found, key=lambda one: one.letter)


def sandbox(
  num_servers: int = 1,
  *,
  unsafe: bool = False,
  layers: Sequence[str] | None = None,
) -> Sandbox:
  """The strongest sandbox here, or one of these layers.

  Errors: UserError at grade C, unless unsafe.
  """
  try:
    found = strongest() if layers is None else grade(layers)
  except SandboxError as error:
    raise UserError(f'no sandbox for code on this machine: {error}') from error
  if found.letter == 'C' and not unsafe:
    raise UserError(
      f'{found}; run code where Linux has seccomp and Landlock or bubblewrap, '
      'or set unsafe=True'
    )
  return Sandbox(num_servers, layers=found.layers)


@contextlib.contextmanager
def _neighbour(user: int, secret: str) -> Iterator[subprocess.Popen]:
  """A process of the sandbox's own uid, with a secret in its environment."""
  other = os.getuid() == 0 and user != 0
  process = subprocess.Popen(
    ['/bin/cat'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={'TPU_LM_SECRET': secret},
    cwd='/',
    **({'user': user, 'group': user, 'extra_groups': []} if other else {}),
  )
  try:
    process.stdin.write(b'up\n')
    process.stdin.flush()
    process.stdout.readline()  # else it may not have its environment yet
    yield process
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):
      process.stdin.close()


@contextlib.contextmanager
def _listeners(name: str) -> Iterator[list[socket.socket]]:
  """Sockets that wait: one on the loopback, one with an abstract name."""
  with contextlib.ExitStack() as stack:
    found = []
    for family, where in (
      (socket.AF_INET, ('127.0.0.1', 0)),
      (socket.AF_UNIX, name),
    ):
      listener = stack.enter_context(socket.socket(family))
      listener.bind(where)
      listener.listen()
      listener.setblocking(False)
      found.append(listener)
    yield found


def _reached(listener: socket.socket) -> bool:
  try:
    listener.accept()[0].close()
  except BlockingIOError:
    return False
  return True


def _escapes(sandbox: Sandbox, held: dict[str, Any]) -> Iterator[str]:
  """The names of the canaries that got out."""

  def run(name: str, *args: Any) -> Any:
    step = {'call': name, 'args': list(args), 'named': {}}
    found = sandbox.run(_CANARIES, steps=[step], seconds=5.0)
    if found.status == 'failed':
      raise SandboxError(f'canary {name}: {found.note}')
    return found.outcomes[0].value

  secret = secrets.token_hex(16)
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o777)
    places = [pathlib.Path(folder) / 'out']
    places += [pathlib.Path('/tmp') / secret, pathlib.Path('/dev/shm') / secret]
    run('write', [str(path) for path in places])
    if any(path.exists() for path in places):
      yield 'wrote a file'
    for path in places:
      path.unlink(missing_ok=True)
  with _listeners(f'\0{secret}') as listeners:
    run('connect', listeners[0].getsockname()[1], f'\0{secret}')
    if any(map(_reached, listeners)):
      yield 'connected a socket'
  yield from _neighbourly(run, held, secret)
  if run('forks', _MOST_FORKS) not in (*range(held['tasks'] + 1), None):
    yield 'forked without bound'
  if run('memory', 4 << 30) is not None:
    yield 'took memory without bound'
  if run('len', 'ab') != 2:
    raise SandboxError('the sandbox did not outlive its canaries')


def _neighbourly(
  run: Callable, held: dict[str, Any], secret: str
) -> Iterator[str]:
  """Those that go for a neighbour of the same uid.

  A fresh one each: at grade C a server ends all of its uid after every run.
  """
  with _neighbour(held['user'], secret):
    if any(secret in text for text in run('environments') or ()):
      yield "read a neighbour's environment"
  with _neighbour(held['user'], secret) as neighbour:
    if run('trace', neighbour.pid):
      yield 'traced a neighbour'
  with _neighbour(held['user'], secret) as neighbour:
    if run('signals', neighbour.pid):
      yield 'killed a neighbour'
