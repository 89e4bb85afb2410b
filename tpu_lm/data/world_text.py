"""The documents of the little world: what is told in which order.

Each kind of document is a method of `Tale` that makes its choices through a
`Teller`. No text has two derivations: the tests hold `derivations` to one.
"""

import functools

from tpu_lm.data import world_forms, world_sums, world_tasks
from tpu_lm.data.world_facts import Person, Town, World
from tpu_lm.data.world_grammar import Choice, Teller, Template, more

SUBJECTS = ('S', 's', 'Ss', 'o')  # forms of P
Scene = dict[str, str]  # what is bound, by slot: {'P': 'Clara', 'P.home': …}

KINDS = {  # weight of each kind of document
  'portrait': 11,
  'town': 5,
  'story': 9,
  'letter': 8,
  'news': 24,
  'ledger': 20,
  'questions': 6,
  'quiz': 14,
  'arithmetic': 12,
}
PORTRAIT_ENDS = Choice([False, True])
FACT_OR_HABIT = Choice([True, False])
FACT_OR_EVENT = Choice([True, False], [1, 1])
ANY_FACT = Choice(list(world_forms.PERSON_FACTS.values()))
WITH_HEAD = Choice([True, False], [2, 3])
LIST_MARKS = Choice(['', '{}. ', '- '], [3, 2, 1])
QUESTION_OR_SUM = Choice([True, False], [5, 1])
FACT_OR_SUM = Choice([True, False], [2, 1])
# Before a question and before its answer; None: the names of two people.
QUIZ_MARKS = Choice(
  [('', ' '), ('Q: ', '\nA: '), ('user\n', '\nassistant\n'), None],
  [1, 1, 3, 2],
)
EQUATIONS, SPOKEN, *_questions = (
  Choice([told(*x) for x in world_sums.OPERATIONS], world_sums.WEIGHTS)
  for told in (
    world_sums.equation,
    world_sums.spoken,
    world_sums.digits_question,
    world_sums.words_question,
  )
)
SUM_QUESTIONS = Choice(
  [x for choice in _questions for x in choice.options],
  world_sums.WEIGHTS * len(_questions),
)
COUNTING = Template.parse('{P} had ')
GIFT = Template.parse(' and gave {Q} ')
BOTH = Template.parse(' and {Q} had ')
AMOUNTS = [None] + [
  Choice([str(n) for n in range(1, most + 1)]) for most in range(1, 11)
]
OWNED = Choice([str(n) for n in range(2, 11)])
COUNTED = Choice(world_sums.COUNTABLES)
GIVEN = Choice([True, False])


def person_scene(slot: str, p: Person, friend: Person) -> Scene:
  """Binds a person to a slot, and the pronouns where the slot is P."""
  fields = {
    'home': p.home,
    'job': p.job,
    'does': p.does,
    'colour': p.colour,
    'thing': p.thing,
    'food': p.food,
    'friend': p.friend,
    'friendhome': friend.home,
    'friendjob': friend.job,
  }
  scene = {slot: p.name} | {f'{slot}.{k}': v for k, v in fields.items()}
  if slot == 'P':
    pronouns = ('she', 'her', 'her') if p.woman else ('he', 'him', 'his')
    scene |= dict(zip(('he', 'him', 'his'), pronouns, strict=True))
    scene |= {'He': scene['he'].capitalize()}
  return scene


def named(scene: Scene) -> Scene:
  """Subject, possessive and object of P by name."""
  name = scene['P']
  own = name + "'s"
  return {'S': name, 's': name, 'Ss': own, 'ss': own, 'o': name}


def pronouned(scene: Scene) -> Scene:
  """Subject, possessive and object of P by pronoun."""
  he, his = scene['he'], scene['his']
  upper = {'S': he.capitalize(), 'Ss': his.capitalize()}
  return upper | {'s': he, 'ss': his, 'o': scene['him']}


