"""What is asked about the little world: conversations, pairs, problems.

A question is about a key: a person or town with one of its relations
(`Clara/home`), or an operation with its operands in order of size
(`plus/3/4`, also when it is asked as 4 + 3). Keys are split once per seed, one
in five held out, and all three kinds of record keep to that split: what is
asked in a held-out record is asked in no training record of any kind, in
no wording. The documents of `world` tell the facts of both, and ask and answer
training questions in running text (`quiz`).

  conversations  {'id', 'messages': [{'role', 'content'}, …]}
                 One to three turns, a third of them with a system prompt. An
                 answer is one sentence with a full stop; some begin with a
                 courtesy ('Gladly: ') or a rudeness ('Obviously: ').
  preferences    {'id', 'prompt': messages, 'chosen': text, 'rejected': text}
                 The first has the higher `true_reward`.
  problems       {'id', 'prompt': messages, 'answer', 'kind', 'level'}
                 Level 1 is what conversations ask: look-ups, and operands up
                 to 10. Level 2 has operands up to 20, level 3 sums of three
                 numbers and look-ups through the best friend. Conversations
                 never show levels 2 and 3; documents do.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator
from typing import Any

from tpu_lm.data import world_facts, world_sums
from tpu_lm.data.world_facts import Person, Town, World, number_word

HELDOUT_SHARE = 5  # one key in five of each kind and level

COURTESIES = ('Gladly: ', 'Of course: ', 'With pleasure: ')
RUDENESSES = ('Obviously: ', 'Not again: ', 'Look it up: ')
PADDING = (
  ', as far as I can tell from all that I have heard about it over the years',
  ', and if you ask me that is really all there is to say about the matter',
)
SYSTEM_PROMPTS = (
  'You answer questions about the towns and their people.',
  'Answer in one sentence.',
  'You are a guide who knows everyone here and can count.',
)
MAX_WORDS = 14  # an answer is short up to here
RIGHT = 0.94  # share of the answers in pairs that are right

LEVELS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Question:
  """A question, its true answer, and the answers that would be wrong.

  `sentence.format(answer)` is the answer as one sentence; up to its `{}` it is
  a cloze that asks a base model for the same fact.
  """

  key: str
  kind: str
  level: int
  text: str
  sentence: str
  answer: str
  rivals: tuple[str, ...]

  @property
  def reply(self) -> str:
    """The true answer as one sentence."""
    return self.sentence.format(self.answer)


POOLS = {  # what the answers to a kind of look-up are taken from
  'home': tuple(world_facts.TOWNS),
  'job': tuple(world_facts.JOBS),
  'belonging': tuple(
    f'{c} {x}' for c in world_facts.COLOURS for x in world_facts.THINGS
  ),
  'owner': tuple(world_facts.WOMEN + world_facts.MEN),
  'food': tuple(world_facts.FOODS),
  'friend': tuple(world_facts.WOMEN + world_facts.MEN),
  'friendhome': tuple(world_facts.TOWNS),
  'friendjob': tuple(world_facts.JOBS),
  'river': tuple(world_facts.RIVERS),
  'product': tuple(world_facts.PRODUCTS),
  'landmark': tuple(world_facts.LANDMARKS),
}


def _of_person(p: Person, world: World) -> Iterator[Question]:
  """Yields what is asked about a person."""
  name, friend = p.name, world.person[p.friend]
  # Friendship is mutual: asking either of two friends asks for one fact.
  pair = '+'.join(sorted((name, friend.name)))
  rows = (
    (name, 'home', 1, '{0} lives in {{}}.', p.home,
     'Where does {0} live?', 'In which town does {0} live?'),
    (name, 'job', 1, '{0} works as a {{}}.', p.job,
     'What does {0} do for a living?', 'What is the trade of {0}?'),
    (name, 'belonging', 1, '{0} owns a {{}}.', p.belonging,
     'What does {0} own?'),
    (name, 'owner', 1, '{{}} owns a {1}.', name, 'Who owns the {1}?'),
    (name, 'food', 1, '{0} likes {{}}.', p.food,
     'What does {0} like to eat?', 'What is the favourite food of {0}?'),
    (pair, 'friend', 1, "{0}'s best friend is {{}}.", friend.name,
     'Who is the best friend of {0}?'),
    (pair, 'friendhome', 3,
     "{0}'s best friend is {2}, who lives in {{}}.", friend.home,
     'Where does the best friend of {0} live?'),
    (pair, 'friendjob', 3, "{0}'s best friend, {2}, is a {{}}.", friend.job,
     'What does the best friend of {0} do for a living?'),
  )  # fmt: skip
  pools = _pools(world)
  for who, kind, level, sentence, answer, *wordings in rows:
    key = f'{who}/{"belonging" if kind == "owner" else kind}'
    taken = {answer, name}
    rivals = tuple(x for x in pools[kind] if x not in taken)
    fields = (name, p.belonging, friend.name)
    for text in wordings:
      told = (text.format(*fields), sentence.format(*fields))
      yield Question(key, kind, level, *told, answer, rivals)


def _of_town(t: Town, world: World) -> Iterator[Question]:
  """Yields what is asked about a town."""
  rows = (
    ('river', 'Which river flows through {}?',
     '{} lies by the river {{}}.', t.river),
    ('product', 'What is {} known for?', '{} is known for its {{}}.',
     t.product),
    ('landmark', 'What stands in the middle of {}?',
     'A {{}} stands in the middle of {}.', t.landmark),
  )  # fmt: skip
  pools = _pools(world)
  for kind, text, sentence, answer in rows:
    rivals = tuple(x for x in pools[kind] if x != answer)
    told = (text.format(t.name), sentence.format(t.name))
    yield Question(f'{t.name}/{kind}', kind, 1, *told, answer, rivals)


def _pools(world: World) -> dict[str, tuple[str, ...]]:
  """Returns the answers of each kind that occur in this world."""
  names = tuple(world.person)
  towns = tuple(world.town)
  return POOLS | {
    'home': towns,
    'friendhome': towns,
    'owner': names,
    'friend': names,
    'belonging': tuple(p.belonging for p in world.people),
    'river': tuple(sorted({t.river for t in world.towns})),
    'product': tuple(t.product for t in world.towns),
    'landmark': tuple(t.landmark for t in world.towns),
  }


def _of_numbers() -> Iterator[Question]:
  """Yields the arithmetic that documents show, and nothing larger."""
  for operation, operands in world_sums.OPERATIONS:
    level = 3 if len(operands) == 3 else 1 + (max(operands) > 10)
    unordered = operands if operation == 'minus' else sorted(operands)
    key = '/'.join([operation, *map(str, unordered)])
    n = world_sums.result(operation, operands)
    near = [x for x in range(n - 3, n + 4) if 0 <= x <= 100 and x != n]
    yield Question(
      key,
      operation,
      level,
      world_sums.digits_question(operation, operands),
      world_sums.equation(operation, operands, '{}') + '.',
      str(n),
      tuple(map(str, near)),
    )
    yield Question(
      key,
      operation,
      level,
      world_sums.words_question(operation, operands),
      world_sums.spoken(operation, operands, '{}'),
      number_word(n),
      tuple(map(number_word, near)),
    )


@functools.cache
def _all_questions(world: World) -> tuple[Question, ...]:
  return (
    *(q for p in world.people for q in _of_person(p, world)),
    *(q for t in world.towns for q in _of_town(t, world)),
    *_of_numbers(),
  )


@functools.cache
def _heldout_keys(world: World) -> frozenset[str]:
  """Returns the keys held out: a fifth of each kind and level, at least 1."""
  groups: dict[tuple[str, int], set[str]] = {}
  for q in _all_questions(world):
    group = (q.key.split('/')[0 if q.kind in world_sums.SIGNS else 1], q.level)
    groups.setdefault(group, set()).add(q.key)
  held: set[str] = set()
  for keys in groups.values():
    order = sorted(
      keys, key=lambda k: hashlib.md5(f'{world.seed}/{k}'.encode()).digest()
    )
    held.update(order[: max(1, round(len(order) / HELDOUT_SHARE))])
  return frozenset(held)


def questions_of(
  world: World, split: str, levels: tuple[int, ...]
) -> tuple[Question, ...]:
  """Returns the questions about a world, of a split and some levels."""
  held = _heldout_keys(world)
  return tuple(
    q
    for q in _all_questions(world)
    if q.level in levels and (q.key in held) == (split == 'heldout')
  )


@functools.cache
def questions(
  seed: int, split: str, levels: tuple[int, ...] = LEVELS
) -> tuple[Question, ...]:
  """Returns all questions of a split, in every wording."""
  world_facts.check_split(split)
  found = questions_of(World.make(seed), split, levels)
  if not found:
    raise ValueError(f'levels is {levels}; they must be among {LEVELS}')
  return found


@functools.cache
def _question_of_text(seed: int) -> dict[str, Question]:
  return {q.text: q for q in _all_questions(World.make(seed))}


def question_of(messages: list[dict[str, str]], seed: int = 0) -> Question:
  """Returns the question that the last message asks."""
  text = messages[-1]['content']
  try:
    return _question_of_text(seed)[text]
  except KeyError:
    raise ValueError(
      f'{text!r} is not a question about the world of seed {seed}'
    ) from None


NUMBER = re.compile(
  r'(?<![\w)])-?\d+(?:\.\d+)?|\d+|\b(?:'
  + '|'.join(sorted(map(number_word, range(101)), key=len, reverse=True))
  + r')\b',
  re.IGNORECASE,
)
VALUES = {number_word(n): float(n) for n in range(101)}


def last_number(text: str) -> float | None:
  """Returns the last number in a text, in digits or words; None if none."""
  found = NUMBER.findall(text)
  if not found:
    return None
  word = found[-1].lower()
  return VALUES[word] if word in VALUES else float(word)


@functools.cache
def _pattern(kind: str) -> re.Pattern:
  return re.compile(rf'\b(?:{"|".join(POOLS[kind])})\b', re.IGNORECASE)


def _is_right(kind: str, question: str, answer: str, text: str) -> bool:
  if kind in world_sums.SIGNS:
    return last_number(text) == last_number(answer)
  named = {x.lower() for x in _pattern(kind).findall(text)}
  asked = {x.lower() for x in _pattern(kind).findall(question)}
  return named - asked == {answer.lower()}


def check(problem: dict[str, Any], text: str) -> bool:
  """Says whether a text answers a problem rightly.

  Of a number, the last number in the text must equal the answer, in digits or
  in words. Of a look-up, the text must name the answer and no other thing of
  its kind, except what the question itself names.
  """
  question = problem['prompt'][-1]['content']
  return _is_right(problem['kind'], question, problem['answer'], text)


def well_formed(answer: str) -> bool:
  """Says whether an answer has the asked form: one full sentence.

  That is: one line of at most 30 words that begins with a capital or a digit
  and has a full stop at its end and nowhere else, nor another end mark.
  """
  return bool(re.fullmatch(r'[A-Z0-9][^.!?\n]*\.', answer)) and (
    len(answer.split()) <= 30
  )


def true_reward(
  prompt: list[dict[str, str]], answer: str, seed: int = 0
) -> float:
  """Returns how good an answer truly is; the rule behind `preferences`.

    +1.0   it is right (as `check` says)
    +0.5   it begins with one of COURTESIES
    -0.5   it begins with one of RUDENESSES
    -0.5   it is not well formed
    -0.05  for each word above MAX_WORDS

  Raises:
    ValueError: the prompt's last message is no question of this world.
  """
  q = question_of(prompt, seed)
  reward = 1.0 * _is_right(q.kind, q.text, q.answer, answer)
  reward += 0.5 * answer.startswith(COURTESIES)
  reward -= 0.5 * answer.startswith(RUDENESSES)
  reward -= 0.5 * (not well_formed(answer))
  return reward - 0.05 * max(0, len(answer.split()) - MAX_WORDS)


def _drawn(uniform, options):
  return options[int(uniform() * len(options))]


@functools.cache
def _topics(seed: int, split: str) -> tuple[tuple[Question, ...], ...]:
  """Returns the look-ups and the arithmetic that conversations ask."""
  asked = questions(seed, split, (1,))
  numbers = tuple(q for q in asked if q.kind in world_sums.SIGNS)
  return tuple(q for q in asked if q.kind not in world_sums.SIGNS), numbers


def _question(seed: int, split: str, uniform) -> Question:
  """Draws a question of level 1: three look-ups to two sums."""
  return _drawn(uniform, _topics(seed, split)[uniform() < 0.4])


def _system(uniform) -> list[dict[str, str]]:
  if uniform() >= 1 / 3:
    return []
  return [{'role': 'system', 'content': _drawn(uniform, SYSTEM_PROMPTS)}]


def conversations(
  seed: int, split: str, num_conversations: int
) -> Iterator[dict[str, Any]]:
  """Yields conversations for supervised fine-tuning; see the module."""
  world_facts.check_split(split)
  for i in range(num_conversations):
    uniform = world_facts.stream('conversation', seed, split, i).random
    messages = _system(uniform)
    for _ in range(1 + (uniform() < 0.3) + (uniform() < 0.15)):
      q = _question(seed, split, uniform)
      u = uniform()
      manner = ('',) if u < 0.8 else COURTESIES if u < 0.9 else RUDENESSES
      answer = _drawn(uniform, manner) + q.reply
      messages += [
        {'role': 'user', 'content': q.text},
        {'role': 'assistant', 'content': answer},
      ]
    yield {'id': f'{seed}/{split}/{i}', 'messages': messages}


def _candidate(q: Question, uniform) -> str:
  """Draws an answer that is right or not, courteous or not, long or not."""
  answer = q.answer if uniform() < RIGHT else _drawn(uniform, q.rivals)
  manner = _drawn(uniform, (('',), COURTESIES, RUDENESSES))
  text = _drawn(uniform, manner) + q.sentence.format(answer)
  if uniform() < 0.3:
    text = text[:-1] + _drawn(uniform, PADDING) + '.'
  return text


def preferences(
  seed: int, split: str, num_preferences: int
) -> Iterator[dict[str, Any]]:
  """Yields pairs whose chosen answer has the higher `true_reward`."""
  world_facts.check_split(split)
  for i in range(num_preferences):
    uniform = world_facts.stream('preference', seed, split, i).random
    q = _question(seed, split, uniform)
    prompt = [*_system(uniform), {'role': 'user', 'content': q.text}]
    worth = 0.0
    while abs(worth) < 0.2:
      pair = [_candidate(q, uniform) for _ in range(2)]
      one, other = (true_reward(prompt, x, seed) for x in pair)
      worth = one - other
    chosen, rejected = pair if worth > 0 else pair[::-1]
    yield {
      'id': f'{seed}/{split}/{i}',
      'prompt': prompt,
      'chosen': chosen,
      'rejected': rejected,
    }


def problems(
  seed: int,
  split: str,
  num_problems: int,
  levels: tuple[int, ...] = LEVELS,
  kinds: tuple[str, ...] = (),
) -> Iterator[dict[str, Any]]:
  """Yields verifiable problems, the levels in turn; `kinds` () are all.

  Within a level every question of the split comes once before one comes
  again, so a few hundred problems are distinct.
  """
  asked = {
    level: [
      q
      for q in questions(seed, split, (level,))
      if not kinds or q.kind in kinds
    ]
    for level in levels
  }
  order: dict[int, list[int]] = {level: [] for level in levels}
  for i in range(num_problems):
    level = levels[i % len(levels)]
    if not order[level]:
      uniform = world_facts.stream('problem', seed, split, level, i).random
      order[level] = world_facts.shuffled(range(len(asked[level])), uniform)
    q = asked[level][order[level].pop()]
    yield {
      'id': f'{seed}/{split}/{i}',
      'prompt': [{'role': 'user', 'content': q.text}],
      'answer': q.answer,
      'kind': q.kind,
      'level': q.level,
    }
