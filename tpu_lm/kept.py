"""Columns of a batch that are computed once and kept.

What a stage names in `kept` (log-probabilities of the reference, logits of a
teacher) depends on the row alone. It is computed for every row that a run will
visit, before its first step, and stored beside the run:

  kept/SPLIT-FINGERPRINT/{meta.json, done.npy, COLUMN.npy}

Arrays have one entry a row of the split; `done` says which are filled, so that
a run that was killed, or is made longer, computes only what is missing. So the
reference needs no memory and no time in the steps, and a resumed run sees the
very same numbers.
"""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tpu_lm import processes, start, weights, workdir
from tpu_lm.errors import UserError


class Kept:
  """The kept columns of one split; none where `folder` is None."""

  def __init__(self, folder: pathlib.Path | None = None):
    self._arrays = {}
    if folder is not None:
      names = json.loads((folder / 'meta.json').read_text())['columns']
      self._arrays = {
        name: np.load(folder / f'{name}.npy', mmap_mode='r') for name in names
      }

  def columns(self, loader: Any, step: int) -> dict[str, np.ndarray]:
    """The columns of `loader.batch(step)`; zeros for a row of padding."""
    if not self._arrays:
      return {}
    numbers, found = loader.row_numbers(step), {}
    for name, array in self._arrays.items():
      rows = np.array(array[np.maximum(numbers, 0)])
      rows[numbers < 0] = 0
      found[name] = rows
    return found


def visited(
  run: Any,
  loader: Any,
  split: str,
  num_batches: int,
  report: Callable[[str], None],
) -> Kept:
  """The kept columns of the rows of `loader` that `run` will see.

  Args:
    run: whose stage computes them.
    loader: of the split.
    split: 'train' or 'heldout'.
    num_batches: that it will see, from the first.
    report: is told how long it took.
  """
  if not run.stage.kept:
    return Kept()
  folder = run.workdir / 'kept' / f'{split}-{loader.manifest.fingerprint[:12]}'
  _open(folder, _about(run), loader.num_rows)
  processes.barrier('kept columns')
  done = np.lib.format.open_memmap(folder / 'done.npy', 'r+')
  missing = _numbers(loader, num_batches)
  missing = missing[~done[missing]]
  if len(missing):
    began = time.perf_counter()
    with run.phases('keep'):
      _compute(run, loader, folder, done, missing)
    report(
      f'kept {", ".join(run.stage.kept)} of {len(missing):,} {split} rows, '
      f'{time.perf_counter() - began:.1f} s'
    )
  return Kept(folder)


def _about(run: Any) -> dict[str, Any]:
  """All that decides the columns, besides the rows."""
  config = run.config
  about = {
    'columns': list(run.stage.kept),
    'base': run.base,
    'seed': config.seed,
    'stage': [config.stage_name, config.stage.to_dict()],
    'transforms': config.transforms,
  }
  if config.stage.get('teacher'):
    about['teacher'] = start.newest_fingerprint(config.stage.teacher)
  return about


def _numbers(loader: Any, num_batches: int) -> np.ndarray:
  """The rows of these batches, sorted; all, where most are likely seen."""
  if num_batches * loader.batch_size >= 2 * loader.num_rows:
    return np.arange(loader.num_rows)
  steps = range(num_batches)
  batches = [loader.row_numbers(step, whole=True) for step in steps]
  numbers = np.unique(np.concatenate(batches))
  return numbers[numbers >= 0]


def _open(folder: pathlib.Path, about: dict, num_rows: int) -> None:
  """Makes the folder, or refuses one that was computed with another base."""
  path = folder / 'meta.json'
  if not path.is_file():
    if jax.process_index():
      return
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / 'done.npy', np.zeros(num_rows, bool))
    workdir.write_json(path, about)
  elif json.loads(path.read_text()) != json.loads(json.dumps(about)):
    raise UserError(
      f'{folder}: was computed with another base, teacher or stage; remove the '
      'folder to compute it again'
    )


def _compute(run, loader, folder, done, missing) -> None:
  # A stage of its own, so that a reference is freed when all is computed.
  stage = run.make_stage()
  params = weights.combine(run.state.params, run.frozen)
  size = loader.batch_size
  arrays = {}
  for first in range(0, len(missing), size):
    numbers = np.full(size, -1)
    chunk = missing[first : first + size]
    numbers[: len(chunk)] = chunk
    rows = processes.own_rows({'row': numbers}, run.mesh)['row']
    batch = run.put(loader.rows_at(rows))
    (part,) = stage.prepare(params, batch, run.root)
    for name in stage.kept:
      rows = processes.whole(part[name])[: len(chunk)]
      if jax.process_index():
        continue  # process 0 writes, the others have only helped
      if name not in arrays:
        arrays[name] = _array(folder / f'{name}.npy', len(done), rows)
      arrays[name][chunk] = rows
  for array in arrays.values():
    array.flush()
  processes.barrier('kept columns are computed')
  if not jax.process_index():
    done[missing] = True
    done.flush()
  processes.barrier('kept columns are written')


def _array(path: pathlib.Path, num_rows: int, like: np.ndarray) -> np.ndarray:
  if path.is_file():
    return np.lib.format.open_memmap(path, 'r+')
  shape = (num_rows, *like.shape[1:])
  return np.lib.format.open_memmap(path, 'w+', like.dtype, shape)
