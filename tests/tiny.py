"""The smallest model, batch and run that the tests of the frame share."""

import atexit
import functools
import pathlib
import shutil
import tempfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tpu_lm import checkpoint, models, reading, sharding, tokenizer, train
from tpu_lm import config as configs

VOCAB = 64
LENGTH = 16

# Shapes for every preset; two key-value heads under four query heads.
SHAPE = {
  'num_layers': 2,
  'dim': 32,
  'num_heads': 4,
  'num_kv_heads': 2,
  'hidden_dim': 48,
}
# With experts, for presets that have none.
MOE = {'num_experts': 4, 'experts_per_token': 2, 'expert_hidden_dim': 24}
# Compiles twice as fast; the numbers are as exact, only later.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)

# A file of configs/ that trains on a few kilobytes within seconds.
CONFIG = """
from tpu_lm import config as configs


def get_config(variant=''):
  configs.check_variant(variant, ('tiny',))
  config = configs.base()
  config.steps = 8
  config.batch_size = 8
  config.log_every = 1
  config.eval_every = 4
  config.checkpoint.every = 4
  config.data.source = {source!r}
  config.data.tokenizer = 'byte'
  config.data.length = 16
  config.model_name = 'qwen3'
  config.model.num_layers = 2
  config.model.dim = 32
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.hidden_dim = 48
  config.optimizer.learning_rate = 0.01
  config.optimizer.warmup = 2
  return config
"""


def model(name: str = 'qwen3', **options):
  """A family's preset in the tiny shape."""
  return models.make(name, SHAPE | options, VOCAB, LENGTH)


def seeded(path: tuple, shape: tuple[int, ...], scale: float) -> np.ndarray:
  """Normal numbers that depend on nothing but the path of the parameter."""
  seed = zlib.crc32(sharding.path_name(path).encode())
  numbers = np.random.default_rng(seed).normal(size=shape) * scale
  return numbers.astype(np.float32)


def params(model, scale: float = 0.1):
  """Parameters of which none is zero, so that every gradient is alive."""
  shapes = jax.eval_shape(model.init_params, jax.random.key(0))
  start = 0.0 if model.config.norm_plus_one else 1.0
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      seeded(path, leaf.shape, scale)
      + start * ('norm' in sharding.path_name(path))
    ).astype(np.float32),
    shapes,
  )


