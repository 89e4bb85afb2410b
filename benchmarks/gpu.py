"""Measures training and decoding of a 1B model on one GPU, beside PyTorch.

  python benchmarks/gpu.py --torch=PYTHON    both, in turn, and the ratio
  python benchmarks/gpu.py --only=train      ours alone: train or decode
  python benchmarks/gpu.py --tiny            the same on any machine

PYTHON is an interpreter that has torch for this GPU. Each side trains the same
Llama-shaped network (0.95 B parameters, untied, bfloat16 matmuls over float32
weights, AdamW, clipping) on rows of 4,096 random tokens; a round is some steps
of each, and the figures are medians over rounds. MFU counts 6 N and causal
attention (flops.py) over the GPU's dense bfloat16 peak. Decoding, batch 1, is
compared with the time it takes to read all weights once.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from tpu_lm import config as configs
from tpu_lm import devices, flops, models, optim, sharding, stage, train
from tpu_lm.generate import engine
from tpu_lm.generate.sampler import Sampler

SHAPE = {
  'num_layers': 16, 'dim': 2048, 'num_heads': 16, 'num_kv_heads': 8,
  'head_dim': 128, 'hidden_dim': 6656, 'vocab_size': 32_768,
}  # fmt: skip
TINY = {
  'num_layers': 2, 'dim': 128, 'num_heads': 4, 'num_kv_heads': 2,
  'head_dim': 32, 'hidden_dim': 256, 'vocab_size': 512,
}  # fmt: skip
_BANDWIDTHS = {'H100': 3.35e12, 'H200': 4.8e12, 'A100': 2.0e12}


def options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--torch', default='', help='a Python that has torch')
  parser.add_argument('--only', default='', choices=('', 'train', 'decode'))
  parser.add_argument('--rows', type=int, default=4, help='of a step')
  parser.add_argument('--length', type=int, default=4096)
  parser.add_argument('--remat', default='attention')
  parser.add_argument('--steps', type=int, default=5, help='of a round')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--new', type=int, default=256, help='tokens decoded')
  parser.add_argument('--tiny', action='store_true')
  args = parser.parse_args()
  if args.tiny:
    args.rows, args.length, args.steps, args.rounds = 2, 256, 2, 2
    args.new = 32
  return args


def made(args: argparse.Namespace, **more: Any) -> Any:
  """The network."""
  shape = (TINY if args.tiny else SHAPE) | {'dtype': 'bfloat16'} | more
  return models.make('llama', shape, 1, args.length)


class Trainer:
  """The update that `tpu_lm train` runs, on random rows."""

  def __init__(self, args: argparse.Namespace):
    self.model, self.steps = made(args, remat=args.remat), args.steps
    config = configs.base()
    self.mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    tx, schedule = optim.make(config.optimizer, 10_000)
    loss = stage.make('pretrain', self.model, None, {}).loss
    begin = functools.partial(train.init, tx=tx, window=50)
    with jax.set_mesh(self.mesh):
      params = jax.jit(self.model.init_params)(jax.random.key(0))
      self.state = jax.jit(begin, donate_argnums=0)(params)
    self.frozen = jax.tree.map(lambda _: None, self.state.params)
    self.update = train.jitted(loss, tx, schedule, config, self.state, {})
    shape = args.rows, args.length + 1
    ids = jax.random.randint(
      jax.random.key(1), shape, 0, self.model.config.vocab_size
    )
    ones = jnp.ones(shape, jnp.int32)
    self.batch = {
      'tokens': ids,
      'loss_mask': ones.astype(bool),
      'segment_ids': ones,
      'positions': jnp.broadcast_to(jnp.arange(shape[1]), shape),
    }
    self.tokens = args.rows * args.length

  def round(self) -> float:
    """Tokens a second over some steps."""
    begin = time.perf_counter()
    with jax.set_mesh(self.mesh):
      for _ in range(self.steps):
        self.state, metrics = self.update(
          self.state, self.frozen, self.batch, jax.random.key(0)
        )
      jax.block_until_ready(metrics)
    return self.tokens * self.steps / (time.perf_counter() - begin)


def trained(args: argparse.Namespace) -> dict[str, Any]:
  """Rounds of ours, and of PyTorch's beside them."""
  ours, peer = Trainer(args), None
  if args.torch:
    given = {k: getattr(args, k) for k in ('rows', 'length', 'steps')}
    shape = json.dumps((TINY if args.tiny else SHAPE) | given)
    script = __file__.replace('gpu.py', 'gpu_torch.py')
    peer = subprocess.Popen(
      [args.torch, script, shape],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
  rates: dict[str, list[float]] = {'tpu_lm': [], 'torch': []}
  for n in range(args.rounds + 1):  # the first one compiles
    found = {'tpu_lm': ours.round()}
    if peer:
      print('go', file=peer.stdin, flush=True)
      found['torch'] = float(peer.stdout.readline())
    for name, rate in found.items() if n else ():
      rates[name].append(rate)
  if peer:
    peer.stdin.close()
    peer.wait()
  a_token = flops.train_per_token(ours.model.config, args.length)
  result = {}
  for name, values in rates.items():
    if values:
      rate = statistics.median(values)
      result[f'{name}_tokens_per_second'] = round(rate)
      result[f'{name}_mfu'] = flops.utilisation(rate * a_token)
  if peer:
    pairs = zip(rates['tpu_lm'], rates['torch'], strict=True)
    result['ratio'] = statistics.median(a / b for a, b in pairs)
  return result


def decoded(args: argparse.Namespace) -> dict[str, Any]:
  """Tokens a second of one answer, and the share of the bandwidth used."""
  model = made(args)
  params = jax.jit(model.init_params)(jax.random.key(0))
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  prompt = [list(range(4, 36))]
  times = []
  for _ in range(args.rounds + 1):
    begin = time.perf_counter()
    engine.generate(model, params, prompt, args.new, sampler=Sampler(0.0))
    times.append(time.perf_counter() - begin)
  rate = args.new / statistics.median(times[1:])
  # The embedding is only looked up.
  table = model.config.vocab_size * model.config.dim
  read = 2 * (sum(x.size for x in jax.tree.leaves(params)) - table)
  kind = jax.devices()[0].device_kind
  speed = next((v for k, v in _BANDWIDTHS.items() if k in kind), None)
  share = read * rate / speed if speed else None
  return {'decode_tokens_per_second': round(rate), 'bandwidth_share': share}


def main() -> None:
  args = options()
  devices.set_up()
  if jax.default_backend() != 'gpu' and not args.tiny:
    sys.exit('error: no GPU here; --tiny runs on any machine')
  result: dict[str, Any] = {'device': jax.devices()[0].device_kind}
  if args.only != 'decode':
    result |= trained(args)
  if args.only != 'train':
    result |= decoded(args)
  print(json.dumps(result))


if __name__ == '__main__':
  main()
