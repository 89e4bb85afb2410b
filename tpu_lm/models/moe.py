"""Mixture of experts: each token goes through a few of many feed-forwards.

A router scores the experts, s = softmax(W x) or sigmoid(W x), in float32; a
token goes through the K experts of the highest score, and the sum of what they
give is weighed by their scores (Shazeer et al., arXiv 1701.06538, equation 2):
  router='softmax'  with renormalise over the K chosen ones, which is a softmax
           over their logits (Mixtral, arXiv 2401.04088, section 2.1; Qwen3-MoE
           by norm_topk_prob); without, the scores as they are (OLMoE).
  router='sigmoid'  DeepSeek-V3 (arXiv 2412.19437, equations 12 to 15).
`router_scale` multiplies the weights. `shared_experts` see every token (arXiv
2401.06066, equation 9); they are held as one feed-forward, as wide as so many.

Load balance. T tokens (padding is no token: it is neither routed nor counted):
  balance_loss   E sum_e f_e P_e, f_e the share of all choices that fell on e,
           P_e the mean score, scores summing to 1 (Switch, arXiv 2101.03961,
           equations 4 to 6; DeepSeek-V3, equations 17 to 20). It is 1 where
           the load is even; transformers has K times that. Over all rows of a
           microbatch, on all devices, and a mean over layers.
  router_z_loss  the mean of logsumexp(W x)^2 (ST-MoE, arXiv 2202.08906,
           equation 5).
  router_bias    b_e is added to the score where experts are chosen, and only
           there, and falls by optimizer.balance_rate in each update if e had
           more than the mean load of the batch, or else rises (arXiv
           2408.15664, algorithm 1). For this the gradient of b_e is set to its
           load, less the mean; optim.py takes the sign.

Forms:
  dropless  choices are sorted by expert and multiplied group by group
           (grouped.py). Every choice counts, so nothing depends on the number
           of devices or microbatches.
  capacity  (GShard, arXiv 2006.16668, section 2.2) each row of the batch sends
           an expert at most C = capacity_factor K L / E of its L tokens, the
           first ones; choices beyond are dropped and counted. All shapes are
           static and all products dense: it runs anywhere. A row is a group,
           so that the mesh does not matter, but its documents share C. Only
           for training and scoring; decoding never drops.
  auto      dropless, on every mesh: a network must not be another one on
           another number of chips.

On an `expert` axis of X devices each device holds E / X experts and has rows
of its own, T tokens a device. Bytes that it receives in a layer's forward pass
(as many in the backward pass), b a number:
  dropless  tokens of the X devices are gathered, and what its experts make of
           them is summed and scattered: 2 (X - 1) T D b. Buffers are for the
           worst case, X T K rows, of which 1 / X are multiplied on average.
  capacity  two all-to-alls of what is sent: 2 (X - 1) / X capacity_factor K T
           D b. Cheaper where capacity_factor K < X.

Expert matrices stay plain under int8, nf4 and lora; shared experts do not.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tpu_lm import auxiliary, per_device, sharding
from tpu_lm.auxiliary import Term
from tpu_lm.errors import UserError
from tpu_lm.models import grouped
from tpu_lm.models.block import ACTIVATIONS, Block, held

ROUTERS = ('softmax', 'sigmoid')
FORMS = ('auto', 'dropless', 'capacity')

Matrices = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down


def check(config: Any, fail: Callable[[str, str], None]) -> None:
  """Calls `fail(key, what)` for a field that cannot be."""
  num_experts, chosen = config.num_experts, config.experts_per_token
  if num_experts and not 1 <= chosen <= num_experts:
    fail('experts_per_token', f'from 1 to num_experts={num_experts}')
  if config.shared_experts and not num_experts:
    fail('shared_experts', 'needs num_experts above 0')
  for key in ('capacity_factor', 'router_scale'):
    if not 0 < getattr(config, key) < math.inf:
      fail(key, 'must be above 0')


def check_mesh(config: Any, mesh: Any) -> None:
  """Refuses an expert axis that the network cannot use.

  Raises:
    UserError: it has no experts, or not so many for each device.
  """
  size = mesh.shape['expert']
  if size > 1 and not config.num_experts:
    raise UserError(
      f'mesh.expert={size}: this network has no experts; set mesh.expert=1, '
      f'and give its devices to mesh.fsdp'
    )
  if config.num_experts % size:
    raise UserError(
      f'mesh.expert={size}: does not divide model.num_experts='
      f'{config.num_experts}; lower mesh.expert to '
      f'{math.gcd(size, config.num_experts)}'
    )


class Routing(NamedTuple):
  """Where tokens go, and what there is to tell of it."""

  ids_BLK: jax.Array  # int32; E: nowhere
  gates_BLK: jax.Array  # float32
  figures: dict[str, tuple[jax.Array, jax.Array]]  # (total, weight) by name


class Moe(Block):
  """Takes the place of `Mlp`; returns its output, and the figures."""

  @nn.compact
  def __call__(self, x_BLD, segment_ids_BL, drops: bool):
    config = self.config
    dim, hidden, count = config.dim, config.expert_size, config.num_experts
    real_BL = jnp.ones(x_BLD.shape[:2], bool)
    if segment_ids_BL is not None:
      real_BL = segment_ids_BL != 0
    x_BLD = jnp.where(real_BL[..., None], x_BLD, 0)
    h_BLD = self.normed('norm', x_BLD)
    ids_BLK, gates_BLK, figures = self._routed(h_BLD, real_BL)
    matrices = {
      'gate': self.weight('gate', (count, dim, hidden)),
      'up': self.weight('up', (count, dim, hidden)),
      'down': self.weight('down', (count, hidden, dim), output=True),
    }
    matrices = {
      '/'.join((*self.path, name)): leaf.astype(self.dtype)
      for name, leaf in matrices.items()
    }
    act = ACTIVATIONS[config.activation]
    if drops and config.moe_form == 'capacity':
      slots_BLK, capacity = _slots(ids_BLK, config)
      kept_BLK = slots_BLK < capacity
      if figures:
        sent_BLK = ids_BLK < count
        figures['dropped_share'] = (sent_BLK & ~kept_BLK).sum(), sent_BLK.sum()
      ids_BLK = jnp.where(kept_BLK, ids_BLK, count)
      columns = h_BLD, ids_BLK, gates_BLK, slots_BLK
      form = functools.partial(_sent, act=act, capacity=capacity)
      y_BLD = _by_device(form, columns, matrices, False)
    else:
      form = functools.partial(_sorted, act=act)
      y_BLD = _by_device(form, (h_BLD, ids_BLK, gates_BLK), matrices, True)
    if config.shared_experts:
      y_BLD += self.gated(h_BLD, config.shared_experts * hidden, 'shared_')
    if config.post_norms:
      y_BLD = self.normed('post_norm', y_BLD)
    return y_BLD, figures

  def _routed(self, h_BLD: jax.Array, real_BL: jax.Array) -> Routing:
    config, num_experts = self.config, self.config.num_experts
    init = nn.initializers.normal(config.init_std)
    router = held(self, 'router', init, (config.dim, num_experts))
    router_DE = per_device.whole('/'.join((*self.path, 'router')), router)
    logits_BLE = jnp.einsum(
      'BLD,DE->BLE',
      h_BLD.astype(jnp.float32),
      router_DE.astype(jnp.float32),
      precision='highest',
    )
    bias_E = None
    if config.router_bias:
      zeros = nn.initializers.zeros
      bias_E = self.param('router_bias', zeros, (num_experts,))
    return routed(config, logits_BLE, bias_E, real_BL)


def routed(
  config: Any,
  logits_BLE: jax.Array,
  bias_E: jax.Array | None,
  real_BL: jax.Array,
) -> Routing:
  """Scores the experts and chooses; see the module.

  Args:
    config: of the network.
    logits_BLE: float32.
    bias_E: is added where experts are chosen; None: nothing is.
    real_BL: bool; False at padding.
  """
  num_experts = config.num_experts
  is_sigmoid = config.router == 'sigmoid'
  score = jax.nn.sigmoid if is_sigmoid else jax.nn.softmax
  scores_BLE = score(logits_BLE)
  ranked_BLE = scores_BLE if bias_E is None else scores_BLE + bias_E
  ranked_BLE = jax.lax.stop_gradient(ranked_BLE)
  _, ids_BLK = jax.lax.top_k(ranked_BLE, config.experts_per_token)
  gates_BLK = _gates(logits_BLE, scores_BLE, ids_BLK, config)
  chosen_BLKE = ids_BLK[..., None] == jnp.arange(num_experts)
  chosen_BLKE &= real_BL[..., None, None]
  load_E = chosen_BLKE.sum((0, 1, 2), dtype=jnp.float32)
  if bias_E is not None:
    gates_BLK = _steered(gates_BLK, bias_E, load_E - load_E.mean())
  figures = {}
  if auxiliary.is_collected():
    if is_sigmoid:
      scores_BLE /= scores_BLE.sum(-1, keepdims=True) + 1e-20
    figures = _figures(logits_BLE, scores_BLE, load_E, real_BL)
  ids_BLK = jnp.where(real_BL[..., None], ids_BLK, num_experts)
  return Routing(ids_BLK, gates_BLK, figures)


def _gates(logits_BLE, scores_BLE, ids_BLK, config) -> jax.Array:
  """The weights of what was chosen."""
  if config.router == 'softmax' and config.renormalise:
    chosen_BLK = jnp.take_along_axis(logits_BLE, ids_BLK, axis=-1)
    return config.router_scale * jax.nn.softmax(chosen_BLK)
  gates_BLK = jnp.take_along_axis(scores_BLE, ids_BLK, axis=-1)
  if config.renormalise:
    gates_BLK /= gates_BLK.sum(-1, keepdims=True) + 1e-20
  return config.router_scale * gates_BLK


@jax.custom_vjp
def _steered(gates: jax.Array, bias_E: jax.Array, excess_E: jax.Array):
  """`gates`; the gradient of `bias_E` is `excess_E`."""
  del bias_E, excess_E
  return gates


def _steered_forward(gates, bias_E, excess_E):
  del bias_E
  return gates, excess_E


def _steered_backward(excess_E, grad):
  return grad, excess_E, None


_steered.defvjp(_steered_forward, _steered_backward)


def _figures(logits_BLE, scores_BLE, load_E, real_BL) -> dict[str, tuple]:
  """Sums over the rows of this device, each with its weight."""
  tokens = real_BL.sum(dtype=jnp.float32)
  whole_E = per_device.total(load_E)
  share_E = whole_E / jnp.maximum(whole_E.sum(), 1)
  score_E = jnp.where(real_BL[..., None], scores_BLE, 0).sum((0, 1))
  z_BL = jnp.square(jax.nn.logsumexp(logits_BLE, axis=-1))
  return {
    'balance_loss': (len(load_E) * (share_E * score_E).sum(), tokens),
    'router_z_loss': (jnp.where(real_BL, z_BL, 0).sum(), tokens),
    'expert_load': (len(load_E) * share_E.max() * tokens, tokens),
  }


def tell(config: Any, figures_N: dict[str, tuple]) -> None:
  """Adds the figures of all layers, as means over layers."""
  coefficients = {
    'balance_loss': config.balance_loss,
    'router_z_loss': config.router_z_loss,
  }
  for name, pair in figures_N.items():
    total, weight = (x.sum(dtype=jnp.float32) for x in pair)
    auxiliary.add(name, Term(total, weight, coefficients.get(name, 0.0)))


# Experts, and the devices that hold them.


def _by_device(
  form: Callable, columns: tuple, matrices: dict[str, Any], by_hand: bool
) -> jax.Array:
  """`form(*columns, matrices)`, each device on its own rows.

  Args:
    form: of rows that need no others; is told whether those of the devices
      that share out experts differ.
    columns: [B, L, …].
    matrices: of the experts, as they are held, by their paths.
    by_hand: whether positions are independent, too, and the partitioner cannot
      divide the products.
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = sharding.free_axes(mesh) if mesh.size > 1 else {}
  if not by_hand:  # XLA refuses regions of nothing but axes of size 1
    free = {axis: size for axis, size in free.items() if size > 1}
  rows = sharding.rows_over(mesh) if free else ()
  rows = tuple(axis for axis in rows if axis in free)
  num_rows, length = columns[0].shape[:2]
  if num_rows % math.prod(free[axis] for axis in rows):
    rows = ()  # a prompt or two: the same on all devices
  differ = 'expert' in rows or 'expert' not in free

  def run(*given):
    *columns, leaves = given
    # Here, where each device has its own hidden units: gathered before, they
    # would be the partitioner's, which gathers them, too.
    whole = tuple(
      per_device.whole(path, leaf, keep=('expert',))
      for path, leaf in zip(matrices, leaves, strict=True)
    )
    return form(*columns, whole, differ=differ)

  # A Pallas call wants all axes, those of size 1 as well.
  axes = set(free) if by_hand else set(rows)
  if not axes:
    return run(*columns, tuple(matrices.values()))
  across = 'sequence' if 'sequence' in axes else None
  if across and length % free[across]:
    across = None
  place = P(rows or None, across)
  expert, hidden = (a if a in axes else None for a in ('expert', 'tensor'))
  outer, inner = P(expert, None, hidden), P(expert, hidden, None)
  return jax.shard_map(
    run,
    in_specs=(*(place for _ in columns), (outer, outer, inner)),
    out_specs=place,
    axis_names=axes,
    check_vma=False,
  )(*columns, tuple(matrices.values()))


