"""`tpu_lm check`: is a configuration's batch what its author believes?

Shows rows of the first batch, with what is trained and what is masked, where
documents begin and end, and the stop token; of pairs and ratings each record
by itself, of prompts what else their records hold. Then proves on this very
configuration that loss and gradient do not depend on gradient accumulation, on
the number of devices, or on which documents or records were packed into one
row.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from ml_collections import ConfigDict

from tpu_lm import (
  mistakes,
  models,
  rollouts,
  run,
  sharding,
  stage,
  tokenizer,
  train,
)
from tpu_lm.data import loader as loaders
from tpu_lm.data import prompts
from tpu_lm.data.records import ASKING
from tpu_lm.models.attention import SHARED
from tpu_lm.phases import Phases

LOSS_TOLERANCE = 1e-5  # relative, float32
GRADIENT_TOLERANCE = 1e-4  # of the gradient's norm
_PARTS = (1, 2, 4, 8)
_SHOWN = 100  # characters of a record's field


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


def _prefixes(batch: dict[str, np.ndarray]) -> list[str]:
  """'' of tokens, 'chosen_' of chosen_tokens, and so on."""
  end = 'segment_ids'
  return sorted(n.removesuffix(end) for n in batch if n.endswith(end))


def _of_records(batch: dict[str, np.ndarray]) -> list[str]:
  """Columns [B, S], with an entry for each record of a row."""
  length = batch[f'{_prefixes(batch)[0]}segment_ids'].shape[1] - 1
  return [n for n, x in batch.items() if x.ndim > 1 and x.shape[1] < length]


def _spelled(
  row: dict[str, np.ndarray], prefix: str, tokens: Any, paint: Colours
) -> str:
  """One row as text: ‹masked›, trained, ⟦special⟧, │ between documents.

  Args:
    row: columns of one row.
    prefix: of the columns that are shown.
    tokens: the tokenizer.
    paint: how.
  """
  ids, segments = row[f'{prefix}tokens'], row[f'{prefix}segment_ids']
  # As the loss sees it: the first token of a segment is only read.
  trained = np.append(False, segments[1:] == segments[:-1])
  trained &= row[f'{prefix}loss_mask'].astype(bool)
  text, before = [], None
  held = range(np.count_nonzero(segments))  # padding is at the end
  kinds = itertools.groupby(held, lambda t: (segments[t], trained[t]))
  for (segment, is_trained), run_ in kinds:
    if before not in (None, segment):
      text.append(f'{paint.special} │ {paint.plain}')
    piece = _piece([int(ids[t]) for t in run_], is_trained, tokens, paint)
    text.append(piece if is_trained or paint.plain else f'‹{piece}›')
    before = segment
  return ''.join(text)


def _piece(
  ids: list[int], is_trained: bool, tokens: Any, paint: Colours
) -> str:
  """Tokens that are trained, or tokens that are not, as text."""
  special, pieces = set(tokens.special_ids.tolist()), []
  for is_special, some in itertools.groupby(ids, special.__contains__):
    colour = paint.trained if is_trained else paint.masked
    if not is_special:
      pieces.append(f'{colour}{tokens.decode(some)}{paint.plain}')
      continue
    mark = paint.special if is_trained else paint.masked + paint.special
    pieces += [f'{mark}⟦{tokens.token(i)}⟧{paint.plain}' for i in some]
  return ''.join(pieces)


def _lines(
  batch: dict[str, np.ndarray], r: int, tokens: Any, paint: Colours
) -> Iterator[str]:
  """Row r as it is shown; what is of records, record by record."""
  whole = {name: column[r : r + 1] for name, column in batch.items()}
  numbers, prefixes = _of_records(batch), _prefixes(batch)
  if not numbers:
    row = {name: column[0] for name, column in whole.items()}
    padding = int((row['segment_ids'] == 0).sum())
    more = f'{paint.masked} … {padding} of padding{paint.plain}'
    yield _spelled(row, '', tokens, paint) + (more if padding else '')
    return
  records = unpack(whole)
  for number in range(len(records[numbers[0]])):
    row = {name: column[number] for name, column in records.items()}
    values = ', '.join(f'{n.removesuffix("s")} {row[n][0]:g}' for n in numbers)
    yield f'{paint.bold}record {number + 1}{paint.plain}, {values}'
    for prefix in prefixes:
      name = prefix.rstrip('_') or 'answered'
      text = _spelled(row, prefix, tokens, paint)
      yield f'{paint.bold}{name}{paint.plain}: {text}'


def _known(prompt: prompts.Prompt) -> Iterator[tuple[str, str]]:
  """The fields of a prompt's record that do not ask, in short."""
  said = [message['content'] for message in prompt.messages]
  for name, value in prompt.record.items():
    is_text = isinstance(value, str)
    asks = not is_text or any(value in text for text in said)
    if value is None or (name in ASKING and asks):
      continue
    text = value if is_text else json.dumps(value, ensure_ascii=False)
    text = ' '.join(text.split())
    if len(text) > _SHOWN:  # many an answer stands at the end
      text = f'{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}'
    yield name, text


