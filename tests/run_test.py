"""Whole runs: resuming, starting from another, and what is left behind."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from tpu_lm import checkpoint, metrics, run, sharding, start, tokenizer
from tpu_lm.errors import UserError
from tpu_lm.phases import KILL_AT, Phases

# One device, and a rate that does not depend on how many steps there will be.
PLAIN = {'mesh.data': 1, 'optimizer.schedule': 'constant'}


def quiet(_):
  """Takes what a run reports."""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Text, configuration and prepared rows that all tests here share."""
  folder = tmp_path_factory.mktemp('runs')
  tiny.write_config(folder)
  return folder


def config(folder, **overrides):
  shared = {'data.dir': folder / 'rows'}
  return tiny.config(folder, **(shared | PLAIN | overrides))


@pytest.fixture(scope='module')
def whole(folder):
  """8 steps in one go: (working directory, final figures)."""
  workdir = folder / 'whole'
  return workdir, run.execute(config(folder), workdir, quiet)


@pytest.fixture(scope='module')
def half(folder):
  """A working directory that stopped after 4 of them."""
  workdir = folder / 'half'
  run.execute(config(folder, steps=4), workdir, quiet)
  return workdir


def opened(config, workdir):
  """The `Run` of a working directory, not run any further."""
  with Phases(watchdog_seconds=0) as phases:
    made = run.Run(config, workdir, phases, quiet)
    made.close()
  return made


def lines(workdir):
  """Metrics without what the clock says."""
  found = metrics.read(workdir / 'metrics.jsonl')
  return [metrics.comparable(line) for line in found]


def assert_alike(found, expected):
  """Metrics whose numbers agree to 1e-5, and the rest exactly.

  The norm of gradients, a sum of squares of what has been rounded, to 1e-4.
  """
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      exact = key == 'rows_crc' or isinstance(a[key], str)
      rel = 1e-4 if key == 'gradient_norm' else 1e-5
      wanted = b[key] if exact else pytest.approx(b[key], rel=rel)
      assert a[key] == wanted, (key, a, b)


