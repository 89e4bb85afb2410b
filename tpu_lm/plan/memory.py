"""What fills the memory of a device: counted before the compiler is asked.

Parameters, optimizer state and batch are exact: shapes, shared out as
sharding.py says. What an update needs besides is a model of it: gradients, what
the backward pass keeps of each layer (models/remat.py), one layer at work with
its gathered weights, and the loss with the gathered head. The table shows the
compiler's figure beside it.
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
  gradients: float
  activations: float  # kept for the backward pass, of all layers
  layer: float  # one layer at work, weights that are gathered for it included
  loss: float  # head, its gradient, logits

  @property
  def fixed(self) -> float:
    """What is there before the update begins."""
    return self.parameters + self.optimizer + self.batch

  @property
  def total(self) -> float:
    """The most that is there at once: a layer and the loss take turns."""
    rest = self.gradients + self.activations
    return self.fixed + rest + max(self.layer, self.loss)


NAMES = Bars._fields


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
  trained = jax.tree.leaves(parts.state.params)
  size = np.dtype(config.dtype).itemsize
  return Bars(
    parameters=num_bytes(parts.state.params) + num_bytes(parts.frozen),
    optimizer=num_bytes(parts.state.optimizer),
    batch=num_bytes(parts.batch),
    gradients=num_bytes(trained) * (2 if microbatches > 1 else 1),
    activations=config.num_layers * tokens * kept(config, mesh) * size,
    layer=_layer(parts, tokens, size),
    loss=_loss(parts, microbatches, tokens, size),
  )


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
  """One layer's backward pass, with the weights of the next on their way."""
  config, mesh = parts.model.config, parts.mesh
  tensor = mesh.shape['tensor']
  leaves = jax.tree_util.tree_leaves_with_path(parts.state.params)
  weights = sum(
    math.prod(leaf.shape[1:]) * _kept_apart(path, mesh)
    for path, leaf in leaves
    if sharding.path_name(path).startswith('layers/')
  )
  weights = weights * size / tensor
  hidden = config.hidden_dim / tensor
  if config.num_experts:
    hidden = 2 * config.expert_size * config.experts_per_token / tensor
  heads = config.num_heads * config.head_size / tensor
  working = tokens * size * (4 * config.dim + 4 * heads + 3 * hidden)
  return 2 * weights + working


def _kept_apart(path: tuple, mesh: Any) -> float:
  """The share of a layer's weight that is on a device once gathered."""
  is_expert = '/moe/' in sharding.path_name(path)
  return 1 / mesh.shape['expert'] if is_expert else 1.0


def _loss(parts: Parts, microbatches: int, tokens: float, size: int) -> float:
  """The head, its gradient in float32, a chunk of logits twice."""
  config, mesh = parts.model.config, parts.mesh
  table = config.vocab_size * config.dim / mesh.shape['tensor']
  rows, columns = next(iter(parts.batch.values())).shape
  shape = rows // microbatches, columns - 1
  with target.planned(mesh.devices.flat[0]), jax.set_mesh(mesh):
    chunk = cross_entropy.chunk_length(
      shape, config.vocab_size, config.loss_chunk
    )
  chunk *= shape[0] // sharding.num_batch_shards(mesh)
  logits = 2 * 4 * chunk * config.vocab_size / mesh.shape['tensor']
  return table * (size + 4) + logits + tokens * config.dim * size * 2
