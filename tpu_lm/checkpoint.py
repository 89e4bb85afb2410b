"""Checkpoints: atomic, verified, read back onto any mesh.

A step is a folder `STEP/` with three Orbax items: `params`, `state` (the rest
of the state) and `meta` (JSON: shape, dtype and digest of every array, and what
the caller gives), and a seal (`seal.py`) over all of its files. Writing happens
beside training; a rename commits the step.

Orbax restores flipped bits without a word, is stopped by an empty newer folder
and names neither step nor file. So nothing is trusted on the way back: first
the seal over the files, then the digests of the arrays (computed on the device
before the save). A damaged step is named, moved to `damaged/` and the newest
good one is used. A model that differs from the saved one is no damage.
"""

import contextlib
import dataclasses
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from tpu_lm import phases, seal, stored_step
from tpu_lm.digest import digest
from tpu_lm.errors import UserError

Tree = Any

_TEMPORARY = '.orbax-checkpoint-tmp'  # in the name of whatever is not committed
_TRASH = 'trash'
_DAMAGED = 'damaged'

# What disks say, as the several libraries below spell it.
_DISK = {
  'the disk is full': ('No space left', 'ENOSPC', 'EDQUOT', 'quota exceeded'),
  'the file system is read-only': ('Read-only file system', 'EROFS'),
  'it may not be written': ('Permission denied', 'EACCES', 'not permitted'),
  'a file grew too large for this system': ('File too large', 'EFBIG'),
  'the disk does not answer properly': ('Input/output error', 'EIO'),
}


class Restored(NamedTuple):
  step: int
  state: Tree
  meta: dict


