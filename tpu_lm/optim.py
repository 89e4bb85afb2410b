"""Optimizers by name, their schedules, and which weights decay.

  adamw      Loshchilov and Hutter, arXiv 1711.05101
  adafactor  Shazeer and Stern, arXiv 1804.04235 (no momentum)
  lion       Chen et al., arXiv 2302.06675
  muon       Jordan et al. 2024 for the hidden matrices, with AdamW at
             `rest_learning_rate` for embeddings, head, norms and biases

Weight decay is decoupled and scaled by the learning rate in all four; paths
that match `no_decay` are left out, and so is all that Muon leaves to AdamW.
Gradient clipping is done by the loop, which knows the norm already.

The bias of a router (models/moe.py) has no gradient of the loss, but how much
more than the mean its expert had to do. It moves by `balance_rate` against the
sign of that (arXiv 2408.15664, algorithm 1), and no optimizer sees it.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from tpu_lm import sharding
from tpu_lm.errors import UserError, nearest
from tpu_lm.sharding import path_name

_STEERED = re.compile(r'(^|/)router_bias$')


def _check(options: Any, steps: int) -> None:
  """Refuses values that no optimizer can mean."""
  positive = ('learning_rate', 'eps')
  not_negative = (
    'warmup', 'weight_decay', 'clip', 'rest_learning_rate', 'balance_rate',
  )  # fmt: skip
  shares = ('final', 'decay')
  averages = ('b1', 'b2', 'momentum')
  for key, value in options.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f'optimizer.{key}={value}: must be finite')
    if key in positive and not value > 0:
      raise UserError(f'optimizer.{key}={value}: must be above 0')
    if key in not_negative and not value >= 0:
      raise UserError(f'optimizer.{key}={value}: must not be negative')
    if key in shares and not 0 <= value <= 1:
      raise UserError(f'optimizer.{key}={value}: must lie in 0 to 1')
    if key in averages and not 0 <= value < 1:
      raise UserError(
        f'optimizer.{key}={value}: must be at least 0 and below 1'
      )
  try:
    re.compile(options.no_decay)
  except re.error as error:
    raise UserError(
      f'optimizer.no_decay={options.no_decay!r}: no regular expression '
      f'({error})'
    ) from error
  if options.warmup >= steps > 0:
    raise UserError(
      f'optimizer.warmup={options.warmup}: must be less than steps={steps}'
    )


def make_schedule(options: Any, steps: int, peak: float) -> optax.Schedule:
  """Warm-up from 0 to `peak`, then what `options.schedule` names.

  cosine, linear: down towards `final` times the peak, which the step after the
  last one would have, so that none is wasted on a rate of 0. constant: stays.
  wsd: stays, then falls linearly as far over the last `decay` share of the
  steps (warm-up, stable, decay: arXiv 2404.06395).
  """
  rest = max(steps - options.warmup, 1)
  low = options.final * peak
  fall = min(max(round(options.decay * steps), 1), rest)
  after = {
    'cosine': optax.cosine_decay_schedule(peak, rest, options.final),
    'linear': optax.linear_schedule(peak, low, rest),
    'constant': optax.constant_schedule(peak),
    'wsd': optax.linear_schedule(peak, low, fall, rest - fall),
  }
  if options.schedule not in after:
    raise UserError(
      f'optimizer.schedule={options.schedule!r}: unknown'
      f'{nearest(options.schedule, after)}; there are {", ".join(after)}'
    )
  # Step 1 already moves: the ramp starts at 1 / warmup, not at 0.
  ramp = optax.linear_schedule(
    peak / max(options.warmup, 1), peak, max(options.warmup - 1, 1)
  )
  return optax.join_schedules([ramp, after[options.schedule]], [options.warmup])


def norm(grads: Any) -> jax.Array:
  """The global norm of what is a gradient of the loss."""
  return optax.tree.norm(_cut(grads, False))


def _cut(tree: Any, steered: bool) -> Any:
  """Of a tree the biases of routers, or all but these; None for the others."""

  def kept(path: tuple, leaf: Any) -> Any:
    return leaf if bool(_STEERED.search(path_name(path))) == steered else None

  return jax.tree_util.tree_map_with_path(kept, tree)


def _steering(
  made: optax.GradientTransformation, rate: float
) -> optax.GradientTransformation:
  """`made` for all but the biases of routers; see the module."""

  def init(params):
    return made.init(_cut(params, False))

  def update(grads, state, params):
    rest = _cut(params, False)
    moved, state = made.update(_cut(grads, False), state, rest)
    steered = jax.tree.map(lambda g: -rate * jnp.sign(g), _cut(grads, True))
    # Two trees of one structure; where one has a leaf the other has None.
    updates = jax.tree.map(
      lambda a, b: b if a is None else a,
      moved,
      steered,
      is_leaf=lambda leaf: leaf is None,
    )
    return updates, state

  return optax.GradientTransformation(init, update)


def muon_axes(params: Any) -> Any:
  """For each parameter its matrix axes under Muon, or None for AdamW."""

  def axes(path, leaf):
    name = path_name(path).removesuffix('/base')
    if sharding.EXPERTS.search(name):  # N E: as many matrices
      return contrib.MuonDimensionNumbers((2,), (3,))
    inputs = sharding.num_inputs(name)
    if not inputs:  # LoRA's factors, too: their product is the matrix
      return None
    first = range(1, 1 + inputs)
    return contrib.MuonDimensionNumbers(
      tuple(first), tuple(range(1 + inputs, leaf.ndim))
    )

  return jax.tree_util.tree_map_with_path(axes, params)


def make(
  options: Any, steps: int, updates: int = 1
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Makes the optimizer of the configuration's `optimizer` section.

  Args:
    options: the section; `config.base()` lists its keys.
    steps: for the schedule.
    updates: how many there are in a step; its rate is that of them all.

  Returns:
    (transformation, the learning rate as a function of accepted updates)
  """
  _check(options, steps)

  def rate(peak: float) -> optax.Schedule:
    schedule = make_schedule(options, steps, peak)
    return lambda count: schedule(count // updates)

  schedule = rate(options.learning_rate)
  # '' is found in every path, and means that all decay.
  no_decay = re.compile(options.no_decay or r'(?!)')

  def decays(params):
    def decides(path, leaf):
      del leaf
      name = path_name(path)  # DoRA's magnitudes are norms (weights.py)
      return not (no_decay.search(name) or name.endswith('/m'))

    return jax.tree_util.tree_map_with_path(decides, params)

  b1, b2, eps = options.b1, options.b2, options.eps
  decay = options.weight_decay
  if options.name == 'adamw':
    made = optax.adamw(schedule, b1, b2, eps, weight_decay=decay, mask=decays)
  elif options.name == 'adafactor':
    made = optax.chain(
      optax.adafactor(schedule, multiply_by_parameter_scale=False),
      optax.add_decayed_weights(lambda i: -decay * schedule(i), decays),
    )
  elif options.name == 'lion':
    made = optax.lion(schedule, b1, b2, weight_decay=decay, mask=decays)
  elif options.name == 'muon':
    rest = options.rest_learning_rate or options.learning_rate
    made = contrib.muon(
      schedule,
      beta=options.momentum,
      eps=eps,
      weight_decay=decay,
      weight_decay_mask=decays,
      adam_b1=b1,
      adam_b2=b2,
      adam_learning_rate=rate(rest),
      muon_weight_dimension_numbers=muon_axes,
    )
  else:
    names = ('adamw', 'adafactor', 'lion', 'muon')
    raise UserError(
      f'optimizer.name={options.name!r}: unknown'
      f'{nearest(options.name, names)}; there are {", ".join(names)}'
    )
  return _steering(made, options.balance_rate), schedule
