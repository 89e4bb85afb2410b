"""What a stage of training is: two functions.

A stage (pretrain, sft, reward, dpo, …) is a pure `loss` and a `prepare` that
turns a data batch into the batches that are trained on. The loop knows
nothing else of it. `stages/NAME.py` holds `make(model, start, **hparams)`;
the file name is the registration, and the signature of `make` is the schema
of the `stage.*` keys. Its `ROWS` names the kinds of prepared rows that it
trains on (data/prepare.py), the default first.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpu_lm import cross_entropy
from tpu_lm.errors import UserError, nearest
from tpu_lm.models import transformer

Params = Any
Batch = dict[str, jax.Array]
Key = jax.Array


class Mean(NamedTuple):
  """A mean that has not been divided yet; sums add up, means do not."""

  total: jax.Array  # float32 [], the sum over what counts
  weight: jax.Array  # float32 [], how much counted


LossFn = Callable[[Params, Batch, Key], tuple[Mean, dict[str, Mean]]]
PrepareFn = Callable[[Params, Batch, Key], Iterable[Batch]]


def any_metrics(metrics: dict[str, float]) -> None:
  """The default `watch`."""


def as_it_came(params: Params, batch: Batch, key: Key) -> Iterable[Batch]:
  """The default `prepare`: one update on the batch itself."""
  del params, key
  return (batch,)


class Stage(NamedTuple):
  """`loss` is differentiated, jitted and sharded; `prepare` is not.

  `kept` names columns that `prepare` adds and that depend on the row alone
  (a reference's log-probabilities, a teacher's logits). A run computes them
  once for every row it visits, keeps them, and gives them with the batch;
  `prepare` then returns the batch as it came.

  `watch` sees the metrics of each step, before a checkpoint has that step;
  it ends a run by a UserError.
  """

  loss: LossFn
  prepare: PrepareFn = as_it_came
  kept: tuple[str, ...] = ()
  watch: Callable[[dict[str, float]], None] = any_metrics


def adding(
  names: tuple[str, ...], columns: Callable[[Batch], Batch]
) -> PrepareFn:
  """A `prepare` that adds the columns `names`, unless the batch has them."""

  def prepare(params, batch, key):
    del params, key
    if all(name in batch for name in names):
      return (batch,)
    return (batch | columns(batch),)

  return prepare


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


def _keywords(make: Callable) -> dict[str, Any]:
  """The keyword arguments of `make`, with their defaults."""
  return {
    name: parameter.default
    for name, parameter in inspect.signature(make).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  }


def arguments(make: Callable, hparams: dict) -> dict[str, Any]:
  """What `make` is called with: keys of a tuple go into the tuple.

  Tuples come whole, filled up with the defaults of `make`.
  """
  given = {}
  for name, default in _keywords(make).items():
    if hasattr(default, '_fields'):
      own = {key: hparams[key] for key in default._fields if key in hparams}
      given[name] = default._replace(**own)
    elif name in hparams:
      given[name] = hparams[name]
  return given


def check_hparams(make: Callable, hparams: dict, prefix: str) -> None:
  """Refuses keys and types that the keyword arguments of `make` have not.

  A NamedTuple among their defaults stands for its fields.
  """
  schema = {}
  for name, default in _keywords(make).items():
    many = hasattr(default, '_fields')
    schema |= default._asdict() if many else {name: default}
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


def make(
  name: str,
  model: Any,
  start: Callable[[], Params],
  hparams: dict,
  sampler: Any = None,
) -> Stage:
  """Makes the stage `stages/NAME.py`.

  Args:
    name: of the file.
    model: the network.
    start: returns the parameters that the stage starts from. They may be
      kept; only stages with a reference call it, since it may cost a copy.
    hparams: the section `stage` of the configuration.
    sampler: a `rollouts.Rollouts`, for a stage whose `make` takes it third.
  """
  module = find('tpu_lm.stages', name, 'stage_name')
  check_hparams(module.make, hparams, 'stage')
  given = arguments(module.make, hparams)
  if takes(name, 'sampler'):
    return module.make(model, start, sampler, **given)
  return module.make(model, start, **given)


def rows_of(config: Any) -> str:
  """The kind of prepared rows that a configuration trains on."""
  kinds = find('tpu_lm.stages', config.stage_name, 'stage_name').ROWS
  chosen = config.data.rows or kinds[0]
  if chosen not in kinds:
    raise UserError(
      f'data.rows={chosen}: stage_name={config.stage_name} trains on '
      f'{" or ".join(kinds)}{nearest(chosen, kinds)}'
    )
  return chosen


def takes(name: str, hparam: str) -> bool:
  """Whether the stage has a hyper-parameter of this name."""
  module = find('tpu_lm.stages', name, 'stage_name')
  return hparam in inspect.signature(module.make).parameters


def require(ok: bool, key: str, value: Any, wanted: str) -> None:
  """Refuses a hyper-parameter that cannot be, unless it is `ok`."""
  if not ok:
    raise UserError(f'stage.{key}={value!r}: {wanted}')


# What several losses share. `rows` are columns [B, L+1] of packed segments:
# tokens, loss_mask, segment_ids and positions.


def target_weights(rows: Batch) -> jax.Array:
  """Float32 [B, L]: 1 where the next token is a target, else 0.

  A target counts where `loss_mask` says so and the token before it belongs to
  the same segment; segment 0 is padding.
  """
  segments = rows['segment_ids']
  same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
  return (same & rows['loss_mask'][:, 1:]).astype(jnp.float32)


def hidden_states(model: Any, params: Params, rows: Batch) -> jax.Array:
  """[B, L, D]: what the network makes of all slots but the last."""
  return model.apply(
    {'params': params},
    rows['tokens'][:, :-1],
    rows['positions'][:, :-1],
    rows['segment_ids'][:, :-1],
    shares='answer_at' in rows,  # data/answer_rows.py
  )


def token_logps(
  model: Any,
  params: Params,
  rows: Batch,
  temperature: float = 1.0,
  hidden_BLD: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities of the targets, in nats, and which of them count.

  Args:
    model: the network.
    params: its parameters.
    rows: columns, as above.
    temperature: of the softmax.
    hidden_BLD: what `hidden_states` gives, where that is known already.

  Returns:
    (logps_BL, weights_BL), float32; both 0 where there is no target.
  """
  weights_BL = target_weights(rows)
  if hidden_BLD is None:
    hidden_BLD = hidden_states(model, params, rows)
  logps_BL = cross_entropy.token_logps(
    *transformer.read_by_head(params, hidden_BLD),
    rows['tokens'][:, 1:],
    mask_BL=weights_BL > 0,
    soft_cap=model.config.logit_soft_cap,
    temperature=temperature,
    chunk=model.config.loss_chunk,
  )
  return logps_BL, weights_BL


def segment_sums(
  values_BL: jax.Array, segment_ids_BL: jax.Array, num_segments: int
) -> jax.Array:
  """[B, S]: the sums of `values_BL` over segments 1 to S of each row."""
  one_hot_BLS = segment_ids_BL[..., None] == jnp.arange(1, num_segments + 1)
  # Not a matmul: TPUs would round its operands to bfloat16.
  return jnp.where(one_hot_BLS, values_BL[..., None], 0).sum(axis=1)


def sequence_logps(
  model: Any, params: Params, rows: Batch, num_segments: int
) -> tuple[jax.Array, jax.Array]:
  """Per segment: the log-probability of all its targets, and their number.

  Returns:
    (logps_BS, counts_BS), float32; a slot without targets has 0 and 0.
  """
  logps_BL, weights_BL = token_logps(model, params, rows)
  segments_BL = rows['segment_ids'][:, 1:]
  return (
    segment_sums(logps_BL, segments_BL, num_segments),
    segment_sums(weights_BL, segments_BL, num_segments),
  )
