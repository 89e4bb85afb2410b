"""Products of training in 8 bits, for chips that do twice as many of them.

Forward and for the gradient of what comes in, both operands are rounded along
what is summed over, a scale a token and a scale an output (an input, backward):

  y = (q_x q_w) s_x s_w,   s = max|.| / largest,   q = round(. / s)

The gradient of a weight sums over all tokens, whose sizes differ most: it is
made in the dtype of the network (SwitchBack, Wortsman et al., arXiv 2304.13013,
section 2.2). `int8` is that; `fp8` has E4M3 numbers, and E5M2 for gradients
(Micikevicius et al., arXiv 2209.05433, section 3). Weights, moments, attention,
the head, routers and experts stay as they are.
"""

import functools

import jax
import jax.numpy as jnp

from tpu_lm import quantize, target

# What operands and gradients are rounded to.
_DTYPES = {
  'int8': (jnp.int8, jnp.int8),
  'fp8': (jnp.float8_e4m3fn, jnp.float8_e5m2),
}
KINDS = ('', *_DTYPES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec: str, x: jax.Array, weight: jax.Array, kind: str) -> jax.Array:
  """`jnp.einsum(spec, x, weight)` of rounded operands, in the dtype of x.

  Args:
    spec: of an einsum of two operands.
    x: tokens come first.
    weight: of any floating dtype.
    kind: int8 or fp8.
  """
  number, _ = _DTYPES[kind]
  return _rounded_product(spec, (x, number), (weight, number))


def _forward(spec, x, weight, kind):
  return einsum(spec, x, weight, kind), (x, weight)


def _backward(spec, kind, kept, y_grad):
  x, weight = kept
  number, gradient = _DTYPES[kind]
  letters, weight_letters, output = quantize.letters_of(spec)
  x_grad = _rounded_product(
    f'{output},{weight_letters}->{letters}',
    (y_grad, gradient),
    (weight, number),
  )
  weight_grad = jnp.einsum(f'{letters},{output}->{weight_letters}', x, y_grad)
  return x_grad, weight_grad.astype(weight.dtype)


einsum.defvjp(_forward, _backward)


def _rounded_product(spec: str, *operands: tuple[jax.Array, jnp.dtype]):
  *letters, output = quantize.letters_of(spec)
  parts = [
    _rounded(x, tuple(n for n, k in enumerate(own) if k not in output), dtype)
    for (x, dtype), own in zip(operands, letters, strict=True)
  ]
  kept = [''.join(k for k in own if k in output) for own in letters]
  (a, a_scale), (b, b_scale) = parts
  if target.platform() == 'cpu':  # which has no units for them
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  sums = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
  y = jnp.einsum(spec, a, b, preferred_element_type=sums)
  scale = jnp.einsum(f'{kept[0]},{kept[1]}->{output}', a_scale, b_scale)
  return (y.astype(jnp.float32) * scale).astype(operands[0][0].dtype)


def _rounded(
  x: jax.Array, axes: tuple[int, ...], dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
  """(x / scale, rounded to `dtype`; scale, float32, without `axes`)."""
  x = x.astype(jnp.float32)
  info = jnp.iinfo(dtype) if dtype == jnp.int8 else jnp.finfo(dtype)
  peak = jnp.abs(x).max(axes, keepdims=True)
  scale = jnp.where(peak > 0, peak / float(info.max), 1.0)
  x = x / scale
  x = jnp.round(x) if dtype == jnp.int8 else x
  return x.astype(dtype), scale.squeeze(axes)