def prompts_of(batches: loaders.Loader, step: int) -> list[prompts.Prompt]:
  """The prompts of a batch of the training split; none of other rows."""
  if batches.manifest.rows != 'prompts':
    return []
  found = prompts.Prompts(batches.manifest.directory, 'train')
  return [found[number] for number in batches.row_numbers(step)]


def show(
  batch: dict,
  tokens: Any,
  rows: int,
  out: TextIO,
  things: str = 'documents or pieces',
  asked: Sequence[prompts.Prompt] = (),
) -> None:
  """Prints the first rows of a batch, and how much of it is trained.

  Args:
    batch: columns.
    tokens: the tokenizer.
    rows: how many are shown.
    out: where.
    things: what is counted in a row.
    asked: of rows of prompts, the prompt of each row.
  """
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
  prefixes = _prefixes(batch)
  for r in range(min(rows, len(batch[f'{prefixes[0]}tokens']))):
    print(f'\n{paint.bold}row {r}{paint.plain}', file=out)
    for line in _lines(batch, r, tokens, paint):
      print(line, file=out)
    for name, text in _known(asked[r]) if asked else ():
      print(f'{paint.bold}{name}{paint.plain}: {text}', file=out)
  segments = np.stack([batch[f'{p}segment_ids'] for p in prefixes])
  mask = np.stack([batch[f'{p}loss_mask'] for p in prefixes])
  same = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] != 0)
  num_trained = int((same & mask[..., 1:]).sum())
  # Segments count from 1 in each row.
  num_documents = sum(len(np.unique(row[row > 0])) for row in segments[0])
  print(
    f'\n{num_trained:,} of {same.size:,} positions are trained '
    f'({num_trained / same.size:.1%}), {num_documents} {things} in '
    f'{segments.shape[1]} rows, {float((segments == 0).mean()):.1%} padding',
    file=out,
  )
  if asked:
    print('what is trained are the answers to them', file=out)


