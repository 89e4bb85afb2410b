"""A cloud that is not there: the scripts, stubs of their programs, a worker.

`gcloud`, `xpk` and `kubectl` are a stub that records its words. What it is told
to execute on a worker, it executes in another home.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

SCRIPTS = pathlib.Path(__file__).parents[2] / 'scripts' / 'tpu'
PROGRAMS = ('gcloud', 'xpk', 'kubectl')
FILES = (
  'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'requirements/cpu.txt',
  'tpu_lm/new.py', 'my data.jsonl',
)  # fmt: skip
# What breaks a command line that is put together without care.
WORDS = [
  'tpu_lm', 'train', 'two words', "it's", '"quoted"', '$HOME', '`id`',
  '$(touch pwned)', 'two\nlines $(NAME)', 'back\\slash', '\\', '', '*', '~',
  '--config.data.source=gs://b/a?b&c', '#no', ';', '-n', 'ä', 'tab\t!', '{a,b}',
]  # fmt: skip
CREATION = (
  '--name=my-tpu', '--project=my-project', '--zone=us-west4-a',
  '--accelerator=v5e-256',
)  # fmt: skip

STUB = """#!{python} -SE
import json, os, sys
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(os.environ['RECORD'], 'a') as f:
  f.write(json.dumps(words) + '\\n')
home = os.environ['WORKER_HOME']
if os.environ.get('FAIL', '-') in words:
  sys.exit('stub: told to fail')
if 'describe' in words:
  with open(os.environ['STATES'], 'r+') as f:
    state, *rest = f.read().split()
    f.seek(0)
    f.truncate()
    f.write(' '.join(rest or [state]))
  if state == 'NOT_FOUND':
    sys.exit('ERROR: (gcloud) NOT_FOUND: Resource was not found')
  if state == 'DENIED':
    sys.exit('ERROR: (gcloud) PERMISSION_DENIED: no such permission')
  print(state)
if 'scp' in words:
  with open(words[5], 'rb') as f:
    archive = f.read()
  with open(os.path.join(home, words[6].partition(':')[2]), 'wb') as f:
    f.write(archive)
if 'ssh' in words:
  os.environ['HOME'] = home
  script = words[-1].removeprefix('--command=')
  os.execvp('bash', ['bash', '-c', script])
"""
# Says what it was given, and trains as long as a file `busy` is there.
TRAINER = """#!{python} -SE
import json, os, signal, sys, time
if sys.argv[1:] == ['--version']:
  sys.exit(print('1.2.3'))
def stop(number, frame):
  if not os.path.exists('stubborn'):
    os.remove('busy')
    print('saved', flush=True)
signal.signal(signal.SIGTERM, stop)
told = {{'argv': sys.argv[1:], 'a': os.environ.get('A'), 'folder': os.getcwd(),
         'session': os.getsid(0), 'hangup': signal.getsignal(signal.SIGHUP)}}
with open(os.path.expanduser('~/trained.tmp'), 'w') as f:
  json.dump(told, f)
os.rename(f.name, os.path.expanduser('~/trained'))
print('trains', flush=True)
while os.path.exists('busy'):
  time.sleep(0.02)
"""
# Of a worker: makes an environment whose pip installs the trainer.
PYTHON = """#!/bin/bash
printf '%s\\n' "$*" >>~/pythons
case "$*" in
  *'uv venv'*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *--editable*) mkdir -p .venv/bin && cp "$TRAINER" .venv/bin/tpu_lm ;;
esac
"""


class Cloud:
  """A copy of the scripts, the stubs they find, and the home of a worker."""

  def __init__(self, folder: pathlib.Path):
    self.tree = folder / "a 'tree'"
    self.home = folder / 'home'
    self.record = folder / 'record'
    self.states = folder / 'states'
    stubs = folder / 'stubs'
    for path in (self.home / 'tpu_lm/.venv/bin', stubs, self.tree / 'configs'):
      path.mkdir(parents=True)
    shutil.copytree(SCRIPTS, self.tree / 'scripts' / 'tpu')
    for name in ('tpu_lm', 'requirements'):
      (self.tree / name).mkdir()
    for name in FILES:
      (self.tree / name).write_text(name)
    for name in PROGRAMS:
      self._write(stubs / name, STUB)
    self._write(stubs / 'python3', PYTHON)
    self._write(stubs / 'python', PYTHON)
    self.trainer = self.home / 'tpu_lm/.venv/bin/tpu_lm'
    self._write(folder / 'trainer', TRAINER)
    shutil.copy(folder / 'trainer', self.trainer)
    shutil.copy(stubs / 'python', self.trainer.parent / 'python')
    self.stubs = stubs
    self.environment = {
      'PATH': f'{stubs}:{os.environ["PATH"]}',
      'RECORD': str(self.record),
      'STATES': str(self.states),
      'WORKER_HOME': str(self.home),
      'TRAINER': str(folder / 'trainer'),
      'HOME': str(folder),
      'LANG': 'C.UTF-8',
    }
    self.be('ACTIVE')

  def _write(self, path: pathlib.Path, text: str) -> None:
    path.write_text(
      text.format(python=sys.executable) if '{p' in text else text
    )
    path.chmod(0o755)

  def be(self, *states: str) -> None:
    """What `describe` says, one after the other, and the last from then on."""
    self.states.write_text(' '.join(states))

  def call(self, *argv: str, program: str = 'tpu.sh', **environment: str):
    script = self.tree / 'scripts' / 'tpu' / program
    return subprocess.run(
      ['bash', str(script), *argv], capture_output=True, text=True,
      env=self.environment | environment, timeout=30, check=False,
      cwd=self.tree,
    )  # fmt: skip

  def ran(self) -> list[list[str]]:
    """The words of each program that ran since the last look."""
    if not self.record.exists():
      return []
    lines = self.record.read_text().splitlines()
    self.record.unlink()
    return [json.loads(line) for line in lines]

  def tpu(
    self, command: str, *argv: str, **environment: str
  ) -> list[list[str]]:
    """Calls tpu.sh, which must go well; returns what ran."""
    done = self.call(command, *CREATION, *argv, **environment)
    assert done.returncode == 0, done.stderr
    return self.ran()

  def trained(self) -> dict:
    """What the trainer was given; waits until it is there."""
    path = self.home / 'trained'
    wait_for(path.exists)
    told = json.loads(path.read_text())
    path.unlink()
    return told

  def status(self) -> str:
    path = self.home / 'tpu_lm_run' / 'status'
    wait_for(lambda: path.exists() and path.read_text())
    return path.read_text().strip()

  def log(self) -> str:
    return (self.home / 'tpu_lm_run' / 'log').read_text()


def wait_for(is_so) -> None:
  end = time.monotonic() + 10
  while not is_so():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.01)


def verbs(ran: list[list[str]]) -> list[str]:
  """`create`, `ssh`, …: what gcloud was asked for."""
  return [words[4] for words in ran]


def commands_of(text: str) -> list[list[str]]:
  """The commands of a script, which may have quoted line ends."""
  found, part = [], ''
  for line in text.splitlines(keepends=True):
    if not part and line.startswith('#'):
      continue
    part += line
    try:
      found.append(shlex.split(part))
    except ValueError:  # a quote is still open
      continue
    part = ''
  assert not part
  return found
