"""Mistakes end in one line on stderr, status 2, and nothing half-written."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import tiny

from tpu_lm import __version__, cli


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  return tiny.write_config(tmp_path_factory.mktemp('cli'))


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory):
  """A working directory after two steps."""
  workdir = tmp_path_factory.mktemp('trained')
  command = arguments(config, workdir, 'steps=2', 'checkpoint.every=1')
  assert cli.main(command) == 0
  return workdir


def arguments(config, workdir, *overrides):
  return [
    'train', f'--config={config}', f'--workdir={workdir}',
    *(f'--config.{override}' for override in overrides),
    *([] if any('warmup' in o for o in overrides)
      else ['--config.optimizer.warmup=1']),
    *([] if any('mesh' in o for o in overrides)
      else ['--config.mesh.data=1']),
  ]  # fmt: skip


def refused(capsys, argv, message):
  """Runs `argv`, which must fail with this one line."""
  capsys.readouterr()
  status = cli.main(argv)
  told = capsys.readouterr().err
  assert status == 2
  assert told.startswith('error: ')
  assert told.endswith('\n')
  assert told.count('\n') == 1, told
  assert re.search(message, told), told


def files(folder: pathlib.Path) -> dict:
  """Every file with its content."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file() and path.name != 'lock'
  }


CONFIG_MISTAKES = [
  ('stepz=5', r"stepz: unknown key \(did you mean 'steps'\?\)"),
  ('model.dimm=5', r"model\.dimm: unknown key.*'model\.dim'"),
  ('steps=many', r'steps=many: must be a whole number'),
  ('steps=-1', r'steps=-1: must be at least 1'),
  ('optimizer.learning_rate=-1', r'optimizer\.learning_rate=-1\.0: must be'),
  ('optimizer.name=adam_w', r"optimizer\.name='adam_w'.*'adamw'"),
  ('optimizer.warmup=8', r'optimizer\.warmup=8: must be less than steps=8'),
  ('stage_name=pretrian', r"stage_name='pretrian'.*'pretrain'"),
  ('stage.zloss=1', r"stage\.zloss: unknown key.*'z_loss'"),
  ('model_name=qwen33', r"model_name='qwen33'.*'qwen3'"),
  ('model.num_heads=5', r'model\.num_heads=5: must divide'),
  ('evals=bits_per_bite', r"evals='bits_per_bite'.*'bits_per_byte'"),
  ('mesh.data=16', r'mesh: data=16 needs 16 devices.*there are 8 cpu'),
  ('mesh.fsdp=3', r'mesh: fsdp=3 needs 3 devices'),
  ('mesh.data=3', r'batch_size=8: .* a multiple of 3'),
  ('microbatches=3', r'microbatches=3: must divide batch_size=8'),
  ('mesh.data=0', r'mesh\.data=0: give a size of at least 1'),
  ('mesh.tensor=4', r'mesh\.tensor=4: does not divide the 2 heads'),
  ('mesh.sequence=3', r'data\.length=16: cannot .* mesh\.sequence=3'),
  ('platform=tpu', r"platform='tpu': JAX found only cpu devices; pip install"),
  ('platform=gpu', r"platform='gpu': .*tpu_lm\[cuda\]"),
  ('platform=npu', r"platform='npu': choose one of cpu, gpu, tpu"),
  ('trainable=atention', r"trainable: no parameter path matches 'atention'"),
  ('init_from=/nowhere', r'init_from=/nowhere: no working directory'),
  ('data.source=', r'data\.source'),
  ('data.source=/nowhere.txt', r'/nowhere\.txt'),
  ('data.packing=best', r"data\.packing=best: .*'best_fit'"),
  ('data.tokenizer=/nowhere.json', r'/nowhere\.json'),
  ('data.heldout_share=2', r'data\.heldout_share=2'),
  ('data.heldout_by=luck', r'data\.heldout_by=luck: .* tail'),
]


