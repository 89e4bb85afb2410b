"""Divergences between two next-token distributions, and their sum over tokens.

With p the teacher's distribution and q the student's, over the vocabulary:
- forward_kl: KL(p || q) = sum p log(p / q);
- reverse_kl: KL(q || p);
- gjsd, the generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649,
  equation 1): b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q. Its
  gradient, over b, nears that of forward_kl for b to 0; over 1 - b, that of
  reverse_kl for b to 1. At 0 and 1 it is 0; TRL gives forward_kl for 0 and
  reverse_kl for 1.

With stored top-k log-probabilities both distributions are taken over the
teacher's k tokens and one event more, "any other token". That is a lower bound
of the divergence over the vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpu_lm import cross_entropy
from tpu_lm import start as starts
from tpu_lm.models import transformer
from tpu_lm.stage import Batch, hidden_states, require

KINDS = ('forward_kl', 'reverse_kl', 'gjsd')


def divergence(
  teacher: jax.Array, student: jax.Array, kind: str, beta: float = 0.5
) -> jax.Array:
  """The divergence over the last axis, in nats, of log-probabilities."""

  def kl(a, b):
    return (jnp.exp(a) * (a - b)).sum(axis=-1)

  if kind == 'forward_kl':
    return kl(teacher, student)
  if kind == 'reverse_kl':
    return kl(student, teacher)
  middle = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
  return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def with_rest(logits_BLV: jax.Array, ids_BLK: jax.Array) -> jax.Array:
  """Float32 [B, L, K+1]: log p of these ids, and of all others together."""
  some_BLK = jnp.take_along_axis(logits_BLV, ids_BLK, axis=-1)
  drop = jax.vmap(jax.vmap(lambda logits, ids: logits.at[ids].set(-jnp.inf)))
  # Not 1 minus the sum of the others, of which nothing is left if it is near 1.
  rest_BL = jax.nn.logsumexp(drop(logits_BLV, ids_BLK), axis=-1)
  events = jnp.concatenate([some_BLK, rest_BL[..., None]], axis=-1)
  return jax.nn.log_softmax(events)


class Measure(NamedTuple):
  """How far a student is from a teacher at a token."""

  kind: str
  beta: float  # of gjsd
  temperature: float  # T: both are softmax(logits / T)
  top_k: int  # what is stored of the teacher; 0: the whole vocabulary

  def check(self, num_vocab: int) -> None:
    """Refuses what cannot be, by the keys of stages/distill.py."""
    kind, beta, temperature, top_k = self
    require(kind in KINDS, 'divergence', kind, ', '.join(KINDS))
    ends = 'above 0 and below 1; the ends are forward_kl and reverse_kl'
    require(0 < beta < 1, 'beta', beta, ends)
    require(temperature > 0, 'temperature', temperature, 'must be above 0')
    below = f'below the {num_vocab} tokens, or 0 for all of them'
    require(0 <= top_k < num_vocab, 'top_k', top_k, below)

  @property
  def names(self) -> tuple[str, ...]:
    """The columns that stand for the teacher."""
    return (
      ('teacher_ids', 'teacher_logps') if self.top_k else ('teacher_logits',)
    )

  def columns(self, logits_BLV: jax.Array) -> tuple[jax.Array, ...]:
    """What is known of the teacher: logits; or ids and log-probabilities."""
    if not self.top_k:
      return (logits_BLV,)
    ids_BLK = jax.lax.top_k(logits_BLV, self.top_k)[1]
    return ids_BLK, with_rest(logits_BLV / self.temperature, ids_BLK)

  def between(
    self,
    columns: tuple[jax.Array, ...],
    student_BLV: jax.Array,
    mask_BL: jax.Array,
  ) -> jax.Array:
    """[B, L]: T^2 times the divergence; 0 where the mask is False.

    Args:
      columns: of the teacher; anything where the mask is False.
      student_BLV: its logits, finite.
      mask_BL: bool.
    """
    mask_BL1, student_BLV = mask_BL[..., None], student_BLV / self.temperature
    if self.top_k:
      ids_BLK, teacher = columns
      student = with_rest(student_BLV, jnp.where(mask_BL1, ids_BLK, 0))
      # Finite, and so are the gradients.
      teacher = jnp.where(mask_BL1, teacher, -1.0)
    else:
      teacher = jnp.where(mask_BL1, columns[0], 0) / self.temperature
      teacher = jax.nn.log_softmax(teacher)
      student = jax.nn.log_softmax(student_BLV)
    each_BL = divergence(teacher, student, self.kind, self.beta)
    return jnp.where(mask_BL, self.temperature**2 * each_BL, 0)


def picked_logps(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
  """Float32 [B, L]: log p of the targets."""
  hit_BLV = targets_BL[..., None] == jnp.arange(logits_BLV.shape[-1])
  return jnp.where(hit_BLV, jax.nn.log_softmax(logits_BLV), 0).sum(axis=-1)


def row_sums(
  each: Callable[..., Any],
  fixed: Any,
  columns: tuple[jax.Array, ...],
  num_vocab: int,
) -> Any:
  """Sums over positions of `each(fixed, *columns)`, some positions at a time.

  Whatever is as large as the logits lives for a chunk of positions only; the
  backward pass makes it again.

  Args:
    each: gives a tree of arrays [B, C] for columns [B, C, …].
    fixed: a tree of arrays that all chunks read, such as the head.
    columns: [B, L, …]; zeros follow where chunks do not divide L.
    num_vocab: of the logits that `each` makes.

  Returns:
    The tree of sums [B].
  """
  rows, length = columns[0].shape[:2]
  size = cross_entropy.chunk_length((rows, length), num_vocab)
  num_chunks = -(-length // size)

  def split(x):
    missing = [
      (0, num_chunks * size - length if i == 1 else 0) for i in range(x.ndim)
    ]
    x = jnp.pad(x, missing)
    return jnp.moveaxis(x.reshape(rows, num_chunks, size, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def sums(fixed, *chunk):
    return jax.tree.map(lambda x: x.sum(axis=1), each(fixed, *chunk))

  def step(before, chunk):
    return jax.tree.map(jnp.add, before, sums(fixed, *chunk)), None

  chunks = tuple(map(split, columns))
  shapes = jax.eval_shape(sums, fixed, *(x[0] for x in chunks))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(step, zeros, chunks)[0]


def teaching(
  directory: str, num_vocab: int, measure: Measure, mesh: Any
) -> Callable[[Batch], Batch]:
  """Opens a teacher on a mesh: a batch -> the columns of what it makes of it.

  Raises:
    UserError: there is none, or it has another vocabulary.
  """
  loaded = starts.load(directory, None if mesh.empty else mesh)
  model = loaded.model
  theirs = model.config.vocab_size
  wanted = f'has {theirs} tokens, and the student {num_vocab}'
  require(theirs == num_vocab, 'teacher', directory, wanted)

  @jax.jit
  def columns(params, batch):
    hidden_BLD = hidden_states(model, params, batch)
    logits_BLV = transformer.logits(model.config, params, hidden_BLD)
    return dict(zip(measure.names, measure.columns(logits_BLV), strict=True))

  return functools.partial(columns, loaded.params)
