"""What a run starts from, and how a working directory is opened again.

A run starts from the parameters of `init_from`, another working directory, or
from fresh ones, held as `transforms` say. Where some stay frozen and came from
`init_from`, they are not saved again: checkpoints hold the trained part alone
(an adapter of a few MB) and name the base by directory, step and fingerprint.
"""

import functools
import hashlib
import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tpu_lm import checkpoint, models, sharding, tokenizer, weights
from tpu_lm import config as configs
from tpu_lm import workdir as workdirs
from tpu_lm.data import chat
from tpu_lm.errors import UserError

Params = Any


class Loaded(NamedTuple):
  """What reading commands need of a working directory."""

  config: ConfigDict
  tokenizer: Any
  model: Any
  params: Params
  step: int
  mesh: Any
  base: dict[str, Any] | None = None  # as `Start.base` when it began


class Start(NamedTuple):
  """Parameters to start from, and which base they came from."""

  params: Params
  base: dict[str, Any] | None  # directory, step, fingerprint; None: fresh


def _held(params: Params, config: ConfigDict) -> Params:
  """`params` as `transforms` say; traceable."""
  key = jax.random.key(config.seed)
  key = jax.random.fold_in(key, zlib.crc32(b'transforms'))
  return weights.transform(params, config.transforms, key)


def _fresh(model: Any, config: ConfigDict) -> Params:
  return _held(model.init_params(jax.random.key(config.seed)), config)


def abstract(model: Any, config: ConfigDict, mesh: Any) -> Params:
  """The parameters of a run as shapes with their shardings."""
  shapes = jax.eval_shape(functools.partial(_fresh, model, config))
  return sharding.abstract(shapes, mesh)


def is_apart(config: ConfigDict, frozen: Params) -> bool:
  """Whether what is frozen stays with its base and is not saved again."""
  return bool(config.init_from) and bool(jax.tree.leaves(frozen))


def has_start(config: ConfigDict, params: Params) -> bool:
  """Whether trained parameters still hold those that they began with.

  They do where only adapters are trained: take these away (`weights.unadapt`).
  """
  return not config.trainable and weights.is_adapted(params)


def begin(
  model: Any,
  config: ConfigDict,
  mesh: Any,
  digest: str,
  base: dict[str, Any] | None = None,
  report: Callable[[str], None] = lambda _: None,
) -> Start:
  """Makes the parameters that a run starts from.

  Args:
    model: the network of the run.
    config: of the run.
    mesh: on which they are laid out.
    digest: of the run's tokenizer.
    base: what `init_from` must be, as recorded when the run began; None: the
      newest step of it.
    report: is told where they come from.

  Raises:
    UserError: `init_from` is of another network or tokenizer, or not `base`.
  """
  places = jax.tree.map(lambda x: x.sharding, abstract(model, config, mesh))
  if not config.init_from:
    make = functools.partial(_fresh, model, config)
    return Start(jax.jit(make, out_shardings=places)(), None)
  check_tokenizer('init_from', config.init_from, digest)
  other = load(config.init_from, mesh, step=base and base['step'])
  found = {
    'directory': str(config.init_from),
    'step': other.step,
    'fingerprint': fingerprint(config.init_from, other.step),
  }
  if base and base['fingerprint'] != found['fingerprint']:
    raise UserError(
      f'{config.init_from}: is not the base that was trained on (its step '
      f'{other.step} has the fingerprint {found["fingerprint"]}, not '
      f'{base["fingerprint"]}); name the directory that is, once '
      f'{base["directory"]}'
    )
  _check_fits(other, model, config.init_from)

  def held(params: Params) -> Params:
    fresh = model.init_params(jax.random.key(config.seed))
    plain = weights.merge(params)
    return _held({name: plain.get(name, fresh[name]) for name in fresh}, config)

  report(
    f'starts from the parameters of {config.init_from}, step {other.step:,}'
  )
  with jax.set_mesh(mesh):
    return Start(jax.jit(held, out_shardings=places)(other.params), found)


def _check_fits(other: Loaded, model: Any, where: str) -> None:
  """Refuses a base whose arrays are not those of the network."""

  def shapes(of: Any) -> dict[str, tuple]:
    tree = jax.eval_shape(of.init_params, jax.random.key(0))
    return {
      sharding.path_name(path): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
      if not weights.ADDED.search(sharding.path_name(path))
    }

  theirs, ours = shapes(other.model), shapes(model)
  for name in sorted(theirs.keys() | ours.keys()):
    if theirs.get(name) != ours.get(name):
      raise UserError(
        f'init_from={where}: its {name} has the shape {theirs.get(name)}, '
        f'this network asks for {ours.get(name)}; leave the model.* keys out, '
        'and they are taken from there'
      )