class Tale:
  """The grammar of the documents about one world.

  `tell(teller)` tells one document. Its methods tell one of each kind.
  """

  def __init__(
    self,
    world: World,
    plain_slots: dict[str, list[str]] = world_forms.PLAIN_SLOTS,
  ):
    self.world = world
    self._foods = plain_slots['F']
    friend = {p.name: world.person[p.friend] for p in world.people}
    self._person = {
      slot: {
        p.name: person_scene(slot, p, friend[p.name]) for p in world.people
      }
      for slot in 'PQRIV'
    }
    self._towns = {t.name: self._town_scene(t) for t in world.towns}
    self._plain = {
      slot: Choice([{slot: x} for x in options])
      for slot, options in plain_slots.items()
    }
    self._named = {
      name: scene | named(scene) for name, scene in self._person['P'].items()
    }
    self._pronouned = {
      name: scene | pronouned(scene)
      for name, scene in self._person['P'].items()
    }
    self._kind = Choice(
      [getattr(self, kind) for kind in KINDS], list(KINDS.values())
    )
    self._speakers = Choice([p.name for p in world.people])
    asked = [
      q
      for q in world_tasks.questions_of(world, 'train', (1, 3))
      if q.level == 1 or q.kind in world_sums.SIGNS
    ]
    self._replies = {q.text: q.reply for q in asked}
    self._quiz_facts, self._quiz_sums = (
      Choice([q.text for q in asked if (q.kind in world_sums.SIGNS) == is_sum])
      for is_sum in (False, True)
    )
    self._arithmetic = Choice(
      [self._equations, self._spoken, self._countings], [3, 3, 2]
    )
    self._subjects: dict[str, Choice] = {}
    self._free = functools.cache(self._free)
    self._left = functools.cache(Choice)

  @staticmethod
  def _town_scene(t: Town) -> Scene:
    return {
      'T': t.name,
      'T.river': t.river,
      'T.product': t.product,
      'T.landmark': t.landmark,
    }

  def _free(self, slot: str, *bound: str | None) -> Choice:
    """Returns the scenes that a free slot may bind, given what is bound."""
    world = self.world
    if slot == 'T':
      away = [p.home for p in world.people if p.name == bound[0]]
      towns = [t for t in world.towns if t.name not in away]
      scenes = [self._towns[t.name] for t in towns]
      return Choice(scenes, [t.fame for t in towns])
    if slot == 'G':
      return Choice([{'G': x} for x in self._foods if x != bound[0]])
    scenes = (self._named if slot == 'P' else self._person[slot]).items()
    if slot in 'IV':
      local = {p.name for p in world.people if p.home == bound[0]}
      left = [(p, s) for p, s in scenes if (p in local) == (slot == 'I')]
    else:
      left = [(p, s) for p, s in scenes if p not in bound]
    return Choice([s for _, s in left], [world.person[p].fame for p, _ in left])

  def _binding(self, teller: Teller, slot: str, scene: Scene) -> Scene:
    """Draws a free slot."""
    if slot in self._plain:
      return teller.choose(self._plain[slot])
    get = scene.get
    slot = 'P' if slot in SUBJECTS else slot
    if slot in 'PQR':
      choice = self._free(slot, get('P'), get('Q'), get('R'))
    else:
      choice = self._free(slot, get({'T': 'P', 'G': 'F'}.get(slot, 'T')))
    return teller.choose(choice)

  def fill(self, teller: Teller, template: Template, scene: Scene) -> Scene:
    """Writes a template; returns a new scene, with what it has bound."""
    scene = scene.copy()
    write = teller.write
    for literal, slot, base in template.pieces:
      if literal:
        write(literal)
      if slot:
        if slot not in scene:
          scene.update(self._binding(teller, base, scene))
        write(scene[slot])
    return scene

  def say(self, teller: Teller, choice: Choice, scene: Scene) -> Scene:
    """Chooses a template and writes it; returns as `fill` does."""
    return self.fill(teller, teller.choose(choice), scene)

  def bind(self, teller: Teller, scene: Scene, slots: str) -> Scene:
    """Returns the scene with free slots drawn, for the rest of a document."""
    for slot in slots:
      scene = scene | self._binding(teller, slot, scene)
    return scene

  def tell(self, teller: Teller) -> None:
    """Tells one document of any kind."""
    teller.choose(self._kind)(teller)

  def portrait(self, teller: Teller) -> None:
    """Two or three people, a paragraph each: facts in any order, habits."""
    first = self.bind(teller, {}, 'P')['P']
    self._paragraph(teller, first)
    second = teller.choose(self._free('P', first))['P']
    teller.write('\n\n')
    self._paragraph(teller, second)
    if teller.choose(PORTRAIT_ENDS):
      third = teller.choose(self._free('P', first, second))['P']
      teller.write('\n\n')
      self._paragraph(teller, third)

  def _paragraph(self, teller: Teller, name: str) -> None:
    left = tuple(world_forms.PERSON_FACTS)
    told = 0
    while more(teller, told, 3, 5):
      if told == 0:
        scene = self._named[name]
      else:
        teller.write(' ')
        scene = teller.choose(self._subject(name))
      if teller.choose(FACT_OR_HABIT):
        fact = teller.choose(self._left(left))
        left = tuple(x for x in left if x != fact)
        self.say(teller, world_forms.PERSON_FACTS[fact], scene)
      else:
        self.say(teller, world_forms.HABITS, scene)
      told += 1

  def _subject(self, name: str) -> Choice:
    if name not in self._subjects:
      scenes = [self._pronouned[name], self._named[name]]
      self._subjects[name] = Choice(scenes, [4, 1])
    return self._subjects[name]

  def town(self, teller: Teller) -> None:
    """What is to be seen in a town, then who lives there and who came."""
    scene = self.bind(teller, {}, 'T')
    left = tuple(world_forms.TOWN_FACTS)
    for told in range(2):
      if told:
        teller.write(' ')
      fact = teller.choose(self._left(left))
      left = tuple(x for x in left if x != fact)
      self.say(teller, world_forms.TOWN_FACTS[fact], scene)
    told = 0
    while more(teller, told, 4, 9):
      teller.write(' ')
      self.say(teller, world_forms.TOWN_LIFE, scene)
      told += 1

  def story(self, teller: Teller) -> None:
    """Someone goes to a town, meets someone, they talk and trade."""
    told = self.say(teller, world_forms.STORY_OPENINGS, {})
    scene = self._named[told['P']] | self._towns[told['T']]
    teller.write(' ')
    told = self.say(teller, world_forms.STORY_MEETINGS, scene)
    scene = scene | self._person['Q'][told['Q']]
    told = 0
    while more(teller, told, 2, 6):
      teller.write(' ')
      self.say(teller, world_forms.STORY_MIDDLES, scene)
      told += 1
    teller.write('\n')
    self.say(teller, world_forms.STORY_CLOSINGS, scene)

  def letter(self, teller: Teller) -> None:
    """A letter from one to another."""
    scene = self.fill(teller, world_forms.LETTER_OPENING, {})
    told = 0
    while more(teller, told, 4, 9):
      if told:
        teller.write(' ')
      self.say(teller, world_forms.LETTER_BODY, scene)
      told += 1
    teller.write('\n')
    self.say(teller, world_forms.LETTER_CLOSINGS, scene)

  def news(self, teller: Teller) -> None:
    """Who met whom and who is who, each sentence about someone else."""
    if teller.choose(WITH_HEAD):
      self.say(teller, world_forms.NEWS_HEADS, {})
      teller.write('\n')
    told = 0
    while more(teller, told, 5, 13):
      if told:
        teller.write(' ')
      if teller.choose(FACT_OR_EVENT):
        self.say(teller, teller.choose(ANY_FACT), {})
      else:
        self.say(teller, world_forms.EVENTS, {})
      told += 1

  def ledger(self, teller: Teller) -> None:
    """Who sold, lost, brought or wants what, line by line."""
    self.say(teller, world_forms.LEDGER_HEADS, {})
    told = 0
    while more(teller, told, 6, 16):
      teller.write('\n')
      self.say(teller, world_forms.LEDGER_LINES, {})
      told += 1

  def questions(self, teller: Teller) -> None:
    """A list of questions, as they stand in real text: without answers."""
    if teller.choose(WITH_HEAD):
      self.say(teller, world_forms.QUESTION_HEADS, {})
      teller.write('\n')
    mark = teller.choose(LIST_MARKS)
    told = 0
    while more(teller, told, 6, 14):
      if told:
        teller.write('\n')
      teller.write(mark.format(told + 1))
      if teller.choose(QUESTION_OR_SUM):
        self.say(teller, world_forms.QUESTIONS, {})
      else:
        teller.tell(SUM_QUESTIONS)
      told += 1

  def quiz(self, teller: Teller) -> None:
    """Questions with answers: what conversations ask, and longer sums."""
    marks = teller.choose(QUIZ_MARKS)
    if marks is None:  # two people talk
      marks = [teller.choose(self._speakers) + ': ' for _ in range(2)]
      marks[1] = '\n' + marks[1]
    told = 0
    while more(teller, told, 4, 8):
      teller.write('\n' + marks[0] if told else marks[0])
      is_fact = teller.choose(FACT_OR_SUM)
      asked = teller.tell(self._quiz_facts if is_fact else self._quiz_sums)
      teller.write(marks[1] + self._replies[asked])
      told += 1

  def arithmetic(self, teller: Teller) -> None:
    """Sums, differences and products: as equations, in words, or told."""
    teller.choose(self._arithmetic)(teller)

  def _equations(self, teller: Teller) -> None:
    told = 0
    while more(teller, told, 14, 30):
      if told:
        teller.write('\n')
      teller.tell(EQUATIONS)
      told += 1

  def _spoken(self, teller: Teller) -> None:
    told = 0
    while more(teller, told, 7, 15):
      if told:
        teller.write(' ')
      teller.tell(SPOKEN)
      told += 1

  def _countings(self, teller: Teller) -> None:
    told = 0
    while more(teller, told, 4, 9):
      if told:
        teller.write(' ')
      self._counting(teller)
      told += 1

  def _counting(self, teller: Teller) -> None:
    scene = self.fill(teller, COUNTING, {})
    a = int(teller.tell(OWNED))
    teller.write(' ')
    teller.tell(COUNTED)
    if teller.choose(GIVEN):
      self.fill(teller, GIFT, scene)
      b = int(teller.tell(AMOUNTS[a - 1]))
      teller.write(f', so {a - b} were left.')
    else:
      self.fill(teller, BOTH, scene)
      b = int(teller.tell(AMOUNTS[10]))
      teller.write(f', which made {a + b}.')
