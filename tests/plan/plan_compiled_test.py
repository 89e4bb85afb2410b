"""Plans by the TPU compiler, as a shell runs them."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from html_page import Page

from tpu_lm.plan import chips, hlo, schedule

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="needs the TPU compiler: pip install 'tpu_lm[plan]'",
)

CONFIG = """
from tpu_lm import config as configs


def get_config(variant=''):
  config = configs.base()
  config.steps = 1000
  config.batch_size = {rows}
  config.data.length = {length}
  config.data.vocab_size = {vocab}
  config.model_name = 'llama'
  config.model.num_layers = {layers}
  config.model.dim = {dim}
  config.model.num_heads = {heads}
  config.model.num_kv_heads = {kv_heads}
  config.model.hidden_dim = {hidden}
  config.model.dtype = 'bfloat16'
  config.model.remat = 'full'
  config.model.loss_chunk = {chunk}
  config.mesh.data = 1
  config.mesh.fsdp = -1
  return config
"""
TINY = {
  'rows': 8,
  'length': 256,
  'vocab': 1024,
  'layers': 2,
  'dim': 256,
  'heads': 2,
  'kv_heads': 1,
  'hidden': 512,
  'chunk': 0,
}
BILLION = {
  'rows': 16,
  'length': 4096,
  'vocab': 65_536,
  'layers': 16,
  'dim': 2048,
  'heads': 16,
  'kv_heads': 8,
  'hidden': 5632,
  'chunk': 1024,
}


def planned(folder, topology, timeout, *given, **shape):
  """Runs `tpu_lm plan`, which keeps the schedule that the compiler makes."""
  path = folder / 'mine.py'
  path.write_text(CONFIG.format(**shape))
  kept = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'kept' / 'xla')}
  return subprocess.run(
    [sys.executable, '-m', 'tpu_lm', 'plan', f'--config={path}',
     f'--topology={topology}', *given],
    capture_output=True, text=True, check=False, timeout=timeout,
    env=os.environ | kept,
  )  # fmt: skip


def collectives(folder, topology):
  (path,) = folder.glob('kept/plans/*.json.gz')
  text = json.loads(gzip.decompress(path.read_bytes()))['text']
  program = hlo.parse(text)
  return schedule.cost(program, chips.find(topology)).collectives


def num_bytes(found, kind):
  """Received within loops, by a device and a step."""
  return sum(
    one.num_bytes * one.times
    for one in found
    if one.in_loop and one.kind == kind
  )


def check_schedule(folder, topology, shape):
  """Weights are gathered, gradients scattered, the head gathered once."""
  found = collectives(folder, topology)
  size = chips.find(topology).size
  dim, head_size = shape['dim'], 128
  outputs = shape['heads'] * head_size * 2 + shape['kv_heads'] * head_size * 2
  layer = 2 * dim * (outputs + 3 * shape['hidden'])  # bfloat16
  arrives = shape['layers'] * layer * (size - 1) / size
  # Forward, and again for the backward pass; some are padded to whole tiles.
  gathered = num_bytes(found, 'all-gather')
  assert gathered == pytest.approx(2 * arrives, rel=0.03)
  scattered = num_bytes(found, 'reduce-scatter')
  assert scattered == pytest.approx(arrives, rel=0.03)
  least = 2 * dim * shape['kv_heads'] * head_size
  assert all(
    one.num_bytes < least
    for one in found
    if one.in_loop and one.kind == 'all-reduce'
  )
  head = 2 * dim * shape['vocab'] * (size - 1) / size
  whole = [
    one for one in found if one.kind == 'all-gather' and one.num_bytes >= head
  ]
  assert [(one.times, one.in_loop) for one in whole] == [(1, False)]


def check_kept(folder, done, topology, shape):
  """What is printed, the record and the page."""
  assert done.returncode == 0, done.stderr
  assert 'Warning' not in done.stderr
  assert 'no measurement' in done.stdout
  name = topology.replace(':', '_')
  record = json.loads((folder / f'mine.plan/{name}.json').read_text())
  assert record['fits']
  assert 0 < record['mfu'] < 1
  assert sum(record['by'].values()) == pytest.approx(record['seconds'])
  loops = {(one['loop'], one['times']) for one in record['timeline']}
  ways = ('forward', 'backward')
  assert loops >= {(f'Layers, {way}', shape['layers']) for way in ways}
  page = Page((folder / f'mine.plan/{name}.html').read_text())
  assert f'mine.py on {topology}' in page.text
  assert len(page.all('svg')) == len(loops)
  return record


def test_a_small_network_is_planned_for_four_chips(tmp_path):
  done = planned(tmp_path, 'v5e:2x2', 240, '--price=1.2', **TINY)
  record = check_kept(tmp_path, done, 'v5e:2x2', TINY)
  again = planned(tmp_path, 'v5e:2x2', 60, '--price=1.2', **TINY)
  assert again.stdout == done.stdout  # without the compiler
  assert record['mesh'] == {'fsdp': 2, 'fsdp_y': 2}
  assert record['price'] == pytest.approx(1.2 * record['chip_hours'])
  check_schedule(tmp_path, 'v5e:2x2', TINY)


@pytest.mark.skipif(
  importlib.util.find_spec('jax_plugins') is None
  or importlib.util.find_spec('jax_plugins.xla_cuda13') is None,
  reason="needs the CUDA plug-in: pip install 'tpu_lm[cuda]'",
)
def test_gpus_are_planned_where_their_compiler_is(tmp_path):
  done = planned(tmp_path, 'h100-8', 240, **TINY)
  assert done.returncode == 0, done.stderr
  path = tmp_path / 'mine.plan' / 'h100-8.json'
  record = json.loads(path.read_text())
  assert record['fits']
  assert record['mesh'] == {'fsdp': 8}
  assert record['memory']['compiled'] > 0
  kinds = {one['kind'] for one in record['collectives']}
  assert {'all-gather', 'reduce-scatter'} <= kinds
  assert 'attention by chunks' in done.stdout


def test_products_of_eight_bits_are_the_chips_own(tmp_path):
  done = planned(tmp_path, 'v5e:2x2', 240, '--config.model.matmul=int8', **TINY)
  assert done.returncode == 0, done.stderr
  (kept,) = (tmp_path / 'kept' / 'plans').glob('*.json.gz')
  text = json.loads(gzip.decompress(kept.read_bytes()))['text']
  program = hlo.parse(text)
  whole, halved = (
    sum(
      hlo.flops(program, name, op, low)
      for name, ops in program.computations.items()
      for op in ops
      if op.kind in ('dot', 'convolution')
    )
    for low in (1.0, 2.0)
  )
  assert 0.5 * whole < halved < 0.9 * whole


@pytest.mark.slow
def test_the_kernels_of_experts_compile_for_tpus(tmp_path):
  done = planned(
    tmp_path, 'v5e:2x2', 400, '--config.model.num_experts=4',
    '--config.mesh.fsdp=2', '--config.mesh.expert=2', **TINY,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  (kept,) = (tmp_path / 'kept' / 'plans').glob('*.json.gz')
  program = hlo.parse(json.loads(gzip.decompress(kept.read_bytes()))['text'])
  kernels = [
    op.name.split('.')[0]
    for ops in program.computations.values()
    for op in ops
    if op.target == 'tpu_custom_call'
  ]
  # Three products forward, two of them again, and two gradients of each.
  assert kernels.count('tgmm') == 3
  assert kernels.count('gmm') >= 3 + 2 + 3
  record = json.loads((tmp_path / 'mine.plan/v5e_2x2.json').read_text())
  assert record['hardware_flops'] > record['model_flops']


def test_what_cannot_be_is_one_line(tmp_path):
  for topology, said in (
    ('v5e-9', '--topology=v5e-9: unknown'),
    ('v5e:3x5', '--topology=v5e:3x5: '),  # what the compiler says
  ):
    done = planned(tmp_path, topology, 120, **TINY)
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: {said}')
    assert done.stderr.count('\n') == 1
  assert not (tmp_path / 'mine.plan').exists()


@pytest.mark.slow
def test_a_billion_parameters_are_planned_for_sixteen_chips(tmp_path):
  """Two minutes of a quiet core."""
  done = planned(tmp_path, 'v5e:4x4', 1500, **BILLION)
  record = check_kept(tmp_path, done, 'v5e:4x4', BILLION)
  memory = record['memory']
  assert memory['analytic'] == pytest.approx(memory['compiled'], rel=0.05)
  assert record['mfu'] > 0.35
  assert record['bound'] == 'matmul'
  check_schedule(tmp_path, 'v5e:4x4', BILLION)


@pytest.mark.slow
def test_gradients_are_scattered_along_both_rings_of_a_pod(tmp_path):
  """16x16 chips, each with 16 rows of a matrix; with 8 there are sums."""
  shape = BILLION | {'rows': 256, 'layers': 2, 'dim': 4096, 'heads': 32}
  done = planned(tmp_path, 'v5e-256', 1500, **shape)
  record = check_kept(tmp_path, done, 'v5e-256', shape)
  assert record['mesh'] == {'fsdp': 16, 'fsdp_y': 16}
  check_schedule(tmp_path, 'v5e-256', shape)
  groups = {
    (one.kind, one.group)
    for one in collectives(tmp_path, 'v5e-256')
    if one.in_loop and one.kind == 'reduce-scatter'
  }
  assert groups == {('reduce-scatter', 16)}


@pytest.mark.slow
def test_memory_grows_with_the_length_and_sequence_divides_it(tmp_path):
  """Rows of 32k and 64k on one chip, and eight times as long on eight."""
  shape = TINY | {'rows': 1, 'heads': 8, 'kv_heads': 8, 'chunk': 1024}
  needed, fixed = {}, {}
  for topology, length, *given in (
    ('v5e:1x1', 32_768),
    ('v5e:1x1', 65_536),
    ('v5e:2x4', 8 * 65_536, '--config.mesh.fsdp=1', '--config.mesh.sequence=8'),
  ):
    folder = tmp_path / str(length)
    folder.mkdir()
    shape['length'] = length
    given = ('--config.model.head_dim=128', *given)
    done = planned(folder, topology, 900, *given, **shape)
    assert done.returncode == 0, done.stderr
    name = topology.replace(':', '_')
    record = json.loads((folder / f'mine.plan/{name}.json').read_text())
    needed[length] = record['memory']['compiled']
    fixed[length] = sum(
      record['memory'][name] for name in ('parameters', 'optimizer')
    )
  short, long, shared = (needed[n] - fixed[n] for n in needed)
  assert 1.8 < long / short < 2.2
  # Heads are exchanged for positions and back: what leaves and what arrives.
  assert shared < 2.2 * long


def test_gradients_are_summed_in_the_dtype_that_they_are_made_in(tmp_path):
  """Those of layers in bfloat16, of the tables in float32; norms are small."""
  given = '--config.mesh.data=2', '--config.mesh.fsdp=2'
  done = planned(tmp_path, 'v5e:2x2', 240, *given, **TINY)
  assert done.returncode == 0, done.stderr
  arrives = sum(
    one.num_bytes * one.times
    for one in collectives(tmp_path, 'v5e:2x2')
    if one.kind == 'all-reduce' and one.group == 2
  )
  layer = 256 * (2 * 256 + 2 * 128 + 3 * 512)
  tables = 2 * 1024 * 256
  assert arrives == pytest.approx((2 * 2 * layer + 4 * tables) / 2, rel=0.02)
