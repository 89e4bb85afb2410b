import json
import pathlib

import pytest
import tiny

from tpu_lm import config as configs
from tpu_lm import workdir
from tpu_lm.errors import UserError

SHIPPED = sorted(pathlib.Path('configs').glob('*.py'))


@pytest.fixture
def folder(tmp_path):
  tiny.write_config(tmp_path)
  return tmp_path


def load(folder, **overrides):
  return tiny.config(folder, **overrides)


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_sound(path):
  variants = ['', ':tiny'] if ':tiny' in path.read_text() else ['']
  for variant in variants:
    config = configs.load(f'{path}{variant}', [])
    assert config.steps > 0
    with pytest.raises(UserError, match='tinny'):
      configs.load(f'{path}:tinny', [])


def test_there_are_shipped_configs():
  assert SHIPPED  # else the test above is none


@pytest.mark.parametrize(
  ('key', 'text', 'value'),
  [
    ('steps', '12', 12),
    ('optimizer.learning_rate', '1e-3', 1e-3),
    ('optimizer.learning_rate', '1', 1.0),
    ('data.source', '12', '12'),  # text stays text
    ('data.source', 'a=b.txt', 'a=b.txt'),
    ('tensorboard', 'true', True),
    ('tensorboard', 'False', False),
    ('evals', '("bits_per_byte",)', ('bits_per_byte',)),
    ('evals', 'bits_per_byte', ('bits_per_byte',)),
    ('evals', '[]', ()),
    ('model.rope_theta', '500000', 500_000.0),
    ('model.window_pattern', '(1, 0)', (1, 0)),
    ('model.tied', 'false', False),
    ('mesh.data', '-1', -1),
    ('seed', '7', 7),
  ],
)
def test_an_override_has_the_type_of_its_key(folder, key, text, value):
  found = load(folder, **{key: text})
  for part in key.split('.'):
    found = found[part]
  assert found == value
  assert type(found) is type(value)


def test_overrides_of_a_stage_are_left_to_the_stage(folder):
  config = load(folder, **{'stage.z_loss': '0.1', 'stage.name': 'x'})
  assert config.stage.to_dict() == {'z_loss': 0.1, 'name': 'x'}


@pytest.mark.parametrize(
  ('key', 'text', 'message'),
  [
    ('stepz', '5', r"--config\.stepz: unknown key.*'steps'"),
    ('optimiser.name', 'x', r"optimiser\.name: unknown key.*'optimizer\.name'"),
    ('model.dimm', '5', r"model\.dimm: unknown key.*'model\.dim'"),
    ('data', '5', r'--config\.data: unknown key.*it is a section'),
    ('model', '5', r'--config\.model: unknown key.*it is a section'),
    ('steps', 'ten', r'steps=ten: must be a whole number'),
    ('steps', '1.5', r'steps=1\.5: must be a whole number'),
    ('steps', 'True', r'steps=True: must be a whole number'),
    ('steps', '', r'steps=: must be a whole number'),
    ('optimizer.learning_rate', 'high', r'learning_rate=high: must be a numb'),
    ('tensorboard', '1', r'tensorboard=1: must be true or false'),
    ('model.tied', '0', r'model\.tied=0: must be true or false'),
    ('steps', '0', r'steps=0: must be at least 1'),
    ('steps', '-5', r'steps=-5: must be at least 1'),
    ('batch_size', '0', r'batch_size=0: must be at least 1'),
    ('microbatches', '-1', r'microbatches=-1: must be at least 1'),
    ('log_every', '0', r'log_every=0: must be at least 1'),
    ('eval_every', '-1', r'eval_every=-1: must not be negative'),
    ('eval_rows', '-1', r'eval_rows=-1: must not be negative'),
    ('seed', '-1', r'seed=-1: must not be negative'),
    ('data.length', '1', r'data\.length=1: must be at least 2'),
    ('data.length', '-256', r'data\.length=-256: must be at least 2'),
    ('checkpoint.every', '0', r'checkpoint\.every=0: must be at least 1'),
    ('checkpoint.keep', '0', r'checkpoint\.keep=0: must be at least 1'),
    ('guard.bad_in_a_row', '0', r'guard\.bad_in_a_row=0: must be at least 1'),
    ('guard.window', '1', r'guard\.window=1: must be at least 2'),
    ('guard.spike_factor', '-1', r'guard\.spike_factor=-1\.0: must not be neg'),
    ('watchdog', '-1', r'watchdog=-1\.0: must not be negative'),
    ('watchdog', '1e999', r'watchdog=inf: must be finite'),
    ('trainable', 'mlp(', r"trainable='mlp\(': no regular expression"),
    ('seed', str(2**70), r'seed=1180591620717411303424: must be below'),
  ],
)
def test_a_mistyped_value_is_refused_by_name(folder, key, text, message):
  with pytest.raises(UserError, match=message):
    load(folder, **{key: text})


