"""Continuous batching: sequences that end make room while the rest go on.

A fixed number of slots is decoded together. Whenever an eighth of them are
done, their completions are given out and the next prompts are put into them; a
prompt that several sequences share is run once. Three programs do all, of
shapes that are known beforehand, so that nothing is compiled on the way. Where
all sequences have found a slot at once, slots are halved as they become free,
which compiles some programs more, the first time.

The device decodes on while the caller works on what it was given.
"""

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpu_lm.buckets import bucket, room_for
from tpu_lm.generate import cache as caches
from tpu_lm.generate import engine
from tpu_lm.generate.engine import Asked, Completion, Rows, State
from tpu_lm.generate.packed import packed
from tpu_lm.generate.sampler import Sampler
from tpu_lm.models import ring, transformer
from tpu_lm.models.transformer import Transformer

_SEGMENT = 64  # the most tokens of a sequence between two looks at all of them
_SHARE = 8  # of the slots, one in so many is done before they are refilled
_SMALLEST = 16
_FEWEST = 4  # slots, of which none are given up any more


def completed(
  model: Transformer,
  params: Any,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int | Sequence[int],
  sampler: Sampler = Sampler(),  # noqa: B008
  stop_ids: Sequence[int] | Sequence[Sequence[int]] = (),
  seed: int = 0,
  sequence_ids: Sequence[int] | None = None,
  copies: int = 1,
  quantised_cache: bool = False,
  *,
  slots: int = 64,
) -> Iterator[tuple[int, Completion]]:
  """Yields (number of the sequence, completion) as they are done.

  The completions are those of `engine.generate`, whatever `slots` is.

  Args:
    model: and all but the last: see `engine.generate`.
    slots: sequences that are decoded together, rounded up to a power of two.

  Raises:
    UserError: at once, if something cannot be generated.
  """
  if not prompts:
    return iter(())
  sequences = engine.asked(
    model,
    prompts,
    max_new_tokens,
    sampler,
    stop_ids,
    seed,
    sequence_ids,
    copies,
  )
  if len(sequences) > slots:
    pool = _Pool(model, params, sequences, sampler, copies, slots)
    state = pool.empty(quantised_cache)
    return _completed(model, params, state, sampler, pool, 0)
  state = engine.start(
    model,
    params,
    prompts,
    max_new_tokens,
    sampler,
    stop_ids,
    seed,
    sequence_ids,
    copies,
    quantised_cache,
  )
  return _completed(model, params, state, sampler, None, len(sequences))


class _Part(NamedTuple):
  """What has been generated of a sequence."""

  tokens: list[int]
  logps: list[float]
  sampled_logps: list[float]

  def add(self, tokens, logps, sampled_logps) -> None:
    self.tokens.extend(tokens.tolist())
    self.logps.extend(logps.tolist())
    self.sampled_logps.extend(sampled_logps.tolist())

  def completion(self, finished: bool) -> Completion:
    return Completion(self.tokens, self.logps, finished, self.sampled_logps)


