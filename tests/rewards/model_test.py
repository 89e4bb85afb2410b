"""A reward model as a reward says what its own evaluation says."""

import json

import numpy as np
import pytest
import tiny

from tpu_lm import config as configs
from tpu_lm import metrics, run, scoring
from tpu_lm.errors import UserError

CONFIG = """
from tpu_lm import config as configs


def get_config():
  config = configs.base()
  config.stage_name = 'reward'
  config.model.scalar_head = True
  config.steps = 6
  config.batch_size = 4
  config.eval_every = 0
  config.data.length = 64
  config.mesh.data = 1
  config.evals = ('heldout',)
  config.optimizer.learning_rate = 0.02
  config.optimizer.warmup = 0
  return config
"""


def pairs(first: int) -> list[dict]:
  return [
    {'prompt': f'What is {n}?', 'chosen': f'It is {n}.', 'rejected': 'no' * n}
    for n in range(first, first + 12)
  ]


def quiet(_):
  """Takes what a run reports."""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('rm')
  plain = {'mesh.data': 1, 'optimizer.schedule': 'constant'}
  run.execute(tiny.config(folder, steps=4, **plain), folder / 'base', quiet)
  (folder / 'tune.py').write_text(CONFIG)
  for name, first in (('train', 1), ('held', 5)):
    lines = ''.join(json.dumps(pair) + '\n' for pair in pairs(first))
    (folder / f'{name}.jsonl').write_text(lines)
  config = configs.load(
    str(folder / 'tune.py'),
    [
      ('init_from', str(folder / 'base')),
      ('data.source', str(folder / 'train.jsonl')),
      ('data.heldout_source', str(folder / 'held.jsonl')),
    ],
  )
  run.execute(config, folder / 'rm', quiet)
  return folder


def samples(which: str) -> list[scoring.Sample]:
  return [
    scoring.Sample(
      [{'role': 'user', 'content': pair['prompt']}], pair[which], {}
    )
    for pair in pairs(5)
  ]


def test_it_says_what_its_evaluation_says(folder):
  last = metrics.read(folder / 'rm' / 'metrics.jsonl')[-1]
  assert last['split'] == 'heldout'
  with scoring.parse(
    f"model(workdir='{folder / 'rm'}', batch_size=5)"
  ) as judge:
    chosen, rejected = (
      judge(samples(which)).total for which in ('chosen', 'rejected')
    )
  assert (chosen - rejected).mean() == pytest.approx(last['margin'], rel=1e-4)
  assert (chosen > rejected).mean() == pytest.approx(last['accuracy'])
  assert np.abs(chosen - rejected).max() > 0


def test_rewards_are_clipped(folder):
  with scoring.parse(f"model(workdir='{folder / 'rm'}', limit=0.001)") as judge:
    assert np.abs(judge(samples('chosen')).total).max() <= 0.001


def test_what_is_no_reward_model_is_refused(folder):
  for options, message in (
    ('', "needs model\\(workdir='DIR'\\)"),
    (f"workdir='{folder / 'base'}'", 'has no scalar head'),
    (f"workdir='{folder / 'none'}'", 'no config.json there'),
  ):
    with pytest.raises(UserError, match=message):
      scoring.parse(f'model({options})')