def batch(rows: int = 8, length: int = LENGTH, seed: int = 0) -> dict:
  """Packed rows: several documents, ragged masks and ragged padding."""
  rng = np.random.default_rng(seed)
  shape = (rows, length + 1)
  segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  for r in range(rows):
    start = 0
    end = length + 1 - int(rng.integers(0, length // 2))
    for segment in range(1, 4):
      size = end - start if segment == 3 else int(rng.integers(2, length // 3))
      size = min(size, end - start)
      segments[r, start : start + size] = segment
      positions[r, start : start + size] = np.arange(size)
      start += size
  mask = rng.random(shape) < np.linspace(0.3, 1.0, rows)[:, None]
  return {
    'tokens': rng.integers(0, VOCAB, shape).astype(np.int32),
    'loss_mask': mask & (segments > 0),
    'segment_ids': segments,
    'positions': positions,
  }


NUM_SEGMENTS = 4  # slots for records; rows have 0 to 3


def packed(rng, records: list[list[tuple[int, int]]], length: int) -> dict:
  """Rows of whole records; each is (prompt tokens, completion tokens).

  The completion is trained, its last token included, and slot L is padding.
  """
  shape = (len(records), length + 1)
  segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  mask = np.zeros(shape, bool)
  for r, row in enumerate(records):
    start = 0
    for segment, (prompt, completion) in enumerate(row, 1):
      end = start + prompt + completion
      assert end <= length
      segments[r, start:end] = segment
      positions[r, start:end] = np.arange(end - start)
      mask[r, start + prompt : end] = True
      start = end
  return {
    'tokens': rng.integers(0, VOCAB, shape).astype(np.int32) * (segments > 0),
    'loss_mask': mask,
    'segment_ids': segments,
    'positions': positions,
  }


def compared(
  rows: int, prefixes: tuple[str, ...], values: str, length: int = LENGTH
) -> dict:
  """Rows of records that stand in one set of columns for each prefix.

  Args:
    rows: how many; the second has no record at all.
    prefixes: such as ('chosen_', 'rejected_').
    values: the name of a column with a number for each record.
    length: L.
  """
  rng = np.random.default_rng(len(values) + len(prefixes))
  counts = [0 if r == 1 else 1 + r % 3 for r in range(rows)]
  batch = {}
  for prefix in prefixes:
    records = [
      [(int(rng.integers(1, 3)), int(rng.integers(1, 4))) for _ in range(n)]
      for n in counts
    ]
    found = packed(rng, records, length)
    batch |= {prefix + name: column for name, column in found.items()}
  exists = np.arange(NUM_SEGMENTS) < np.array(counts)[:, None]
  numbers = rng.normal(size=exists.shape).astype(np.float32)
  return batch | {values: numbers * exists}


def pairs(rows: int = 8) -> dict:
  """What `data.rows=pairs` gives."""
  return compared(rows, ('chosen_', 'rejected_'), 'margins')


def rated(rows: int = 8) -> dict:
  """What `data.rows=rated` gives."""
  return compared(rows, ('', 'mismatched_'), 'scores')


def scored(rows: int = 8) -> dict:
  """What `data.rows=scored` gives."""
  return compared(rows, ('',), 'scores')


def mesh(**sizes: int):
  """A mesh of the first devices; the axes that are not named have size 1."""
  sizes = dict.fromkeys(sharding.AXES, 1) | sizes
  count = int(np.prod(list(sizes.values())))
  return sharding.make_mesh(sizes, jax.devices()[:count])


def write_text(path: pathlib.Path, lines: int = 60) -> pathlib.Path:
  """Some sentences, each line different."""
  rng = np.random.default_rng(0)
  names, things = ('Ada', 'Bo', 'Cleo', 'Dai'), ('an oak', 'a cat', 'a key')
  text = [
    f'{rng.choice(names)} saw {rng.choice(things)} on day {n}.\n'
    for n in range(lines)
  ]
  path.write_text(''.join(text))
  return path


def write_config(folder: pathlib.Path) -> pathlib.Path:
  """Writes text and a configuration of it; returns the latter's path."""
  source = write_text(folder / 'text.txt')
  path = folder / 'tiny.py'
  path.write_text(CONFIG.format(source=str(source)))
  return path


def config(folder: pathlib.Path, **overrides):
  """That configuration, loaded; `overrides` are dotted keys."""
  path = folder / 'tiny.py'
  if not path.exists():
    write_config(folder)
  return configs.load(
    str(path), [(key, str(value)) for key, value in overrides.items()]
  )


@functools.cache
def teacher() -> tuple[str, int]:
  """(working directory, vocabulary) of a model that others may learn from."""
  folder = pathlib.Path(tempfile.mkdtemp())
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  made = config(folder)
  tokens = tokenizer.train([], 'byte')
  tokens.save(folder / 'tokenizer')
  (folder / 'config.json').write_text(made.to_json())
  network = models.make(
    made.model_name, made.model, tokens.vocab_size, made.data.length
  )
  # Another scale than the students': their distributions shall differ.
  state = train.init(
    jax.tree.map(jnp.asarray, params(network, 0.3)), optax.sgd(0.0), 10
  )
  checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', keep=1)
  checkpoints.save(1, state, {'fingerprint': '', 'base': None}, None)
  checkpoints.close()
  return str(folder), tokens.vocab_size


def figures(evaluation, loaded, workdir, source=''):
  """The figures that `tpu_lm eval` prints of an evaluation."""
  with reading.opened(loaded, workdir, source) as (opened, rows):
    return evaluation.make(opened, rows)(loaded.params)
