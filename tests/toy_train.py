"""A run in miniature, for tests that kill it: same parts, toy update.

python toy_train.py --workdir=DIR [--steps=N] [--slow=PHASE] [--flaw=NAME]

`slow` makes one phase take very long; `flaw` breaks exact resume on purpose.
"""

import argparse
import json
import pathlib
import time
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpu_lm import checkpoint, workdir
from tpu_lm.phases import Phases, leave


class State(NamedTuple):
  step: jax.Array
  params: Any
  momentum: Any


def update(state: State, batch: jax.Array) -> tuple[State, jax.Array]:
  def loss(params):
    return jnp.mean((jnp.tanh(batch @ params['w']) - params['b']) ** 2)

  value, grads = jax.value_and_grad(loss)(state.params)
  momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state.momentum, grads)
  params = jax.tree.map(lambda p, m: p - 0.05 * m, state.params, momentum)
  return State(state.step + 1, params, momentum), value


def take_long(x: jax.Array) -> jax.Array:
  """Compiles for minutes."""
  for k in range(1500):
    x = jnp.sin(x @ x + k).T
  return x


def slow_compilation() -> None:
  lowered = jax.jit(take_long).lower(jnp.ones((64, 64)))
  print('compiling', flush=True)
  lowered.compile()


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--steps', type=int, default=24)
  parser.add_argument('--slow', default='')
  parser.add_argument('--flaw', default='')
  args, _ = parser.parse_known_args()
  with workdir.lock(args.workdir), Phases(grace_seconds=1.0) as phases:
    phases.install()
    run(args, phases)
  return 0


def begin(checkpoints: checkpoint.Checkpoints) -> tuple[int, State]:
  w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
  params = {'w': w, 'b': jnp.zeros(32)}
  state = State(jnp.int32(0), params, jax.tree.map(jnp.zeros_like, params))
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = jax.device_put(state, sharding)
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
  )
  restored = checkpoints.restore(target)
  return (restored.step, restored.state) if restored else (0, state)


def run(args: argparse.Namespace, phases: Phases) -> None:
  checkpoints = checkpoint.Checkpoints(args.workdir / 'checkpoints')
  first, state = begin(checkpoints)
  path = args.workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  if args.flaw != 'metrics':
    lines = [x for x in lines if json.loads(x)['step'] <= first]
  path.write_text(''.join(f'{line}\n' for line in lines))
  step_fn = jax.jit(update, donate_argnums=0)
  if args.flaw == 'state' and first:
    state = state._replace(momentum=jax.tree.map(lambda m: m + 1e-6, state[2]))

  for step in range(first + 1, args.steps + 1):
    before = step - 1

    def save(step=before, state=state):
      checkpoints.save(step, state)
      checkpoints.wait()

    phases.boundary(save if before else None)
    if phases.stop_requested:
      if before:
        save()
      return
    with phases('data'):
      rng = np.random.default_rng(step + (args.flaw == 'data') * first)
      batch = rng.normal(size=(8, 64)).astype(np.float32)
    if args.slow == 'compile' and step == 9:
      with phases('compile'):
        slow_compilation()
    with phases('step'):
      state, loss = step_fn(state, batch)
      loss.block_until_ready()
      time.sleep(0.03)
    line = {
      'step': step,
      'split': 'train',
      'loss': float(loss),
      'rows_crc': zlib.crc32(batch.tobytes()),
      'seconds': time.time(),
    }
    with open(path, 'a') as f:
      f.write(json.dumps(line) + '\n')
    if step % 6 == 0 or step == args.steps:
      with phases('evaluate'):
        if not evaluate(args, phases):
          continue
      with phases('save'):
        checkpoints.save(step, state)
        if args.slow == 'save':
          print('saving', flush=True)
          time.sleep(2)
  checkpoints.close()


def evaluate(args: argparse.Namespace, phases: Phases) -> bool:
  for batch in range(1000 if args.slow == 'evaluate' else 2):
    if phases.stop_requested:
      return False
    if args.slow == 'evaluate' and batch == 1:
      print('evaluating', flush=True)
    time.sleep(0.02)
  return True


if __name__ == '__main__':
  leave(main())