def _completed(model, params, state, sampler, pool, num_first):
  """Decodes by segments, and yields what is done after each."""
  num_slots, room = len(state.done_B), state.tokens_TB.shape[0]
  owners: list[int | None] = [None] * num_slots
  owners[:num_first] = range(num_first)
  # Where a slot's newest tokens begin: the first was drawn before the segment.
  begins = [0] * num_slots
  parts: dict[int, _Part] = collections.defaultdict(lambda: _Part([], [], []))
  if pool is not None:
    state = pool.refill(_rewound(state), owners, begins)
  ready = []
  while any(owner is not None for owner in owners):
    wake = max(len(owners) // _SHARE, 1)
    num_done = sum(owner is None for owner in owners) + wake
    state = engine.advance(
      model, params, state, room, sampler, min(num_done, len(owners))
    )
    yield from ready  # while the device decodes
    ready = _taken(state, owners, begins, parts)
    state, begins = _rewound(state), [1] * len(owners)
    if pool is not None:
      state = pool.refill(state, owners, begins)
    elif (chosen := _fewer(state, owners)) is not None:
      weights = state.weights
      state = _shrunk(state._replace(weights=None), chosen)
      state = state._replace(weights=weights)
      owners = [owners[slot] for slot in chosen]
      begins = [1] * len(owners)
  yield from ready


def _fewer(state: State, owners: list) -> np.ndarray | None:
  """The slots that suffice: half, a quarter, … of them.

  None: it takes all, or nothing is under way.

  Of each prompt that is kept once as many must be left.
  """
  groups, slots = 1, state.cache.layers[0]
  if slots.prefix_k is not None:  # whose heads may be part of this axis
    groups = len(slots.prefix_k) * len(owners) // len(slots.k)
  free_PC = np.array([owner is None for owner in owners]).reshape(groups, -1)
  most = max(int((~free_PC).sum(axis=1).max()), -(-_FEWEST // groups))
  if free_PC.all() or 2 * (copies := bucket(most)) > free_PC.shape[1]:
    return None
  # Those under way first.
  chosen_PC = np.argsort(free_PC, axis=1, kind='stable')[:, :copies]
  firsts_P1 = np.arange(groups)[:, None] * free_PC.shape[1]
  return (firsts_P1 + chosen_PC).reshape(-1)


@jax.jit
def _shrunk(state: State, chosen_R) -> State:
  """The state of these slots."""
  count = len(state.done_B)

  def slots_of(x):
    """x [count, …], or [count * heads, …]."""
    rows = x.reshape(count, -1)[chosen_R]
    return rows.reshape(-1, *x.shape[1:])

  def layer(slots: ring.Slots) -> ring.Slots:
    own = slots._replace(prefix_k=None, prefix_v=None)
    return jax.tree.map(slots_of, own)._replace(
      prefix_k=slots.prefix_k, prefix_v=slots.prefix_v
    )

  cache = state.cache._replace(layers=tuple(map(layer, state.cache.layers)))
  if cache.prefix_B is not None:
    cache = cache._replace(prefix_B=cache.prefix_B[chosen_R])
  rows = ('token_B', 'position_B', 'done_B', 'stopped_B', 'count_B')
  columns = ('tokens_TB', 'logps_TB', 'sampled_logps_TB')
  return state._replace(
    cache=cache,
    rows=jax.tree.map(lambda x: x[chosen_R], state.rows),
    **{name: getattr(state, name)[chosen_R] for name in rows},
    **{name: getattr(state, name)[:, chosen_R] for name in columns},
  )


def _rewound(state: State) -> State:
  """Makes room for the tokens of the next segment."""
  count_B = np.zeros(len(state.done_B), np.int32)
  return state._replace(step=np.int32(1), count_B=count_B)


def _taken(state: State, owners: list, begins: list, parts: dict) -> list:
  """Moves what was generated to `parts`; frees the slots of what is done."""
  *columns, count_B, done_B, stopped_B = jax.device_get(
    (
      state.tokens_TB, state.logps_TB, state.sampled_logps_TB,
      state.count_B, state.done_B, state.stopped_B,
    )
  )  # fmt: skip
  ready = []
  for slot, owner in enumerate(owners):
    if owner is None:
      continue
    begin, end = begins[slot], begins[slot] + count_B[slot]
    parts[owner].add(*(x_TB[begin:end, slot] for x_TB in columns))
    if done_B[slot]:
      ready.append((owner, parts.pop(owner).completion(bool(stopped_B[slot]))))
      owners[slot] = None
  return ready


class _Prefilled(NamedTuple):
  """Prompts that have been run, and the sequences that wait for them."""

  kept: Any
  logits_PV: jax.Array
  lengths_P: jax.Array
  waiting: collections.deque  # (sequence, row of the prompt)


class _Pool:
  """Sequences that wait for a slot."""

  def __init__(self, model, params, sequences, sampler, copies, slots):
    self._model, self._params, self._sampler = model, params, sampler
    self._sequences: list[Asked] = sequences
    self._copies, self._next = copies, 0
    self._num_slots = bucket(slots)
    # How many prompts are run at once, and how many slots are filled.
    self._at_once = max(self._num_slots // _SHARE, 1)
    self._num_prompts = bucket(max(self._at_once // copies, 1))
    self._length = bucket(max(len(one.prompt) for one in sequences), _SMALLEST)
    self._num_stops = max(len(one.stop_ids) for one in sequences)
    self._prefilled: _Prefilled | None = None

  def empty(self, quantised_cache: bool) -> State:
    """A state without sequences."""
    most = max(one.most for one in self._sequences)
    longest = max(len(one.prompt) + one.most for one in self._sequences)
    rows = self._rows([], self._num_slots)
    state = _empty(
      rows,
      model=self._model,
      slots=room_for(longest),
      room=min(bucket(most, _SMALLEST), _SEGMENT),
      quantised_cache=quantised_cache,
    )
    weights = packed(self._params, self._num_slots)
    return state._replace(weights=weights)

  def refill(self, state: State, owners: list, begins: list) -> State:
    """Fills slots without an owner, as long as sequences wait."""
    free = [slot for slot, owner in enumerate(owners) if owner is None]
    while free and (self._waits() or self._prefill()):
      waiting = self._prefilled.waiting
      count = min(len(free), len(waiting), self._at_once)
      taken = [waiting.popleft() for _ in range(count)]
      into, free = free[:count], free[count:]
      state = self._insert(state, taken, into)
      for slot, (sequence, _) in zip(into, taken, strict=True):
        owners[slot], begins[slot] = sequence, 0
    return state

  def _rows(self, sequences, num_rows: int) -> Rows:
    return engine.rows_of(
      self._model, sequences, self._sampler, num_rows, self._num_stops
    )

  def _waits(self) -> bool:
    return self._prefilled is not None and bool(self._prefilled.waiting)

  def _prefill(self) -> bool:
    """Runs the next prompts; False: there are none."""
    first = self._next
    end = min(first + self._num_prompts * self._copies, len(self._sequences))
    if first == end:
      self._prefilled = None
      return False
    self._next = end
    prompts = [
      self._sequences[i].prompt for i in range(first, end, self._copies)
    ]
    tokens_PL, lengths_P = engine.padded(
      prompts, self._num_prompts, self._length
    )
    kept, logits_PV = _prefill(
      self._params, tokens_PL, lengths_P, model=self._model
    )
    waiting = collections.deque(
      (i, (i - first) // self._copies) for i in range(first, end)
    )
    self._prefilled = _Prefilled(kept, logits_PV, lengths_P, waiting)
    return True

  def _insert(self, state: State, taken: list, into: list[int]) -> State:
    source_R = np.zeros(self._at_once, np.int32)
    source_R[: len(taken)] = [row for _, row in taken]
    # Rows that go nowhere have a slot beyond the last.
    into_R = np.full(self._at_once, self._num_slots, np.int32)
    into_R[: len(into)] = into
    rows = self._rows([self._sequences[i] for i, _ in taken], self._at_once)
    weights = state.weights
    state = _insert(
      state._replace(weights=None),
      self._prefilled.kept,
      self._prefilled.logits_PV,
      self._prefilled.lengths_P,
      rows,
      source_R,
      into_R,
      model=self._model,
      sampler=self._sampler,
    )
    return state._replace(weights=weights)


@functools.partial(
  jax.jit, static_argnames=('model', 'slots', 'room', 'quantised_cache')
)
def _empty(rows: Rows, *, model, slots, room, quantised_cache) -> State:
  num_rows = len(rows.left_B)
  cache = ring.init_cache(model.config, num_rows, slots, 1, quantised_cache)
  cache = cache._replace(clock=jnp.int32(0))
  return engine.new_state(cache, rows, jnp.zeros(num_rows, jnp.int32), room)


@functools.partial(jax.jit, static_argnames='model')
def _prefill(params, tokens_PL, lengths_P, *, model):
  hidden_PD, kept = engine.prefilled(model, params, tokens_PL, lengths_P)
  return kept, transformer.logits(model.config, params, hidden_PD)


@functools.partial(
  jax.jit, static_argnames=('model', 'sampler'), donate_argnames='state'
)
def _insert(
  state: State,
  kept,
  logits_PV,
  lengths_P,
  new: Rows,
  source_R,
  into_R,
  *,
  model: Transformer,
  sampler: Sampler,
) -> State:
  """Puts R sequences into slots and draws the first token of each."""
  lengths_R, num_new = lengths_P[source_R], len(source_R)
  slot_sizes = [slots.k.shape[-1] for slots in state.cache.layers]
  cache = caches.filled(
    model.config,
    jax.tree.map(lambda x: x[:, source_R], kept),
    lengths_R,
    max(slot_sizes),
    state.cache.clock,
    state.cache.layers[0].k_scale is not None,
  )
  part = engine.new_state(cache, new, lengths_R - 1, state.tokens_TB.shape[0])
  uniform_R2 = engine.random_numbers(new, lengths_R[None], sampler)[0]
  part = engine.extended(part, logits_PV[source_R], uniform_R2, sampler)

  def put(into, values):
    return into.at[into_R].set(values, mode='drop')

  def put_slots(into, values):
    rows = len(state.done_B)
    shape = rows, into.size // rows
    flat = put(into.reshape(shape), values.reshape(num_new, shape[1]))
    return flat.reshape(into.shape)

  layers = jax.tree.map(put_slots, state.cache.layers, cache.layers)
  return state._replace(
    cache=state.cache._replace(layers=layers),
    rows=jax.tree.map(put, state.rows, part.rows),
    **{
      name: put(getattr(state, name), getattr(part, name))
      for name in ('token_B', 'position_B', 'done_B', 'stopped_B', 'count_B')
    },
    **{
      name: getattr(state, name)
      .at[0, into_R]
      .set(getattr(part, name)[0], mode='drop')
      for name in ('tokens_TB', 'logps_TB', 'sampled_logps_TB')
    },
  )