@pytest.mark.parametrize(
  ('override', 'message'), CONFIG_MISTAKES, ids=lambda text: text[:24]
)
def test_a_mistake_in_a_configuration(
  config, tmp_path, capsys, override, message
):
  given = [override]
  if override == 'mesh.sequence=3':  # 16 positions in 3 parts
    given = ['mesh.data=1', override]
  refused(capsys, arguments(config, tmp_path / 'w', *given), message)
  # No checkpoint, no metrics, and no configuration of a run that never was.
  left = {name.split('/')[0] for name in files(tmp_path)}
  assert left <= {'w'}
  left = {p.name for p in (tmp_path / 'w').glob('*')}
  assert left <= {'lock', 'data'}, left


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('model.num_heads=5', ''),
    ('model.rope_theta=-1', ''),
    ('optimizer.name=x', ''),
    ('stage_name=x', ''),
    ('stage.x=1', ''),
    ('evals=x', ''),
    ('mesh.data=16', ''),
    ('trainable=atention', ''),
    ('init_from=/nowhere', ''),
  ],
)
def test_a_mistake_is_found_before_data_are_prepared(
  config, tmp_path, capsys, override, message
):
  """To read and tokenise may take an hour."""
  refused(capsys, arguments(config, tmp_path / 'w', override), message)
  assert not list((tmp_path / 'w').glob('data/*'))


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('model.dim=64', r'was made with model\.dim=32, not 64; .*--workdir'),
    ('model.rope_theta=5e4', r'was made with model\.rope_theta='),
    ('model_name=llama', r"was made with model_name='qwen3', not 'llama'"),
    ('seed=1', r'was made with seed=0, not 1'),
    ('data.length=8', r'was made with data\.length=16, not 8'),
    ('stage.z_loss=0.1', r'was made with stage\.z_loss='),
    ('trainable=mlp', r"was made with trainable='', not 'mlp'"),
    ('optimizer.name=lion', r"optimizer\.name='adamw', not 'lion'"),
    ('data.heldout_share=0.3', r'was trained with data\.heldout_share=.*, not'),
    ('data.tokenizer=bpe', r'other|tokenizer'),
  ],
)
def test_a_working_directory_of_another_run(
  config, trained, capsys, override, message
):
  before = files(trained)
  argv = arguments(config, trained, override, 'steps=4')
  if override == 'data.tokenizer=bpe':
    argv.append('--config.data.vocab_size=270')
  refused(capsys, argv, message)
  after = files(trained)
  changed = {
    name for name in before.keys() | after.keys()
    if before.get(name) != after.get(name)
  }  # fmt: skip
  # Rows for the other request may have been prepared, whole, beside the old.
  assert all(name.startswith('data/') for name in changed - before.keys())
  assert not changed & before.keys()


