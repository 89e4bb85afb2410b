"""Measures our training step, or what the shared loop adds to it.

  python benchmarks/train_step.py --shape=micro            steps of the loop
  python benchmarks/train_step.py --shape=small --bare     the jitted update
  python benchmarks/train_step.py --overhead               both, in turn

Trains a Llama-shaped model in float32 with AdamW, clipping, guards and packed
rows of text that the generated world yields, through the same `Run` and
`fold` as `tpu_lm train`. With --overhead every step of the loop is followed
by a bare one on a copy of the state; `overhead` is the share that the loop
adds, median over the pairs. `protocol.py` says what is printed.
"""

import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import protocol

from tpu_lm import config as configs
from tpu_lm import devices, train
from tpu_lm import run as runs
from tpu_lm.data import world
from tpu_lm.phases import Phases

_DOCUMENTS = 400  # some 100 kB of text


def configuration(args: Any, folder: pathlib.Path):
  """The configuration of a shape; writes the text that it trains on."""
  source = folder / 'world.txt'
  texts = (d.text for d in world.documents(0, 'train', _DOCUMENTS))
  source.write_text('\n\n'.join(texts))
  config = configs.base()
  config.steps = 1_000_000  # never reached
  config.eval_every, config.evals, config.checkpoint.every = 0, (), 1_000_000
  config.data.source, config.data.tokenizer = str(source), 'byte'
  model = config.model
  (
    model.dim,
    model.num_layers,
    model.num_heads,
    model.num_kv_heads,
    model.hidden_dim,
    model.vocab_size,
    config.data.length,
    config.batch_size,
  ) = protocol.SHAPES[args.shape]
  model.update(json.loads(args.model))
  return config


class TimedRun(runs.Run):
  """A run whose steps are ticks of a clock."""

  def start_timing(self, clock: protocol.Clock, overhead: bool) -> None:
    self.clock, self.compiled = clock, self.update
    self.bare_seconds, self.newest = [], None
    self.sample = self.put(self.loader.batch(0))
    self.twin = jax.tree.map(jnp.copy, self.state) if overhead else None

    def update(*args):
      state, self.newest = self.compiled(*args)
      return state, self.newest

    self.update = update

  def trace(self, step: int) -> None:
    """Called by the loop after each step; waits until it is done."""
    jax.block_until_ready(self.newest)
    timed = self.clock.is_warm
    self.clock.tick()
    if self.twin is None:
      return
    start = time.perf_counter()
    self.twin, metrics = self.compiled(
      self.twin, self.frozen, self.sample, self.root
    )
    jax.block_until_ready(metrics)
    if timed:
      self.bare_seconds.append(time.perf_counter() - start)
      loop = self.clock.walls[-len(self.bare_seconds) :]
      ratios = [a / b for a, b in zip(loop, self.bare_seconds, strict=True)]
      added = statistics.median(ratios) - 1
      self.clock.facts['overhead'] = round(added, 4)
    self.clock.restart()

  def bare(self) -> None:
    """Updates with one batch for ever, without the loop."""
    state = self.state
    while True:
      state, metrics = self.compiled(state, self.frozen, self.sample, self.root)
      jax.block_until_ready(metrics)
      self.clock.tick()


def main() -> None:
  parser = protocol.parser()
  parser.add_argument('--bare', action='store_true')
  parser.add_argument('--overhead', action='store_true')
  parser.add_argument('--model', default='{}', help='JSON of model.* keys')
  args = parser.parse_args()
  *_, length, rows = protocol.SHAPES[args.shape]
  name = f'tpu_lm {"update" if args.bare else "loop"}'
  clock = protocol.Clock(name, args, rows * length)
  devices.set_up()
  with (
    clock.running(),
    tempfile.TemporaryDirectory() as folder,
    Phases(watchdog_seconds=3600.0) as phases,
  ):
    folder = pathlib.Path(folder)
    config = configuration(args, folder)
    run = TimedRun(config, folder / 'run', phases)
    with jax.set_mesh(run.mesh):
      run.start_timing(clock, args.overhead)
      clock.restart()
      if args.bare:
        run.bare()
      train.fold(run)


if __name__ == '__main__':
  main()
