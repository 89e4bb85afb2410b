"""`scripts/tpu`: what they print before they run, and say of mistakes."""

import re
import shlex
import shutil
import subprocess

import pytest
from stub_cloud import CREATION, PROGRAMS, WORDS, commands_of, verbs

TPU_COMMANDS = (
  'create', 'install', 'run', 'exec', 'logs', 'status', 'stop', 'delete',
)  # fmt: skip
XPK_COMMANDS = (
  'cluster-create', 'cluster-delete', 'run', 'list', 'logs', 'delete',
)  # fmt: skip
EVERY = [('tpu.sh', name) for name in TPU_COMMANDS]
EVERY += [('xpk.sh', name) for name in XPK_COMMANDS]


@pytest.mark.parametrize(('program', 'command'), EVERY, ids='-'.join)
def test_a_dry_run_is_a_script_of_what_the_real_run_does(
  cloud, program, command
):
  argv = [command, *CREATION, '--no-follow', '--spot']
  argv += ['--cluster=my-cluster'] * (program == 'xpk.sh')
  argv += ['--', *WORDS] * (command in ('run', 'exec'))
  dry = cloud.call(argv[0], '--dry-run', *argv[1:], program=program)
  assert dry.returncode == 0, dry.stderr
  assert dry.stderr == ''
  assert cloud.ran() == []
  assert not (cloud.tree / '.cache').exists()

  real = cloud.call(*argv, program=program)
  ran = cloud.ran()
  assert ran
  shown = ''.join(
    line.removeprefix('+ ') for line in real.stderr.splitlines(keepends=True)
  )
  for text in (dry.stdout, shown):
    printed = [x for x in commands_of(text) if x and x[0] in PROGRAMS]
    assert printed == ran

  if command in ('run', 'exec') and program == 'tpu.sh':
    cloud.trained()
  if command == 'run' and program == 'tpu.sh':
    cloud.status()
  pasted = subprocess.run(
    ['bash', '-e', '-c', dry.stdout], env=cloud.environment, check=False,
    capture_output=True, text=True,
  )  # fmt: skip
  assert pasted.returncode == real.returncode
  assert cloud.ran() == ran


def test_a_dry_run_needs_no_program(cloud):
  for name in ('dirname', 'bash'):
    (cloud.tree / 'bin').mkdir(exist_ok=True)
    (cloud.tree / 'bin' / name).symlink_to(shutil.which(name))
  path = str(cloud.tree / 'bin')
  assert cloud.call('status', *CREATION, '--dry-run', PATH=path).stdout
  missing = cloud.call('status', *CREATION, PATH=path)
  assert missing.returncode == 2
  assert re.fullmatch(
    r'error: gcloud: no such program; install it: .*\n', missing.stderr
  )


def test_a_dry_run_of_resume_shows_every_branch(cloud):
  dry = cloud.call('resume', *CREATION, '--dry-run', '--spot', '--', *WORDS)
  assert cloud.ran() == []
  shown = [x for x in commands_of(dry.stdout) if x[0] == 'gcloud']
  assert verbs(shown) == [
    'describe', 'ssh', 'ssh', 'delete', 'create', 'describe', 'scp', 'ssh',
    'ssh',
  ]  # fmt: skip


def test_what_goes_wrong_ends_the_rest(cloud):
  done = cloud.call('install', *CREATION, FAIL='scp')
  assert done.returncode == 1
  assert verbs(cloud.ran()) == ['scp']


# ---- mistakes

