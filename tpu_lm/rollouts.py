"""What a policy answers to prompts, and what that is worth.

A stage that learns from its own answers asks here, in its `prepare`: prompts
of a batch are answered (generate/), answers are scored by host code while the
device goes on (scoring.py), and come back as rows that a loss can read, with
their log-probabilities under the sampler and under the trainer. A row is one
answer behind its prompt. Every random number derives from (seed, step, place in
the batch, sample), so that a run that was killed samples the same again.

Rows of prompts (`data.rows=prompts`) hold no more than numbers for a batch:
`row`, which record of the split, and `step`, both int32 [B].
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from tpu_lm import advantages, meters, scoring, sharding, stage
from tpu_lm.data import answer_rows, chat, loader, prompts
from tpu_lm.generate import batching, engine
from tpu_lm.generate.sampler import Sampler
from tpu_lm.phases import Phases

_TOGETHER = 16  # answers scored at a time


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

  def check(self) -> None:
    """Refuses what cannot be, by the keys of a stage."""
    for key in (
      'group', 'max_new_tokens', 'updates', 'minibatches', 'slots'
    ):  # fmt: skip
      value = getattr(self, key)
      stage.require(value >= 1, key, value, 'must be at least 1')
    for key in ('resample', 'max_gap'):
      value = getattr(self, key)
      stage.require(value >= 0, key, value, 'must not be negative')
    heat = self.temperature
    stage.require(heat > 0, 'temperature', heat, 'must be above 0')


ONE_ANSWER = Sampling(group=1)


class Rollout(NamedTuple):
  """N answers, those to one prompt side by side."""

  columns: dict[str, np.ndarray]  # rows of the loss, numpy
  rewards: np.ndarray  # float64 [N], NaN: not judged, and masked
  finished: np.ndarray  # bool [N]: stopped by itself
  figures: dict[str, float]  # of all, for the metrics

  @property
  def mask_BL(self) -> np.ndarray:
    """Bool: which targets are the answers' tokens."""
    return self.columns['loss_mask'][:, 1:]


class _Answers(NamedTuple):
  prompts: list[prompts.Prompt]  # one an answer
  ids: list[list[int]]  # of the prompt
  found: list[engine.Completion]
  scored: scoring.Scored | None


