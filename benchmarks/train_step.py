"""Speed of a training step, bare or within the shared loop.

  .venv/bin/python benchmarks/train_step.py --shape small
  .venv/bin/python benchmarks/train_step.py --mode loop

One JSON line a run; `protocol.py` tells how to run it in turn with others.
`--mode step` calls the jitted update on one batch after another; `--mode loop`
runs `train.fold` with its loader, metrics and guards.
"""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np
import protocol

from tpu_lm import config as configs
from tpu_lm import devices, run, train
from tpu_lm.phases import Phases


def make_config(shape: str, folder: pathlib.Path):
  """The shape's model on random text of its vocabulary."""
  dim, layers, heads, kv_heads, hidden, vocab, length, batch = protocol.SHAPES[
    shape
  ]
  words = np.random.default_rng(0).integers(97, 123, (40 * length, 5 * batch))
  text = folder / 'text.txt'
  text.write_text('\n'.join(bytes(row.tolist()).decode() for row in words))
  config = configs.base()
  config.steps = 100_000
  config.batch_size = batch
  config.eval_every = 0
  config.checkpoint.every = 100_000
  config.data.source = str(text)
  config.data.length = length
  config.data.tokenizer = 'byte'
  config.model_name = 'llama'
  config.model = {
    'tied': True,
    'vocab_size': vocab,
    'num_layers': layers,
    'dim': dim,
    'num_heads': heads,
    'num_kv_heads': kv_heads,
    'hidden_dim': hidden,
  }
  return config


class TimedRun(run.Run):
  """Ticks when the metrics of a step have been read."""

  clock: protocol.Clock

  def report(self, *args) -> None:
    super().report(*args)
    self.clock.tick()


def bare(made: run.Run, clock: protocol.Clock) -> None:
  """The jitted update alone, its loss read after each step as the peers do."""
  state, batches = made.state, made.batches(0)
  while True:
    batch = made.put(next(batches))
    state, metrics = made.update(state, made.frozen, batch, made.root)
    float(metrics['loss'])
    clock.tick()


def main() -> None:
  parser = protocol.parser()
  parser.add_argument('--mode', default='step', choices=('step', 'loop'))
  args = parser.parse_args()
  devices.set_up()
  _, _, _, _, _, _, length, batch = protocol.SHAPES[args.shape]
  clock = protocol.Clock(f'tpu_lm_{args.mode}', args, batch * length)
  folder = pathlib.Path(tempfile.mkdtemp())
  with Phases(watchdog_seconds=0) as phases:
    config = make_config(args.shape, folder)
    made = TimedRun(config, folder / 'run', phases, lambda _: None)
    made.clock = clock
    with clock.running(), jax.set_mesh(made.mesh):
      if args.mode == 'step':
        bare(made, clock)
      train.fold(made)


if __name__ == '__main__':
  main()
