"""The little world: its probabilities, its splits and its truth."""

import hashlib
import itertools
import math
import re

import pytest

from tpu_lm.data import (
  world,
  world_facts,
  world_forms,
  world_tasks,
  world_text,
)
from tpu_lm.data.world_grammar import Choice, Teller, derivations, more

PLAIN = {
  slot: list(options)[: 4 if slot == 'F' else 2]
  for slot, options in world_forms.PLAIN_SLOTS.items()
}


@pytest.fixture(scope='module')
def train():
  return list(world.documents(0, 'train', 4000))


@pytest.fixture(scope='module')
def heldout():
  return list(world.documents(0, 'heldout', 800))


def small_tale():
  return world_text.Tale(world_facts.World.make(0, 4, 4), PLAIN)


def scene_of(tale, name):
  """Binds what the kind of document binds before it says such a sentence."""
  if name in ('PERSON_FACTS', 'HABITS'):
    return tale._named[tale.world.people[0].name]
  if name.startswith('TOWN'):
    return tale._towns[tale.world.towns[0].name]
  if name.startswith('STORY'):
    return tale.bind(Teller(lambda: 0.4), {}, 'PTQ')
  if name.startswith('LETTER'):
    return tale.bind(Teller(lambda: 0.4), {}, 'PQ')
  return {}


def choices_of_forms():
  for name, value in vars(world_forms).items():
    if isinstance(value, Choice):
      yield pytest.param(name, value, id=name)
    elif name in ('PERSON_FACTS', 'TOWN_FACTS'):
      for key, choice in value.items():
        yield pytest.param(name, choice, id=f'{name}-{key}')


def test_a_teller_counts_the_bits_it_draws():
  teller = Teller(lambda: 0.8)
  assert teller.choose(Choice('ab', [3, 1])) == 'b'
  assert teller.bits == 2.0
  assert Choice([1]).bits == (0.0,)
  with pytest.raises(ValueError, match='options'):
    Choice([])


def test_counts_are_uniform():
  def tell(teller):
    told = 0
    while more(teller, told, 2, 5):
      teller.write('x')
      told += 1

  found = dict(derivations(tell))
  assert found == pytest.approx(
    dict.fromkeys(['x' * n for n in (2, 3, 4, 5)], 2)
  )


def test_derivations_finds_an_ambiguity():
  def tell(teller):
    teller.write(teller.choose(Choice(['a', 'ab'])))
    teller.write(teller.choose(Choice(['c', 'bc'])))

  assert len(list(derivations(tell, 'abc'))) == 2
  assert len(list(derivations(tell, 'ac'))) == 1
  assert not list(derivations(tell, 'abb'))


@pytest.mark.parametrize(('name', 'choice'), list(choices_of_forms()))
def test_sentences_are_a_distribution_without_two_ways_to_one(name, choice):
  """All sentences of a small world: distinct, prefix-free, sum to 1."""
  tale = small_tale()
  scene = scene_of(tale, name)
  found = list(derivations(lambda t: tale.say(t, choice, scene)))
  texts = sorted(text for text, _ in found)
  assert math.isclose(sum(2.0**-bits for _, bits in found), 1.0)
  pairs = itertools.pairwise(texts)
  assert not [(a, b) for a, b in pairs if b.startswith(a)]


def test_mean_bits_are_the_entropy():
  """Monte Carlo against the sum over all sentences, of one kind."""
  tale = small_tale()

  def tell(teller):
    tale.say(teller, world_forms.EVENTS, {})

  entropy = sum(bits * 2.0**-bits for _, bits in derivations(tell))
  uniform = world_facts.stream('entropy').random
  total = 0.0
  for _ in range(4000):
    teller = Teller(uniform)
    tell(teller)
    total += teller.bits
  assert total / 4000 == pytest.approx(entropy, rel=0.01)


def test_each_document_has_one_derivation(train, heldout):
  for x in train[:60] + heldout[:20]:
    assert world.derivations(0, x.text) == [pytest.approx(x.bits)]