def fingerprint(workdir: str | pathlib.Path, step: int) -> str:
  """Tells a step's parameters from all others, those of its base included."""
  folder = pathlib.Path(workdir) / 'checkpoints'
  content = checkpoint.Checkpoints(folder, read_only=True).content(step)
  arrays = {
    name: about
    for name, about in content['arrays'].items()
    if name.startswith('params/')
  }
  base = (content['caller'].get('base') or {}).get('fingerprint')
  text = json.dumps([arrays, base], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def newest_fingerprint(workdir: str | pathlib.Path) -> str:
  """The fingerprint of the newest step; '' where nothing is saved."""
  folder = pathlib.Path(workdir) / 'checkpoints'
  steps = checkpoint.Checkpoints(folder, read_only=True).steps()
  return fingerprint(workdir, steps[-1]) if steps else ''


def check_tokenizer(key: str, workdir: str, digest: str) -> None:
  """Refuses a working directory that has another tokenizer."""
  theirs = tokenizer.load(pathlib.Path(workdir) / 'tokenizer')
  if theirs.digest != digest:
    raise UserError(
      f'{key}={workdir}: has another tokenizer; set --config.data.tokenizer='
      f'{workdir}/tokenizer/tokenizer.json'
    )


def load(
  workdir: str | pathlib.Path,
  mesh: Any = None,
  step: int | None = None,
  base: str = '',
) -> Loaded:
  """Opens a working directory to read it.

  Args:
    workdir: of a training run.
    mesh: on which the parameters are laid out; None: the devices here.
    step: which checkpoint; None: the newest good one.
    base: where the base of an adapter lies now; '': where it was.

  Raises:
    UserError: nothing was trained there, or its base is another one.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(
      f'--workdir={workdir}: no config.json there, so nothing was trained in '
      'it; give the --workdir of a `tpu_lm train`'
    )
  config = configs.read(path)
  if base:
    config.init_from = base
  tokens = tokenizer.load(workdir / 'tokenizer')
  model = models.make(
    config.model_name, config.model, tokens.vocab_size, config.data.length
  )
  if mesh is None:
    sizes = dict.fromkeys(sharding.AXES, 1) | {'data': -1}
    mesh = sharding.make_mesh(sizes, jax.local_devices())
  target = abstract(model, config, mesh)
  trainable, frozen = weights.partition(target, config.trainable)
  apart = is_apart(config, frozen)
  step, params, meta = checkpoint.restore_params(
    workdir / 'checkpoints', trainable if apart else target, step
  )
  if apart:
    begun = begin(model, config, mesh, tokens.digest, meta['base'])
    frozen = weights.partition(begun.params, config.trainable)[1]
    params = weights.combine(params, frozen)
  return Loaded(config, tokens, model, params, step, mesh, meta.get('base'))


class _Plain(NamedTuple):
  """The state of a merged model: parameters, and the step they are of."""

  step: jax.Array
  params: Params


def merge(
  workdir: str | pathlib.Path, to: str | pathlib.Path, base: str = ''
) -> None:
  """Writes what `workdir` trained as plain weights, with no base to keep.

  The new directory can be read by every command, and started from.

  Raises:
    UserError: `to` exists already, or `workdir` cannot be read.
  """
  to = pathlib.Path(to)
  if to.exists() and any(to.iterdir()):
    raise UserError(f'--to={to}: is there already; name a new directory')
  loaded = load(workdir, base=base)
  config = loaded.config
  config.init_from = config.transforms = config.trainable = ''
  shapes = abstract(loaded.model, config, loaded.mesh)
  places = jax.tree.map(lambda x: x.sharding, shapes)
  plain = jax.jit(weights.merge, out_shardings=places)(loaded.params)
  workdirs.make(to)
  loaded.tokenizer.save(to / 'tokenizer')
  chat.hand_on(pathlib.Path(workdir) / 'tokenizer', to / 'tokenizer')
  writer = checkpoint.Checkpoints(to / 'checkpoints')
  meta = {'tokenizer': loaded.tokenizer.digest, 'seed': config.seed}
  state = _Plain(jnp.int32(loaded.step), plain)
  writer.save(loaded.step, state, meta)
  writer.close()
  workdirs.write_json(to / 'config.json', json.loads(config.to_json()))
  print(
    f'{to}: {weights.count(plain):,} plain parameters, step {loaded.step:,}'
  )
