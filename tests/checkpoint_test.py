import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tpu_lm import checkpoint, seal
from tpu_lm.errors import UserError


class State(NamedTuple):
  step: jax.Array
  params: Any
  moments: Any
  key: jax.Array


def shardings(num_devices: int):
  """Rows over the first devices, scalars everywhere."""
  mesh = jax.make_mesh(
    (num_devices,),
    ('data',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )

  def place(x):
    rows = x.ndim and x.shape[0] % num_devices == 0
    return NamedSharding(mesh, PartitionSpec(*(['data'] if rows else [])))

  return place


def make_state(step: int, num_devices: int = 8, width: int = 24) -> State:
  rng = np.random.default_rng(step)
  kernel = rng.normal(size=(8, width)).astype(np.float32)
  state = State(
    step=jnp.int32(step),
    params={
      'block': {'kernel': jnp.asarray(kernel)},
      'scale': jnp.asarray(rng.normal(size=16), jnp.bfloat16),
    },
    moments=({'kernel': jnp.asarray(kernel**2)}, None, ()),
    key=jax.random.key(step),
  )
  place = shardings(num_devices)
  return jax.tree.map(lambda x: jax.device_put(x, place(x)), state)


def make_target(num_devices: int = 8, width: int = 24) -> State:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    make_state(0, num_devices, width),
  )


def raw(tree) -> list[bytes]:
  """The bits of every leaf."""
  return [
    np.asarray(
      jax.random.key_data(x)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
    ).tobytes()
    for x in jax.tree.leaves(tree)
  ]


def write(folder, *steps: int, keep: int = 9) -> None:
  checkpoints = checkpoint.Checkpoints(folder, keep=keep)
  for step in steps:
    checkpoints.save(step, make_state(step), {'fingerprint': f'f{step}'})
  checkpoints.close()


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('two') / 'checkpoints'
  write(folder, 1, 2)
  return folder


@pytest.fixture
def saved(two_steps, tmp_path) -> pathlib.Path:
  return shutil.copytree(two_steps, tmp_path / 'checkpoints')


# Saving and reading back.


@pytest.mark.parametrize('num_devices', [1, 2, 8])
def test_a_restored_state_is_the_saved_one_on_any_mesh(two_steps, num_devices):
  reader = checkpoint.Checkpoints(two_steps, read_only=True)
  target = make_target(num_devices)
  step, state, meta = reader.restore(target)
  assert (step, meta) == (2, {'fingerprint': 'f2'})
  assert raw(state) == raw(make_state(2))
  for x, to in zip(
    jax.tree.leaves(state), jax.tree.leaves(target), strict=True
  ):
    assert x.sharding == to.sharding
    assert x.committed
    assert x.dtype == to.dtype


def test_a_state_may_be_donated_right_after_save(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  spoil = jax.jit(
    lambda s: s._replace(
      params=jax.tree.map(lambda x: x * 0, s.params),
      moments=jax.tree.map(lambda x: x * 0, s.moments),
    ),
    donate_argnums=0,
  )
  for step in range(1, 6):
    state = make_state(step)
    checkpoints.save(step, state)
    jax.block_until_ready(spoil(state).params)
    assert raw(checkpoints.restore(make_target()).state) == raw(
      make_state(step)
    )
  checkpoints.close()


def test_newest_and_best_are_kept(tmp_path):
  scores = [5.0, 1.0, 4.0, float('nan'), 3.0, 2.0, None]
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, keep_best=1)
  for step, score in enumerate(scores, 1):
    metrics = None if score is None else {'bits_per_byte': score}
    assert checkpoints.save(step, make_state(step), metrics=metrics)
    if step == 4:  # as a run that is killed and goes on
      checkpoints.close()
      checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, keep_best=1)
  assert not checkpoints.save(7, make_state(7))
  checkpoints.close()
  assert checkpoints.steps() == [2, 6, 7]
  assert {p.name for p in tmp_path.iterdir()} == {'2', '6', '7'}


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
  assert checkpoint.Checkpoints(tmp_path / 'a').restore(make_target()) is None


def test_params_alone_in_another_dtype(two_steps):
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
    make_target(2).params,
  )
  step, params, meta = checkpoint.restore_params(two_steps, target)
  assert (step, meta['fingerprint']) == (2, 'f2')
  expected = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16), make_state(2).params
  )
  assert raw(params) == raw(expected)
  step, _, _ = checkpoint.restore_params(two_steps, target, step=1)
  assert step == 1


