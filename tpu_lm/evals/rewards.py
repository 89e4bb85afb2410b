"""What a policy's answers to held-out prompts are worth.

Each prompt is answered once greedily (`exact`, the mean reward) and 8 times at
`stage.temperature`: `reward` is their mean, `pass8` the share of prompts of
which at least one answer has the full reward of 1. What `stage.true_reward`
says of the 8 comes beside it where it is given.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tpu_lm import rollouts, stage

READS_ROWS = False  # but prompts
_PROMPTS = 64  # at a time
_SAMPLES = 8


def figures(
  sampler: rollouts.Rollouts,
  params: Any,
  how: rollouts.Sampling,
  count: int = 0,
  stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
  """The figures of the first `count` prompts (0: all); None: stopped.

  Args:
    sampler: of the prompts.
    params: of its model.
    how: the rewards, temperature and length.
    count: of prompts.
    stop: asked between parts.
  """
  numbers = np.arange(min(count or len(sampler.prompts), len(sampler.prompts)))
  greedy = how._replace(temperature=0.0, group=1)
  how = how._replace(group=_SAMPLES)
  found: dict[str, list[np.ndarray]] = {}
  for first in range(0, len(numbers), _PROMPTS):
    part = numbers[first : first + _PROMPTS]
    key = jax.random.fold_in(jax.random.key(0), first)
    for name, one in (('exact', greedy), ('reward', how)):
      scored = sampler.judged(params, part, key, one)
      rewards = scored.total.reshape(len(part), one.group)
      found.setdefault(name, []).append(np.nanmean(rewards, axis=1))
      if one is how:
        passed = (rewards >= 1).any(axis=1)
        found.setdefault('pass8', []).append(passed)
        if 'true' in scored.values:
          found.setdefault('true_reward', []).append(scored.values['true'])
      if stop():
        return None
  return {k: float(np.nanmean(np.concatenate(v))) for k, v in found.items()}


def make(run: Any, rows: pathlib.Path) -> Callable[[Any], dict | None]:
  """The evaluation that a run does: params -> figures of its held-out rows."""
  how = rollouts.sampling_of(run.config)
  stage.require(how and how.reward, 'reward', '', 'evals=rewards needs one')
  ours = getattr(run, 'sampler', None)
  sampler = rollouts.Rollouts(
    run.model,
    run.tokenizer,
    rows,
    run.mesh,
    split='heldout',
    scorings=ours and ours.scorings,
  )

  def evaluate(params: Any) -> dict[str, float] | None:
    count = run.config.eval_rows
    return figures(sampler, params, how, count, run.stop_evaluation)

  return evaluate
