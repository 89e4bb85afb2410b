"""What a network adds to the loss of whatever stage it is trained by.

A network with experts (models/moe.py) is pulled towards an even load, and
stages know nothing of it. So whoever differentiates a loss collects, while it
is traced, what the network has to add; elsewhere nothing is computed.

Each term is a mean that is not divided yet. `objective` is what to add to a
sum of losses, so that after the division by the sum of their weights it is

  loss + sum of coefficient * mean,

each mean being over the rows of all devices, of one microbatch; the means of
several microbatches count by the weights of their losses. The network must be
applied at the top level of a loss, not within a `jax.jit` or a loop.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tpu_lm import per_device


class Term(NamedTuple):
  """A sum over the rows of this device, and what it is divided by."""

  total: jax.Array  # float32 []
  weight: jax.Array  # float32 []
  coefficient: float  # 0: told, but no part of the objective


_FOUND: contextvars.ContextVar[dict[str, Term] | None]
_FOUND = contextvars.ContextVar('auxiliary', default=None)


@contextlib.contextmanager
def collected() -> Iterator[dict[str, Term]]:
  """Gives the dictionary that `add` fills meanwhile."""
  found = {}
  token = _FOUND.set(found)
  try:
    yield found
  finally:
    _FOUND.reset(token)


def is_collected() -> bool:
  """Whether somebody reads what is added."""
  return _FOUND.get() is not None


def add(name: str, term: Term) -> None:
  """Adds a term, if it is read; terms of one name are one mean."""
  found = _FOUND.get()
  if found is None:
    return
  if name in found:
    total, weight, _ = found[name]
    term = term._replace(total=term.total + total, weight=term.weight + weight)
  found[name] = term


def objective(found: dict[str, Term], weight: jax.Array) -> jax.Array:
  """What to add to the sum of the losses of this device.

  Args:
    found: what was collected.
    weight: the sum of these losses' weights.
  """
  weight = per_device.total(jax.lax.stop_gradient(weight))
  added = jnp.zeros((), jnp.float32)
  for term in found.values():
    if term.coefficient:
      count = per_device.total(jax.lax.stop_gradient(term.weight))
      share = term.coefficient * weight / jnp.maximum(count, 1)
      added += share * term.total
  return added
