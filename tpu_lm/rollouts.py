"""What a policy answers to prompts, and what that is worth.

A stage that learns from its own answers asks here, in its `prepare`: prompts
of a batch are answered (generate/), answers are scored by host code while the
device goes on (scoring.py), and come back as rows that a loss can read, with
their log-probabilities under the sampler and under the trainer. A row is a
prompt and one or several answers (data/answer_rows.py). Every random number
derives from (seed, step, place in the batch, sample), so that a run that was
killed samples the same again.

Rows of prompts (`data.rows=prompts`) hold no more than numbers for a batch:
`row`, which record of the split, and `step`, both int32 [B].
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpu_lm import advantages, meters, processes, scoring, sharding, stage
from tpu_lm.answered import Answers, Started, gathered, joined
from tpu_lm.data import answer_rows, chat, loader, prompts
from tpu_lm.generate import batching
from tpu_lm.generate.sampler import Sampler
from tpu_lm.phases import Phases

_AT_ONCE = 16  # answers scored at a time
_LOGPS = 'old_logps', 'sampler_logps', 'reference_logps'


class Sampling(NamedTuple):
  """The keys of every stage that samples."""

  reward: str = ''  # what answers are trained for; see scoring.py
  true_reward: str = ''  # logged beside it, never trained for
  group: int = 8  # answers to a prompt
  max_new_tokens: int = 128  # of an answer, its stop token included
  temperature: float = 1.0
  updates: int = 1  # passes over a rollout
  minibatches: int = 1  # updates a pass
  resample: int = 0  # times that groups without variance are replaced (DAPO)
  slots: int = 64  # answers decoded together
  max_gap: float = 0.1  # nats between sampler and trainer, mean; 0: any

  @property
  def num_updates(self) -> int:
    """On a rollout; the first is made by the policy that has answered."""
    return self.updates * self.minibatches

  def check(self) -> None:
    """Refuses what cannot be, by the keys of a stage."""
    for key in (
      'group', 'max_new_tokens', 'updates', 'minibatches', 'slots',
    ):  # fmt: skip
      value = getattr(self, key)
      stage.require(value >= 1, key, value, 'must be at least 1')
    for key in ('resample', 'max_gap'):
      value = getattr(self, key)
      stage.require(value >= 0, key, value, 'must not be negative')
    heat = self.temperature
    stage.require(heat > 0, 'temperature', heat, 'must be above 0')


ONE_ANSWER = Sampling(group=1)


def sampling_of(config: Any) -> Sampling | None:
  """How the stage of a configuration samples; None: it does not."""
  if stage.rows_of(config) != 'prompts':
    return None
  module = stage.find('tpu_lm.stages', config.stage_name, 'stage_name')
  return stage.arguments(module.make, dict(config.stage))['sampling']


class Rollout(NamedTuple):
  """N answers, those to one prompt side by side, in B rows."""

  columns: dict[str, np.ndarray]  # rows of the loss, numpy
  rewards: np.ndarray  # float64 [N], NaN: not judged, and masked
  finished: np.ndarray  # bool [N]: stopped by itself
  figures: dict[str, float]  # of all, for the metrics

  def of_answers(self, values_N: np.ndarray) -> np.ndarray:
    """A number an answer as a column: [B], or [B, G] with several a row."""
    together = len(values_N) // len(self.columns['tokens'])
    return values_N.reshape(-1, together) if together > 1 else values_N

  @property
  def mask_BL(self) -> np.ndarray:
    """Bool: which targets are the answers' tokens."""
    return self.columns['loss_mask'][:, 1:]


