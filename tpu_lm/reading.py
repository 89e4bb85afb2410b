"""What evaluations need of a run, of a working directory that is only read."""

import contextlib
import copy
import functools
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from tpu_lm import run, sharding, stage, start
from tpu_lm.data import loader, prepare
from tpu_lm.errors import UserError

_ROWS = 8  # in a batch, at least; more where a mesh divides them


class Reading:
  """A trained model as `evals.NAME.make` takes a run."""

  def __init__(self, loaded: start.Loaded, config: ConfigDict):
    self.config, self.model = config, loaded.model
    self.mesh, self.tokenizer = loaded.mesh, loaded.tokenizer
    self.root = jax.random.key(config.seed)
    self._loaded = loaded

  @functools.cached_property
  def stage(self) -> stage.Stage:
    """What it was trained with; nothing is kept of rows read but once."""
    name, hparams = self.config.stage_name, dict(self.config.stage)
    if stage.takes(name, 'on_the_fly'):
      hparams['on_the_fly'] = True
    return stage.make(name, self.model, self._starting, hparams)

  def _starting(self) -> Any:
    loaded = self._loaded
    if start.has_start(self.config, loaded.params):
      return loaded.params
    digest = self.tokenizer.digest
    return start.begin(
      self.model, self.config, self.mesh, digest, loaded.base
    ).params

  def put(self, rows: dict) -> dict:
    return sharding.put_batch(rows, self.mesh)

  def stop_evaluation(self) -> bool:
    return False


@contextlib.contextmanager
def opened(
  loaded: start.Loaded, workdir: pathlib.Path, source: str = ''
) -> Iterator[tuple[Reading, pathlib.Path]]:
  """A working directory to score, and the folder of its prepared rows.

  Args:
    loaded: what `start.load` returns.
    workdir: of the model.
    source: as `data.source`, all of it held out; '': the held-out split.

  Raises:
    UserError: the source cannot be read, or the run's own has changed since,
      and its tokens are not those of the model.
  """
  config = copy.deepcopy(loaded.config)
  config.batch_size = -(-_ROWS // loaded.mesh.size) * loaded.mesh.size
  config.microbatches, config.eval_rows = 1, 0
  with contextlib.ExitStack() as stack:
    folder = run.data_dir(config, workdir)
    if source:
      config.data.source = config.data.heldout_source = source
      config.data.tokenizer = str(pathlib.Path(workdir) / 'tokenizer')
      folder = stack.enter_context(tempfile.TemporaryDirectory())
    # Standard output is for the figures.
    tell = functools.partial(print, file=sys.stderr, flush=True)
    found = prepare.prepare(config, pathlib.Path(folder), tell)
    if found.tokenizer_digest != loaded.tokenizer.digest:
      raise UserError(
        f'{config.data.source}: has changed since {workdir} was trained, and '
        'gives another tokenizer; name the data to score with --source=PATH'
      )
    stack.enter_context(jax.set_mesh(loaded.mesh))
    yield Reading(loaded, config), found.directory


def heldout(of: Any, rows: pathlib.Path) -> tuple[loader.Loader, int]:
  """The held-out rows of a run, and how many batches of them it reads.

  `eval_rows` of the config limits the rows, rounded up to whole batches; a
  batch is a microbatch of training, to need no more memory than that.
  """
  config = copy.deepcopy(of.config)
  config.batch_size //= config.microbatches
  found = run.open_rows(config, rows, 'heldout', of.model, of.mesh)
  wanted = config.eval_rows or found.num_rows
  return found, min(-(-wanted // found.batch_size), found.num_batches)
