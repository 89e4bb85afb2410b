"""Rotary position embedding, half-rotation form, with the usual scalings.

RoPE: Su et al., arXiv 2104.09864, equation 34, in the layout of GPT-NeoX and
Llama: the first half of a head is rotated against its second half.

Scalings of the frequencies for contexts longer than the trained one:
  linear  positions are divided by `factor` (arXiv 2306.15595).
  llama3  only wavelengths longer than the trained context are divided, with
          a smooth ramp in between (Llama 3.1's `rope_type: llama3`).
  yarn    NTK-by-parts with an attention temperature (arXiv 2309.00071,
          equations 18-23).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

SCALINGS = ('', 'linear', 'llama3', 'yarn')


@dataclasses.dataclass(frozen=True)
class Scaling:
  """How frequencies change beyond the trained length; see the module."""

  kind: str = ''
  factor: float = 1.0
  original_length: int = 0  # tokens of the context it was trained on
  low: float = 1.0  # llama3: wavelengths > original_length / low are divided
  high: float = 4.0  # llama3: wavelengths < original_length / high are kept
  beta_fast: float = 32.0  # yarn: rotations above which nothing changes
  beta_slow: float = 1.0  # yarn: rotations below which all is divided
  attention_factor: float = 0.0  # yarn: 0 means 0.1 ln(factor) + 1


def frequencies(
  head_dim: int, theta: float, scaling: Scaling = Scaling()
) -> tuple[np.ndarray, float]:
  """Returns (radians a position [K/2] float32, factor on cos and sin)."""
  inverse = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  temperature = 1.0
  if scaling.kind == 'linear':
    inverse = inverse / scaling.factor
  elif scaling.kind == 'llama3':
    rotations = scaling.original_length * inverse / (2 * math.pi)
    keep = (rotations - scaling.low) / (scaling.high - scaling.low)
    keep = np.clip(keep, 0.0, 1.0)
    inverse = inverse * (keep + (1 - keep) / scaling.factor)
  elif scaling.kind == 'yarn':

    def dimension(rotations: float) -> float:
      length = scaling.original_length / (rotations * 2 * math.pi)
      return head_dim * math.log(length) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / max(high - low, 1e-3)
    keep = 1 - np.clip(ramp, 0.0, 1.0)
    inverse = inverse * (keep + (1 - keep) / scaling.factor)
    temperature = scaling.attention_factor or (
      0.1 * math.log(scaling.factor) + 1.0
    )
  elif scaling.kind:
    raise ValueError(f'unknown RoPE scaling {scaling.kind!r}')
  return inverse.astype(np.float32), temperature


def sinusoids(
  positions_BL: jax.Array,
  head_dim: int,
  theta: float,
  scaling: Scaling = Scaling(),
) -> tuple[jax.Array, jax.Array]:
  """Returns (cos, sin), each float32 [B, L, K/2]."""
  inverse, temperature = frequencies(head_dim, theta, scaling)
  angles = positions_BL[..., None].astype(jnp.float32) * inverse
  return jnp.cos(angles) * temperature, jnp.sin(angles) * temperature


def rotate(x_BLHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates every head of `x_BLHK` by the angles of its position."""
  cos, sin = cos[:, :, None], sin[:, :, None]
  a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x_BLHK.dtype)
