"""Configurations: their keys, files and command-line overrides.

`base()` holds every key with its default, so that keys are alike everywhere.
A file of `configs/` has `get_config(variant='')`, which starts from `base()`.
On the command line `--config=FILE[:VARIANT]` names it and
`--config.KEY=VALUE` changes a key. A key or a type that the schema does not
have is a mistake of the user's and ends in one line.
"""

import ast
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import pathlib
import re
import traceback
from typing import Any

from ml_collections import ConfigDict

from tpu_lm.errors import UserError, nearest
from tpu_lm.tokenizer import KINDS

# Sections whose keys belong to what is named beside them: a model family's
# `config`, a stage's `make`. They are checked against those signatures.
OPEN_SECTIONS = ('model', 'stage')
# Keys of `model` that say how it is computed, or what a stage adds to it.
_HOW = (
  'dtype',
  'matmul',
  'loss_chunk',
  'remat',
  'attention',
  'unroll',
  'max_length',
  'scalar_head',
)


def base() -> ConfigDict:
  """Every key of a configuration, with its default."""
  return ConfigDict(
    {
      'seed': 0,
      'steps': 1000,
      'batch_size': 16,  # rows a step, over all devices and microbatches
      'microbatches': 1,  # gradient accumulation: parts of a batch in turn
      'log_every': 10,
      'eval_every': 200,  # steps; 0: only at the end
      'eval_rows': 0,  # held-out rows an evaluation reads; 0: all
      'checkpoint': {
        'every': 200,  # steps; the last step is always saved
        'keep': 2,  # the newest so many are kept, and the best one
      },
      'data': {
        'source': '',  # PATH, tfds:NAME, hf:NAME or seqio:NAME
        'heldout_source': '',  # one of its own; '': a share of the source
        'heldout_share': 0.1,
        'heldout_by': 'auto',  # tail (of each file), document or auto
        'field': 'text',  # of JSON and Parquet records
        'length': 256,  # tokens a row
        'rows': '',  # of a stage that takes several kinds; '': its first
        'packing': 'best_fit',  # concat (text) or none (records)
        'tokenizer': 'bpe',  # bpe and byte are trained; or a tokenizer.json
        'vocab_size': 512,  # of a trained bpe
        'chat_template': '',  # a .jinja file; '': the tokenizer's, or ChatML
        'dir': '',  # prepared rows; '': WORKDIR/data
        'max_bad_share': 0.0,  # of records that may be skipped, and counted
      },
      'model_name': 'llama',
      'model': {},
      'init_from': '',  # a working directory whose parameters to start from
      'transforms': '',  # e.g. 'nf4, lora(rank=8)'; see weights.py
      # A regular expression over parameter paths, or top:N for the last N
      # layers; '': everything, or what the transforms add.
      'trainable': '',
      'stage_name': 'pretrain',
      'stage': {},
      'optimizer': {
        'name': 'adamw',
        'learning_rate': 3e-3,
        'schedule': 'cosine',  # cosine, linear, constant or wsd
        'warmup': 50,  # steps
        'final': 0.1,  # of the peak, at the last step
        'decay': 0.2,  # wsd: share of the steps that decays
        'weight_decay': 0.1,
        'no_decay': 'norm|bias',  # paths that do not decay
        'b1': 0.9,
        'b2': 0.95,
        'eps': 1e-8,
        'momentum': 0.95,  # muon
        'rest_learning_rate': 0.0,  # muon: of AdamW's part; 0: the same
        'balance_rate': 1e-3,  # of the bias of a router; see models/moe.py
        'clip': 1.0,  # global norm of the gradient; 0: no clipping
      },
      'guard': {
        'bad_in_a_row': 10,  # skipped steps in a row that end the run
        'spike_factor': 0.0,  # deviations above the mean loss; 0: no guard
        'window': 50,  # accepted losses that mean and deviation are of
      },
      'mesh': {
        'data': -1,
        'fsdp': 1,
        'tensor': 1,
        'sequence': 1,
        'expert': 1,
      },
      'compiler': 'auto',  # groups of options of compiler.py; '': none
      'evals': ('bits_per_byte',),
      'platform': '',  # cpu, gpu or tpu: refuse any other; '': what there is
      'tensorboard': False,
      'profile': False,  # writes a trace of five steps to WORKDIR/profile
      'watchdog': 1800.0,  # seconds without a finished phase that end the run
    }
  )


def tiny(config: ConfigDict) -> ConfigDict:
  """The shape and schedule of a network that a laptop trains in minutes."""
  config.steps = 300
  config.batch_size = 16
  config.data.length = 256
  config.data.vocab_size = 1024
  config.model.num_layers = 4
  config.model.dim = 128
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.hidden_dim = 384
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup = 20
  return config