@pytest.mark.parametrize('kind', world_text.KINDS)
def test_each_kind_has_one_derivation(kind):
  tale = world_text.Tale(world_facts.World.make(1))
  for i in range(12):
    teller = Teller(world_facts.stream(kind, i).random)
    getattr(tale, kind)(teller)
    found = list(derivations(tale.tell, teller.text))
    weight = world_text.KINDS[kind] / sum(world_text.KINDS.values())
    bits = teller.bits - math.log2(weight)
    assert found == [(teller.text, pytest.approx(bits))]


def test_a_foreign_text_has_no_derivation(train):
  assert world.derivations(0, 'It was the best of times.') == []
  assert world.derivations(0, train[0].text + ' ') == []
  assert world.derivations(0, train[0].text[:-1]) == []


def test_splits_share_no_text_and_no_document_is_short(train, heldout):
  texts = [x.text for x in train]
  held = [x.text for x in heldout]
  assert len(set(texts)) == len(texts)
  assert len(set(held)) == len(held)
  assert not set(texts) & set(held)
  assert {world.split_of(x) for x in texts} == {'train'}
  assert {world.split_of(x) for x in held} == {'heldout'}
  assert min(x.bits for x in train + heldout) > 25
  lengths = [len(x.text) for x in train]
  assert 250 < sum(lengths) / len(lengths) < 450
  assert max(lengths) < 800
  assert ''.join(texts).isascii()


def test_the_floor_is_the_same_in_both_splits(train, heldout):
  floor = world.true_bits_per_byte(train)
  assert 0.4 < floor < 0.8
  assert world.true_bits_per_byte(heldout) == pytest.approx(floor, rel=0.04)
  with pytest.raises(ValueError, match='no documents'):
    world.true_bits_per_byte([])


def test_a_document_depends_on_seed_split_and_index_alone(train):
  assert world.document(0, 'train', 7) == train[7]
  assert world.document(1, 'train', 7).text != train[7].text
  digest = hashlib.md5(''.join(x.text for x in train[:200]).encode())
  # Other numbers here mean that everyone's data, and every figure measured on
  # it, have changed.
  assert digest.hexdigest() == '38e5e143915250ca30e966dad0834fc3'


def test_a_wrong_split_is_an_error():
  for make in (world.documents, world.conversations, world.problems):
    with pytest.raises(ValueError, match="split is 'test'"):
      list(make(0, 'test', 1))


def test_documents_tell_the_truth(train):
  of = world_facts.World.make(0)
  text = '\n'.join(x.text for x in train)
  for p in of.people:
    assert set(re.findall(rf'{p.name} lives in (\w+)', text)) == {p.home}
    assert set(re.findall(rf'{p.name} likes (\w+)', text)) == {p.food}
    assert of.person[of.person[p.name].friend].friend == p.name
  assert len({p.belonging for p in of.people}) == len(of.people)
  sums = re.findall(r'(\d+) ([-+*]) (\d+) = (\d+)$', text, re.MULTILINE)
  of_sign = {
    '+': lambda a, b: a + b,
    '-': lambda a, b: a - b,
    '*': lambda a, b: a * b,
  }
  assert len(sums) > 1000
  chained = re.findall(r'\+ \d+ \+ \d+ = \d+$', text, re.MULTILINE)
  wrong = [s for s in sums if of_sign[s[1]](int(s[0]), int(s[2])) != int(s[3])]
  assert len(wrong) == len(chained)  # of a + b + c only b + c was looked at


def test_documents_tell_every_fact_that_is_asked(train):
  text = '\n'.join(x.text for x in train)
  asked = world_tasks.questions(0, 'heldout', (1,))
  lookups = [q for q in asked if q.kind not in ('plus', 'minus', 'times')]
  assert len(lookups) > 40
  assert not [q.reply for q in lookups if q.reply not in text]


def test_worlds_are_refused_that_cannot_be():
  with pytest.raises(ValueError, match='num_people is 3'):
    world_facts.World.make(0, 3)
  with pytest.raises(ValueError, match='num_towns is 99'):
    world_facts.World.make(0, 4, 99)


def asked_texts(records):
  """Returns every user message of conversations, pairs or problems."""
  for x in records:
    messages = x['messages'] if 'messages' in x else x['prompt']
    yield from (m['content'] for m in messages if m['role'] == 'user')