def _num_parts(axis: str) -> int:
  """Over how many devices an axis shares out the matrices that stand here."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape[axis] if axis in mesh.manual_axes else 1


def _sorted(
  h_BLD, ids_BLK, gates_BLK, matrices: Matrices, *, act, differ
) -> jax.Array:
  """The dropless form."""
  held_here, holders = len(matrices[0]), _num_parts('expert')
  columns = h_BLD, ids_BLK, gates_BLK
  h_TD, ids_TK, gates_TK = (x.reshape(-1, x.shape[-1]) for x in columns)
  if holders > 1 and differ:
    h_TD, ids_TK, gates_TK = (
      jax.lax.all_gather(x, 'expert', tiled=True)
      for x in (h_TD, ids_TK, gates_TK)
    )
  if holders > 1:
    ids_TK = ids_TK - jax.lax.axis_index('expert') * held_here
    ids_TK = jnp.where(ids_TK < 0, held_here, ids_TK)
  y_TD = grouped.weighed(h_TD, ids_TK, gates_TK, matrices, act)
  if _num_parts('tensor') > 1:
    y_TD = jax.lax.psum(y_TD, 'tensor')
  if holders > 1 and differ:
    y_TD = jax.lax.psum_scatter(y_TD, 'expert', tiled=True)
  elif holders > 1:
    y_TD = jax.lax.psum(y_TD, 'expert')
  return y_TD.reshape(h_BLD.shape)


def _slots(ids_BLK: jax.Array, config: Any) -> tuple[jax.Array, int]:
  """(the place of each choice at its expert, how many there are).

  A place beyond is none. The first tokens come first, whatever later ones
  choose, so that no token depends on a later one.
  """
  num_rows, length, chosen = ids_BLK.shape
  num_experts = config.num_experts
  capacity = config.capacity_factor * chosen * length / num_experts
  capacity = min(max(math.ceil(capacity), 1), length)
  here_BAE = ids_BLK.reshape(num_rows, -1, 1) == jnp.arange(num_experts)
  before_BAE = jnp.cumsum(here_BAE, axis=1, dtype=jnp.int32) - here_BAE
  slots_BA = jnp.where(here_BAE, before_BAE, 0).sum(-1)
  slots_BLK = slots_BA.reshape(ids_BLK.shape)
  return jnp.where(ids_BLK < num_experts, slots_BLK, capacity), capacity


def _sent(
  h_BLD, ids_BLK, gates_BLK, slots_BLK, matrices, *, act, capacity, differ
) -> jax.Array:
  """The capacity form."""
  gate, up, down = matrices
  holders = _num_parts('expert') if differ else 1
  num_experts = len(gate) * holders
  e_BLKE = jax.nn.one_hot(ids_BLK, num_experts, dtype=jnp.float32)
  c_BLKC = jax.nn.one_hot(slots_BLK, capacity, dtype=jnp.float32)
  sent_BLEC = jnp.einsum('BLKE,BLKC->BLEC', e_BLKE, c_BLKC)
  sent_BLEC = sent_BLEC.astype(h_BLD.dtype)
  weighed_BLEC = jnp.einsum('BLKE,BLKC,BLK->BLEC', e_BLKE, c_BLKC, gates_BLK)
  x_BECD = jnp.einsum('BLEC,BLD->BECD', sent_BLEC, h_BLD)
  swap = functools.partial(jax.lax.all_to_all, axis_name='expert', tiled=True)
  if holders > 1:
    x_BECD = swap(x_BECD, split_axis=1, concat_axis=0)
  a_BECF = jnp.einsum('BECD,EDF->BECF', x_BECD, gate)
  b_BECF = jnp.einsum('BECD,EDF->BECF', x_BECD, up)
  y_BECD = jnp.einsum('BECF,EFD->BECD', act(a_BECF) * b_BECF, down)
  if holders > 1:
    y_BECD = swap(y_BECD, split_axis=0, concat_axis=1)
  weighed_BLEC = weighed_BLEC.astype(h_BLD.dtype)
  return jnp.einsum('BLEC,BECD->BLD', weighed_BLEC, y_BECD)
