"""`tpu_lm check`: is a configuration's batch what its author believes?

Shows rows of the first batch, with what is trained and what is masked, where
documents begin and end, and the stop token. Then proves on this very
configuration that loss and gradient do not depend on gradient accumulation,
on the number of devices, or on which documents were packed into one row.
"""

import dataclasses
import pathlib
import sys
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from ml_collections import ConfigDict

from tpu_lm import models, run, sharding, stage, tokenizer, train
from tpu_lm.phases import Phases

LOSS_TOLERANCE = 1e-5  # relative, float32
GRADIENT_TOLERANCE = 1e-4  # of the gradient's norm
_PARTS = (1, 2, 4, 8)


class Colours(NamedTuple):
  trained: str = ''
  masked: str = ''
  special: str = ''
  bold: str = ''
  plain: str = ''

  @classmethod
  def of(cls, out) -> 'Colours':
    if not out.isatty():
      return cls()
    return cls('\033[32m', '\033[2m', '\033[33;1m', '\033[1m', '\033[0m')


def _show_row(row: dict[str, np.ndarray], tokens: Any, paint: Colours) -> str:
  """One row as text: ‹masked›, trained, ⟦special⟧, │ between documents."""
  text, before = [], None
  plain = not paint.plain
  special = set(tokens.special_ids.tolist())
  for t, i in enumerate(row['tokens'].tolist()):
    segment = row['segment_ids'][t]
    if segment == 0:
      break
    if before not in (None, segment):
      text.append(f'{paint.special} │ {paint.plain}')
    # As the loss sees it: the first token of a segment is only read.
    trained = bool(row['loss_mask'][t]) and before == segment
    if i in special:
      piece = f'{paint.special}⟦{tokens.token(i)}⟧{paint.plain}'
      if not trained:
        piece = f'{paint.masked}{piece}{paint.plain}'
    else:
      piece = tokens.decode([i])
    if plain and not trained:
      piece = f'‹{piece}›'
    elif i not in special:
      piece = (paint.trained if trained else paint.masked) + piece + paint.plain
    text.append(piece)
    before = segment
  padding = int((row['segment_ids'] == 0).sum())
  if padding:
    text.append(f'{paint.masked} … {padding} of padding{paint.plain}')
  return ''.join(text)


def show(batch: dict, tokens: Any, rows: int, out: TextIO) -> None:
  """Prints the first rows of a batch, and how much of it is trained."""
  paint = Colours.of(out)
  if paint.plain:
    key = (
      f'{paint.trained}trained{paint.plain} '
      f'{paint.masked}masked{paint.plain} {paint.special}⟦special⟧ '
      f'│ next document{paint.plain}'
    )
  else:
    key = 'trained ‹masked› ⟦special⟧ │ next document'
  print(f'{paint.bold}Rows of the first batch{paint.plain}   {key}', file=out)
  for r in range(min(rows, len(batch['tokens']))):
    row = {name: column[r] for name, column in batch.items()}
    print(f'\n{paint.bold}row {r}{paint.plain}', file=out)
    print(_show_row(row, tokens, paint), file=out)
  segments, mask = batch['segment_ids'], batch['loss_mask']
  same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
  num_trained = int((same & mask[:, 1:]).sum())
  num_documents = sum(len(np.unique(row[row > 0])) for row in segments)
  print(
    f'\n{num_trained:,} of {same.size:,} positions are trained '
    f'({num_trained / same.size:.1%}), {num_documents} documents or pieces in '
    f'{len(segments)} rows, {float((segments == 0).mean()):.1%} padding',
    file=out,
  )