class Checkpoints:
  """The checkpoints of one working directory.

  `save` and `restore` must be called by every process of a run. Calls from
  several threads of one process wait for each other.
  """

  def __init__(
    self,
    directory: str,
    keep: int = 2,
    keep_best: int = 1,
    best_key: str = 'bits_per_byte',
    read_only: bool = False,
  ):
    """Opens the folder; a writer removes what a killed writer left behind.

    Args:
      directory: holds one folder a step; a local or a cloud path.
      keep: how many of the newest steps are kept.
      keep_best: how many steps of the lowest `best_key` are kept besides.
      best_key: the name of a number in the metrics given to `save`; '' keeps
        none for being best.
      read_only: never write, move or delete anything.

    Raises:
      UserError: the path is a file, or cannot be written.
    """
    if keep < 1:
      raise UserError(f'checkpoint.keep: {keep}; keep at least 1 checkpoint')
    if '://' not in str(directory):
      directory = epath.Path(directory).absolute()
    self.directory = epath.Path(directory)
    self._local = '://' not in str(directory)
    self._keep = keep
    self._keep_best = keep_best if best_key else 0
    self._best_key = best_key
    self._read_only = read_only
    self._metrics: dict[int, float] = {}
    self._writing: int | None = None  # the step that is or was last written
    self._manager: ocp.CheckpointManager | None = None
    self._lock = threading.RLock()
    if self.directory.exists() and not self.directory.is_dir():
      raise UserError(
        f'{self.directory}: is a file where the folder of checkpoints should'
        ' be; move it away'
      )
    if not read_only:
      self._tidy()

  def steps(self) -> list[int]:
    """Returns the steps that are committed, oldest first; good or damaged."""
    if not self.directory.is_dir():
      return []
    found = (path.name for path in self.directory.iterdir())
    return sorted(int(name) for name in found if _is_step(name))

  # Saving.

  def save(
    self,
    step: int,
    state: Tree,
    meta: dict | None = None,
    metrics: dict[str, float] | None = None,
  ) -> bool:
    """Begins to write a step; returns False where the step is there already.

    The state may be donated or changed as soon as this returns.

    Args:
      step: the number of updates the state has seen.
      state: a NamedTuple of arrays with a field `params`.
      meta: anything JSON holds; comes back from `restore`.
      metrics: where `best_key` is looked up.

    Raises:
      UserError: the disk is full, read-only or the like, now or while the
        step before was written.
    """
    assert not self._read_only, 'these checkpoints were opened read-only'
    with self._lock, self._named_errors():
      if self._manager:
        self._manager.wait_until_finished()
        self._empty_trash()
      if step in self.steps():
        return False
      arrays = {
        name: [list(x.shape), str(x.dtype), sum_]
        for (name, sum_), x in zip(
          digest(state).items(), jax.tree.leaves(state), strict=True
        )
      }
      content = {
        'step': step,
        'arrays': arrays,
        'metrics': metrics or {},
        'caller': meta or {},
      }
      self._metrics[step] = _number(content['metrics'], self._best_key)
      self._writing = step
      self._probe()
      if self._manager is None:
        self._manager = self._make_manager()
      self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(state.params),
          state=ocp.args.StandardSave(state._replace(params=None)),
          meta=ocp.args.JsonSave(content),
        ),
        force=True,
      )
      return True

  def check(self) -> None:
    """Raises what went wrong in the background since the last save, if so."""
    with self._lock, self._named_errors():
      if self._manager and not self._manager.is_saving_in_progress():
        self._manager.wait_until_finished()  # does not wait: it has finished

  def wait(self) -> None:
    """Returns when the last save is committed; raises as `save` does."""
    with self._lock, self._named_errors():
      if self._manager:
        self._manager.wait_until_finished()
        self._empty_trash()

  def close(self) -> None:
    """Waits, then ends the threads; the object can be used again."""
    with self._lock:
      self.wait()
      if self._manager:
        self._manager.close()
        self._manager = None

  def _make_manager(self) -> ocp.CheckpointManager:
    policy = _Preserve(
      self._keep, self._keep_best, lambda step: self._metrics[step]
    )
    for step in self.steps():
      if step not in self._metrics:
        metrics = stored_step.content(self.directory / str(step))['metrics']
        self._metrics[step] = _number(metrics, self._best_key)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy,
      # Without it a kill in the middle of a deletion leaves half a step under
      # the name of a whole one.
      todelete_subdir=_TRASH if self._local else None,
      cleanup_tmp_directories=True,
      temporary_path_class=_sealed_path(self._local),
    )
    # A logger keeps a filter once, however often it is added.
    logging.getLogger('absl').addFilter(_is_news)
    return ocp.CheckpointManager(self.directory, options=options)

  @contextlib.contextmanager
  def _named_errors(self) -> Iterator[None]:
    """Turns errors of the disk into one line, and frees what was half done."""
    try:
      yield
    except UserError:
      raise
    except Exception as e:
      manager, self._manager = self._manager, None
      if manager is not None:
        with contextlib.suppress(Exception):
          manager.close()
      self._remove_temporary()
      reason = _disk_reason(e)
      if reason is None:
        raise
      valid = ', '.join(map(str, self.steps())) or 'none yet'
      raise UserError(
        f'{self.directory}: step {self._writing} could not be saved: {reason};'
        f' mend that and start again; the saved steps stay valid ({valid})'
      ) from e

  # Reading.

  def restore(self, abstract_state: Tree) -> Restored | None:
    """Reads the newest good step, or returns None where there is none.

    Damaged steps are named on stderr and moved to `damaged/`, never deleted.

    Args:
      abstract_state: the state as jax.ShapeDtypeStruct, each with a sharding;
        any mesh will do.

    Raises:
      UserError: the saved arrays have other names, shapes or dtypes; nothing
        is moved then.
    """
    with self._lock:
      if self._manager:
        self._manager.wait_until_finished()
      found = 0
      for step in reversed(self.steps()):
        found += 1
        folder = self.directory / str(step)
        fault, state, meta = stored_step.load(folder, abstract_state)
        if fault is None:
          return Restored(step, state, meta)
        self._report(step, fault)
      if found:
        print(f'{self.directory}: no good checkpoint is left', file=sys.stderr)
      return None

  def content(self, step: int) -> dict:
    """Returns what is known of a step: its arrays, metrics, and the caller's.

    Raises:
      UserError: there is no such step, or its files are damaged.
    """
    folder = self.directory / str(step)
    if not folder.exists():
      raise UserError(
        f'{folder}: there is no step {step} (steps there: {self.steps()})'
      )
    if fault := seal.fault(folder, thorough=False):
      raise UserError(f'{folder}: step {step} is damaged: {fault}')
    return stored_step.content(folder)

  def _report(self, step: int, fault: str) -> None:
    """Names a damaged step; a writer also sets it aside."""
    folder = self.directory / str(step)
    line = f'{folder}: step {step} is damaged: {fault}; '
    if self._read_only:
      print(line + 'passed over', file=sys.stderr)
      return
    if jax.process_index() == 0:
      target = _unused(self.directory / _DAMAGED, step)
      try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
      except OSError as e:
        raise UserError(
          line + f'it cannot be moved to {target} ({e.strerror}); move it away'
        ) from e
      print(line + f'set aside as {target}', file=sys.stderr)
    stored_step.barrier('set aside')

  # Tidying up.

  def _tidy(self) -> None:
    """Removes left-overs, and sets aside what is plainly no checkpoint."""
    if jax.process_index() == 0:
      try:
        self._probe()
      except OSError as e:
        raise UserError(
          f'{self.directory}: cannot be written ({e.strerror}); give another'
          ' --workdir'
        ) from e
      for path in self._remove_temporary():
        print(
          f'{path}: removed what an interrupted save left behind',
          file=sys.stderr,
        )
      self._empty_trash()
    stored_step.barrier('tidied')
    for step in self.steps():
      folder = self.directory / str(step)
      fault = stored_step.fault(folder, thorough=False)
      if fault is not None:
        self._report(step, fault)

  def _probe(self) -> None:
    """Raises OSError where nothing can be written.

    Orbax, when it cannot make its folder, waits for minutes before it says so.
    """
    if jax.process_index() == 0:
      probe = self.directory / f'probe{_TEMPORARY}'
      probe.mkdir(parents=True, exist_ok=True)
      (probe / 'file').write_bytes(bytes(4096))
      probe.rmtree()

  def _remove_temporary(self) -> list[epath.Path]:
    if jax.process_index() != 0 or not self.directory.is_dir():
      return []
    paths = [p for p in self.directory.iterdir() if _TEMPORARY in p.name]
    for path in paths:
      _remove(path)
    return paths

  def _empty_trash(self) -> None:
    if jax.process_index() == 0:
      _remove(self.directory / _TRASH)


