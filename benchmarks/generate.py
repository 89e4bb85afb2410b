"""Measures how fast tokens are generated.

  python benchmarks/generate.py --shape=micro --batch=16    128 tokens a row
  python benchmarks/generate.py --batch=32 --groups=4       4 prompts x 8
  python benchmarks/generate.py --batch=32 --requests=128   lengths that differ
  python benchmarks/generate.py --speculate                 by prompt lookup

A Llama-shaped model of random float32 weights continues prompts of --prompt
tokens by --new more; one unit is one call. Greedy, as the peers' scripts are,
unless --temperature says otherwise. --apart: the samples of a group do not
share their prompt. With --requests, so many completions of 1 to --new tokens
(most of them short) are made in --batch slots by continuous batching, or with
--apart in batches, each as long as its longest. `protocol.py` says what is
printed.
"""

import argparse
from typing import Any

import jax
import numpy as np
import protocol

from tpu_lm import devices
from tpu_lm.generate import batching, engine, speculative
from tpu_lm.generate.sampler import Sampler
from tpu_lm.models import transformer


def made(shape: str):
  """(model, parameters) of a shape."""
  dim, layers, heads, kv_heads, hidden, vocab, *_ = protocol.SHAPES[shape]
  model = transformer.Transformer(
    transformer.Config(
      vocab_size=vocab,
      num_layers=layers,
      dim=dim,
      num_heads=heads,
      num_kv_heads=kv_heads,
      hidden_dim=hidden,
      zero_init_output=False,
    )
  )
  return model, jax.jit(model.init_params)(jax.random.key(0))


def lengths(args: argparse.Namespace) -> np.ndarray:
  """How many tokens each completion has."""
  if not args.requests:
    return np.full(args.batch, args.new)
  draw = np.random.default_rng(1)
  most = draw.exponential(args.new / 4, args.requests)
  return np.clip(most, 1, args.new).astype(int)


def call(args: argparse.Namespace, model: Any, params: Any, most: np.ndarray):
  """Generates once; returns the completions."""
  draw = np.random.default_rng(0)
  shared = bool(args.groups) and not args.apart
  groups = args.groups or len(most)
  copies = len(most) // groups
  prompts = [
    draw.integers(4, model.config.vocab_size, args.prompt).tolist()
    for _ in range(groups)
  ]
  if not shared:
    prompts = [prompt for prompt in prompts for _ in range(copies)]
  sampler = Sampler(temperature=args.temperature)
  options = {'sampler': sampler, 'copies': copies if shared else 1}
  if args.speculate:
    found = speculative.generate(model, params, prompts, most, sampler)
    return found.completions
  if args.requests and not args.apart:
    return [
      completion
      for _, completion in batching.completed(
        model, params, prompts, most, slots=args.batch, **options
      )
    ]
  options['quantised_cache'] = args.int8
  if not args.requests:
    return engine.generate(model, params, prompts, most, **options)
  found = []
  for first in range(0, len(most), args.batch):
    chosen = slice(first, first + args.batch)
    found += engine.generate(
      model, params, prompts[chosen], most[chosen], **options
    )
  return found


def main() -> None:
  parser = protocol.parser()
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--groups', type=int, default=0, help='prompts')
  parser.add_argument('--requests', type=int, default=0, help='completions')
  parser.add_argument('--apart', action='store_true')
  parser.add_argument('--prompt', type=int, default=64)
  parser.add_argument('--new', type=int, default=128)
  parser.add_argument('--temperature', type=float, default=0.0)
  parser.add_argument('--int8', action='store_true')
  parser.add_argument('--speculate', action='store_true')
  args = parser.parse_args()
  most = lengths(args)
  clock = protocol.Clock(
    f'tpu_lm generate b{args.batch}', args, int(most.sum())
  )
  devices.set_up()
  with clock.running():
    model, params = made(args.shape)
    clock.restart()
    while True:
      found = call(args, model, params, most)
      assert sum(len(one.tokens) for one in found) == most.sum()
      clock.tick()


if __name__ == '__main__':
  main()