# A file of the user's own.


def refused(folder, source: str, message: str, variant: str = ''):
  path = folder / 'mine.py'
  path.write_text(source)
  with pytest.raises(UserError, match=message) as caught:
    configs.load(f'{path}{variant}', [])
  assert '\n' not in str(caught.value)


HEAD = 'from tpu_lm import config as configs\ndef get_config():\n  c = '


def test_mistakes_in_a_file_name_file_and_line(folder):
  refused(folder, 'def get_config(:\n', r'mine\.py:1: ')
  refused(folder, 'import nothing_like_it\n', r'mine\.py:1: .*nothing_like_it')
  refused(folder, 'x = 1\n', r'mine\.py: has no function get_config')
  refused(folder, HEAD + 'configs.bace()\n  return c\n', r'mine\.py:3: .*bace')
  # ConfigDict itself refuses another type.
  text = HEAD + "configs.base()\n  c.steps = 'many'\n  return c\n"
  refused(folder, text, r'mine\.py:4: .*steps')
  text = HEAD + 'configs.base()\n  c.stepz = 5\n  return c\n'
  refused(folder, text, r"mine\.py: stepz: unknown key.*'steps'")
  text = HEAD + 'configs.base()\n  c.data.lenght = 5\n  return c\n'
  refused(folder, text, r"data\.lenght: unknown key.*'data\.length'")
  text = HEAD + "configs.base()\n  c.model.dim = 'wide'\n  return c\n"
  refused(folder, text, r"model\.dim='wide': must be a whole number")
  refused(
    folder, HEAD + 'configs.base()\n', r'mine\.py: get_config returned NoneType'
  )
  text = HEAD + 'configs.base()\n  del c.steps\n  return c\n'
  refused(folder, text, r'mine\.py: steps: is missing')
  text = HEAD + 'configs.base()\n  return c\n'
  refused(folder, text, r"takes no variant, but 'tiny'", ':tiny')


def test_a_file_that_is_not_there_names_the_nearest(folder):
  with pytest.raises(UserError, match=r'tony\.py: no such file.*tiny\.py'):
    configs.load(str(folder / 'tony.py'), [])
  with pytest.raises(UserError, match='no such file'):
    configs.load(str(folder), [])  # a folder


def test_what_is_written_is_read_back(folder):
  config = load(folder, **{'model.window_pattern': '(1, 0)'})
  workdir.write_json(folder / 'config.json', json.loads(config.to_json()))
  found = configs.read(folder / 'config.json')
  assert found.to_dict() == config.to_dict()
  assert found.model.window_pattern == (1, 0)


def test_a_broken_config_json_is_named(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('{"steps": ')
  with pytest.raises(UserError, match=r'config\.json: no configuration'):
    configs.read(path)


def test_the_schema_knows_every_key_of_every_section():
  known = configs.schema()
  for key in ('steps', 'data.length', 'model.rope_theta', 'mesh.expert'):
    assert key in known