def unpack(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same batch with each segment in a row of its own."""
  rows = []
  for r, segments in enumerate(batch['segment_ids']):
    for segment in np.unique(segments[segments > 0]):
      at = np.flatnonzero(segments == segment)
      row = {name: np.zeros_like(column[r]) for name, column in batch.items()}
      for name, column in batch.items():
        row[name][: len(at)] = column[r][at]
      row['segment_ids'][: len(at)] = 1
      rows.append(row)
  return {name: np.stack([row[name] for row in rows]) for name in batch}


class Result(NamedTuple):
  loss: float
  gradient: Any  # float64 arrays on the host


def gradient_of(
  loss: Any, params: Any, batch: dict, mesh: Any, microbatches: int
) -> Result:
  """Mean loss and gradient of a batch, computed on a mesh."""
  with jax.set_mesh(mesh):
    places = sharding.shardings_of(params, mesh)
    placed = jax.tree.map(jax.device_put, params, places)
    frozen = jax.tree.map(lambda _: None, params)  # nothing is
    grads, mean, _ = jax.jit(
      lambda params, batch: train.summed_gradients(
        loss, params, frozen, batch, jax.random.key(0), microbatches
      )
    )(placed, sharding.put_batch(batch, mesh))
    weight = float(mean.weight)
    host = jax.tree.map(
      lambda g: np.asarray(g, np.float64) / weight, jax.device_get(grads)
    )
    return Result(float(mean.total) / weight, host)


def differences(a: Result, b: Result) -> tuple[float, float]:
  """Relative difference of the losses, and of the gradients by norm."""
  leaves = zip(
    jax.tree.leaves(a.gradient), jax.tree.leaves(b.gradient), strict=True
  )
  apart = sum(float(((x - y) ** 2).sum()) for x, y in leaves) ** 0.5
  size = sum(float((x**2).sum()) for x in jax.tree.leaves(a.gradient)) ** 0.5
  return abs(a.loss - b.loss) / abs(a.loss), apart / size


def _random_params(model: Any) -> Any:
  """Parameters without zeros, so that every gradient path is alive."""
  params = jax.jit(model.init_params)(jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(
    tree,
    [
      jax.device_get(x + 0.02 * jax.random.normal(k, x.shape, x.dtype))
      for x, k in zip(leaves, keys, strict=True)
    ],
  )


def prove(
  loss: Any, params: Any, batch: dict
) -> list[tuple[str, float, float]]:
  """Computes the batch in every way that must not matter.

  Returns:
    (what was varied, difference of the loss, difference of the gradient)
  """
  found = jax.devices()

  def mesh(num_devices: int):
    sizes = dict.fromkeys(sharding.AXES, 1) | {'data': num_devices}
    return sharding.make_mesh(sizes, found[:num_devices])

  plain = gradient_of(loss, params, batch, mesh(1), 1)
  rows = len(batch['tokens'])
  lines = []
  for count in _PARTS[1:]:
    if rows % count:
      continue
    many = gradient_of(loss, params, batch, mesh(1), count)
    lines.append((f'{count} microbatches', *differences(plain, many)))
    if count <= len(found):
      many = gradient_of(loss, params, batch, mesh(count), 1)
      lines.append((f'{count} devices', *differences(plain, many)))
  if {'tokens', 'segment_ids'} <= batch.keys():
    alone = gradient_of(loss, params, unpack(batch), mesh(1), 1)
    lines.append(('documents unpacked', *differences(plain, alone)))
  return lines


def check(config: ConfigDict, workdir: pathlib.Path, rows: int) -> bool:
  """Shows and proves; returns whether every proof held."""
  run.check(config, sharding.make_mesh(config.mesh))
  with Phases(watchdog_seconds=0) as phases:
    folder = run.prepared(config, workdir, phases, print)
  tokens = tokenizer.load(folder)
  model = models.make(
    config.model_name, config.model, tokens.vocab_size, config.data.length
  )
  # The proof is about the arithmetic, so it is done in float32.
  exact = dataclasses.replace(model.config, dtype='float32')
  model = type(model)(exact)
  batch = run.open_rows(config, folder, 'train', model).batch(0)
  print()
  show(batch, tokens, rows, sys.stdout)
  params = _random_params(model)
  loss = stage.make(config.stage_name, model, params, config.stage).loss
  paint = Colours.of(sys.stdout)
  print(
    f'\n{paint.bold}Against one device, one batch, float32{paint.plain}'
    '        loss   gradient'
  )
  held = True
  for what, apart, gradient in prove(loss, params, batch):
    ok = apart <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE
    held &= ok
    verdict = 'the same' if ok else 'DIFFERS'
    print(f'  {what:<28} {verdict:>9} {apart:>10.1e} {gradient:>10.1e}')
  print(
    'loss and gradient do not depend on how the batch is computed'
    if held
    else 'loss or gradient DEPENDS on how the batch is computed'
  )
  return held
