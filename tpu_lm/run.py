"""A configuration brought to life: all that the loop folds over.

`Run` assembles mesh, data, tokenizer, model, stage, optimizer and state, and
holds what the loop does between steps.
"""

import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tpu_lm import (
  checkpoint,
  compiler,
  devices,
  flops,
  goodput,
  kept,
  metrics,
  mistakes,
  models,
  optim,
  processes,
  rollouts,
  sharding,
  stage,
  start,
  tokenizer,
  train,
  weights,
)
from tpu_lm import (
  workdir as workdirs,
)
from tpu_lm.data import chat, loader, prepare
from tpu_lm.errors import UserError
from tpu_lm.phases import Phases
from tpu_lm.plan import compared

_TRACED = (5, 10)  # steps after the start between which a profile is traced


class Run:
  """What one configuration does in one working directory."""

  planned: Callable[[dict[str, Any]], None] | None = None  # sees lines

  def __init__(
    self,
    config: ConfigDict,
    workdir: pathlib.Path,
    phases: Phases,
    report: Callable[[str], None] = print,
    ledger: goodput.Ledger | None = None,
  ):
    self.config, self.workdir, self.phases = config, workdir, phases
    self.ledger = ledger or goodput.Ledger(workdir, phases, writes=False)
    self.mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(
      self.mesh, config.batch_size, config.microbatches, config.data.length
    )
    self.root = jax.random.key(config.seed)
    mistakes.check(config, self.mesh)
    how = rollouts.sampling_of(config)
    self.tx, self.schedule = optim.make(
      config.optimizer, config.steps, how.num_updates if how else 1
    )
    mistakes.check_workdir(config, workdir)
    rows = prepared(config, workdir, phases, report)
    self.tokenizer = tokenizer.load(rows)
    if config.stage.get('teacher'):
      digest = self.tokenizer.digest
      start.check_tokenizer('stage.teacher', config.stage.teacher, digest)
    self.model = models.make(
      config.model_name,
      config.model,
      self.tokenizer.vocab_size,
      config.data.length,
    )
    self.loader = open_rows(config, rows, 'train', self.model, self.mesh)
    if self.loader.num_rows < config.batch_size:
      report(
        f'note: {self.loader.num_rows} training rows are fewer than a batch of '
        f'{config.batch_size}: each step repeats some'
      )
    self.checkpoints = checkpoint.Checkpoints(
      workdir / 'checkpoints', keep=config.checkpoint.keep
    )
    self.sampler = self._sampler(rows)
    with phases('init'), jax.set_mesh(self.mesh):
      self.first_step, self.state, self.frozen = self._start(report)
      self.stage = self.make_stage()
    self._describe()
    self.update = train.jitted(
      self.stage.loss,
      self.tx,
      self.schedule,
      config,
      self.state,
      compiler.options(config.compiler, self.mesh),
    )
    with jax.set_mesh(self.mesh):
      self.kept = kept.visited(self, self.loader, 'train', config.steps, report)
      self.evals = [
        stage.find('tpu_lm.evals', name, 'evals').make(self, rows)
        for name in config.evals
      ]
    self._open_metrics()

  def _open_metrics(self) -> None:
    config = self.config
    # A stage that samples trains on what it has answered.
    tokens = 0 if self.sampler else config.batch_size * config.data.length
    self.ledger.resume(self.first_step)
    a_token = flops.train_per_token(self.model.config, config.data.length)
    self.writer = metrics.Writer(
      self.workdir,
      self.first_step,
      config.steps,
      tokens,
      tokens * a_token,
      stage=config.stage_name,
      tensorboard=config.tensorboard,
      process_index=jax.process_index(),
    )

  def _describe(self) -> None:
    """Writes what the directory is of, now that nothing speaks against it."""
    if jax.process_index() == 0:
      config = json.loads(self.config.to_json())
      workdirs.write_json(self.workdir / 'config.json', config)
      self.tokenizer.save(self.workdir / 'tokenizer')
      rows = self.loader.manifest.directory
      chat.hand_on(rows, self.workdir / 'tokenizer')

  # What it starts from: its own directory, init_from, or scratch.

  def _start(self, report) -> tuple[int, train.State, Any]:
    config = self.config
    whole = start.abstract(self.model, config, self.mesh)
    trainable, frozen = self._split(whole)
    apart = start.is_apart(config, frozen)
    begin = functools.partial(
      train.init, tx=self.tx, window=config.guard.window
    )
    state = sharding.abstract(jax.eval_shape(begin, trainable), self.mesh)
    target = state if apart else state._replace(params=whole)
    try:
      restored = self.checkpoints.restore(target)
    except UserError as error:  # arrays of another shape: why?
      mistakes.check_data(config, self.workdir, error)
      raise
    if restored is None:
      mistakes.check_damaged(self.workdir)
      begun = self._begun(None, report)
      self.base = begun.base
      trainable, frozen = self._split(begun.params)
      places = jax.tree.map(lambda leaf: leaf.sharding, state)
      begin = jax.jit(begin, out_shardings=places, donate_argnums=0)
      return 0, begin(trainable), frozen
    if restored.meta['fingerprint'] != self.loader.manifest.fingerprint:
      mistakes.check_data(config, self.workdir, None)
      raise UserError(
        f'{self.workdir}: the text of {config.data.source} has changed '
        'since it was trained on; give the former files, or another --workdir'
      )
    self.base, state = restored.meta.get('base'), restored.state
    if apart:
      frozen = self._split(self._begun(self.base).params)[1]
    else:
      trainable, frozen = self._split(state.params)
      state = state._replace(params=trainable)
    report(f'continues from step {restored.step:,} of {self.workdir}')
    return restored.step, state, frozen

  def _split(self, params: Any) -> tuple[Any, Any]:
    return weights.partition(params, self.config.trainable)

  def _begun(self, base: dict | None, report=lambda _: None) -> start.Start:
    return start.begin(
      self.model, self.config, self.mesh, self.tokenizer.digest, base, report
    )

  def make_stage(self) -> stage.Stage:
    return stage.make(
      self.config.stage_name,
      self.model,
      self.starting,
      self.config.stage,
      self.sampler,
    )

  def _sampler(self, rows: pathlib.Path) -> rollouts.Rollouts | None:
    """What answers the prompts of a stage that learns from its own answers."""
    if self.loader.manifest.rows != 'prompts':
      return None
    return rollouts.Rollouts(
      self.model,
      self.tokenizer,
      rows,
      self.mesh,
      workdir=self.workdir,
      phases=self.phases,
      microbatches=self.config.microbatches,
    )

  def starting(self) -> Any:
    """The parameters that this run began with; they may be kept.

    Before the first update they are copied, as it donates them. Later they
    are read again, unless only adapters are trained: whoever compares with
    the start takes these away (`weights.unadapt`).
    """
    params = weights.combine(self.state.params, self.frozen)
    if self.first_step and not start.has_start(self.config, params):
      return self._begun(self.base).params
    copies = jax.tree.map(jnp.copy, self.state.params)
    return weights.combine(copies, self.frozen)

  # What the loop does between steps.

  def batches(self, first: int) -> Iterator[dict[str, np.ndarray]]:
    for step, rows in enumerate(self.loader.prefetch(first), first):
      rows |= self.kept.columns(self.loader, step)
      if self.sampler:
        rows |= rollouts.numbers(self.loader, step)
      yield rows

  def put(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return sharding.put_batch(rows, self.mesh)

  def parts(self, state: train.State, batch: dict, key: jax.Array) -> Iterable:
    """The batches that the stage makes of one, each for an update."""
    if self.stage.prepare is stage.as_it_came:
      return (batch,)  # parameters in parts need not be put together for it
    params = weights.combine(state.params, self.frozen)
    return self.stage.prepare(params, batch, key)

  def must_stop(self, step: int, state: train.State, pending: tuple) -> bool:
    """Whether a signal came; also tells the watcher what it may save."""

    def save():
      self._save(step, state, None, pending)
      self.checkpoints.wait()

    self.phases.boundary(save if step else None)
    return self.stop_requested(step)

  def stop_requested(self, step: int) -> bool:
    """Whether a signal came to any process; they agree on it."""
    mine = self.phases.stop_requested
    if not processes.many():
      return mine
    if step % self.config.log_every:  # to ask all of them takes a while
      return False
    with self.phases('agree'):
      stops = processes.any_of(mine)
    if stops:
      self.phases.request_stop('a signal to another process')
    return stops

  def stop_evaluation(self) -> bool:
    # Several processes must agree, and to ask after each batch takes long.
    return not processes.many() and self.phases.stop_requested

  def must_evaluate(self, step: int) -> bool:
    every = self.config.eval_every
    return self._is_last(step) or (every > 0 and step % every == 0)

  def must_save(self, step: int) -> bool:
    return self._is_last(step) or step % self.config.checkpoint.every == 0

  def _is_last(self, step: int) -> bool:
    return step == self.config.steps

  def report(self, step: int, values: dict, rows: dict) -> None:
    """Writes the metrics of a step; ends a run that only skips."""
    with self.phases('wait'):  # for the step
      values = {k: float(v) for k, v in jax.device_get(values).items()}
    bad = values.pop('bad_in_a_row')
    if bad >= self.config.guard.bad_in_a_row:
      if not values['targets']:
        raise UserError(
          f'step {step}: no target was left {bad:.0f} steps in a row: all '
          'answers were cut off or not judged, or all rows masked; raise '
          'stage.max_new_tokens, or look at them with `tpu_lm check`'
        )
      names = ', '.join(map(str, self.loader.rows(step - 1)))
      raise UserError(
        f'step {step}: loss or gradient was not finite, or a spike, '
        f'{bad:.0f} steps in a row (loss {values["loss"]:.4g}, gradient norm '
        f'{values["gradient_norm"]:.4g}); the rows of this step are {names}; '
        'look at them with `tpu_lm check`, or lower optimizer.learning_rate'
      )
    self.stage.watch(values)
    if step % self.config.log_every == 0 or self._is_last(step):
      values['rows_crc'] = self.loader.crc(step - 1, rows)
      line = self.writer.update(step, 'train', values)
      if line and self.planned:
        self.planned(line)

  @contextlib.contextmanager
  def aside(self, phase: str) -> Iterator[None]:
    """A phase whose time is no part of the training speed."""
    start = time.perf_counter()
    with self.phases(phase):
      yield
    self.writer.exclude(time.perf_counter() - start)

  def evaluate(self, step: int, state: train.State) -> dict | None:
    """The held-out figures at `step`, written; None: stopped in between."""
    if self.writer.has(step, 'heldout'):
      return None
    scores = {}
    with self.aside('evaluate'):
      params = weights.combine(state.params, self.frozen)
      for evaluate in self.evals:
        found = evaluate(params)
        if found is None:
          return None
        scores |= found
    self.writer.update(step, 'heldout', scores)
    return scores

  def save(
    self, step: int, state: train.State, scores: dict | None, pending: tuple
  ) -> None:
    """Begins to write a checkpoint; what it needs is written before it.

    Args:
      step: how many batches the state has seen.
      state: what is saved.
      scores: of the evaluation at this step, if there was one.
      pending: what `report` takes for the last step, or ().
    """
    with self.aside('save'):
      self._save(step, state, scores, pending)

  def _save(self, step, state, scores, pending) -> None:
    if pending:
      self.report(*pending)
    if not start.is_apart(self.config, self.frozen):
      params = weights.combine(state.params, self.frozen)
      state = state._replace(params=params)
    meta = {
      'fingerprint': self.loader.manifest.fingerprint,
      'tokenizer': self.tokenizer.digest,
      'seed': self.config.seed,
      'base': self.base,
    }
    self.ledger.mark(self.writer, step)
    self.checkpoints.save(step, state, meta, scores)

  def trace(self, step: int) -> None:
    """Starts and ends the trace that `profile` asks for."""
    if not self.config.profile:
      return
    start, end = (self.first_step + n for n in _TRACED)
    folder = self.workdir / 'profile'
    if step > end:
      return
    if step == start:
      jax.profiler.start_trace(str(folder))
    elif step == end or (self._is_last(step) and step > start):
      jax.profiler.stop_trace()
      self.writer.note(f'profile of steps {start + 1} to {step}: {folder}')

  def close(self) -> None:
    """Waits for what is still being written."""
    if self.sampler:
      self.sampler.close()
    with self.phases('save'):
      self.checkpoints.close()
    self.ledger.mark(self.writer)
    self.writer.close()


def data_dir(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Where the prepared rows of a run lie."""
  return pathlib.Path(config.data.dir or workdir / 'data')


def prepared(
  config: ConfigDict,
  workdir: pathlib.Path,
  phases: Phases,
  report: Callable[[str], None],
) -> pathlib.Path:
  """The folder of prepared rows, made by process 0 if it is missing."""
  with phases('prepare'):
    make = functools.partial(prepare.prepare, config, data_dir(config, workdir))
    found = make(report) if jax.process_index() == 0 else None
    processes.barrier('prepared')
    return (found or make(lambda _: None)).directory


def open_rows(
  config: ConfigDict,
  rows: pathlib.Path,
  split: str,
  model: Any,
  mesh: Any = None,
) -> loader.Loader:
  """This process's part of a split; held-out rows come once, in order."""
  return loader.Loader(
    rows,
    split,
    batch_size=config.batch_size,
    seed=config.seed,
    vocab_size=model.config.vocab_size,
    shuffle=split == 'train',
    part=processes.share(mesh) if processes.many() else (0, 1),
  )


def execute(
  config: ConfigDict,
  workdir: pathlib.Path,
  report: Callable[[str], None] = print,
  began: float | None = None,
  spec: str = '',
) -> dict[str, float]:
  """Trains to the last step or a signal; returns the last held-out figures.

  Args:
    config: what to train.
    workdir: where; it goes on from what is there.
    report: prints one line.
    began: when its time begins to count, by the monotonic clock; None: now.
    spec: the file of the configuration; if `tpu_lm plan` has kept what these
      devices would take, the first steps are compared with it.
  """
  began = time.monotonic() if began is None else began
  workdir = pathlib.Path(workdir)
  devices.require(config.platform)
  first = jax.process_index() == 0
  report = report if first else lambda _: None
  with (
    workdirs.lock(workdir),
    Phases(
      watchdog_seconds=config.watchdog, alone=not processes.many()
    ) as phases,
    goodput.Ledger(workdir, phases, began, first) as ledger,
  ):
    phases.install()
    run = Run(config, workdir, phases, report, ledger)
    if spec and (expected := compared.expected(spec)):
      run.planned = compared.Watch(expected, run.writer.note)
    ledger.started()
    try:
      with jax.set_mesh(run.mesh):
        if config.init_from and not run.first_step:
          run.evaluate(0, run.state)  # what the later ones are compared with
        train.fold(run)
    finally:
      run.close()
    if phases.stop_requested:
      report(f'stopped by {phases.signal_name}; the same command goes on')
    report(goodput.told(ledger.parts()))
    lines = metrics.read(workdir / 'metrics.jsonl')
    heldout = [line for line in lines if line['split'] == 'heldout']
    return heldout[-1] if heldout else {}
