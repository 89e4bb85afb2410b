import json
import pathlib
import random
import shutil
import sys

import pytest

from tpu_lm import drill
from tpu_lm.errors import UserError

TOY = [sys.executable, str(pathlib.Path(__file__).parent / 'toy_train.py')]


@pytest.fixture(scope='module')
def two_runs(tmp_path_factory, module_path) -> pathlib.Path:
  """The same short run twice, neither disturbed."""
  folder = tmp_path_factory.mktemp('drill')
  (folder / 'logs').mkdir()
  start = drill._Start([*TOY, '--steps=8'], folder, 'undisturbed')
  pace = drill._run_undisturbed(start)
  assert pace.last_step == 8
  assert 0 < pace.start_seconds < pace.seconds
  shutil.copytree(folder / 'undisturbed', folder / 'drilled')
  return folder


@pytest.fixture(scope='module')
def module_path():
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PYTHONPATH', str(pathlib.Path(__file__).parents[1]))
    yield


@pytest.fixture
def runs(two_runs, tmp_path) -> pathlib.Path:
  return shutil.copytree(two_runs, tmp_path / 'runs')


def verdict(folder) -> tuple[bool, str]:
  told = []
  passed = drill._verdict(folder, 3, told.append)
  return passed, '\n'.join(told)


def edit_metrics(folder, edit) -> None:
  path = folder / 'drilled' / 'metrics.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  edit(lines)
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_equal_runs_pass(runs):
  edit_metrics(runs, lambda lines: lines[2].update(seconds=1e9))
  passed, told = verdict(runs)
  assert passed
  assert '8 lines of metrics' in told
  assert 'checkpoints 6, 8' in told


@pytest.mark.parametrize(
  ('edit', 'named'),
  [
    (lambda lines: lines.pop(), '7 lines instead of 8'),
    (lambda lines: lines.append(lines[-1]), '9 lines instead of 8'),
    (lambda lines: lines[2].update(rows_crc=1), ':3: rows_crc is 1 instead of'),
    (lambda lines: lines[4].update(loss=lines[4]['loss'] + 1e-15), ':5: loss'),
    (lambda lines: lines[4].pop('loss'), ':5: loss is missing'),
  ],
)
def test_a_difference_in_metrics_is_named(runs, edit, named):
  edit_metrics(runs, edit)
  passed, told = verdict(runs)
  assert not passed
  assert named in told


def test_a_difference_in_arrays_is_named(runs):
  steps = runs / 'drilled' / 'checkpoints'
  shutil.rmtree(steps / '8')
  shutil.copytree(steps / '6', steps / '8')
  passed, told = verdict(runs)
  assert not passed
  for name in ('params/w', 'params/b', 'momentum/w', 'step', 'w (digest)'):
    assert f'checkpoint 8: {name}' in told or name in told
  shutil.rmtree(steps / '6')
  assert 'the steps are [8] instead of [6, 8]' in verdict(runs)[1]


def test_the_plan_has_every_point_once_and_ends_with_a_random_kill():
  pace = drill.Pace(60.0, 10.0, 0.05, 1000, 10)
  for seed in range(20):
    plan = drill._plan(20, pace, random.Random(seed))
    assert len(plan) == 25
    assert sorted(k.point for k in plan if k.point) == sorted(drill.POINTS)
    steps = [k.after_step for k in plan if k.after_step >= 0]
    assert steps == sorted(steps)
    assert 0 <= steps[0] < steps[-1] <= 900
    assert plan == drill._plan(20, pace, random.Random(seed))
  assert len(drill._plan(0, pace, random.Random(0))) == len(drill.POINTS)
  points = drill.POINTS + drill.SAMPLING
  plan = drill._plan(2, pace, random.Random(0), points)
  assert sorted(k.point for k in plan if k.point) == sorted(points)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
  (tmp_path / 'undisturbed').mkdir()
  with pytest.raises(UserError, match='no drill has made'):
    drill.drill([], 1, tmp_path, command=TOY)


def test_a_configuration_that_fails_says_why(tmp_path, module_path):
  with pytest.raises(UserError, match=r"status 1.*invalid int value: 'x'|2"):
    drill.drill(['--steps=x'], 1, tmp_path, command=TOY)


@pytest.mark.slow
def test_a_run_that_resumes_exactly_passes(tmp_path, module_path):
  told = []
  args = ['--steps=60']
  assert drill.drill(args, 4, tmp_path, told.append, command=TOY, seed=1)
  assert 'after 9 kills' in told[-1]


@pytest.mark.slow
@pytest.mark.parametrize('flaw', ['state', 'data', 'metrics'])
def test_a_run_that_does_not_is_found_out(tmp_path, module_path, flaw):
  told = []
  args = ['--steps=30', f'--flaw={flaw}']
  assert not drill.drill(args, 1, tmp_path, told.append, command=TOY)
  assert 'FAILED' in told[-1]
