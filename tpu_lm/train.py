"""The one loop: a run is a fold of `update` over batches.

`update` is jitted once, sharded over the mesh, and donates the state. What is
trained, on which data and with which loss is the `Run`'s business (run.py).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tpu_lm import auxiliary, optim, per_device, weights
from tpu_lm import guard as guards
from tpu_lm.stage import LossFn, Mean


class State(NamedTuple):
  """What an update reads and writes; all of it is checkpointed."""

  step: jax.Array  # int32 [], updates, the skipped ones included
  params: Any  # what is trained
  optimizer: Any
  guard: guards.Guard


def init(params: Any, tx: optax.GradientTransformation, window: int) -> State:
  """The state before the first step."""
  step = jnp.zeros((), jnp.int32)
  return State(step, params, tx.init(params), guards.init(window))


def summed_gradients(
  loss: LossFn, params, frozen, batch, key, microbatches: int
) -> tuple[Any, Mean, dict[str, Mean]]:
  """Gradients and losses as sums over all microbatches, not yet divided.

  Totals and weights add up exactly under ragged masks; means would not. So
  each device may take its own rows (per_device.py).
  """
  own = functools.partial(_gradients, loss, microbatches=microbatches)
  grads, (mean, metrics) = per_device.summed(
    own, params, frozen, batch, key, once=microbatches == 1
  )
  return grads, mean, metrics


def _gradients(loss: LossFn, params, frozen, batch, key, *, microbatches: int):
  """The same, of the rows that are given."""

  def total(params, part, key):
    with auxiliary.collected() as found:
      mean, metrics = loss(weights.combine(params, frozen), part, key)
    if found:
      added = auxiliary.objective(found, mean.weight)
      mean = mean._replace(total=mean.total + added)
      metrics |= {name: Mean(*term[:2]) for name, term in found.items()}
    return mean.total, (mean, metrics)

  gradient = jax.grad(total, has_aux=True)
  if microbatches == 1:
    return gradient(params, batch, key)

  # Row r goes to microbatch r % M, so that each device keeps its own rows.
  parts = jax.tree.map(
    lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
  )
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
    jnp.arange(microbatches)
  )

  def add(sums, part_and_key):
    new = gradient(params, *part_and_key)
    return jax.tree.map(jnp.add, sums, new), None

  shapes = jax.eval_shape(gradient, params, batch, key)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(add, zeros, (parts, keys))[0]


def make_update(
  loss: LossFn,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  microbatches: int,
  clip: float,
  spike_factor: float,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """Makes `update(state, frozen, batch, key) -> (state, metrics)`."""

  def update(state: State, frozen, batch, key):
    grads, mean, metrics = summed_gradients(
      loss, state.params, frozen, batch, key, microbatches
    )
    # A batch without targets has no gradient: NaN here, skipped below.
    grads = jax.tree.map(lambda g: g / mean.weight, grads)
    value = mean.total / mean.weight
    norm = optim.norm(grads)
    ok, guard = guards.judge(state.guard, value, norm, spike_factor)
    if clip:
      scale = jnp.minimum(1.0, clip / (norm + 1e-6))
      grads = jax.tree.map(lambda g: g * scale, grads)
    updates, optimizer = tx.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    params, optimizer = guards.select(
      ok, (params, optimizer), (state.params, state.optimizer)
    )
    report = {name: m.total / m.weight for name, m in metrics.items()}
    report |= {
      'loss': value,
      'targets': mean.weight,
      'gradient_norm': norm,
      'learning_rate': schedule(state.guard.accepted),
      'skipped': guard.skipped,
      'bad_in_a_row': guard.in_a_row,
    }
    return State(state.step + 1, params, optimizer, guard), report

  return update


def jitted(
  loss: LossFn,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  config: Any,
  state: State,
  options: dict[str, Any],
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """The update of a configuration, which donates the state.

  Args:
    loss: of the stage.
    tx: the optimizer.
    schedule: of its learning rate.
    config: of the run.
    state: arrays or shapes, laid out.
    options: of the compiler (compiler.py).
  """
  return jax.jit(
    make_update(
      loss,
      tx,
      schedule,
      microbatches=config.microbatches,
      clip=config.optimizer.clip,
      spike_factor=config.guard.spike_factor,
    ),
    donate_argnums=0,
    # XLA would be free to lay the new state out in another way.
    out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    compiler_options=options or None,
  )


def fold(run: Any) -> State:
  """Trains `run` from where it stands to its last step, or to a signal.

  The metrics of a step are read after the next one has been dispatched, so
  that the device does not wait for the host. A step's lines of metrics are
  written before its checkpoint, and lines beyond the checkpoint are dropped
  on resume, so that a run that was killed tells the same story.
  """
  state, first, pending = run.state, run.first_step, ()
  batches = run.batches(first)
  if first and run.must_evaluate(first) and not run.must_stop(first, state, ()):
    run.evaluate(first, state)  # unless its line was written before the kill
  for step in range(first + 1, run.config.steps + 1):
    if run.must_stop(step - 1, state, pending):
      run.save(step - 1, state, None, pending)
      break
    with run.phases('data'):
      rows = next(batches)
      batch, key = run.put(rows), jax.random.fold_in(run.root, step)
    with run.phases('step') if pending else run.aside('compile'):
      for part in run.parts(state, batch, key):
        state, metrics = run.update(state, run.frozen, part, key)
      if pending:
        run.report(*pending)
    pending = (step, metrics, rows)
    run.trace(step)
    evaluates, saves = run.must_evaluate(step), run.must_save(step)
    if evaluates or saves:
      scores = None
      run.report(*pending)
      if evaluates and not run.must_stop(step, state, pending):
        scores = run.evaluate(step, state)
      if saves:
        run.save(step, state, scores, pending)
  return state
