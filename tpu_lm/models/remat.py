"""Rematerialisation: what the backward pass may keep instead of making again.

Values of a layer have names (`checkpoint_name`), and a policy lists those that
are kept. Bytes are those of a layer and a token, in 16 bits, for a network of D
units, H heads and G key-value heads of size K, and F hidden units:

  none       everything
  dots       results of matmuls: 4 D + 2 (H + 2 G) K + 6 F
  qkv        attention's output and what it reads: D (its input), 2 H K, 2 G K
  attention  attention's output; its kernel does not run again: 2 D + 2 H K
  full       the input of the layer: 2 D
  offload    as full, but that lies in the memory of the host: 0 on the device

Each saves a part of a forward pass: full makes all of it again, a third more
than no rematerialisation (Chen et al., arXiv 1604.06174).
"""

from collections.abc import Callable

import jax

from tpu_lm import target

_KEPT = {
  'qkv': ('q', 'k', 'v', 'attention'),
  'attention': ('attention',),
}
POLICIES = ('none', 'full', 'dots', 'attention', 'qkv', 'offload')


def policy(name: str) -> Callable:
  """Of `jax.checkpoint`, for any of POLICIES but 'none'."""
  policies = jax.checkpoint_policies
  if name == 'full':
    return policies.nothing_saveable
  if name == 'dots':
    return policies.dots_with_no_batch_dims_saveable
  if name == 'offload' and target.platform() == 'cpu':
    return policies.nothing_saveable  # the host's memory is the device's
  if name == 'offload':
    return policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=['input'],
      offload_src='device',
      offload_dst='pinned_host',
    )
  return policies.save_only_these_names(*_KEPT[name])
