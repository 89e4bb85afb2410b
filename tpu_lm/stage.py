"""What a stage of training is: two functions.

A stage (pretrain, sft, reward, dpo, …) is a pure `loss` and a `prepare` that
turns a data batch into the batches that are trained on. The loop knows
nothing else of it. `stages/NAME.py` holds `make(model, params, **hparams)`;
the file name is the registration, and the signature of `make` is the schema
of the `stage.*` keys.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from tpu_lm.errors import UserError, nearest

Params = Any
Batch = dict[str, jax.Array]
Key = jax.Array


class Mean(NamedTuple):
  """A mean that has not been divided yet; sums add up, means do not."""

  total: jax.Array  # float32 [], the sum over what counts
  weight: jax.Array  # float32 [], how much counted


LossFn = Callable[[Params, Batch, Key], tuple[Mean, dict[str, Mean]]]
PrepareFn = Callable[[Params, Batch, Key], Iterable[Batch]]


def as_it_came(params: Params, batch: Batch, key: Key) -> Iterable[Batch]:
  """The default `prepare`: one update on the batch itself."""
  del params, key
  return (batch,)


class Stage(NamedTuple):
  """`loss` is differentiated, jitted and sharded; `prepare` is not."""

  loss: LossFn
  prepare: PrepareFn = as_it_came


def known(package: str) -> list[str]:
  """The names of a package's files: what may be asked for."""
  folder = importlib.import_module(package).__path__
  return sorted(module.name for module in pkgutil.iter_modules(folder))


def find(package: str, name: str, key: str) -> Any:
  """Imports `package.name`, asked for by the configuration key `key`."""
  names = known(package)
  if name not in names:
    raise UserError(
      f'{key}={name!r}: unknown{nearest(name, names)}; there are '
      f'{", ".join(names)}'
    )
  return importlib.import_module(f'{package}.{name}')


def check_hparams(make: Callable, hparams: dict, prefix: str) -> None:
  """Refuses keys and types that the keyword arguments of `make` have not."""
  schema = {
    name: parameter.default
    for name, parameter in inspect.signature(make).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  }
  for name, value in hparams.items():
    if name not in schema:
      raise UserError(
        f'{prefix}.{name}: unknown key{nearest(name, schema)}; there are '
        f'{", ".join(schema) or "none"}'
      )
    wanted = type(schema[name])
    if wanted is float and type(value) is int:
      continue
    if type(value) is not wanted:
      raise UserError(
        f'{prefix}.{name}={value!r}: must be {wanted.__name__}, not '
        f'{type(value).__name__}'
      )


def make(name: str, model: Any, params: Params, hparams: dict) -> Stage:
  """Makes the stage `stages/NAME.py`; `params` are those it starts from."""
  module = find('tpu_lm.stages', name, 'stage_name')
  check_hparams(module.make, hparams, 'stage')
  return module.make(model, params, **hparams)