def test_meta_alone(two_steps):
  reader = checkpoint.Checkpoints(two_steps, read_only=True)
  assert reader.content(1)['caller'] == {'fingerprint': 'f1'}
  with pytest.raises(UserError, match='no step 7'):
    reader.content(7)


# Another model is no damage.


def test_another_shape_is_named_and_nothing_moved(saved):
  with pytest.raises(
    UserError, match=r'block/kernel has shape \(8, 24\).*needs \(8, 32\)'
  ):
    checkpoint.Checkpoints(saved).restore(make_target(width=32))
  assert {p.name for p in saved.iterdir()} == {'1', '2'}


def test_another_dtype_of_the_state_is_refused(saved):
  target = make_target()
  scale = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=target.key.sharding)
  target = target._replace(params=target.params | {'scale': scale})
  with pytest.raises(UserError, match='params/scale is bfloat16'):
    checkpoint.Checkpoints(saved).restore(target)
  assert {p.name for p in saved.iterdir()} == {'1', '2'}


@pytest.mark.parametrize('more', [True, False])
def test_another_structure_is_named(saved, more):
  target = make_target()
  if more:
    params = target.params | {'head': target.params['scale']}
  else:
    params = {'block': target.params['block']}
  with pytest.raises(
    UserError, match='params/head' if more else 'params/scale'
  ):
    checkpoint.Checkpoints(saved).restore(target._replace(params=params))
  assert {p.name for p in saved.iterdir()} == {'1', '2'}


# Damage.


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob('*') if p.is_file())


def flip_bit(folder, rng):
  path = rng.choice([p for p in files(folder) if p.stat().st_size])
  content = bytearray(path.read_bytes())
  bit = rng.integers(8 * len(content))
  content[bit // 8] ^= 1 << (bit % 8)
  path.write_bytes(content)
  return path.name


def truncate(folder, rng):
  path = rng.choice([p for p in files(folder) if p.stat().st_size])
  path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])
  return path.name


def delete(folder, rng):
  path = rng.choice(files(folder))
  path.unlink()
  return path.name


def zero(folder, rng):
  path = rng.choice([p for p in files(folder) if p.stat().st_size])
  content = bytearray(path.read_bytes())
  start = rng.integers(len(content)) // 512 * 512
  length = min(512, len(content) - start)
  content[start : start + length] = bytes(length)
  path.write_bytes(content)
  return path.name


def empty_step(folder, rng):
  newer = folder.parent / str(rng.integers(3, 1000))
  newer.mkdir()
  return newer.name


def junk_step(folder, rng):
  newer = folder.parent / str(rng.integers(3, 1000))
  newer.mkdir()
  for k in range(rng.integers(1, 4)):
    (newer / f'junk{k}').write_bytes(rng.bytes(100))
  if rng.integers(2):  # even one that looks like a step
    shutil.copytree(folder / 'params', newer / 'params')
  return newer.name


def left_over(folder, rng):
  names = [
    '3.orbax-checkpoint-tmp',
    '3.orbax-checkpoint-tmp-sealed',
    '3.orbax-checkpoint-tmp-1733',
  ]
  newer = folder.parent / rng.choice(names)
  shutil.copytree(folder, newer)
  for path in rng.choice(files(newer), size=3, replace=False):
    path.unlink()
  return newer.name


DAMAGES = (flip_bit, truncate, delete, zero, empty_step, junk_step, left_over)


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_is_named_and_survived(two_steps, tmp_path, capsys, damage):
  bits = {step: raw(make_state(step)) for step in (1, 2)}
  target = make_target(1)
  survived = 0
  for seed in range(10):
    folder = shutil.copytree(two_steps, tmp_path / str(seed))
    name = damage(folder / '2', np.random.default_rng(seed))
    in_step = damage in DAMAGES[:4]
    capsys.readouterr()
    step, state, _ = checkpoint.Checkpoints(folder).restore(target)
    told = capsys.readouterr().err.splitlines()
    assert step == (1 if in_step else 2)
    assert raw(state) == bits[step]
    assert len(told) == 1
    assert name in told[0]
    if damage is not left_over:  # set aside, whole
      aside = folder / 'damaged' / ('2' if in_step else name)
      assert aside.is_dir()
      assert str(aside) in told[0]
    # and a writer goes on from there
    checkpoints = checkpoint.Checkpoints(folder)
    assert checkpoints.save(step + 1, make_state(step + 1))
    checkpoints.close()
    assert checkpoints.restore(target).step == step + 1
    survived += 1
  assert survived == 10


