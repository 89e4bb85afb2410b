"""The stage's own loss and metrics on its held-out rows.

Whatever a stage reports while it trains (pairwise accuracy, margins, rewards,
…) is summed over all held-out rows and divided once. Metrics that are squares
of a calibration and the like come as their stage defines them.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tpu_lm import kept, reading, stage
from tpu_lm.errors import UserError


def totals_of(stage_: stage.Stage) -> Callable:
  """(params, batch, key) -> sums: {'loss': Mean, metric: Mean, …}; jitted."""

  def sums(params, batch, key):
    mean, metrics = stage_.loss(params, batch, key)
    return {'loss': mean} | metrics

  return jax.jit(sums)


def make(run: Any, rows: pathlib.Path) -> Callable[[Any], dict | None]:
  """The evaluation that a run does: params -> figures of its held-out rows."""
  loader, num_batches = reading.heldout(run, rows)
  columns = kept.visited(run, loader, 'heldout', num_batches, lambda _: None)
  totals = totals_of(run.stage)

  def evaluate(params: Any) -> dict[str, float] | None:
    found: dict[str, np.ndarray] = {}
    for step in range(num_batches):
      rows = loader.batch(step) | columns.columns(loader, step)
      batch = run.put(rows)
      for part in run.stage.prepare(params, batch, run.root):
        for name, mean in totals(params, part, run.root).items():
          pair = np.array(jax.device_get(tuple(mean)), np.float64)
          found[name] = found.get(name, 0.0) + pair
      if run.stop_evaluation():
        return None
    return figures(found, run.config.data.source)

  return evaluate


def figures(sums: dict[str, np.ndarray], where: str) -> dict[str, float]:
  """Means of (total, weight) pairs."""
  if not sums['loss'][1]:
    raise UserError(
      f'held-out data of {where}: no target in it; make data.heldout_share '
      'larger, or give a data.heldout_source'
    )
  return {
    name: float(total / weight)
    for name, (total, weight) in sums.items()
    if weight
  }
