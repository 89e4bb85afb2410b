"""STOPGAP by the lead until helper D overwrites this file."""

import jax
import jax.numpy as jnp


def mean(hidden, head, targets, weights, *, soft_cap=0.0, z_loss=0.0):
  logits = jnp.einsum('bld,vd->blv', hidden, head)
  lse = jax.nn.logsumexp(logits, -1)
  t = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  return (jnp.where(weights > 0, (lse - t), 0.0) * weights).sum(), weights.sum()
