"""Reading one step of a checkpoint: first its files, then its arrays.

Damage is returned as one line, for the caller to name and pass over; a model
that differs from the saved one is the user's to mend, and raised.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tpu_lm import seal
from tpu_lm.digest import digest, names
from tpu_lm.errors import UserError

Tree = Any


def load(
  folder: epath.Path, target: Tree, cast: bool = False
) -> tuple[str | None, Tree, dict]:
  """Reads the arrays of `target` from a step.

  Args:
    folder: the step.
    target: jax.ShapeDtypeStructs with shardings: the whole state, or
      {'params': …} for the parameters alone.
    cast: a floating array may be asked in another floating dtype.

  Returns:
    (what is wrong with the step or None, the arrays, the caller's meta)
  """
  wrong = fault(folder)
  if wrong is not None:
    return wrong, None, {}
  about = content(folder)
  saved = about['arrays']
  _compare(saved, target, folder, cast)
  tree = None
  try:
    tree = _read(folder, _as_saved(target, saved))
    sums = digest(tree)
    differ = [name for name, sum_ in sums.items() if sum_ != saved[name][2]]
    if differ:
      wrong = f'the array {differ[0]} is not what was saved (digest)'
  except Exception as e:
    wrong = _orbax_fault(e, folder)
  wrong = agreed(wrong)
  if wrong is not None:
    return wrong, None, {}
  return None, _cast(tree, target), about['caller']


def fault(folder: epath.Path, thorough: bool = True) -> str | None:
  """Returns what is wrong with the files of a step in one line, or None."""
  wrong = None
  if jax.process_index() == 0:
    wrong = seal.fault(folder, thorough)
  return agreed(wrong)


def content(folder: epath.Path) -> dict:
  """Returns the `meta` item of a step whose seal is good."""
  return json.loads((folder / 'meta' / 'metadata').read_bytes())


def arrays(folder: epath.Path) -> dict[str, tuple]:
  """Returns shape, dtype, digest and raw bytes of every array of a step.

  Needs neither the model nor its devices: for comparing checkpoints.

  Raises:
    UserError: the step is damaged.
  """
  if wrong := fault(folder):
    raise UserError(f'{folder}: damaged: {wrong}')
  found = {}
  handler = ocp.PyTreeCheckpointHandler()
  with ocp.Checkpointer(handler) as reader:
    for item in ('params', 'state'):
      path = folder / item
      about = handler.metadata(path).tree
      plain = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), about
      )
      tree = reader.restore(
        path, args=ocp.args.PyTreeRestore(restore_args=plain)
      )
      for name, x in zip(names(tree), jax.tree.leaves(tree), strict=True):
        name = f'params/{name}' if item == 'params' else name
        found[name] = (x.shape, str(x.dtype), x.tobytes())
  for name, known in content(folder)['arrays'].items():
    found[f'{name} (digest)'] = tuple(map(str, known))
  return found


def _read(folder: epath.Path, target: Tree) -> Tree:
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:

    def item(name: str, abstract: Tree) -> Tree:
      args = ocp.args.StandardRestore(abstract)
      return reader.restore(folder / name, args=args)

    if isinstance(target, dict):
      return {'params': item('params', target['params'])}
    state = item('state', target._replace(params=None))
    return state._replace(params=item('params', target.params))


def _as_saved(target: Tree, saved: dict[str, list]) -> Tree:
  """Returns the target in the dtypes that were saved."""
  leaves, structure = jax.tree.flatten(target)
  return structure.unflatten(
    x
    if str(x.dtype) == saved[name][1]
    else jax.ShapeDtypeStruct(
      x.shape, jnp.dtype(saved[name][1]), sharding=x.sharding
    )
    for name, x in zip(names(target), leaves, strict=True)
  )


def _cast(tree: Tree, target: Tree) -> Tree:
  return jax.tree.map(
    lambda x, to: x if x.dtype == to.dtype else x.astype(to.dtype), tree, target
  )


def _compare(
  saved: dict[str, list], target: Tree, folder: epath.Path, cast: bool
) -> None:
  """Raises UserError at the first array that differs from the saved one."""
  mend = (
    'use the configuration it was trained with, or another --workdir'
    ' (init_from takes the parameters of another run)'
  )
  asked = dict(zip(names(target), jax.tree.leaves(target), strict=True))
  if isinstance(target, dict):
    saved = {k: v for k, v in saved.items() if k.split('/')[0] == 'params'}
  for name, x in asked.items():
    if name not in saved:
      raise UserError(f'{folder}: has no array {name}, the model does; {mend}')
    shape, dtype, _ = saved[name]
    if tuple(shape) != x.shape:
      raise UserError(
        f'{folder}: {name} has shape {tuple(shape)}, the model needs'
        f' {x.shape}; {mend}'
      )
    if dtype != str(x.dtype) and not (cast and _floating(dtype, x.dtype)):
      raise UserError(
        f'{folder}: {name} is {dtype}, the model needs {x.dtype}; {mend}'
      )
    assert x.sharding is not None, f'{name}: the target needs a sharding'
  for name in saved:
    if name not in asked:
      raise UserError(f'{folder}: has {name}, the model does not; {mend}')


def _floating(saved: str, asked: Any) -> bool:
  return not saved.startswith('key<') and all(
    jnp.issubdtype(jnp.dtype(d), jnp.floating) for d in (saved, asked)
  )


def _orbax_fault(error: Exception, folder: epath.Path) -> str:
  """Returns one line; raises again what is no damage of the files."""
  text = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
  if 'RESOURCE_EXHAUSTED' in text or isinstance(error, MemoryError):
    raise error
  if isinstance(error, OSError) or not seal.is_whole(folder):
    return text
  # Every byte is as it was written: another Orbax or another disk layout is
  # likelier than damage, and must not move all checkpoints out of the way.
  raise UserError(
    f'{folder}: its files are whole, but Orbax {ocp.__version__} cannot read'
    f' them ({text}); use the version that wrote them'
  ) from error


def agreed(wrong: str | None) -> str | None:
  """Returns a fault that any process has found, in every process."""
  if jax.process_count() == 1:
    return wrong
  found = multihost_utils.process_allgather(np.array(wrong is not None))
  return wrong or ('another process found it' if found.any() else None)


def barrier(name: str) -> None:
  """Waits until every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'checkpoints: {name}')
