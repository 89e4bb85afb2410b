import shlex

import pytest
from made_runs import make_run

from tpu_lm import config as configs
from tpu_lm.report import command, records

VARIANTS = ('', 'sft', 'lora', 'qlora', 'reward', 'dpo', 'student', 'distill')


def options(text):
  """{'config': …, 'workdir': …} and the overrides of a command."""
  words = shlex.split(text.replace('\\\n', ' '))
  assert words[:2] == ['tpu_lm', 'train']
  pairs = [word.removeprefix('--').split('=', 1) for word in words[2:]]
  overrides = [(k[7:], v) for k, v in pairs if k.startswith('config.')]
  return dict(pairs), overrides


def repeated(text):
  """The configuration that a command leads to."""
  given, overrides = options(text)
  spec = command.FOLDER / given['config'].removeprefix('configs/')
  return configs.load(str(spec), overrides)


@pytest.fixture
def base(tmp_path):
  return make_run(tmp_path / 'a base' / 'pretrain')


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_command_leads_to_the_very_configuration(variant, base, tmp_path):
  own = []
  if variant in ('sft', 'lora', 'qlora', 'reward', 'dpo'):
    own = [('init_from', str(base))]
  if variant == 'distill':
    own = [('stage.teacher', str(base))]
  name = variant or 'pretrain'
  folder = make_run(tmp_path / 'life' / name, variant, overrides=own)
  record = records.read(folder)
  text = command.command(record)
  given, overrides = options(text)
  assert given['workdir'] == str(folder)
  assert repeated(text).to_dict() == record.config.to_dict()
  # The variant of that stage, and nothing but where it begins.
  assert given['config'] == f'configs/quickstart.py{variant and ":"}{variant}'
  assert [key for key, _ in overrides] == [key for key, _ in own]


def test_changes_of_every_type_are_kept(tmp_path):
  changes = [
    ('steps', '7'),
    ('seed', '3'),
    ('optimizer.learning_rate', '1.25e-7'),
    ('tensorboard', 'true'),
    ('evals', "('bits_per_byte',)"),
    ('data.source', 'it\'s a "file" $HOME; rm -rf.txt'),
    ('stage.loss_type', 'ipo'),
    ('stage.label_smoothing', '0.1'),
    ('stage.tag', "'12'"),  # text that looks like a number
    ('model.num_layers', '2'),
  ]
  folder = make_run(tmp_path / 'mine', 'dpo', overrides=changes)
  record = records.read(folder)
  assert record.config.stage.tag == '12'
  text = command.command(record)
  assert repeated(text).to_dict() == record.config.to_dict()


def test_without_a_file_that_leads_there_no_command_is_made_up(
  tmp_path, monkeypatch
):
  folder = make_run(tmp_path / 'mine')
  monkeypatch.setattr(command, 'FOLDER', tmp_path / 'no configs')
  assert command.command(records.read(folder)) is None


def test_a_base_that_is_gone_changes_nothing(base, tmp_path):
  own = [('init_from', str(base))]
  folder = make_run(tmp_path / 'sft', 'sft', overrides=own)
  record = records.read(folder)
  base.rename(base.with_name('moved'))
  given, overrides = options(command.command(record))
  assert given['config'] == 'configs/quickstart.py:sft'
  found = dict(overrides)
  assert found['init_from'] == str(base)
  assert found['model.num_layers'] == '4'  # no longer to be taken from there
