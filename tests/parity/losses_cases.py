"""Fixed inputs of every loss, and what our stages make of them.

One record a row. A network stands in that gives hidden states which are its
parameters, under an identity head: logits are given, and gradients are those
by the logits. Numbers come from sines, so that they are the same everywhere.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np

from tpu_lm import divergence, stage

ROWS, LENGTH, VOCAB = 4, 9, 7


def waves(shape: tuple[int, ...], start: float, scale: float = 2.0):
  """Float32 numbers of some spread."""
  n = np.arange(np.prod(shape), dtype=np.float64)
  return (scale * np.sin(start + 12.9898 * n)).astype(np.float32).reshape(shape)


def rows(first: int, lengths: list[tuple[int, int]]) -> dict:
  """Rows of a (prompt, completion) each, which begin with the id `first`."""
  shape = (len(lengths), LENGTH + 1)
  slots = np.arange(LENGTH + 1)
  total = np.array([sum(pair) for pair in lengths])[:, None]
  prompt = np.array([pair[0] for pair in lengths])[:, None]
  tokens = np.abs(waves(shape, first, 1e4)).astype(np.int32) % VOCAB
  tokens[:, 0] = first
  present = slots < total
  return {
    'tokens': np.where(present, tokens, 0).astype(np.int32),
    'loss_mask': present & (slots >= prompt),
    'segment_ids': present.astype(np.int32),
    'positions': np.where(present, slots, 0).astype(np.int32),
  }


def prefixed(prefix: str, columns: dict) -> dict:
  return {prefix + name: column for name, column in columns.items()}


# Ragged, and such that TRL's ORPO, which trains prompts too, agrees with ours.
RAGGED = [(2, 5), (1, 3), (3, 6), (2, 1)], [(2, 2), (1, 7), (3, 4), (2, 3)]
EVEN = [(1, 5)] * ROWS, [(1, 5)] * ROWS


def pairs(lengths=RAGGED) -> dict:
  return (
    prefixed('chosen_', rows(1, lengths[0]))
    | prefixed('rejected_', rows(2, lengths[1]))
    | {'margins': np.zeros((ROWS, 1), np.float32)}
  )


def references(names: tuple[str, str], spread: float = 3.0) -> dict:
  """Of the size of sums over a few tokens."""
  return {
    name: -8 + waves((ROWS, 1), 5.0 + i, spread) for i, name in enumerate(names)
  }


PAIR = ('reference_chosen_logps', 'reference_rejected_logps')
RATED = ('reference_logps', 'reference_mismatched_logps')
RAW_TEACHER = waves((ROWS, LENGTH, VOCAB), 4.2)


def _pair_case(stage_name: str, hparams: dict, lengths=RAGGED, columns=None):
  batch = pairs(lengths) | (columns or {})
  logits = waves((2 * ROWS, LENGTH, VOCAB), 3.0)
  return stage_name, hparams, batch, {'hidden': logits}


def _dpo(hparams: dict, zero: bool = False):
  columns = references(PAIR)
  if zero:
    columns = {name: 0 * column for name, column in columns.items()}
  return _pair_case('dpo', hparams, columns=columns)


def _reward(hparams: dict, margins: bool):
  columns = {'margins': np.abs(waves((ROWS, 1), 2.0)) * margins}
  name, hparams, batch, _ = _pair_case('reward', hparams, columns=columns)
  values = waves((2 * ROWS, LENGTH, 1), 4.0)
  return name, hparams, batch, {'hidden': values, 'scalar_head': np.ones(1)}


def _kto(hparams: dict, sign: float):
  columns = references(RATED)
  columns[RATED[1]] = columns[RATED[1]] - 30 * sign  # of z, before its max
  batch = rows(1, RAGGED[0]) | prefixed('mismatched_', rows(2, RAGGED[1]))
  batch |= {'scores': np.array([[1.0], [0.0], [1.0], [0.0]], np.float32)}
  logits = waves((ROWS, LENGTH, VOCAB), 3.0)
  params = {'hidden': logits, 'mismatched': waves(logits.shape, 7.0)}
  return 'kto', hparams, batch | columns, params


def _distill(hparams: dict):
  hparams = {'teacher': 'unread', 'alpha': 1.0, 'top_k': VOCAB - 1} | hparams
  given = divergence.Measure(
    'gjsd', 0.5, hparams.get('temperature', 1.0), VOCAB - 1
  )
  columns = dict(
    zip(given.names, given.columns(jnp.asarray(RAW_TEACHER)), strict=True)
  )
  columns = {name: np.asarray(column) for name, column in columns.items()}
  logits = waves((ROWS, LENGTH, VOCAB), 3.0)
  return 'distill', hparams, rows(1, RAGGED[0]) | columns, {'hidden': logits}


def cases() -> dict[str, tuple[str, dict, dict, dict]]:
  """name -> (stage, hyper-parameters, prepared batch, parameters)."""
  smooth = {'label_smoothing': 0.1, 'beta': 0.3}
  normal = {'length_normalised': True}
  return {
    'sft': (
      'sft', {}, rows(1, RAGGED[0]),
      {'hidden': waves((ROWS, LENGTH, VOCAB), 3.0)},
    ),
    'reward': _reward({}, margins=False),
    'reward_margin_centring': _reward({'centring': 0.05}, margins=True),
    'dpo_sigmoid': _dpo({'beta': 0.3}),
    'dpo_sigmoid_smoothed': _dpo(smooth, zero=True),
    'dpo_sigmoid_normalised': _dpo({'beta': 0.3} | normal),
    'dpo_robust': _dpo(smooth | {'loss_type': 'robust'}),
    'dpo_hinge': _dpo({'beta': 0.3, 'loss_type': 'hinge'}),
    'dpo_ipo': _dpo({'beta': 0.3, 'loss_type': 'ipo'}),
    'dpo_ipo_normalised': _dpo({'beta': 0.3, 'loss_type': 'ipo'} | normal),
    'simpo': _pair_case('simpo', {'beta': 2.0, 'gamma': 0.7}),
    'orpo': _pair_case('orpo', {'weight': 0.4}),
    'orpo_even': _pair_case('orpo', {'weight': 0.4}, EVEN),
    'kto': _kto(
      {'beta': 0.1, 'desirable_weight': 1.3, 'undesirable_weight': 0.8}, 1.0
    ),
    'kto_clamped': _kto({'beta': 0.1}, -1.0),
    'forward_kl': _distill({'divergence': 'forward_kl'}),
    'reverse_kl': _distill({'divergence': 'reverse_kl'}),
    'gjsd': _distill({'divergence': 'gjsd', 'beta': 0.5}),
    'gjsd_small': _distill({'divergence': 'gjsd', 'beta': 0.1}),
    'gjsd_large': _distill({'divergence': 'gjsd', 'beta': 0.9}),
    'gjsd_warm': _distill({'divergence': 'gjsd', 'temperature': 2.0}),
  }  # fmt: skip


class Given:
  """A network whose hidden states are parameters."""

  def __init__(self):
    self.config = types.SimpleNamespace(
      vocab_size=VOCAB, logit_soft_cap=0.0, loss_chunk=0, scalar_head=True
    )

  def apply(self, variables, tokens_BL, positions_BL, segment_ids_BL, **_):
    params = variables['params']
    if 'mismatched' not in params:
      return params['hidden']
    mine = (tokens_BL[:, 0] == 1)[:, None, None]
    return jnp.where(mine, params['hidden'], params['mismatched'])


def ours(name: str) -> tuple[float, np.ndarray]:
  """Our loss of a case, and its gradient by the logits (or the rewards)."""
  stage_name, hparams, batch, params = cases()[name]
  made = stage.make(stage_name, Given(), lambda: None, hparams)
  params = jax.tree.map(jnp.asarray, params) | {'embedding': jnp.eye(VOCAB)}
  (batch,) = made.prepare(params, batch, jax.random.key(0))

  def value(hidden):
    mean, _ = made.loss(params | {'hidden': hidden}, batch, None)
    return mean.total / mean.weight

  with jax.default_matmul_precision('highest'):
    loss, gradient = jax.jit(jax.value_and_grad(value))(params['hidden'])
  return float(loss), np.asarray(gradient)