def restore_params(
  directory: str, abstract_params: Tree, step: int | None = None
) -> tuple[int, Tree, dict]:
  """Reads the parameters alone, and changes nothing on the disk.

  Args:
    directory: the folder of checkpoints.
    abstract_params: jax.ShapeDtypeStruct with a sharding each; any mesh, and
      any floating dtype where a floating one was saved.
    step: which one; by default the newest that is good.

  Returns:
    (step, params, meta)

  Raises:
    UserError: there is no good checkpoint, or it is of another model.
  """
  checkpoints = Checkpoints(directory, read_only=True)
  steps = checkpoints.steps() if step is None else [step]
  for step in reversed(steps):
    folder = checkpoints.directory / str(step)
    if not folder.exists():
      break
    fault, tree, meta = stored_step.load(
      folder, {'params': abstract_params}, cast=True
    )
    if fault is None:
      return step, tree['params'], meta
    checkpoints._report(step, fault)
  has = ', '.join(map(str, checkpoints.steps())) or 'none'
  raise UserError(
    f'{checkpoints.directory}: no good checkpoint to read (steps there: {has});'
    ' train first, or give another directory'
  )


# Writing.


@dataclasses.dataclass
class _Preserve(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the newest steps, and the ones of the lowest metric."""

  num_newest: int
  num_best: int
  metric: Callable[[int], float]

  def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list:
    steps = sorted(info.step for info in checkpoints)
    measured = [s for s in steps if not math.isnan(self.metric(s))]
    best = sorted(measured, key=self.metric)[: self.num_best]
    kept = {*steps[-self.num_newest :], *best}
    return [info.step in kept for info in checkpoints]


def _sealed_path(local: bool) -> type:
  """Returns Orbax's way to commit a step, with our seal before the commit."""
  atomicity = ocp.path.atomicity
  # Stores without a rename are committed by a file written last.
  base = (
    atomicity.AtomicRenameTemporaryPath
    if local
    else atomicity.CommitFileTemporaryPath
  )

  class SealedPath(base):
    def _is_step(self) -> bool:  # not one of the items within it
      return _is_step(self.get_final().name)

    async def create(self) -> epath.Path:
      path = await super().create()
      if self._is_step():
        phases.kill_while_writing(path)
      return path

    async def finalize(self) -> None:
      if not self._is_step():
        await super().finalize()
        return
      whole = local and jax.process_count() == 1
      if not local:
        seal.write(self.get(), whole, late=seal.LATE)
        phases.kill_point('commit')
        await super().finalize()
        return
      # Orbax's own commit leads to a second temporary name, so that the seal
      # covers what it writes last.
      final = self._final_path
      sealed = final.parent / f'{final.name}{_TEMPORARY}-sealed'
      self._final_path = sealed
      await super().finalize()
      self._final_path = final
      seal.write(sealed, whole)
      phases.kill_point('commit')
      sealed.rename(final)

  return SealedPath


def _disk_reason(error: BaseException) -> str | None:
  """Returns what is wrong with the disk, where that is what an error says."""
  seen: BaseException | None = error
  while seen is not None:
    for reason, words in _DISK.items():
      if any(word in str(seen) for word in words):
        return reason
    seen = seen.__cause__ or seen.__context__
  return None


def _is_news(record: logging.LogRecord) -> bool:
  """Keeps out tracebacks of disk errors: each thread of Orbax prints one.

  They surface as one line, from `_named_errors`.
  """
  error = record.exc_info[1] if record.exc_info else None
  return error is None or _disk_reason(error) is None


def _number(metrics: dict, key: str) -> float:
  return float(metrics[key]) if key in metrics else math.nan


def _is_step(name: str) -> bool:
  return name.isascii() and name.isdigit() and str(int(name)) == name


def _unused(folder: epath.Path, step: int) -> epath.Path:
  path, k = folder / str(step), 1
  while path.exists():
    path, k = folder / f'{step}-{k}', k + 1
  return path


def _remove(path: epath.Path) -> None:
  """Removes a file or a folder that a thread may still be writing to."""
  for _ in range(20):
    if not path.exists():
      return
    with contextlib.suppress(OSError):
      path.rmtree() if path.is_dir() else path.unlink()
      return
    time.sleep(0.1)
