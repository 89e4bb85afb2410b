"""Working directories as `train` leaves them."""

import json
import pathlib

from tpu_lm import config as configs

CONFIG = pathlib.Path(configs.__file__).parent.parent / 'configs/quickstart.py'


def make_run(folder, variant='', lines=(), overrides=(), tail=''):
  """Writes config.json and metrics.jsonl of a stage of the quickstart."""
  folder.mkdir(parents=True)
  spec = f'{CONFIG}{variant and ":"}{variant}'
  config = configs.load(spec, list(overrides))
  (folder / 'config.json').write_text(config.to_json(indent=2, sort_keys=True))
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text + tail)
  return folder


def train(step, **values):
  return {
    'step': step,
    'stage': 'pretrain',
    'split': 'train',
    'tokens': step * 100,
    'seconds': step / 2,
    'tokens_per_second': 200.0,
    'loss': 4.0 - step / 10,
    **values,
  }


def heldout(step, **values):
  return {'step': step, 'stage': 'pretrain', 'split': 'heldout', **values}
