"""The PyTorch side of gpu.py: compiled, with its flash attention.

Takes the shape as JSON; for each line on standard input it trains some steps
and prints tokens a second. Needs torch alone.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional

SHAPE = json.loads(sys.argv[1])
DIM, HEADS, KEYS = (SHAPE[k] for k in ('dim', 'num_heads', 'num_kv_heads'))
SIZE, HIDDEN, LENGTH = (SHAPE[k] for k in ('head_dim', 'hidden_dim', 'length'))
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def _angles() -> tuple[torch.Tensor, torch.Tensor]:
  rates = 10000.0 ** (-torch.arange(0, SIZE, 2, device=DEVICE) / SIZE)
  turns = torch.outer(torch.arange(LENGTH, device=DEVICE).float(), rates)
  return turns.cos().bfloat16(), turns.sin().bfloat16()


COS, SIN = _angles()


def rotated(x: torch.Tensor) -> torch.Tensor:
  a, b = x.chunk(2, dim=-1)
  return torch.cat([a * COS - b * SIN, b * COS + a * SIN], dim=-1)


def heads(x: torch.Tensor) -> torch.Tensor:
  return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)


def linear(inputs: int, outputs: int) -> nn.Linear:
  return nn.Linear(inputs, outputs, bias=False)


class Layer(nn.Module):
  """Attention over grouped heads, and SwiGLU."""

  def __init__(self):
    super().__init__()
    self.norms = nn.ModuleList([nn.RMSNorm(DIM), nn.RMSNorm(DIM)])
    self.q, self.o = linear(DIM, HEADS * SIZE), linear(HEADS * SIZE, DIM)
    self.k, self.v = (linear(DIM, KEYS * SIZE) for _ in range(2))
    self.gate, self.up = (linear(DIM, HIDDEN) for _ in range(2))
    self.down = linear(HIDDEN, DIM)

  def forward(self, x):
    h = self.norms[0](x)
    out = functional.scaled_dot_product_attention(
      rotated(heads(self.q(h))),
      rotated(heads(self.k(h))),
      heads(self.v(h)),
      is_causal=True,
      enable_gqa=True,
    )
    x = x + self.o(out.transpose(1, 2).flatten(2))
    h = self.norms[1](x)
    return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
  """Tokens to the mean loss."""

  def __init__(self):
    super().__init__()
    self.table = nn.Embedding(SHAPE['vocab_size'], DIM)
    self.layers = nn.ModuleList(Layer() for _ in range(SHAPE['num_layers']))
    self.norm, self.head = nn.RMSNorm(DIM), linear(DIM, SHAPE['vocab_size'])

  def forward(self, ids):
    x = self.table(ids[:, :-1])
    for layer in self.layers:
      x = layer(x)
    logits = self.head(self.norm(x)).float()
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def main() -> None:
  model = Model().to(DEVICE)
  step = torch.compile(model)
  adam = torch.optim.AdamW(model.parameters(), 3e-3, (0.9, 0.95), fused=True)
  shape = SHAPE['rows'], LENGTH + 1
  ids = torch.randint(SHAPE['vocab_size'], shape, device=DEVICE)
  for _ in sys.stdin:
    begin = time.perf_counter()
    for _ in range(SHAPE['steps']):
      with torch.autocast(DEVICE, torch.bfloat16):
        loss = step(ids)
      loss.backward()
      nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      adam.step()
      adam.zero_grad()
    loss.item()
    tokens = SHAPE['rows'] * LENGTH * SHAPE['steps']
    print(tokens / (time.perf_counter() - begin), flush=True)


if __name__ == '__main__':
  main()