def test_what_may_change_between_runs(config, trained, capsys):
  argv = arguments(
    config, trained, 'steps=3', 'optimizer.learning_rate=0.02',
    'log_every=2', 'model.rope_theta=10000.0',
    'mesh.data=2',
  )  # fmt: skip
  assert cli.main(argv) == 0
  assert 'continues from step 2' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ([], r'required: command'),
    (['trian'], r"invalid choice: 'trian'"),
    (['train'], r'required: --config, --workdir'),
    (['train', '--config=CONFIG'], r'required: --workdir'),
    (['train', '--config=CONFIG', '--workdir=W', '--device=2'],
     r"--device=2: unknown option.*'--devices'"),
    (['train', '--config=CONFIG', '--workdir=W', '--devices=0'],
     r'--devices: 0: must be at least 1'),
    (['train', '--config=CONFIG', '--workdir=W', '--devices=two'],
     r'--devices: .*two'),
    (['train', '--config=CONFIG', '--workdir=W', 'stray'], r'stray'),
    (['train', '--config=CONFIG:tinny', '--workdir=W'],
     r"tinny: no such variant \(did you mean 'tiny'\?\)"),
    (['train', '--config=configs/pretrian.py', '--workdir=W'],
     r'pretrian\.py: no such file.*configs/pretrain\.py'),
    (['train', '--config=CONFIG', '--workdir=W', '--config.steps'],
     r'steps=true: must be a whole number'),
    (['train', '--config=CONFIG', '--workdir=W', '--config.=3'],
     r'unknown key'),
    (['train', '--config=CONFIG', '--workdir=CONFIG/x'], r'is a file'),
    (['train', '--config=CONFIG', '--workdir=W', '--processes=2'],
     r'--processes=2: .*--coordinator'),
    (['train', '--config=CONFIG', '--workdir=W', '--processes=2',
      '--process=2', '--coordinator=localhost:1'], r'--process=2: .*below'),
    (['prepare', '--config=CONFIG'], r'prepare: give --workdir'),
    (['generate', '--workdir=W'], r'W: no config\.json there'),
    (['generate', '--workdir=W', '--temperature=-1'], r'temperature'),
    (['generate', '--workdir=W', '--draft=lookup', '--ahead=0'], r'--ahead: 0'),
    (['generate', '--workdir=W', '--seed=-1'], r'--seed=-1: must be from 0'),
    (['generate', '--workdir=W', '--prompt=\udcff'], r'--prompt: is not UTF-8'),
    (['generate', '--workdir=W', '--config.steps=3'],
     r'--config\.steps: this command reads'),
    (['generate', '--workdir='], r'--workdir: is empty'),
    (['merge', '--workdir=W', '--to='], r'--to: is empty'),
    (['generate', '--workdir=W', '--draft=lookup', '--int8_cache'],
     r'--int8_cache: not together with --draft'),
    (['check', '--config=CONFIG', '--rows=abc'], r"invalid int value: 'abc'"),
    (['eval', '--workdir=W'], r'W: no config\.json there'),
    (['doctor', '--config.steps=3'], r'--config\.steps: this command'),
  ],
  ids=' '.join,
)  # fmt: skip
def test_a_mistake_on_the_command_line(
  config, tmp_path, capsys, monkeypatch, argv, message
):
  root = pathlib.Path.cwd()
  argv = [
    word.replace('CONFIG', str(config)).replace('=configs', f'={root}/configs')
    for word in argv
  ]
  monkeypatch.chdir(tmp_path)
  refused(capsys, argv, message)
  assert not files(tmp_path)


def test_overrides_are_taken_out_of_the_words():
  rest, overrides = cli.split_overrides(
    ['train', '--config=a.py', '--config.a.b=1=2', '--config.c', '3',
     '--config.d', '--workdir=w', '--config.e=']
  )  # fmt: skip
  assert rest == ['train', '--config=a.py', '--workdir=w']
  assert overrides == [('a.b', '1=2'), ('c', '3'), ('d', 'true'), ('e', '')]


@pytest.mark.parametrize('argv', [['--help'], ['train', '--help']])
def test_help_says_what_there_is(argv, capsys):
  with pytest.raises(SystemExit) as ended:
    cli.main(argv)
  assert ended.value.code == 0
  told = capsys.readouterr().out
  assert ('quickstart' if len(argv) == 1 else '--coordinator') in told


def test_version(capsys):
  with pytest.raises(SystemExit):
    cli.main(['--version'])
  assert capsys.readouterr().out.strip() == __version__


def test_the_module_is_the_command(tmp_path):
  """Status and stderr as a shell sees them; and help without JAX."""
  done = subprocess.run(
    [sys.executable, '-m', 'tpu_lm', 'generate', f'--workdir={tmp_path}',
     '--config.a=1'],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert (done.returncode, done.stdout) == (2, '')
  assert re.fullmatch(r'error: .*\n', done.stderr)
  quick = (
    'import sys, tpu_lm.cli as c; c.make_parser(); print("jax" in sys.modules)'
  )
  told = subprocess.run(
    [sys.executable, '-c', quick], capture_output=True, text=True, check=True
  )
  assert told.stdout == 'False\n'


def test_a_platform_that_is_not_there_is_no_traceback(config, tmp_path):
  """JAX itself raises where its environment asks for what it lacks."""
  done = subprocess.run(
    [sys.executable, '-m', 'tpu_lm', *arguments(config, tmp_path / 'w')],
    capture_output=True, text=True, check=False,
    env=os.environ | {'JAX_PLATFORMS': 'tpu'},
  )  # fmt: skip
  assert done.returncode == 2
  errors = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
  assert len(errors) == 1
  assert 'JAX_PLATFORMS=tpu: ' in errors[0]
  assert 'Traceback' not in done.stderr