def reseal(folder: pathlib.Path) -> None:
  """Makes the sums over the files good again, whatever is in them."""
  text = (folder / 'seal.json').read_text()
  old = json.loads(text)
  (folder / 'seal.json').unlink()
  seal.write(checkpoint.epath.Path(folder), whole=True)
  assert (
    old['files'].keys()
    == json.loads((folder / 'seal.json').read_text())['files'].keys()
  )


@pytest.mark.parametrize('item', ['params', 'state'])
def test_an_array_that_is_not_the_saved_one_is_named(saved, capsys, item):
  """As when memory flipped a bit on its way to a disk that is well."""
  path = saved / '2' / 'meta' / 'metadata'
  content = json.loads(path.read_text())
  name = 'params/block/kernel' if item == 'params' else 'moments/0/kernel'
  content['arrays'][name][2] ^= 4
  path.write_text(json.dumps(content))
  reseal(saved / '2')
  assert checkpoint.Checkpoints(saved).restore(make_target()).step == 1
  assert f'the array {name}' in capsys.readouterr().err


def test_arrays_of_another_step_are_noticed(saved, capsys):
  shutil.rmtree(saved / '2' / 'params')
  shutil.copytree(saved / '1' / 'params', saved / '2' / 'params')
  (saved / '2' / 'seal.json').unlink()
  seal.write(checkpoint.epath.Path(saved / '2'), whole=True)
  assert checkpoint.Checkpoints(saved).restore(make_target()).step == 1
  assert 'the array params/block/kernel' in capsys.readouterr().err


def test_a_reader_moves_nothing(saved, capsys):
  flip_bit(saved / '2', np.random.default_rng(0))
  (saved / '7').mkdir()
  before = files(saved)
  step, _, _ = checkpoint.restore_params(saved, make_target(1).params)
  assert step == 1
  assert files(saved) == before
  told = capsys.readouterr().err
  assert 'step 2 is damaged' in told
  assert 'step 7 is damaged' in told


def test_no_good_step_left(saved, capsys):
  for step in '12':
    flip_bit(saved / step, np.random.default_rng(0))
  with pytest.raises(UserError, match='no good checkpoint'):
    checkpoint.restore_params(saved, make_target(1).params)
  assert checkpoint.Checkpoints(saved).restore(make_target()) is None
  assert {p.name for p in (saved / 'damaged').iterdir()} == {'1', '2'}
  assert 'step 1 is damaged' in capsys.readouterr().err


def test_a_step_damaged_twice_keeps_both(tmp_path, capsys):
  for _ in range(2):
    write(tmp_path, 1)
    delete(tmp_path / '1', np.random.default_rng(0))
    checkpoint.Checkpoints(tmp_path)
  assert {p.name for p in (tmp_path / 'damaged').iterdir()} == {'1', '1-1'}


# Disks.


def test_a_file_in_place_of_the_folder(tmp_path):
  (tmp_path / 'checkpoints').write_text('')
  with pytest.raises(UserError, match='is a file'):
    checkpoint.Checkpoints(tmp_path / 'checkpoints')


FULL = """
import resource, sys
import jax, jax.numpy as jnp
from typing import Any, NamedTuple
from tpu_lm import checkpoint
from tpu_lm.errors import UserError

class State(NamedTuple):
  params: Any
  step: Any

checkpoints = checkpoint.Checkpoints(sys.argv[1])
noise = jax.random.normal(jax.random.key(0), (300_000,))
checkpoints.save(1, State({'a': noise[:1000]}, jnp.int32(1)))
checkpoints.wait()
# What a full disk is to a process: a write that fails half way.
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
  checkpoints.save(2, State({'a': noise}, jnp.int32(2)))
  checkpoints.wait()
except UserError as e:
  print(f'told: {e}')
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
checkpoints.save(3, State({'a': noise}, jnp.int32(3)))
checkpoints.close()
"""


def test_a_disk_that_fills_up(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', FULL, str(tmp_path / 'c')],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).parents[1],
  )
  assert 'step 2 could not be saved' in done.stdout
  assert 'stay valid (1)' in done.stdout
  assert 'Traceback' not in done.stderr
  assert {p.name for p in (tmp_path / 'c').iterdir()} == {'1', '3'}
