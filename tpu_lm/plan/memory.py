"""What fills the memory of a device: counted before the compiler is asked.

Parameters, optimizer state and batch are exact: shapes, shared out as
sharding.py says. What an update needs besides is a model of it: what the
backward pass keeps of each layer (models/remat.py), one layer at work with its
gathered weights, and the loss with the gathered head. How many arrays are there
at once was counted in programs of XLA's TPU compiler, where most are; the table
shows the compiler's figure beside it.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from tpu_lm import cross_entropy, sharding, target
from tpu_lm.plan import columns
from tpu_lm.plan.programs import Parts


class Bars(NamedTuple):
  """Bytes of one device."""

  parameters: float
  optimizer: float
  batch: float
  copies: float  # of the layers' weights, in the dtype of the products
  gradients: float  # sums over microbatches or slices
  activations: float  # kept for the backward pass, of all layers
  layer: float  # one at work, gathered weights and all gradients included
  loss: float  # head, its gradient, logits

  @property
  def fixed(self) -> float:
    """What is there before the update begins."""
    return self.parameters + self.optimizer + self.batch

  @property
  def total(self) -> float:
    """The most that is there at once: a layer and the loss take turns."""
    rest = self.copies + self.gradients + self.activations
    return self.fixed + rest + max(self.layer, self.loss)


NAMES = Bars._fields
_FULL = 4  # bytes of a number that is trained
_TILE = 8  # rows of a TPU's, of which shards of a matrix should be multiples


def num_bytes(tree: Any, itemsize: int = 0) -> float:
  """Of one device's part of the arrays; `itemsize` instead of their own."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape))
    * (itemsize or np.dtype(leaf.dtype).itemsize)
    for leaf in jax.tree.leaves(tree)
  )


def bars(parts: Parts, microbatches: int) -> Bars:
  """The model of the module, for the update of `parts`."""
  config, mesh = parts.model.config, parts.mesh
  tokens = columns.num_tokens(parts.batch) / microbatches / mesh.size
  tokens *= mesh.shape['tensor']
  size = np.dtype(config.dtype).itemsize
  gradients = num_bytes(parts.state.params)
  # Else the layers' own become the new parameters, with no other copy.
  sums = gradients if microbatches > 1 else 0.0
  if microbatches == 1 and mesh.shape['data'] > 1:
    sums = exchanged(parts)
  layers = parts.state.params.get('layers', ())
  return Bars(
    parameters=num_bytes(parts.state.params) + num_bytes(parts.frozen),
    optimizer=num_bytes(parts.state.optimizer),
    batch=num_bytes(parts.batch),
    copies=num_bytes(layers, size) if size < _FULL else 0.0,
    gradients=sums,
    activations=config.num_layers * tokens * kept(config, mesh) * size,
    layer=gradients + _layer(parts, tokens, size),
    loss=_loss(parts, microbatches, tokens, size),
  )


def exchanged(parts: Parts) -> float:
  """Bytes of the gradients that replicas sum (see per_device.summed)."""
  is_gathered = sharding.num_weight_shards(parts.mesh) > 1
  size = np.dtype(parts.model.config.dtype).itemsize if is_gathered else _FULL
  return num_bytes(parts.state.params, size)


def kept(config: Any, mesh: Any) -> float:
  """Numbers a token and layer that the backward pass finds kept."""
  tensor = mesh.shape['tensor']
  heads = config.num_heads * config.head_size / tensor
  keys = 2 * config.kv_heads * config.head_size / tensor
  if config.num_experts:
    hidden = config.expert_size * config.experts_per_token / tensor
  else:
    hidden = config.hidden_dim / tensor
  of_lse = 2 * config.num_heads / tensor  # float32
  return {
    'full': config.dim,
    'offload': 0.0,
    'attention': config.dim + heads + of_lse,
    'qkv': config.dim + 2 * heads + keys + of_lse,
    'dots': 3 * config.dim + 2 * heads + keys + of_lse + 2 * hidden,
    'none': 6 * config.dim + 3 * heads + 2 * keys + of_lse + 5 * hidden,
  }[config.remat]


def _layer(parts: Parts, tokens: float, size: int) -> float:
  """The backward pass of a layer's feed-forward, where most is there.

  That is six times its hidden units: two products, their gradients, what they
  were multiplied to and its gradient. Beside it the residual stream, its
  gradient and what norms made of both, queries, keys and values, and how the
  kernel of attention has them.
  """
  config, mesh = parts.model.config, parts.mesh
  tensor = mesh.shape['tensor']
  leaves = jax.tree_util.tree_leaves_with_path(parts.state.params)
  weights = sum(
    math.prod(leaf.shape[1:]) * _kept_apart(path, mesh)
    for path, leaf in leaves
    if sharding.path_name(path).startswith('layers/')
  )
  hidden, streams = config.hidden_dim, 4
  if config.num_experts:  # rows of the choices, their gradients, their sum
    hidden = config.expert_size * config.experts_per_token / 2
    streams += 2 * config.experts_per_token + 2
  heads = (config.num_heads + config.kv_heads) * config.head_size
  rows = 4 if config.remat in ('full', 'offload') else 2  # made again, or kept
  working = 6 * hidden / tensor + streams * config.dim + rows * heads / tensor
  return size * (weights / tensor + tokens * working)


def _kept_apart(path: tuple, mesh: Any) -> float:
  """The share of a layer's weight that is on a device once gathered."""
  is_expert = '/moe/' in sharding.path_name(path)
  return 1 / mesh.shape['expert'] if is_expert else 1.0


def _loss(parts: Parts, microbatches: int, tokens: float, size: int) -> float:
  """The head, its gradient in float32, a chunk of logits, hidden states."""
  config, mesh = parts.model.config, parts.mesh
  table = config.vocab_size * config.dim / mesh.shape['tensor']
  rows, columns = next(iter(parts.batch.values())).shape
  shape = rows // microbatches, columns - 1
  with target.planned(mesh.devices.flat[0]), jax.set_mesh(mesh):
    chunk = cross_entropy.chunk_length(
      shape, config.vocab_size, config.loss_chunk
    )
  chunk *= shape[0] // sharding.num_batch_shards(mesh)
  logits = _FULL * chunk * config.vocab_size / mesh.shape['tensor']
  shards = sharding.num_weight_shards(mesh)
  # Shards that are no whole tiles are put together by a copy.
  copies = 2 if config.dim // shards % _TILE else 1
  head = table * (copies * size + _FULL)
  return head + logits + 3 * tokens * config.dim * size