def unpack(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same batch with each document or record in a row of its own.

  What belongs to its tokens moves with them: columns [B, L or L+1, …], those
  of chosen_ by the segments of chosen_, and so on. Of columns [B, S] entry
  s - 1 of segment s becomes the first; columns [B] are of the whole row. What
  the segments of a row share comes before each of them.
  """
  prefixes, numbers = _prefixes(batch), _of_records(batch)
  rows = []
  for r in range(len(batch[f'{prefixes[0]}segment_ids'])):
    segments = {p: batch[f'{p}segment_ids'][r] for p in prefixes}
    held = np.unique(np.concatenate(list(segments.values())))
    for segment in held[held > 0].tolist():
      row = {name: np.zeros_like(column[r]) for name, column in batch.items()}
      for name, column in batch.items():
        if column.ndim == 1:
          row[name] = column[r]
          continue
        if name in numbers:
          row[name][0] = column[r, segment - 1]
          continue
        mine = [p for p in prefixes if name.startswith(p)] or prefixes
        ids = segments[max(mine, key=len)]
        shared, own = (np.flatnonzero(ids == x) for x in (SHARED, segment))
        at = np.concatenate([shared, own])
        at = at[at < column.shape[1]]
        row[name][: len(at)] = column[r][at]
      for p in prefixes:
        row[f'{p}segment_ids'][row[f'{p}segment_ids'] != 0] = 1
      rows.append(row)
  found = {name: np.stack([row[name] for row in rows]) for name in batch}
  if found.pop('answer_at', None) is not None:  # a row an answer, now
    found |= {name: found[name][:, 0] for name in numbers if name in found}
  return found


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
  # A loss of advantages is 0 or near it, a difference of larger numbers.
  scale = max(abs(a.loss), 0.1)
  return abs(a.loss - b.loss) / scale, apart / max(size, 1e-12)


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


def _mesh(num_devices: int) -> Any:
  sizes = dict.fromkeys(sharding.AXES, 1) | {'data': num_devices}
  return sharding.make_mesh(sizes, jax.devices()[:num_devices])


def prepared(made: stage.Stage, params: Any, batch: dict) -> dict:
  """The first batch that the stage makes of the loader's, on the host."""
  mesh = _mesh(1)
  with jax.set_mesh(mesh):
    places = sharding.shardings_of(params, mesh)
    placed = jax.tree.map(jax.device_put, params, places)
    rows = sharding.put_batch(batch, mesh)
    parts = iter(made.prepare(placed, rows, jax.random.key(0)))
    found = jax.device_get(next(parts))
  given = found.get('advantages')
  if given is not None and not given.any():
    # Answers of random parameters are all as bad: no gradient, no proof.
    draw = np.random.default_rng(0).normal(size=given.shape)
    found['advantages'] = draw.astype(given.dtype)
  return found


def prove(
  loss: Any, params: Any, batch: dict
) -> list[tuple[str, float, float]]:
  """Computes the batch in every way that must not matter.

  Returns:
    (what was varied, difference of the loss, difference of the gradient)
  """
  plain = gradient_of(loss, params, batch, _mesh(1), 1)
  rows = len(next(iter(batch.values())))
  lines = []
  for count in _PARTS[1:]:
    if rows % count:
      continue
    many = gradient_of(loss, params, batch, _mesh(1), count)
    lines.append((f'{count} microbatches', *differences(plain, many)))
    if count <= jax.device_count():
      many = gradient_of(loss, params, batch, _mesh(count), 1)
      lines.append((f'{count} devices', *differences(plain, many)))
  if _prefixes(batch):
    alone = gradient_of(loss, params, unpack(batch), _mesh(1), 1)
    lines.append(('documents unpacked', *differences(plain, alone)))
  return lines


def check(config: ConfigDict, workdir: pathlib.Path, rows: int) -> bool:
  """Shows and proves; returns whether every proof held."""
  mistakes.check(config, sharding.make_mesh(config.mesh))
  with Phases(watchdog_seconds=0) as phases:
    folder = run.prepared(config, workdir, phases, print)
  tokens = tokenizer.load(folder)
  model = models.make(
    config.model_name, config.model, tokens.vocab_size, config.data.length
  )
  # The proof is about the arithmetic, so it is done in float32. How even the
  # load of experts is, is asked of each microbatch, and of all inputs.
  exact = dataclasses.replace(
    model.config,
    dtype='float32',
    balance_loss=0.0,
    router_z_loss=0.0,
    router_bias=False,
  )
  model = type(model)(exact)
  loader = run.open_rows(config, folder, 'train', model)
  batch = loader.batch(0)
  print()
  things = {'text': 'documents or pieces', 'prompts': 'prompts'}
  things = things.get(loader.manifest.rows, 'records')
  show(batch, tokens, rows, sys.stdout, things, prompts_of(loader, 0))
  params = _random_params(model)
  with jax.set_mesh(_mesh(1)):
    sampler = None
    if loader.manifest.rows == 'prompts':
      sampler = rollouts.Rollouts(model, tokens, folder, _mesh(1))
      batch |= rollouts.numbers(loader, 0)
    made = stage.make(
      config.stage_name, model, lambda: params, config.stage, sampler
    )
  batch = prepared(made, params, batch)
  paint = Colours.of(sys.stdout)
  print(
    f'\n{paint.bold}Against one device, one batch, float32{paint.plain}'
    '        loss   gradient'
  )
  held = True
  for what, apart, gradient in prove(made.loss, params, batch):
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