def at_scale(
  model_name: str,
  variant: str,
  *,
  vocab_size: int,
  batch_size: int = 256,
  learning_rate: float = 3e-4,
  **model: Any,
) -> ConfigDict:
  """Pretraining over many chips: fully sharded, rows of 8,192 tokens.

  Args:
    model_name: of the family.
    variant: 'tiny' for `tiny` with the same mesh, or ''.
    vocab_size: of the tokenizer.
    batch_size: rows a step.
    learning_rate: at its peak.
    **model: keys of the section.
  """
  check_variant(variant, ('tiny',))
  config = base()
  config.model_name = model_name
  config.mesh.data = 1
  config.mesh.fsdp = -1
  if variant == 'tiny':
    return tiny(config)
  config.steps = 100_000
  config.batch_size = batch_size
  config.data.length = 8192
  config.data.vocab_size = vocab_size
  config.model = {'dtype': 'bfloat16', **model}
  config.optimizer.learning_rate = learning_rate
  config.optimizer.warmup = 2000
  return config


def split_spec(spec: str) -> tuple[pathlib.Path, str]:
  """'configs/a.py:tiny' is the file and its variant."""
  path, _, variant = spec.partition(':')
  return pathlib.Path(path), variant


def load_file(spec: str) -> ConfigDict:
  """Runs `get_config` of the file that `spec` names.

  Raises:
    UserError: no such file, no such function, or no such variant.
  """
  path, variant = split_spec(spec)
  if not path.is_file():
    beside = [str(p) for p in path.parent.glob('*.py')] or [
      str(p) for p in pathlib.Path('configs').glob('*.py')
    ]
    raise UserError(
      f'--config={spec}: no such file{nearest(str(path), beside)}'
    )
  module_spec = importlib.util.spec_from_file_location(path.stem, path)
  if module_spec is None:
    raise UserError(f'--config={spec}: not a Python file')
  module = importlib.util.module_from_spec(module_spec)
  try:
    return _config_of(module_spec.loader, module, path, variant)
  except UserError:
    raise
  except SyntaxError as error:
    raise UserError(f'{path}:{error.lineno}: {error.msg}') from error
  except Exception as error:  # the user's own code may raise anything
    frames = traceback.extract_tb(error.__traceback__)
    own = [f.lineno for f in frames if f.filename == module_spec.origin]
    line = own[-1] if own else 1
    what = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise UserError(f'{path}:{line}: {what}') from error


def beside(file: str, name: str, variant: str = '') -> ConfigDict:
  """For `get_config` of `file`: what `name`.py in its folder gives."""
  path = pathlib.Path(file).parent / f'{name}.py'
  return load_file(f'{path}:{variant}' if variant else str(path))


def _config_of(
  loader: Any, module: Any, path: pathlib.Path, variant: str
) -> ConfigDict:
  """Runs the file and its `get_config`."""
  loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise UserError(f'{path}: has no function get_config(variant)')
  if variant and not inspect.signature(module.get_config).parameters:
    raise UserError(f'{path}: takes no variant, but {variant!r} was given')
  made = module.get_config(variant) if variant else module.get_config()
  if not isinstance(made, ConfigDict):
    raise UserError(
      f'{path}: get_config returned {type(made).__name__}, not a configuration'
    )
  return made


def check_variant(variant: str, known: tuple[str, ...]) -> None:
  """For `get_config`: refuses a variant that the file does not have."""
  if variant not in ('', *known):
    raise UserError(
      f'--config=…:{variant}: no such variant{nearest(variant, known)}; this '
      f'file has {", ".join(known)}'
    )


def _parse(text: str, default: Any, key: str) -> Any:
  """The value that `text` spells, of the type of `default`."""
  wanted = type(default)
  if wanted is str:
    return text
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = {'true': True, 'false': False}.get(text.lower(), text)
  if wanted is float and type(value) is int:
    value = float(value)
  if wanted is tuple and not isinstance(value, tuple):
    value = tuple(value) if isinstance(value, list) else (value,)
  if type(value) is not wanted:
    raise UserError(
      f'--config.{key}={text}: must be {_spoken(wanted)}, like {default!r}'
    )
  return value


def _spoken(kind: type) -> str:
  return {
    int: 'a whole number',
    float: 'a number',
    bool: 'true or false',
    tuple: 'a tuple',
    str: 'text',
  }[kind]


def schema() -> dict[str, Any]:
  """Every dotted key with a value of its type, open sections included.

  Keys of `model` are those of the transformer; keys of `stage` depend on the
  stage's name and are left to it.
  """
  # Imports JAX, so only where keys are looked at.
  from tpu_lm.models import transformer

  known = flatten(base())
  for field in dataclasses.fields(transformer.Config):
    known[f'model.{field.name}'] = field.default
  return known


def flatten(config: ConfigDict, prefix: str = '') -> dict[str, Any]:
  """{'data.length': 256, …} of a nested configuration."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets the dotted `key` of `config` to what `text` spells."""
  known = schema()
  if key.startswith('stage.'):
    config.stage[key.removeprefix('stage.')] = _guess(text)
    return
  if key not in known:
    raise UserError(
      f'--config.{key}: unknown key{nearest(key, known)}'
      + ('; it is a section' if key in config else '')
    )
  section, _, name = key.rpartition('.')
  target = config[section] if section else config
  target[name] = _parse(text, known[key], key)