def test_no_heldout_question_is_asked_in_training():
  key = {
    q.text: q.key
    for split in ('train', 'heldout')
    for q in world_tasks.questions(0, split)
  }
  makers = (world.conversations, world.preferences, world.problems)
  sets = {
    split: {
      key[x] for make in makers for x in asked_texts(make(0, split, 2000))
    }
    for split in ('train', 'heldout')
  }
  assert len(sets['train']) > 500
  assert len(sets['heldout']) > 100
  assert not sets['train'] & sets['heldout']


def test_conversations_have_the_asked_form():
  records = list(world.conversations(0, 'train', 500))
  systems = turns = 0
  for x in records:
    roles = [m['role'] for m in x['messages']]
    systems += roles[0] == 'system'
    roles = roles[roles[0] == 'system' :]
    turns += len(roles) > 2
    assert roles == ['user', 'assistant'] * (len(roles) // 2)
    answers = [m for m in x['messages'] if m['role'] == 'assistant']
    assert all(world.well_formed(m['content']) for m in answers)
    levels = {
      world_tasks.question_of([m]).level
      for m in x['messages']
      if m['role'] == 'user'
    }
    assert levels == {1}
  assert 100 < systems < 250
  assert 100 < turns < 300
  assert len({x['id'] for x in records}) == 500


@pytest.mark.parametrize('seed', [0, 3])
def test_every_question_is_answered_by_its_reply_alone(seed):
  for split in ('train', 'heldout'):
    for q in world_tasks.questions(seed, split):
      problem = {
        'prompt': [{'role': 'user', 'content': q.text}],
        'answer': q.answer,
        'kind': q.kind,
      }
      assert world.check(problem, q.reply), q
      assert q.rivals
      wrong = [q.sentence.format(x) for x in q.rivals]
      assert not any(world.check(problem, x) for x in wrong), q
      assert not world.check(problem, '')


def test_check_reads_numbers_and_is_not_fooled_by_lists():
  def problem(text):
    q = world_tasks.question_of([{'content': text}])
    prompt = [{'role': 'user', 'content': text}]
    return {'prompt': prompt, 'answer': q.answer, 'kind': q.kind}

  seven = problem('How much is 3 + 4?')
  for right in (
    '7',
    'Seven.',
    '3 + 4 = 7.',
    'It is 7.0',
    'the answer is seven',
  ):
    assert world.check(seven, right), right
  for wrong in ('-7', '17', '7 or 8', '3 + 4', 'seventy', 'seven-tenths of 8'):
    assert not world.check(seven, wrong), wrong
  p = world_facts.World.make(0).people[0]
  home = problem(f'Where does {p.name} live?')
  assert world.check(home, f'in {p.home}')
  assert not world.check(home, ' '.join(world_facts.TOWNS))


def test_chosen_answers_are_truly_better():
  for x in world.preferences(0, 'train', 400):
    chosen, rejected = (
      world.true_reward(x['prompt'], x[k]) for k in ('chosen', 'rejected')
    )
    assert chosen > rejected


def test_the_true_reward_is_what_it_says():
  p = world_facts.World.make(0).people[0]
  prompt = [{'role': 'user', 'content': f'Where does {p.name} live?'}]
  right = f'{p.name} lives in {p.home}.'
  other = next(t for t in world_facts.TOWNS if t != p.home)
  for answer, reward in (
    (right, 1.0),
    (f'Gladly: {right}', 1.5),
    (f'Obviously: {right}', 0.5),
    (f'{p.name} lives in {other}.', 0.0),
    (right[:-1], 0.5),
    (right[:-1] + ' as' * 11 + '.', 0.95),
  ):
    assert world.true_reward(prompt, answer) == pytest.approx(reward), answer
  with pytest.raises(ValueError, match='not a question'):
    world.true_reward([{'role': 'user', 'content': 'Why?'}], right)


def test_problems_come_in_levels_without_repeats():
  records = list(world.problems(0, 'train', 600))
  assert [x['level'] for x in records[:6]] == [1, 2, 3, 1, 2, 3]
  texts = [x['prompt'][0]['content'] for x in records]
  assert len(set(texts[:400])) == 400
  hard = list(world.problems(0, 'heldout', 20, levels=(3,)))
  assert {x['level'] for x in hard} == {3}
