"""Vocabulary projection and cross-entropy, without the whole logits.

-log softmax(cap(x W^T))[target], where cap(l) = c tanh(l / c) (Gemma 2, arXiv
2408.00118, section 2) or nothing. The [B, L, V] logits are never held: they
are made for some positions of all rows at a time. Each device takes its own
rows and positions, so that a batch which is spread over devices stays so, the
head is gathered once, and its gradient is reduced over devices once.

`mean` makes the gradients of hidden states and head in the forward pass,
which costs the logits once instead of twice; that of a frozen head is not
made. It serves losses that are weighted sums. `token_logps` serves all others;
it makes the logits of a chunk again in the backward pass.

Axis letters beside those of DESIGN: N chunks, S shards of the batch, T tokens
of a chunk and shard.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tpu_lm import per_device, sharding, target

# As many are held at a time, a device (float32: 16 and 512 MiB). An accelerator
# reads the whole head for each chunk, which few positions would not repay.
_LOGITS = 1 << 22
_ACCELERATOR_LOGITS = 1 << 27


def mean(
  hidden_BLD: jax.Array,
  head_VD: jax.Array,
  targets_BL: jax.Array,
  weights_BL: jax.Array,
  *,
  soft_cap: float = 0.0,
  z_loss: float = 0.0,
  chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """The weighted sum of -log p(target), in nats, and the sum of the weights.

  Where the weight is 0, hidden state and target may be anything (NaN, an id
  outside of the vocabulary): nothing changes. Elsewhere a target outside of
  the vocabulary makes the total NaN.

  Args:
    hidden_BLD: what the head reads; the matmuls are done in its dtype.
    head_VD: the output head.
    targets_BL: int.
    weights_BL: float32.
    soft_cap: c of the module; 0: none.
    z_loss: adds z_loss * logsumexp(logits)^2 to each -log p (PaLM, arXiv
      2204.02311, section 5).
    chunk: at most so many positions (of all rows) at a time; 0: by the size
      of the vocabulary.

  Returns:
    (total, weight), float32 scalars; both differentiable, also by the
    weights where they are not 0.
  """
  length = chunk_length(targets_BL.shape, head_VD.shape[0], chunk)
  shards = _shards(targets_BL.shape)
  counted_BL = weights_BL != 0
  # `where` before, not multiply after: 0 * NaN is NaN.
  hidden_BLD = jnp.where(counted_BL[..., None], hidden_BLD, 0)
  split = functools.partial(_split, shards=shards, length=length)
  head, letters = _operand(head_VD, hidden_BLD.dtype)
  total = _total(
    split(hidden_BLD),
    head,
    split(jnp.where(counted_BL, targets_BL, 0)),
    split(weights_BL.astype(jnp.float32)),
    letters,
    soft_cap,
    z_loss,
  )
  return total, weights_BL.sum(dtype=jnp.float32)


def token_logps(
  hidden_BLD: jax.Array,
  head_VD: jax.Array,
  targets_BL: jax.Array,
  *,
  mask_BL: jax.Array | None = None,
  soft_cap: float = 0.0,
  temperature: float = 1.0,
  chunk: int = 0,
) -> jax.Array:
  """Float32 [B, L]: log p(target) in nats under softmax(logits / temperature).

  Args:
    hidden_BLD: what the head reads; the matmuls are done in its dtype.
    head_VD: the output head.
    targets_BL: int; one outside of the vocabulary gives NaN.
    mask_BL: bool; where False the result is 0, and hidden state and target
      may be anything. None: all True.
    soft_cap: c of the module, applied before the temperature; 0: none.
    temperature: above 0.
    chunk: as in `mean`.
  """
  length = chunk_length(targets_BL.shape, head_VD.shape[0], chunk)
  shards = _shards(targets_BL.shape)
  if mask_BL is not None:
    hidden_BLD = jnp.where(mask_BL[..., None], hidden_BLD, 0)
    targets_BL = jnp.where(mask_BL, targets_BL, 0)
  head, letters = _operand(head_VD, hidden_BLD.dtype)

  def logps(hidden_STD, head, targets_ST):
    logits_STV = _logits(hidden_STD, head, letters, soft_cap) / temperature
    lse_ST, picked_ST, _ = _reduced(logits_STV, targets_ST)
    return picked_ST - lse_ST

  split = functools.partial(_split, shards=shards, length=length)
  xs = (split(hidden_BLD), split(targets_BL))
  if len(xs[0]) > 1:  # a single chunk may as well be kept
    logps = jax.checkpoint(logps)

  def step(_, xs):
    return None, logps(xs[0], head, xs[1])

  _, logps_NST = jax.lax.scan(step, None, xs)
  logps_BL = _join(logps_NST, targets_BL.shape, shards, length)
  return logps_BL if mask_BL is None else jnp.where(mask_BL, logps_BL, 0.0)


def chunk_length(shape: tuple[int, int], num_vocab: int, chunk: int = 0) -> int:
  """How many positions of its rows a device takes at a time."""
  (rows, length), (row_shards, column_shards) = shape, _shards(shape)
  if not chunk:
    is_cpu = target.platform() == 'cpu'
    logits = _LOGITS if is_cpu else _ACCELERATOR_LOGITS
    chunk = max(logits * row_shards // (rows * num_vocab), 1)
  # As many chunks, but even: the last one is filled up with zeros.
  length //= column_shards
  return -(-length // -(-length // chunk))


def _shards(shape: tuple[int, int]) -> tuple[int, int]:
  """Into how many parts the mesh in force divides rows and positions."""
  mesh = jax.sharding.get_abstract_mesh()
  sizes = sharding.free_axes(mesh)
  rows = math.prod(sizes.get(axis, 1) for axis in sharding.free_rows(mesh))
  columns = sizes.get('sequence', 1)
  return (
    rows if shape[0] % rows == 0 else 1,
    columns if shape[1] % columns == 0 else 1,
  )


def _split(x, shards: tuple[int, int], length: int) -> jax.Array:
  """[B, L, …] to [N, S, T, …], filled up with zeros at the end."""
  (rows, columns), (num_rows, num_columns) = shards, x.shape[:2]
  x = x.reshape(
    rows, num_rows // rows, columns, num_columns // columns, *x.shape[2:]
  )
  missing = -x.shape[3] % length
  x = jnp.pad(x, [(0, missing if i == 3 else 0) for i in range(x.ndim)])
  x = x.reshape(*x.shape[:3], -1, length, *x.shape[4:])
  x = x.transpose(3, 0, 2, 1, 4, *range(5, x.ndim))
  x = x.reshape(x.shape[0], rows * columns, -1, *x.shape[5:])
  return _constrain(x, 1) if rows * columns > 1 else x


def _join(x, shape: tuple[int, int], shards: tuple[int, int], length: int):
  """[N, S, T, …] to [B, L, …]: undoes `_split`."""
  (num_rows, num_columns), (rows, columns) = shape, shards
  x = x.reshape(
    -1, rows, columns, num_rows // rows, length, *x.shape[3:]
  ).transpose(1, 3, 2, 0, 4, *range(5, x.ndim + 2))
  x = x.reshape(*x.shape[:3], -1, *x.shape[5:])
  x = x[:, :, :, : num_columns // columns]
  return x.reshape(num_rows, num_columns, *x.shape[4:])


def _constrain(x: jax.Array, axis: int) -> jax.Array:
  """Lays the shards S, dimension `axis`, on their devices."""
  rows = sharding.free_rows(jax.sharding.get_abstract_mesh())
  shared = (*rows, 'sequence')
  return jax.lax.with_sharding_constraint(x, P(*(None,) * axis, shared))


def _operand(head_VD: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, str]:
  """(head, its letters), as it lies in memory.

  One that was gathered is [D, V] there (per_device.py); turned to [V, D] for
  the scan over chunks it would be there twice.
  """
  head_VD = sharding.replicate_columns(head_VD).astype(dtype)
  return (head_VD.T, 'DV') if per_device.is_inside() else (head_VD, 'VD')


def _logits(hidden_STD, head, letters: str, soft_cap: float) -> jax.Array:
  logits_STV = jnp.einsum(
    f'STD,{letters}->STV', hidden_STD, head, preferred_element_type=jnp.float32
  )
  if soft_cap:
    return soft_cap * jnp.tanh(logits_STV / soft_cap)
  return logits_STV


def _reduced(logits_STV, targets_ST):
  """logsumexp, logit of the target (NaN: there is none), where it stands."""
  lse_ST = jax.nn.logsumexp(logits_STV, axis=-1)
  num_vocab = logits_STV.shape[-1]
  hit_STV = jnp.arange(num_vocab) == targets_ST[..., None]
  picked_ST = jnp.where(hit_STV, logits_STV, 0.0).sum(-1)
  known_ST = (targets_ST >= 0) & (targets_ST < num_vocab)
  return lse_ST, jnp.where(known_ST, picked_ST, jnp.nan), hit_STV


def _nlls(lse_ST, picked_ST, weights_ST, z_loss: float) -> jax.Array:
  """The loss of each token before its weight; 0 where that is 0."""
  nll_ST = lse_ST - picked_ST + z_loss * jnp.square(lse_ST)
  return jnp.where(weights_ST != 0, nll_ST, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _total(
  hidden_NSTD, head, targets_NST, weights_NST, letters, soft_cap, z_loss
):
  """The weighted sum; computes no gradient unless it is asked for one."""

  def step(total_S, xs):
    hidden_STD, targets_ST, weights_ST = xs
    logits_STV = _logits(hidden_STD, head, letters, soft_cap)
    lse_ST, picked_ST, _ = _reduced(logits_STV, targets_ST)
    nll_ST = _nlls(lse_ST, picked_ST, weights_ST, z_loss)
    return total_S + jnp.sum(weights_ST * nll_ST, axis=1), None

  xs = (hidden_NSTD, targets_NST, weights_NST)
  zeros_S = jnp.zeros(hidden_NSTD.shape[1], jnp.float32)
  return jax.lax.scan(step, zeros_S, xs)[0].sum()


def _total_forward(hidden, head, targets, weights, letters, soft_cap, z_loss):
  """Value and, scaled by a cotangent of 1, the gradients that are asked for."""
  hidden_NSTD, matrix = hidden.value, head.value
  dtype = hidden_NSTD.dtype

  def step(sums, xs):
    total_S, head_grads_S = sums
    hidden_STD, targets_ST, weights_ST = xs
    logits_STV = _logits(hidden_STD, matrix, letters, soft_cap)
    lse_ST, picked_ST, hit_STV = _reduced(logits_STV, targets_ST)
    nll_ST = _nlls(lse_ST, picked_ST, weights_ST, z_loss)
    p_STV = jnp.exp(logits_STV - lse_ST[..., None])
    pull_ST = weights_ST * (1.0 + 2.0 * z_loss * lse_ST)
    grad_STV = pull_ST[..., None] * p_STV
    grad_STV = grad_STV - jnp.where(hit_STV, weights_ST[..., None], 0.0)
    if soft_cap:
      grad_STV = grad_STV * (1.0 - jnp.square(logits_STV / soft_cap))
    grad_STV = grad_STV.astype(dtype)
    hidden_grad_STD = None
    if head.perturbed:
      head_grads_S = head_grads_S + jnp.einsum(
        f'STV,STD->S{letters}',
        grad_STV,
        hidden_STD,
        preferred_element_type=jnp.float32,
      )
    if hidden.perturbed:
      hidden_grad_STD = jnp.einsum(f'STV,{letters}->STD', grad_STV, matrix)
    total_S = total_S + jnp.sum(weights_ST * nll_ST, axis=1)
    return (total_S, head_grads_S), (hidden_grad_STD, nll_ST)

  num_shards = hidden_NSTD.shape[1]
  zeros = None
  if head.perturbed:
    zeros = jnp.zeros((num_shards, *matrix.shape), jnp.float32)
    zeros = _constrain(zeros, 0) if num_shards > 1 else zeros
  (total_S, head_grads_S), (hidden_grad_NSTD, nll_NST) = jax.lax.scan(
    step,
    (jnp.zeros(num_shards, jnp.float32), zeros),
    (hidden_NSTD, targets.value, weights.value),
  )
  head_grad = None
  if head.perturbed:
    head_grad = head_grads_S.sum(0).astype(matrix.dtype)
  return total_S.sum(), (hidden_grad_NSTD, head_grad, nll_NST)


def _total_backward(letters, soft_cap, z_loss, kept, cotangent):
  del letters, soft_cap, z_loss
  hidden_grad_NSTD, head_grad, nll_NST = kept

  def scaled(grad):
    return None if grad is None else (cotangent * grad).astype(grad.dtype)

  return (
    scaled(hidden_grad_NSTD),
    scaled(head_grad),
    None,
    cotangent * nll_NST,
  )


_total.defvjp(_total_forward, _total_backward, symbolic_zeros=True)