def _guess(text: str) -> Any:
  """The literal that `text` spells, else the text."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return {'true': True, 'false': False}.get(text.lower(), text)


def check(config: ConfigDict, where: str) -> None:
  """Refuses keys, types and signs that no run can mean."""
  known = schema()
  for key, value in flatten(config).items():
    if key.startswith('stage.'):
      continue
    if key not in known:
      raise UserError(f'{where}: {key}: unknown key{nearest(key, known)}')
    wanted = type(known[key])
    if type(value) is not wanted and not (
      wanted is float and type(value) is int
    ):
      raise UserError(f'{where}: {key}={value!r}: must be {_spoken(wanted)}')
    if wanted is float and not math.isfinite(value):
      raise UserError(f'{key}={value!r}: must be finite')
  missing = flatten(base()).keys() - flatten(config).keys()
  if missing:
    raise UserError(
      f'{where}: {min(missing)}: is missing; start from configs.base()'
    )
  _check_values(config)


def _check_values(config: ConfigDict) -> None:
  """Refuses numbers of the wrong sign or size."""
  for key in ('steps', 'batch_size', 'microbatches', 'log_every'):
    if config[key] < 1:
      raise UserError(f'{key}={config[key]}: must be at least 1')
  for key in ('seed', 'eval_every', 'eval_rows'):
    if config[key] < 0:
      raise UserError(f'{key}={config[key]}: must not be negative')
  if config.seed >= 1 << 32:
    raise UserError(f'seed={config.seed}: must be below 2**32')
  if config.watchdog < 0:
    raise UserError(
      f'watchdog={config.watchdog}: must not be negative; 0 for none'
    )
  for key, low in (('bad_in_a_row', 1), ('window', 2)):
    if config.guard[key] < low:
      raise UserError(
        f'guard.{key}={config.guard[key]}: must be at least {low}'
      )
  if config.guard.spike_factor < 0:
    raise UserError(
      f'guard.spike_factor={config.guard.spike_factor}: must not be negative'
    )
  try:
    re.compile(config.trainable)
  except re.error as error:
    raise UserError(
      f'trainable={config.trainable!r}: no regular expression ({error})'
    ) from error
  if config.data.length < 2:
    raise UserError(f'data.length={config.data.length}: must be at least 2')
  for key in ('every', 'keep'):
    if config.checkpoint[key] < 1:
      raise UserError(
        f'checkpoint.{key}={config.checkpoint[key]}: must be at least 1'
      )


def load(spec: str, overrides: list[tuple[str, str]]) -> ConfigDict:
  """Reads a configuration file, applies overrides, checks the whole."""
  config = load_file(spec)
  for key, text in overrides:
    override(config, key, text)
  check(config, spec)
  adopt(config)
  return config


def adopt(config: ConfigDict) -> None:
  """Takes network and tokenizer from `init_from`, where they are not given.

  How the network computes (precision, kernels) stays the run's own affair. A
  student takes the tokenizer of its `stage.teacher`.

  Raises:
    UserError: no working directory is there.
  """
  _take_tokenizer(config, 'init_from', config.init_from)
  _take_tokenizer(config, 'stage.teacher', config.stage.get('teacher', ''))
  if config.init_from:
    base = read(pathlib.Path(config.init_from) / 'config.json')
    config.model_name = base.model_name
    for name, value in base.model.items():
      if name not in config.model and name not in _HOW:
        config.model[name] = value


def _take_tokenizer(config: ConfigDict, key: str, source: str) -> None:
  """Takes the tokenizer of `source`, where none is given by its path."""
  if not source:
    return
  path = pathlib.Path(source) / 'config.json'
  if not path.is_file():
    raise UserError(
      f'{key}={source}: no working directory of a `tpu_lm train` (it has no '
      f'config.json){nearest(str(source), _siblings(path.parent))}'
    )
  if config.data.tokenizer in KINDS:
    config.data.tokenizer = str(path.parent / 'tokenizer' / 'tokenizer.json')


def _siblings(path: pathlib.Path) -> list[str]:
  return [str(p.parent) for p in path.parent.glob('*/config.json')]


def read(path: str | os.PathLike) -> ConfigDict:
  """Reads back `WORKDIR/config.json`."""

  def tuples(value):
    if isinstance(value, list):
      return tuple(tuples(item) for item in value)
    if isinstance(value, dict):
      return {key: tuples(item) for key, item in value.items()}
    return value

  try:
    found = tuples(json.loads(pathlib.Path(path).read_text()))
  except ValueError as error:
    raise UserError(f'{path}: no configuration ({error})') from error
  config = base()  # a key that came later has its default
  config.update(ConfigDict(found))
  return config