class _Started(NamedTuple):
  numbers: list[int]
  futures: list[Any]  # of the reward, and of the true one


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
  ):
    self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
    self.template = chat.load('', tokenizer, rows)
    self.stop_ids = (self.template.stop_id, tokenizer.eot_id)
    self.prompts = prompts.Prompts(rows, split)
    self._workdir, self._microbatches = workdir, microbatches
    self._phases = phases or Phases(watchdog_seconds=0)
    self._logps = jax.jit(self._token_logps, static_argnames='temperature')
    self._scorings: dict[str, scoring.Scoring] = {}

  # What a stage asks for.

  def sample(
    self, params: Any, batch: dict, key: jax.Array, how: Sampling
  ) -> Rollout:
    """Answers the prompts of a batch, `how.group` times each.

    The columns of the rollout are tokens, segment_ids, positions and loss_mask
    [N, L+1], `sampler_logps` and `old_logps` [N, L]. What was not judged is
    not in the mask.

    Raises:
      UserError: the sampler is not the trainer's policy (`how.max_gap`), or
        too many answers could not be judged.
    """
    numbers = np.asarray(jax.device_get(batch['row']))
    found = self._answered(params, numbers, key, how)
    for again in range(how.resample if found.scored else 0):
      dead = advantages.equal_groups(_by_group(found.scored.total, how))
      if not dead.any():
        break
      fresh = jax.random.fold_in(key, again)
      drawn = jax.random.randint(fresh, dead.shape, 0, len(self.prompts))
      other = self._answered(params, np.asarray(drawn)[dead], fresh, how)
      found = _replaced(found, other, np.repeat(dead, how.group))
    columns = self._columns(found)
    with self._phases('score'):
      old = self.logps(params, columns, how)
    columns['old_logps'] = old
    rewards = np.zeros(len(found.found))
    figures = meters.of_answers(found.found)
    if found.scored:
      rewards = found.scored.total
      columns['loss_mask'] &= ~np.isnan(rewards)[:, None]
      figures |= meters.of_rewards(found.scored, how.group, how.reward)
    figures |= meters.of_gap(old, columns, how.max_gap)
    step = int(jax.device_get(batch['step'])[0])
    self._write(step, found)
    finished = np.array([one.finished for one in found.found])
    return Rollout(columns, rewards, finished, figures)

  def judged(
    self, params: Any, numbers: np.ndarray, key: jax.Array, how: Sampling
  ) -> scoring.Scored:
    """The rewards of `how.group` answers to each of these prompts."""
    return self._answered(params, numbers, key, how).scored

  def logps(self, params: Any, columns: dict, how: Sampling) -> np.ndarray:
    """Float32 [N, L]: of the targets, at the temperature of the sampling."""
    forward = functools.partial(self._logps, temperature=how.temperature)
    return self.over(forward, params, columns)

  def over(self, function: Callable, params: Any, columns: dict) -> Any:
    """`function(params, rows)` over all rows, a microbatch at a time."""
    size = -(-len(columns['tokens']) // self._microbatches)
    size = -(-size // self._shards) * self._shards
    parts = [
      jax.device_get(function(params, self._put(part)))
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
    columns = rollout.columns | {
      meters.FIGURE + name: np.full(len(rollout.rewards), value, np.float32)
      for name, value in rollout.figures.items()
    }
    count = len(rollout.rewards)
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
    for one in self._scorings.values():
      one.close()

  # How it is done.

  @property
  def _shards(self) -> int:
    return sharding.num_batch_shards(self.mesh)

  def _put(self, rows: dict) -> dict:
    return sharding.put_batch(rows, self.mesh)

  def _token_logps(self, params, rows, *, temperature):
    return stage.token_logps(self.model, params, rows, temperature)[0]

  def _answered(
    self, params: Any, numbers: np.ndarray, key: jax.Array, how: Sampling
  ) -> _Answers:
    """Answers to the records of these numbers, scored as groups finish."""
    asked = [self.prompts[int(n)] for n in numbers]
    ids = [self.template.prompt(one.messages, one.tools) for one in asked]
    asked = [one for one in asked for _ in range(how.group)]
    with self._phases('generate'):
      completions = batching.completed(
        self.model,
        params,
        ids,
        how.max_new_tokens,
        Sampler(temperature=how.temperature),
        self.stop_ids,
        seed=int(jax.random.bits(key)),
        copies=how.group,
        slots=how.slots,
      )
      found: list[Any] = [None] * len(asked)
      missing = np.full(len(numbers), how.group)
      ready, started = [], []
      for number, one in completions:
        found[number] = one
        missing[number // how.group] -= 1
        if how.reward and not missing[number // how.group]:
          first = number - number % how.group
          ready += range(first, first + how.group)
          if len(ready) >= _TOGETHER or not missing.any():
            started.append(self._started(ready, asked, found, how))
            ready = []
    with self._phases('reward'):
      scored = _gathered(started, len(asked)) if started else None
    return _Answers(
      asked, [one for one in ids for _ in range(how.group)], found, scored
    )

  def _started(self, numbers, asked, found, how: Sampling) -> _Started:
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
    return _Started(numbers, futures)

  def _scoring(self, how: Sampling, key: str) -> scoring.Scoring:
    text = getattr(how, key)
    if text not in self._scorings:
      self._scorings[text] = scoring.parse(text, f'stage.{key}')
    return self._scorings[text]

  def _columns(self, found: _Answers) -> dict[str, np.ndarray]:
    answers = [one.tokens for one in found.found]
    columns = answer_rows.rows(found.ids, answers, self.tokenizer.pad_id)
    sampled = [one.sampled_logps for one in found.found]
    columns['sampler_logps'] = answer_rows.beside(columns, sampled)
    return columns

  def _write(self, step: int, found: _Answers) -> None:
    """Writes WORKDIR/rollouts/STEP.jsonl, one answer a line."""
    if self._workdir is None or jax.process_index():
      return
    folder = self._workdir / 'rollouts'
    folder.mkdir(exist_ok=True)
    path = folder / f'{step:08d}.jsonl'
    partial = path.with_suffix('.tmp')
    with open(partial, 'w', encoding='utf-8') as file:
      for line in self._lines(step, found):
        file.write(json.dumps(line, ensure_ascii=False) + '\n')
    partial.replace(path)

  def _lines(self, step: int, found: _Answers) -> Iterator[dict[str, Any]]:
    scored = found.scored
    for i, one in enumerate(found.found):
      line = {
        'step': step,
        'prompt': found.prompts[i].messages,
        'text': self.tokenizer.decode(one.tokens),
        'tokens': one.tokens,
        'finished': one.finished,
      }
      if scored:
        line['reward'] = _number(scored.total[i])
        line['rewards'] = {k: _number(v[i]) for k, v in scored.values.items()}
        line['notes'] = {k: v[i] for k, v in scored.notes.items() if v[i]}
      yield line


def _gathered(parts: list[_Started], count: int) -> scoring.Scored:
  """Waits for all that has been started; in the order of the answers."""
  found = [part.futures[0].result() for part in parts]
  order = np.argsort(np.concatenate([part.numbers for part in parts]))
  assert len(order) == count

  def joined(get: Callable) -> dict[str, np.ndarray]:
    columns = [get(one) for one in found]
    return {
      name: np.concatenate([column[name] for column in columns])[order]
      for name in columns[0]
    }

  values = joined(lambda one: one.values)
  true = [f.result().total for part in parts for f in part.futures[1:]]
  if true:
    values['true'] = np.concatenate(true)[order]
  return scoring.Scored(
    np.concatenate([one.total for one in found])[order],
    values,
    joined(lambda one: one.parsed),
    {k: v.tolist() for k, v in joined(lambda one: one.notes).items()},
  )


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


def numbers(batches: loader.Loader, step: int) -> dict[str, np.ndarray]:
  """What a stage that samples reads of batch `step`; see the module."""
  found = batches.row_numbers(step).astype(np.int32)
  return {'row': found, 'step': np.full_like(found, step + 1)}


def _number(value: float) -> float | None:
  return None if np.isnan(value) else float(value)


def _by_group(rewards: np.ndarray, how: Sampling) -> np.ndarray:
  return rewards.reshape(-1, how.group)


def _replaced(found: _Answers, other: _Answers, where: np.ndarray) -> _Answers:
  """`found` with the answers of `other` where the mask says."""
  at = np.flatnonzero(where)

  def put(old, new):
    if isinstance(old, np.ndarray):
      old = old.copy()
      old[at] = new
      return old
    mixed = list(old)
    for i, value in zip(at, new, strict=True):
      mixed[i] = value
    return mixed

  def each(old, new):
    return {name: put(old[name], new[name]) for name in old}

  a, b = found.scored, other.scored
  scored = scoring.Scored(
    put(a.total, b.total),
    each(a.values, b.values),
    each(a.parsed, b.parsed),
    each(a.notes, b.notes),
  )
  return _Answers(
    put(found.prompts, other.prompts),
    put(found.ids, other.ids),
    put(found.found, other.found),
    scored,
  )


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
