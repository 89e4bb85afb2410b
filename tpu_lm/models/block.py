"""What the blocks of a layer share: norms, weights, the gated product."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpu_lm import per_device, weights

ACTIVATIONS = {
  'silu': nn.silu,
  'gelu': lambda x: nn.gelu(x, approximate=True),
}


def rms_norm(
  x: jax.Array, scale: jax.Array, eps: float, plus_one: bool
) -> jax.Array:
  """RMSNorm (arXiv 1910.07467, equation 4) over the last axis, in float32."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * (1.0 + scale if plus_one else scale)).astype(x.dtype)


def held(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]):
  """A weight of `module`: new, or as the given parameters hold it."""
  # linen's own check of shapes knows plain arrays only.
  if module.has_variable('params', name):
    found = module.get_variable('params', name)
    if isinstance(found, weights.HELD) or per_device.is_inside():
      return found
  return module.param(name, init, shape)


class Block(nn.Module):
  """What attention and feed-forward share: norms, initialisers, dtype."""

  config: Any  # transformer.Config

  @property
  def dtype(self) -> jnp.dtype:
    return jnp.dtype(self.config.dtype)

  def matrix(self, name: str, shape: tuple[int, ...], output: bool = False):
    """A weight, gathered; `output` ones write to the residual stream."""
    found = self.weight(name, shape, output)
    return per_device.whole('/'.join((*self.path, name)), found, self.dtype)

  def weight(self, name: str, shape: tuple[int, ...], output: bool = False):
    """The same, as it is held."""
    config = self.config
    if output and config.zero_init_output:
      init = nn.initializers.zeros
    else:
      init = nn.initializers.normal(config.init_std)
    return held(self, name, init, shape)

  def matrices(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Several weights of the same inputs, gathered at once."""
    leaves = [self.weight(name, shape) for name, shape in shapes.items()]
    names = ['/'.join((*self.path, name)) for name in shapes]
    found = per_device.all_whole(names, leaves, self.dtype)
    return dict(zip(shapes, found, strict=True))

  def gated(self, h_BLD: jax.Array, hidden: int, prefix: str = ''):
    """act(h gate) * (h up), times down; `hidden` units (arXiv 2002.05202)."""
    dim = self.config.dim
    gate = self.matrix(f'{prefix}gate', (dim, hidden))
    up = self.matrix(f'{prefix}up', (dim, hidden))
    a_BLF = self.times('BLD,DF->BLF', h_BLD, gate)
    b_BLF = self.times('BLD,DF->BLF', h_BLD, up)
    down = self.matrix(f'{prefix}down', (hidden, dim), output=True)
    c_BLF = ACTIVATIONS[self.config.activation](a_BLF) * b_BLF
    return self.times('BLF,FD->BLD', c_BLF, down)

  def times(self, spec: str, x: jax.Array, weight: Any) -> jax.Array:
    """`weights.einsum` as the network has it."""
    matmul = self.config.matmul
    return weights.einsum(spec, x, weight, self.dtype, matmul)

  @property
  def is_packed(self) -> bool:
    """Whether its matrices are those of generate/packed.py."""
    return self.has_variable('params', 'packed')

  def product(self, name: str, x_BLX: jax.Array) -> jax.Array:
    """`x_BLX` times a packed matrix."""
    return self.get_variable('params', 'packed')[name].product(
      x_BLX.astype(self.dtype)
    )

  def normed(self, name: str, x: jax.Array) -> jax.Array:
    config = self.config
    start = nn.initializers.constant(0.0 if config.norm_plus_one else 1.0)
    scale = self.param(name, start, x.shape[-1:])
    return rms_norm(x, scale, config.norm_eps, config.norm_plus_one)
