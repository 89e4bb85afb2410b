"""The cache of sequences under way: made from prompts, and refilled.

All rows write at one clock: the token that a row adds at tick t goes to slot
t mod S of every layer, whatever its own position is, for one slice is written
several times faster than a scattered one. A row's newest tokens thus stand in
the slots before the clock, and its position says how many of them are its own.
"""

import jax
import jax.numpy as jnp

from tpu_lm.models import ring
from tpu_lm.models.ring import Cache, Slots
from tpu_lm.models.transformer import Config


def filled(
  config: Config,
  kept: tuple[jax.Array, jax.Array],
  lengths_B: jax.Array,
  slots: int,
  clock: jax.Array | None,
  quantised: bool = False,
  at_once: int = 1,
) -> Cache:
  """The cache after prompts.

  Args:
    config: of the network.
    kept: keys and values of its layers, [N, B, L, G, K] each, prompts
      left-aligned.
    lengths_B: of the prompts.
    slots: the most tokens a row will have.
    clock: tokens written by now, at least the longest prompt; None: a row's
      position says its slot.
    quantised: keys and values in 8 bits.
    at_once: the most tokens that will be written at once.
  """
  rows = len(lengths_B)
  empty = ring.init_cache(config, rows, slots, at_once, quantised)
  written = lengths_B[:, None] if clock is None else clock
  layers = []
  for k_BLGK, v_BLGK, slot in zip(*kept, empty.layers, strict=True):
    size = slot.k.shape[-1]
    # Slot s holds what was written this many tokens before the newest.
    ages = (written - 1 - jnp.arange(size)) % size
    from_BS = jnp.maximum(lengths_B[:, None] - 1 - ages, 0)
    chosen = from_BS[:, :, None, None]
    k = jnp.take_along_axis(k_BLGK, chosen, axis=1).transpose(0, 2, 3, 1)
    v = jnp.take_along_axis(v_BLGK, chosen, axis=1).swapaxes(1, 2)
    k, v = k.reshape(slot.k.shape), v.reshape(slot.v.shape)
    if quantised:
      k, k_scale = ring.quantised(k, -2)
      v, v_scale = ring.quantised(v, -1)
      layers.append(Slots(k, v, k_scale, v_scale))
    else:
      dtype = slot.k.dtype
      layers.append(Slots(k.astype(dtype), v.astype(dtype)))
  return Cache(tuple(layers), clock)


def shared(
  config: Config,
  kept: tuple[jax.Array, jax.Array],
  lengths_P: jax.Array,
  slots: int,
  copies: int,
  quantised: bool = False,
) -> Cache:
  """The cache of `copies` rows after each prompt, which itself is kept once.

  Args:
    config: of the network.
    kept: see `filled`.
    lengths_P: of the prompts.
    slots: the most tokens that come after a prompt.
    copies: rows a prompt, side by side.
    quantised: what comes after the prompt in 8 bits.
  """
  rows = len(lengths_P) * copies
  empty = ring.init_cache(config, rows, slots, 1, quantised)
  dtype = jnp.dtype(config.dtype)

  def merged(x_PGAB):
    shape = ring.slot_shape(*x_PGAB.shape)
    return x_PGAB.astype(dtype).reshape(shape)

  layers = []
  for k_PLGK, v_PLGK, window, slot in zip(
    *kept, config.windows, empty.layers, strict=True
  ):
    length = k_PLGK.shape[1]
    size = min(window, length) if window else length
    from_PS = lengths_P[:, None] + jnp.arange(-size, 0)
    chosen = jnp.maximum(from_PS, 0)[:, :, None, None]
    k = jnp.take_along_axis(k_PLGK, chosen, axis=1)
    v = jnp.take_along_axis(v_PLGK, chosen, axis=1)
    layers.append(
      slot._replace(
        prefix_k=merged(k.transpose(0, 2, 3, 1)),
        prefix_v=merged(v.swapaxes(1, 2)),
      )
    )
  layers = tuple(layers)
  return Cache(layers, jnp.int32(0), jnp.repeat(lengths_P, copies))
