"""`scripts/tpu/tpu.sh`: what reaches a worker, and what resuming does."""

import os
import re
import shutil
import signal
import subprocess

import pytest
from stub_cloud import CREATION, SCRIPTS, WORDS, verbs


@pytest.mark.parametrize('name', ['lib.sh', 'tpu.sh', 'xpk.sh'])
def test_syntax(name):
  subprocess.run(['bash', '-n', str(SCRIPTS / name)], check=True)
  text = (SCRIPTS / name).read_text()
  assert max(map(len, text.splitlines())) <= 80
  if shutil.which('shellcheck'):
    subprocess.run(
      ['shellcheck', '-x', '-P', str(SCRIPTS), str(SCRIPTS / name)],
      check=True,
    )  # fmt: skip


# ---- what reaches a worker


def test_the_words_reach_the_worker_as_they_are(cloud):
  (ran,) = cloud.tpu('run', '--env=A=b c', '--env=B=', '--', *WORDS)
  assert ran[1:5] == ['compute', 'tpus', 'queued-resources', 'ssh']
  assert {'my-tpu', '--worker=all', '--node=all', '--zone=us-west4-a',
          '--project=my-project'} <= set(ran)  # fmt: skip
  told = cloud.trained()
  assert told['argv'] == WORDS[1:]
  assert told['a'] == 'b c'
  assert told['folder'] == str(cloud.home / 'tpu_lm')
  assert cloud.status() == '0'
  assert 'two words' in cloud.log()
  assert cloud.log().endswith('trains\n')
  assert not list(cloud.home.rglob('pwned'))


def test_exec_waits_for_the_words_and_tells_their_status(cloud):
  cloud.tpu('exec', '--env=A=1', '--', *WORDS)
  told = cloud.trained()
  assert told['argv'] == WORDS[1:]
  assert told['a'] == '1'
  assert cloud.call('exec', *CREATION, '--', 'false').returncode != 0


def test_what_runs_outlives_the_connection(cloud):
  busy = cloud.home / 'tpu_lm' / 'busy'
  busy.touch()
  cloud.tpu('run', '--', 'tpu_lm')  # and it came back
  told = cloud.trained()
  assert told['session'] != os.getsid(0)
  assert told['hangup'] == signal.SIG_IGN
  again = cloud.call('run', *CREATION, '--', 'tpu_lm')
  assert again.returncode != 0
  assert 'already running' in again.stderr
  said = cloud.call('status', *CREATION)
  assert re.fullmatch(r'\S+: running: trains\n', said.stdout)
  cloud.ran()
  cloud.tpu('stop')
  assert cloud.log().endswith('saved\n')
  assert cloud.status() == '0'
  assert 'ended with status 0' in cloud.call('status', *CREATION).stdout
  assert 'nothing runs' in cloud.call('stop', *CREATION).stdout


def test_what_does_not_end_is_killed(cloud):
  for name in ('busy', 'stubborn'):
    (cloud.home / 'tpu_lm' / name).touch()
  cloud.tpu('run', '--', 'tpu_lm')
  cloud.trained()
  told = cloud.call('stop', *CREATION, '--grace=1')
  assert 'killed' in told.stdout
  assert 'saved' not in cloud.log()


def test_logs(cloud):
  cloud.tpu('run', '--', 'tpu_lm')
  cloud.status()
  told = cloud.call('logs', *CREATION, '--no-follow', '--lines=1')
  assert re.fullmatch(r'\S+: trains\n', told.stdout)
  words = cloud.ran()[-1]
  assert {'--worker=0', '--node=0'} <= set(words)
  followed = cloud.call('logs', *CREATION, '--worker=all', '--dry-run').stdout
  assert 'tail -n 100 -F' in followed
  assert '--worker=all' in followed


def test_install_replaces_the_code_and_keeps_the_environment(cloud):
  old = cloud.home / 'tpu_lm' / 'tpu_lm'
  old.mkdir()
  (old / 'deleted.py').touch()
  cloud.trainer.unlink()  # the first time: there is no environment
  ran = cloud.tpu('install', '--include=my data.jsonl')
  assert verbs(ran) == ['scp', 'ssh']
  assert (old / 'new.py').read_text() == 'tpu_lm/new.py'
  assert not (old / 'deleted.py').exists()
  assert (cloud.home / 'tpu_lm' / 'my data.jsonl').exists()
  pythons = (cloud.home / 'pythons').read_text()
  assert '-m uv venv --quiet --seed --python 3.11 .venv' in pythons
  assert '--constraint requirements/cpu.txt --editable .[tpu]' in pythons
  marker = cloud.home / 'tpu_lm/.venv/marker'
  marker.touch()
  cloud.tpu('install')
  assert marker.exists()
  assert (cloud.home / 'pythons').read_text().count('uv venv') == 1


def test_nothing_private_is_copied(cloud):
  for name in ('.env', '.git', 'runs', '.venv'):
    (cloud.tree / name).mkdir()
  cloud.tpu('install')
  archive = cloud.tree / '.cache/tpu/tpu_lm.tar.gz'
  listed = subprocess.run(
    ['tar', '-tzf', str(archive)], capture_output=True, text=True, check=True
  ).stdout
  tops = {line.split('/')[0] for line in listed.splitlines()}
  assert tops == {
    'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'requirements',
    'scripts', 'configs', 'tpu_lm',
  }  # fmt: skip


# ---- creating and resuming