class Rollouts:
  """Samples answers of one model to the prompts of one split.

  Args:
    model: the network.
    tokenizer: of it.
    rows: the folder of prepared prompts.
    mesh: on which parameters lie.
    split: of the prompts.
    workdir: rollouts are written there; None: nowhere.
    phases: of the run.
    microbatches: into how many parts a batch is cut for a forward pass.
    scorings: rewards that are there already, by their text; others are added.
  """

  def __init__(
    self,
    model: Any,
    tokenizer: Any,
    rows: pathlib.Path,
    mesh: Any,
    *,
    split: str = 'train',
    workdir: pathlib.Path | None = None,
    phases: Phases | None = None,
    microbatches: int = 1,
    scorings: dict[str, scoring.Scoring] | None = None,
  ):
    self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
    self.template = chat.load('', tokenizer, rows)
    self.stop_ids = (self.template.stop_id, tokenizer.eot_id)
    self.prompts = prompts.Prompts(rows, split)
    self._workdir, self._microbatches = workdir, microbatches
    self._phases = phases or Phases(watchdog_seconds=0)
    self._logps = jax.jit(self._token_logps, static_argnames='temperature')
    self.scorings = {} if scorings is None else scorings

  # What a stage asks for.

  def sample(
    self,
    params: Any,
    batch: dict,
    key: jax.Array,
    how: Sampling,
    scores: bool = True,
    together: int = 1,
  ) -> Rollout:
    """Answers the prompts of a batch, `how.group` times each.

    The columns of the rollout are those of data/answer_rows.py, and
    `sampler_logps` and, if it `scores`, `old_logps` [B, L]. What was not judged
    is not in the mask.

    Args:
      params: of the policy.
      batch: of prompts.
      key: of the step.
      how: the keys of the stage.
      scores: whether `old_logps` are made, and the sampler compared with them;
        else the loss does both, in its one update (policy.Objective).
      together: answers of a row.

    Raises:
      UserError: the sampler is not the trainer's policy (`how.max_gap`), or
        too many answers could not be judged.
    """
    numbers = processes.whole(batch['row'])
    mine = processes.local(params, self.mesh)
    found = self._answered(mine, numbers, key, how)
    for again in range(how.resample if found.scored else 0):
      dead = advantages.equal_groups(_by_group(found.scored.total, how))
      if not dead.any():
        break
      fresh = jax.random.fold_in(key, again)
      drawn = jax.random.randint(fresh, dead.shape, 0, len(self.prompts))
      other = self._answered(mine, np.asarray(drawn)[dead], fresh, how)
      found = found.replaced(other, np.repeat(dead, how.group))
    if together > 1:
      found = found.evened(how.group, together)
    del mine  # before the forward passes: memory
    self._write(int(processes.whole(batch['step'])[0]), found)
    columns = self._columns(found, how, together)
    rewards = np.zeros(len(found.found))
    figures = meters.of_answers(found.found)
    if found.scored:
      rewards = found.scored.total
      answer_rows.keep(columns, ~np.isnan(rewards))
      figures |= meters.of_rewards(found.scored, how.group, how.reward)
    with self._phases('score'):  # begins in any case: `drill` kills here
      if scores:
        columns['old_logps'] = self.logps(params, columns, how)
        figures |= meters.of_gap(columns)
        meters.check_gap(figures, how.max_gap)
    finished = np.array([one.finished for one in found.found])
    return Rollout(columns, rewards, finished, figures)

  def judged(
    self, params: Any, numbers: np.ndarray, key: jax.Array, how: Sampling
  ) -> scoring.Scored:
    """The rewards of `how.group` answers to each of these prompts."""
    mine = processes.local(params, self.mesh)
    return self._answered(mine, numbers, key, how).scored

  def logps(self, params: Any, columns: dict, how: Sampling) -> np.ndarray:
    """Float32 [B, L]: of the targets, at the temperature of the sampling."""
    forward = functools.partial(self._logps, temperature=how.temperature)
    return self.over(forward, params, columns)

  def over(self, function: Callable, params: Any, columns: dict) -> Any:
    """`function(params, rows)` over all rows, a microbatch at a time."""
    size = -(-len(columns['tokens']) // self._microbatches)
    size = -(-size // self._shards) * self._shards
    parts = [
      processes.whole(function(params, self._put(part)))
      for part in _cut(columns, size)
    ]
    count = len(columns['tokens'])
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)

  def batches(
    self, rollout: Rollout, key: jax.Array, how: Sampling
  ) -> Iterator[dict[str, jax.Array]]:
    """The batches of the updates on a rollout, its figures with each.

    With several minibatches each pass has the rows in another order.
    """
    count = len(rollout.columns['tokens'])
    columns = rollout.columns | {
      meters.FIGURE + name: np.full(count, value, np.float32)
      for name, value in rollout.figures.items()
    }
    parts = self._microbatches * self._shards
    size = -(-count // how.minibatches)
    size = -(-size // parts) * parts
    for update in range(how.updates):
      order = np.arange(count)
      if how.minibatches > 1:
        seed = jax.random.bits(jax.random.fold_in(key, update))
        np.random.default_rng(int(seed)).shuffle(order)
      shuffled = {name: column[order] for name, column in columns.items()}
      for part in _cut(shuffled, size):
        yield self._put(part)

  def close(self) -> None:
    """Ends what the rewards have started."""
    for one in self.scorings.values():
      one.close()

  # How it is done.

  @property
  def _shards(self) -> int:
    return sharding.num_batch_shards(self.mesh)

  def _put(self, rows: dict) -> dict:
    return sharding.put_batch(processes.own_rows(rows, self.mesh), self.mesh)

  def _token_logps(self, params, rows, *, temperature):
    return stage.token_logps(self.model, params, rows, temperature)[0]

  def _answered(
    self, mine: tuple[Any, Any], numbers: np.ndarray, key: jax.Array, how
  ) -> Answers:
    """Answers to the records of these numbers, scored as groups finish.

    Each process answers its share of them, and has those of all in the end.

    Args:
      mine: parameters and mesh, of `processes.local`.
      numbers: the same in every process.
      key: of all that is drawn.
      how: the keys of the stage.
    """
    asked = [self.prompts[int(n)] for n in numbers]
    ids = [self.template.prompt(one.messages, one.tools) for one in asked]
    asked = [one for one in asked for _ in range(how.group)]
    seed, span = int(jax.random.bits(key)), processes.span(len(numbers))
    with self._phases('generate'), jax.set_mesh(mine[1]):
      found, started = self._own(mine[0], ids, asked, span, seed, how)
    with self._phases('reward'):
      scored = gathered(started) if started else None
    parts = processes.gathered((found, scored))
    found = [one for part, _ in parts for one in part]
    scored = joined([part for _, part in parts if part])
    ids = [one for one in ids for _ in range(how.group)]
    return Answers(asked, ids, found, scored)

  def _own(
    self, params, ids, asked, span: range, seed: int, how: Sampling
  ) -> tuple[list, list[Started]]:
    """The answers to the prompts of a span, and the scores begun of them."""
    first = span.start * how.group  # of the answers: each draws as if alone
    asked = asked[first : span.stop * how.group]
    completions = batching.completed(
      self.model,
      params,
      ids[span.start : span.stop],
      how.max_new_tokens,
      Sampler(temperature=how.temperature),
      self.stop_ids,
      seed=seed,
      sequence_ids=range(first, first + len(asked)),
      copies=how.group,
      slots=how.slots,
    )
    found: list[Any] = [None] * len(asked)
    missing = np.full(len(span), how.group)
    ready, started = [], []
    for number, one in completions:
      found[number] = one
      missing[number // how.group] -= 1
      if how.reward and not missing[number // how.group]:
        begin = number - number % how.group
        ready += range(begin, begin + how.group)
        if len(ready) >= _AT_ONCE or not missing.any():
          started.append(self._started(ready, asked, found, how))
          ready = []
    return found, started

  def _started(self, numbers, asked, found, how: Sampling) -> Started:
    """Begins to score the answers of these numbers, in other threads."""
    samples = [
      scoring.Sample(
        prompt=asked[i].messages,
        text=self.tokenizer.decode(found[i].tokens),
        record=asked[i].record,
        num_tokens=len(found[i].tokens),
        finished=found[i].finished,
      )
      for i in numbers
    ]
    keys = [key for key in ('reward', 'true_reward') if getattr(how, key)]
    futures = [self._scoring(how, key).start(samples) for key in keys]
    return Started(numbers, futures)

  def _scoring(self, how: Sampling, key: str) -> scoring.Scoring:
    text = getattr(how, key)
    if text not in self.scorings:
      self.scorings[text] = scoring.parse(text, f'stage.{key}')
    return self.scorings[text]

  def _columns(
    self, found: Answers, how: Sampling, together: int
  ) -> dict[str, np.ndarray]:
    answers = [one.tokens for one in found.found]
    columns = answer_rows.rows(
      found.ids,
      answers,
      self.tokenizer.pad_id,
      together,
      how.max_new_tokens,
    )
    sampled = [one.sampled_logps for one in found.found]
    columns['sampler_logps'] = answer_rows.beside(columns, sampled)
    return columns

  def _write(self, step: int, found: Answers) -> None:
    """Writes WORKDIR/rollouts/STEP.jsonl, one answer a line."""
    if self._workdir is None or jax.process_index():
      return
    folder = self._workdir / 'rollouts'
    folder.mkdir(exist_ok=True)
    path = folder / f'{step:08d}.jsonl'
    found.write(path, step, self.tokenizer.decode)


def then(
  sampler: Rollouts | None, how: Sampling, prepare: stage.PrepareFn
) -> stage.PrepareFn:
  """Samples, and prepares each batch of updates; without a sampler, a batch."""
  if sampler is None:
    return prepare

  def sampled(params, batch, key):
    rollout = sampler.sample(params, batch, key, how)
    for part in sampler.batches(rollout, key, how):
      yield from prepare(params, part, key)

  return sampled


def by_answer(
  batch: stage.Batch, logps_BL: jax.Array, mask_BL: jax.Array
) -> tuple[stage.Batch, jax.Array, jax.Array]:
  """(columns, log-probabilities, mask) as policy.py has them: a row an answer.

  Args:
    batch: rows of one or several answers.
    logps_BL: of the targets.
    mask_BL: which are the answers'.
  """
  at_BGA = batch.get('answer_at')
  if at_BGA is None:
    return batch, logps_BL, mask_BL
  at_BX = at_BGA.reshape(len(at_BGA), -1)

  def moved(x_BL):
    x_BX = jnp.take_along_axis(x_BL, at_BX, axis=1)
    return x_BX.reshape(-1, at_BGA.shape[2])

  columns = {name: moved(batch[name]) for name in _LOGPS if name in batch}
  columns['advantages'] = batch['advantages'].reshape(-1)
  return columns, moved(logps_BL), moved(mask_BL)


def numbers(batches: loader.Loader, step: int) -> dict[str, np.ndarray]:
  """What a stage that samples reads of batch `step`; see the module."""
  found = batches.row_numbers(step).astype(np.int32)
  return {'row': found, 'step': np.full_like(found, step + 1)}


def _by_group(rewards: np.ndarray, how: Sampling) -> np.ndarray:
  return rewards.reshape(-1, how.group)


def _cut(columns: dict, size: int) -> Iterator[dict[str, np.ndarray]]:
  """Rows `size` at a time; the last part is filled up with empty rows."""
  count = len(columns['tokens'])
  for first in range(0, count, size):
    part = {k: column[first : first + size] for k, column in columns.items()}
    missing = size - len(part['tokens'])
    if missing:
      # Segment 0 is padding. Figures stay what they are: of all rows.
      part = {
        k: np.pad(
          column,
          [(0, missing)] + [(0, 0)] * (column.ndim - 1),
          'edge' if k.startswith(meters.FIGURE) else 'constant',
        )
        for k, column in part.items()
      }
    yield part