MISTAKES = [
  ('creat', r'creat: unknown command; see .*--help'),
  ('create --zone=', r'--zone: needs a value; give --zone=VALUE'),
  ('create --zone', r'--zone: needs a value'),
  (
    'create --zone=mars',
    r'--zone=mars: is no valid zone; give one like us-east5-b',
  ),
  (
    'create --project=A',
    r'--project=A: is no valid project; give one like my-project',
  ),
  (
    'create --name=My_TPU',
    r'--name=My_TPU: is no valid name; give one like my-tpu',
  ),
  ('create --zones=a', r'--zones=a: unknown option; see .*--help'),
  ('create -spot', r'-spot: stray word'),
  ('create --spot=1', r'--spot=1: takes no value'),
  ('create --spot --reserved', r'--spot and --reserved: choose one'),
  ('create --accelerator=v7-8', r'=v7-8: no such slice; known are v5e-N'),
  ('create --accelerator=v5e-7', r'=v5e-7: no such slice'),
  ('create --accelerator=v5p-12', r'=v5p-12: no such slice'),
  ('create --accelerator=v6e-08', r'=v6e-08: no such slice'),
  ('create --accelerator=2xv5e-8 --num-slices=3', r'is not --num-slices=3'),
  ('create --num-slices=0', r'--num-slices=0: .* at least 1'),
  ('create --num-slices=two', r'--num-slices=two: must be a whole number'),
  ('create --kind=pod', r'--kind=pod: choose one of queued, vm'),
  ('create --kind=vm --num-slices=2', r'--kind=vm: is one slice'),
  ('install --include=nothing', r'--include=nothing: is not in '),
  ('run', r'run: what shall run\? give it after --'),
  ('resume --', r'resume: what shall run\?'),
  ('resume --accelerator=v5e-7 -- a', r'=v5e-7: no such slice'),
  ('run --env=1=2 -- a', r'--env=1=2: is no NAME=VALUE'),
  ('exec --env=A -- a', r'--env=A: is no NAME=VALUE'),
  ('stop --grace=soon', r'--grace=soon: must be a whole number'),
]


def one_error(done, message):
  assert done.returncode == 2
  assert done.stdout == ''
  assert re.fullmatch(r'error: [^\n]*\n', done.stderr), done.stderr
  assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize(('line', 'message'), MISTAKES)
def test_a_mistake_is_one_line_and_runs_nothing(cloud, line, message):
  command, *rest = shlex.split(line)
  one_error(cloud.call(command, *CREATION, *rest), message)
  assert cloud.ran() == []


@pytest.mark.parametrize('missing', ['name', 'project', 'zone', 'accelerator'])
def test_what_is_missing_is_named_with_its_variable(cloud, missing):
  argv = [x for x in CREATION if not x.startswith(f'--{missing}')]
  variable = f'TPU_{missing.upper()}'
  told = cloud.call('create', *argv)
  one_error(told, rf'--{missing}: is missing; give .*, or export {variable}=')
  value = {x.split('=')[0]: x.split('=')[1] for x in CREATION}[f'--{missing}']
  assert cloud.call('create', *argv, **{variable: value}).returncode == 0


def test_mistakes_with_xpk(cloud):
  call = cloud.call
  one_error(call('list', program='xpk.sh'), r'--cluster: is missing')
  place = ('--cluster=c', *CREATION)
  one_error(
    call('cluster-create', *place, '--spot', '--reservation=r',
         program='xpk.sh'), r'--spot and --reservation: choose one',
  )  # fmt: skip
  one_error(call('run', *place, program='xpk.sh'), r'run: what shall run\?')
  one_error(call('pause', program='xpk.sh'), r'pause: unknown command')
  assert cloud.ran() == []


@pytest.mark.parametrize('argv', [['--help'], [], ['{command}', '--help']])
@pytest.mark.parametrize(
  ('program', 'commands'),
  [('tpu.sh', (*TPU_COMMANDS, 'resume')), ('xpk.sh', XPK_COMMANDS)],
)
def test_help(cloud, program, commands, argv):
  argv = [word.format(command=commands[0]) for word in argv]
  told = cloud.call(*argv, program=program)
  assert told.returncode == 0, told.stderr
  for command in commands:
    assert f'  {command} ' in told.stdout
  assert 'parse_options' not in told.stdout
