"""The stage's own loss and metrics on its held-out rows.

Whatever a stage reports while it trains (pairwise accuracy, margins, rewards,
…) is summed over all held-out rows and divided once. Metrics that are squares
of a calibration and the like come as their stage defines them.
"""

import copy
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tpu_lm import kept, run, sharding, stage, start, weights
from tpu_lm.data import prepare
from tpu_lm.errors import UserError


def totals_of(stage_: stage.Stage) -> Callable:
  """(params, batch, key) -> sums: {'loss': Mean, metric: Mean, …}; jitted."""

  def sums(params, batch, key):
    mean, metrics = stage_.loss(params, batch, key)
    return {'loss': mean} | metrics

  return jax.jit(sums)


def make(run_: Any, rows: pathlib.Path) -> Callable[[Any], dict | None]:
  """The evaluation that a run does: params -> figures of its held-out rows.

  `eval_rows` of the config limits the rows, rounded up to whole batches; a
  batch is a microbatch of training, to need no more memory than that.
  """
  config = copy.deepcopy(run_.config)
  config.batch_size //= config.microbatches
  loader = run.open_rows(config, rows, 'heldout', run_.model)
  columns = kept.visited(run_, loader, 'heldout', lambda _: None)
  totals = totals_of(run_.stage)
  wanted = config.eval_rows or loader.num_rows
  num_batches = min(-(-wanted // loader.batch_size), loader.num_batches)

  def evaluate(params: Any) -> dict[str, float] | None:
    found: dict[str, np.ndarray] = {}
    for step in range(num_batches):
      rows = loader.batch(step) | columns.columns(loader.row_numbers(step))
      batch = run_.put(rows)
      for part in run_.stage.prepare(params, batch, run_.root):
        for name, mean in totals(params, part, run_.root).items():
          pair = np.array(jax.device_get(tuple(mean)), np.float64)
          found[name] = found.get(name, 0.0) + pair
      if run_.stop_evaluation():
        return None
    return figures(found, config.data.source)

  return evaluate


def figures(sums: dict[str, np.ndarray], where: str) -> dict[str, float]:
  """Means of (total, weight) pairs."""
  if not sums['loss'][1]:
    raise UserError(
      f'held-out data of {where}: no target in it; make data.heldout_share '
      'larger, or give a data.heldout_source'
    )
  return {
    name: float(total / weight)
    for name, (total, weight) in sums.items()
    if weight
  }


class _Reading:
  """What `make` needs of a run, of a working directory that is only read."""

  first_step = 1  # it is beyond its start

  def __init__(self, loaded: start.Loaded):
    self.config, self.model = loaded.config, loaded.model
    self.mesh, self.tokenizer = loaded.mesh, loaded.tokenizer
    self.root = jax.random.key(loaded.config.seed)
    self._params = loaded.params
    on_the_fly = stage.takes(loaded.config.stage_name, 'on_the_fly')
    hparams = dict(loaded.config.stage)
    if on_the_fly:
      hparams['on_the_fly'] = True
    self.stage = stage.make(
      loaded.config.stage_name, loaded.model, self._starting, hparams
    )

  def _starting(self) -> Any:
    if not self.config.trainable and weights.is_adapted(self._params):
      return self._params
    return start.begin(
      self.model, self.config, self.mesh, self.tokenizer.digest
    ).params

  def put(self, rows: dict) -> dict:
    return sharding.put_batch(rows, self.mesh)

  def stop_evaluation(self) -> bool:
    return False


def score(
  loaded: start.Loaded, workdir: pathlib.Path, source: str = ''
) -> dict[str, float]:
  """The figures of a working directory on its held-out split, or on `source`.

  Args:
    loaded: what `start.load` returns.
    workdir: of the model.
    source: as `data.source`; all of it is scored.
  """
  config = copy.deepcopy(loaded.config)
  folder = run.data_dir(config, workdir)
  if source:
    config.data.source = config.data.heldout_source = source
    config.data.tokenizer = str(pathlib.Path(workdir) / 'tokenizer')
  found = prepare.prepare(config, folder, _tell)
  if found.tokenizer_digest != loaded.tokenizer.digest:
    raise UserError(
      f'{config.data.source}: has changed since {workdir} was trained, and '
      'gives another tokenizer; name the data to score with --source=PATH'
    )
  config.batch_size = -(-8 // loaded.mesh.size) * loaded.mesh.size
  config.microbatches, config.eval_rows = 1, 0
  with jax.set_mesh(loaded.mesh):
    reading = _Reading(loaded._replace(config=config))
    return make(reading, found.directory)(loaded.params)


# Standard output is for the figures.
_tell = functools.partial(print, file=sys.stderr, flush=True)