@pytest.mark.parametrize(
  ('given', 'expected', 'runtime'),
  [
    ('v4-8', 'v4-8', 'tpu-ubuntu2204-base'),
    ('v5e-8', 'v5litepod-8', 'v2-alpha-tpuv5-lite'),
    ('v5litepod-256', 'v5litepod-256', 'v2-alpha-tpuv5-lite'),
    ('v5p-128', 'v5p-128', 'v2-alpha-tpuv5'),
    ('v6e-256', 'v6e-256', 'v2-alpha-tpuv6e'),
  ],
)
def test_accelerators(cloud, given, expected, runtime):
  ran = cloud.tpu('create', f'--accelerator={given}')
  assert ran[0][4:] == [
    'create', 'my-tpu', '--project=my-project', '--zone=us-west4-a',
    f'--accelerator-type={expected}', f'--runtime-version={runtime}',
    '--node-id=my-tpu',
  ]  # fmt: skip
  assert verbs(ran) == ['create', 'describe']


def test_several_slices(cloud):
  by_name = cloud.tpu('create', '--accelerator=2xv5e-256')
  by_number = cloud.tpu('create', TPU_NUM_SLICES='2')
  assert by_name == by_number
  assert by_name[0][-2:] == ['--node-count=2', '--node-prefix=my-tpu']
  assert '--accelerator-type=v5litepod-256' in by_name[0]


def test_what_create_takes(cloud):
  (words, _) = cloud.tpu(
    'create', '--spot', '--runtime-version=mine', '--create-option=--labels=a=b'
  )
  assert words[-2:] == ['--spot', '--labels=a=b']
  assert '--runtime-version=mine' in words
  assert '--reserved' in cloud.tpu('create', '--reserved')[0]
  cloud.be('READY')
  (words, _) = cloud.tpu('create', '--kind=vm')
  assert words[3:6] == ['tpu-vm', 'create', 'my-tpu']
  assert words[-1] == '--version=v2-alpha-tpuv5-lite'
  (words,) = cloud.tpu('exec', '--kind=vm', '--ssh-option=--plain', '--', 'id')
  assert words[8:10] == ['--worker=all', '--plain']


def test_create_waits(cloud):
  cloud.be('WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE')
  assert verbs(cloud.tpu('create', '--poll=0')) == ['create'] + 3 * ['describe']
  cloud.be('PROVISIONING', 'FAILED')
  done = cloud.call('create', *CREATION, '--poll=0')
  assert done.returncode == 1
  assert 'error: my-tpu is FAILED' in done.stderr


def resumed(cloud, *states, options=()) -> list[str]:
  """What resuming did, from these states on; the words must have been run."""
  cloud.be(*states)
  ran = cloud.tpu('resume', '--spot', '--poll=0', *options, '--', *WORDS)
  assert cloud.trained()['argv'] == WORDS[1:]
  assert cloud.status() == '0'
  created = [words for words in ran if words[4] == 'create']
  assert all('--spot' in words for words in created)
  return verbs(ran)


@pytest.mark.parametrize(
  'gone', ['SUSPENDED', 'FAILED', 'SUSPENDING SUSPENDED']
)
def test_resume_after_a_preemption(cloud, gone):
  did = resumed(
    cloud, *gone.split(), 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'
  )
  looks = ['describe'] * len(gone.split())
  assert did == [
    *looks, 'delete', 'create', 'describe', 'describe', 'describe', 'scp',
    'ssh', 'ssh',
  ]  # fmt: skip


def test_resume_of_a_preempted_vm(cloud):
  did = resumed(cloud, 'PREEMPTED', 'READY', options=['--kind=vm'])
  assert did == [
    'describe',
    'delete',
    'create',
    'describe',
    'scp',
    'ssh',
    'ssh',
  ]


def test_resume_in_the_queue_waits_and_creates_nothing(cloud):
  did = resumed(cloud, 'PROVISIONING', 'ACTIVE')
  assert did == ['describe', 'describe', 'scp', 'ssh', 'ssh']


def test_resume_of_what_was_deleted_creates(cloud):
  did = resumed(cloud, 'NOT_FOUND', 'ACTIVE')
  assert did == ['describe', 'create', 'describe', 'scp', 'ssh', 'ssh']


def test_resume_after_a_crash_starts_again_on_the_same_machines(cloud):
  cloud.tpu('run', '--', 'false')
  assert cloud.status() == '1'
  cloud.ran()
  did = resumed(cloud, 'ACTIVE')
  assert did == ['describe', 'ssh', 'ssh', 'scp', 'ssh', 'ssh']


@pytest.mark.parametrize('is_busy', [True, False])
def test_resume_lets_what_runs_or_ended_well_alone(cloud, is_busy):
  busy = cloud.home / 'tpu_lm' / 'busy'
  if is_busy:
    busy.touch()
  cloud.tpu('run', '--', 'tpu_lm')
  cloud.trained()
  if not is_busy:
    cloud.status()
  before = cloud.log()
  assert verbs(cloud.tpu('resume', '--', 'tpu_lm')) == ['describe', 'ssh']
  assert cloud.log() == before


@pytest.mark.parametrize('state', ['DENIED', 'STOPPED'])
def test_resume_deletes_nothing_when_in_doubt(cloud, state):
  cloud.be(state)
  done = cloud.call('resume', *CREATION, '--kind=vm', '--', 'tpu_lm')
  assert done.returncode == 1
  assert ('PERMISSION_DENIED' if state == 'DENIED' else state) in done.stderr
  assert set(verbs(cloud.ran())) == {'describe'}


def test_delete_asks_unless_told(cloud):
  (words,) = cloud.tpu('delete')
  assert words[4:6] == ['delete', 'my-tpu']
  assert words[-1] == '--force'  # of the nodes in it; gcloud asks
  assert cloud.tpu('delete', '--yes')[0][-1] == '--quiet'
