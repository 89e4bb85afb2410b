"""Measures our training step, or what the shared loop adds to it.

  python benchmarks/train_step.py --shape=micro            steps of the loop
  python benchmarks/train_step.py --shape=small --bare     the jitted update
  python benchmarks/train_step.py --overhead               both, in turn
  python benchmarks/train_step.py --stage=dpo              another stage

`sft` trains on packed conversations of the shape's rows; `dpo` and `reward` on
8 pairs of 128 tokens (prompt 64, answer 64); a step of `grpo` answers 4 prompts
of 32 tokens 8 times with 64 tokens and learns once from them, with a reference:
as the peers' scripts do. `--prompt=256 --answer=256 --stops=8` makes both
longer, and lets answers end at any of 8 tokens of the vocabulary. Other keys:
`--set KEY=VALUE`, e.g. `--set 'transforms=lora(rank=8)'`.

Trains a Llama-shaped model in float32 with AdamW, clipping, guards and packed
rows of text that the generated world yields, through the same `Run` and
`fold` as `tpu_lm train`. With --overhead every step of the loop is followed
by a bare one on a copy of the state; `overhead` is the share that the loop
adds, median over the pairs. `protocol.py` says what is printed.
"""

import json
import math
import pathlib
import random
import statistics
import string
import tempfile
import time
from collections.abc import Iterator
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
_STAGES = ('pretrain', 'sft', 'dpo', 'reward', 'grpo')
_PAIR = (8, 128)  # pairs a step, tokens of a half
_ANSWERS = (4, 8)  # prompts, answers to each


def _texts() -> Iterator[str]:
  return (d.text for d in world.documents(0, 'train', _DOCUMENTS))


def _conversations() -> Iterator[dict]:
  return world.conversations(0, 'train', 10 * _DOCUMENTS)


def _letters(num_tokens: int) -> str:
  return ''.join(random.choices(string.ascii_letters, k=num_tokens))


def _prompts(num_tokens: int) -> Iterator[dict]:
  """Prompts by ChatML and one byte a token."""
  for _ in range(_DOCUMENTS):
    yield {'prompt': _letters(num_tokens - 20), 'answer': ''}


def _pairs() -> Iterator[dict]:
  """Halves of 128 tokens."""
  for _ in range(_DOCUMENTS):
    # <|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n are 20 tokens.
    chosen, rejected = _letters(63), _letters(63)
    yield {'prompt': _letters(44), 'chosen': chosen, 'rejected': rejected}


def _write_source(args: Any, folder: pathlib.Path) -> pathlib.Path:
  if args.stage == 'pretrain':
    source = folder / 'world.txt'
    source.write_text('\n\n'.join(_texts()))
    return source
  source = folder / 'world.jsonl'
  random.seed(0)
  records = {
    'sft': _conversations,
    'dpo': _pairs,
    'reward': _pairs,
    'grpo': lambda: _prompts(args.prompt),
  }
  lines = [json.dumps(record) + '\n' for record in records[args.stage]()]
  source.write_text(''.join(lines))
  return source


def configuration(args: Any, folder: pathlib.Path):
  """The configuration of a shape; writes the text that it trains on."""
  source = _write_source(args, folder)
  config = configs.base()
  config.stage_name = args.stage
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
  if args.stage in ('dpo', 'reward'):
    config.batch_size, config.data.length = _PAIR
    model.scalar_head = args.stage == 'reward'
  if args.stage == 'grpo':
    config.batch_size, config.stage.group = _ANSWERS
    config.data.length = args.prompt
    config.stage.max_new_tokens = args.answer
    config.stage.reward = "regex(pattern='e', limit=64)"
    config.stage.beta, config.optimizer.learning_rate = 0.04, 1e-4
  model.update(json.loads(args.model))
  for text in args.set:
    configs.override(config, *text.split('=', 1))
  return config


class TimedRun(runs.Run):
  """A run whose steps are ticks of a clock."""

  def start_timing(self, clock: protocol.Clock, overhead: bool) -> None:
    self.clock, self.compiled = clock, self.update
    self.bare_seconds, self.newest = [], None
    self.sample = self.put(next(self.batches(0)))
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
  parser.add_argument('--stage', default='pretrain', choices=_STAGES)
  parser.add_argument('--set', action='append', default=[])
  parser.add_argument('--prompt', type=int, default=32)
  parser.add_argument('--answer', type=int, default=64)
  parser.add_argument('--stops', type=int, default=0)
  args = parser.parse_args()
  *_, length, rows = protocol.SHAPES[args.shape]
  num_tokens = rows * length
  if args.stage in ('dpo', 'reward'):
    num_tokens = 2 * math.prod(_PAIR)
  if args.stage == 'grpo':
    num_tokens = math.prod(_ANSWERS) * args.answer
  name = f'tpu_lm {args.stage} {"update" if args.bare else "loop"}'
  clock = protocol.Clock(name, args, num_tokens)
  devices.set_up()
  with (
    clock.running(),
    tempfile.TemporaryDirectory() as folder,
    Phases(watchdog_seconds=3600.0) as phases,
  ):
    folder = pathlib.Path(folder)
    config = configuration(args, folder)
    run = TimedRun(config, folder / 'run', phases)
    if run.sampler:
      # A model by chance would end some answers with the usual ones.
      run.sampler.stop_ids = tuple(range(4, 4 + args.stops))
    with jax.set_mesh(run.mesh):
      run.start_timing(clock, args.overhead)
      clock.restart()
      if args.bare:
        run.bare()
      train.fold(run)


if __name__ == '__main__':
  main()