def assert_same(a, b):
  a, b = jax.device_get(a), jax.device_get(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_a_run_leaves_behind(folder, whole):
  workdir, figures = whole
  assert figures['bits_per_byte'] > 0
  train = [line for line in lines(workdir) if line['split'] == 'train']
  held = [line for line in lines(workdir) if line['split'] == 'heldout']
  assert [line['step'] for line in train] == list(range(1, 9))
  assert [line['step'] for line in held] == [4, 8]
  assert train[-1]['loss'] < train[0]['loss']
  assert held[-1]['bits_per_byte'] == figures['bits_per_byte']
  written = json.loads((workdir / 'config.json').read_text())
  assert written == json.loads(config(folder).to_json())
  saved = checkpoint.Checkpoints(workdir / 'checkpoints', read_only=True)
  assert saved.steps() == [4, 8]
  assert (workdir / 'tokenizer/tokenizer.json').is_file()


def test_a_finished_run_is_left_as_it_is(folder, whole):
  workdir, figures = whole
  before = lines(workdir)
  assert run.execute(config(folder), workdir, quiet) == figures
  assert lines(workdir) == before


def test_two_halves_are_the_whole_bit_by_bit(folder, whole, half, tmp_path):
  workdir = tmp_path / 'w'
  shutil.copytree(half, workdir)
  run.execute(config(folder), workdir, quiet)
  assert lines(workdir) == lines(whole[0])
  a, b = (opened(config(folder), w) for w in (workdir, whole[0]))
  assert a.first_step == 8
  assert_same(a.state, b.state)


def test_a_run_is_a_function_of_its_seed(folder, whole, tmp_path):
  run.execute(config(folder, seed=1), tmp_path / 'w', quiet)
  assert lines(tmp_path / 'w') != lines(whole[0])


@pytest.mark.parametrize(
  'mesh',
  [
    pytest.param({'data': 2}, marks=pytest.mark.slow),
    {'data': 1, 'fsdp': 8},
    pytest.param({'data': 2, 'fsdp': 2, 'tensor': 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_resumed_on_another_mesh_it_goes_on_alike(
  folder, whole, half, tmp_path, mesh
):
  workdir = tmp_path / 'w'
  shutil.copytree(half, workdir)
  overrides = {f'mesh.{axis}': size for axis, size in mesh.items()}
  run.execute(config(folder, **overrides), workdir, quiet)
  assert_alike(lines(workdir), lines(whole[0]))


def test_under_fsdp_nothing_is_whole_and_a_step_keeps_it_so(folder, tmp_path):
  made = opened(
    config(folder, **{'mesh.data': 1, 'mesh.fsdp': 8}), tmp_path / 'w'
  )

  def shards(state):
    return {
      sharding.path_name(path): (leaf.sharding.spec, leaf.size,
                                 leaf.addressable_shards[0].data.size)
      for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }  # fmt: skip

  before = shards(made.state)
  big = {path: n for path, (_, size, n) in before.items() if size >= 1024}
  assert len(big) == 3 * 8
  for path, size in big.items():
    assert size * 8 == before[path][1], path
  state = made.state
  with jax.set_mesh(made.mesh):
    for step, rows in zip((1, 2, 3), made.batches(0), strict=False):
      key = jax.random.fold_in(made.root, step)
      state, _ = made.update(state, made.frozen, made.put(rows), key)
  # Else memory grows, and the next step is compiled again.
  assert shards(state) == before
  assert made.update._cache_size() == 1


def test_init_from_takes_the_parameters_and_nothing_else(
  folder, whole, tmp_path
):
  made = opened(
    config(folder, init_from=whole[0], steps=3, **{'optimizer.name': 'lion'}),
    tmp_path / 'w',
  )
  other = opened(config(folder), whole[0])
  assert made.first_step == 0
  assert_same(made.state.params, other.state.params)
  assert int(made.state.step) == int(made.state.guard.accepted) == 0
  # Once it has a checkpoint of its own, that is what it goes on from.
  own = config(folder, init_from=whole[0], steps=3)
  run.execute(own, tmp_path / 'own', quiet)
  assert opened(own, tmp_path / 'own').first_step == 3


def test_init_from_refuses_another_model_and_another_tokenizer(
  folder, whole, tmp_path
):
  with pytest.raises(UserError, match=r'whole.*embedding|embedding.*whole'):
    opened(
      config(folder, init_from=whole[0], **{'model.dim': 64}), tmp_path / 'a'
    )
  # A kind to train is taken from the base; a file of one's own is not.
  tokenizer.train(['a text'], 'bpe', 260).save(tmp_path / 'brought')
  other = {'data.tokenizer': tmp_path / 'brought' / 'tokenizer.json'}
  with pytest.raises(UserError, match=r'another tokenizer; .*tokenizer\.json'):
    opened(config(folder, init_from=whole[0], **other), tmp_path / 'b')
  for name in 'ab':
    left = {path.name for path in (tmp_path / name).glob('*')}
    assert not left & {'config.json', 'tokenizer', 'metrics.jsonl'}


def test_what_is_not_trainable_stays_bit_by_bit(folder, half, tmp_path):
  chosen = config(folder, trainable='mlp/(up|down)', steps=3)
  start = opened(config(folder, steps=3), tmp_path / 'start').state.params
  run.execute(chosen, tmp_path / 'w', quiet)
  made = opened(chosen, tmp_path / 'w')
  _, params, _ = checkpoint.restore_params(
    tmp_path / 'w/checkpoints',
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      start,
    ),
  )
  changed = set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    before = functools.reduce(lambda tree, key: tree[key.key], path, start)
    if not np.array_equal(leaf, before):
      changed.add(sharding.path_name(path))
  assert changed == {'layers/mlp/up', 'layers/mlp/down'}
  moments = [
    sharding.path_name(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(made.state.optimizer)
    if leaf.size > 1
  ]
  assert len(moments) == 4  # two of each


def test_too_many_bad_steps_end_the_run_and_name_step_and_rows(
  folder, tmp_path
):
  wild = config(
    folder, steps=30,
    **{'optimizer.learning_rate': 1e30, 'optimizer.warmup': 0,
       'guard.bad_in_a_row': 3, 'eval_every': 0, 'checkpoint.every': 30},
  )  # fmt: skip
  message = (
    r'step (\d+): .* 3 steps in a row .*rows of this step are (.*); look'
  )
  with pytest.raises(UserError, match=message) as caught:
    run.execute(wild, tmp_path / 'w', quiet)
  step, rows = re.search(message, str(caught.value)).groups()
  assert rows.count('train') == 8  # shard and row of each of the batch
  made = opened(wild, tmp_path / 'other')
  assert rows == ', '.join(map(str, made.loader.rows(int(step) - 1)))
  train = lines(tmp_path / 'w')
  assert [line['skipped'] for line in train][-2:] == [1, 2]
  assert int(step) == len(train) + 1


def test_the_data_may_not_change_under_a_run(folder, half, tmp_path):
  workdir = tmp_path / 'w'
  shutil.copytree(half, workdir)
  text = tmp_path / 'other.txt'
  text.write_text((folder / 'text.txt').read_text().replace('Ada', 'Eva'))
  before = (workdir / 'config.json').read_bytes()
  with pytest.raises(UserError, match=r'was trained with data\.source=.*other'):
    run.execute(
      config(folder, **{'data.source': text, 'data.dir': tmp_path / 'rows'}),
      workdir, quiet,
    )  # fmt: skip
  assert (workdir / 'config.json').read_bytes() == before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(
  folder, half, tmp_path
):
  workdir = tmp_path / 'w'
  shutil.copytree(half, workdir)
  for step in (workdir / 'checkpoints').iterdir():
    (step / 'seal.json').write_text('{}')
  lines = (workdir / 'metrics.jsonl').read_bytes()
  for _ in range(2):  # nor the second time, when they are set aside
    with pytest.raises(UserError, match='every checkpoint is damaged'):
      run.execute(config(folder), workdir, quiet)
  assert (workdir / 'metrics.jsonl').read_bytes() == lines


def test_load_reads_what_was_trained(folder, whole):
  loaded = start.load(whole[0])
  assert loaded.step == 8
  assert loaded.config.to_dict() == config(folder).to_dict()
  assert_same(loaded.params, opened(config(folder), whole[0]).state.params)


def test_what_changes_harmlessly_may_change(folder, half, tmp_path):
  workdir = tmp_path / 'w'
  shutil.copytree(half, workdir)
  harmless = {'model.remat': 'full', 'model.unroll': 2, 'log_every': 5,
              'model.rope_theta': 1e4}  # fmt: skip
  made = opened(config(folder, **harmless), workdir)
  assert made.first_step == 4


# Other processes.


def command(folder, workdir, *more):
  overrides = {'data.dir': folder / 'rows'} | PLAIN
  return [
    'train', f'--config={folder / "tiny.py"}', f'--workdir={workdir}',
    *(f'--config.{key}={value}' for key, value in overrides.items()), *more,
  ]  # fmt: skip


def launched(code, argv, **environment):
  """A process that runs `code` with `argv`; 8 simulated devices by default."""
  if not any(word.startswith('--devices') for word in argv):
    argv = [*argv, '--devices=8']
  return subprocess.Popen(
    [sys.executable, '-c', code, *map(str, argv)],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env=os.environ | environment,
  )  # fmt: skip


RUN = 'import sys; from tpu_lm import cli; sys.exit(cli.main(sys.argv[1:]))'
WITHOUT_TENSORFLOW = """
import sys
from tpu_lm import cli
status = cli.main(sys.argv[1:])
heavy = {'tensorflow', 'seqio', 'tensorflow_datasets', 'datasets', 'torch'}
print('imported:', sorted(heavy & sys.modules.keys()))
sys.exit(status)
"""
# SIGTERM at the moment when a phase begins for the first time.
SIGNALLED = """
import os, signal, sys, time
from tpu_lm import cli, phases
wanted, before = os.environ['AT'], phases.kill_point
def arrive(name):
  global wanted
  if name == wanted:
    wanted = ''
    print('signalled', time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
  before(name)
phases.kill_point = arrive
sys.exit(cli.main(sys.argv[1:]))
"""


def finish(process, seconds=240):
  out, err = process.communicate(timeout=seconds)
  return process.returncode, out, err


def test_killed_and_started_again_it_ends_bit_by_bit_alike(
  folder, whole, tmp_path
):
  """And once rows are there, a run imports no TensorFlow."""
  workdir = tmp_path / 'w'
  given = [*command(folder, workdir), '--config.checkpoint.every=2']
  killed = launched(RUN, given, **{KILL_AT: 'step:7'})
  assert finish(killed)[0] == -signal.SIGKILL
  assert 4 <= len(lines(workdir)) < len(lines(whole[0]))
  again = launched(WITHOUT_TENSORFLOW, given)
  status, out, err = finish(again)
  assert status == 0, err
  # The save of step 6 may or may not have been committed.
  assert re.search('continues from step [46] ', out)
  assert 'imported: []' in out
  assert lines(workdir) == lines(whole[0])
  a, b = (opened(config(folder), w) for w in (workdir, whole[0]))
  assert_same(a.state, b.state)


@pytest.mark.slow
@pytest.mark.parametrize('phase', ['compile', 'step', 'save', 'evaluate'])
def test_sigterm_ends_well_and_soon(folder, whole, tmp_path, phase):
  workdir = tmp_path / 'w'
  process = launched(SIGNALLED, command(folder, workdir), AT=phase)
  status, out, err = finish(process)
  took = time.time() - float(re.search(r'signalled ([\d.]+)', out)[1])
  assert status == 0, err
  assert took < 10
  again = launched(RUN, command(folder, workdir))
  status, _, err = finish(again)
  assert status == 0, err
  assert lines(workdir) == lines(whole[0])
  a, b = (opened(config(folder), w) for w in (workdir, whole[0]))
  assert_same(a.state, b.state)


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 2, 4])
def test_resumed_with_other_numbers_of_devices(
  folder, whole, half, tmp_path, devices
):
  workdir = tmp_path / 'w'
  shutil.copytree(half, workdir)
  given = command(folder, workdir, f'--devices={devices}')
  process = launched(RUN, [*given, '--config.mesh.data=-1'])
  status, _, err = finish(process)
  assert status == 0, err
  assert_alike(lines(workdir), lines(whole[0]))
