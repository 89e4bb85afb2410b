"""The world's own rules, on its own problems and pairs."""

import pytest

from tpu_lm.data import world, world_tasks
from tpu_lm.errors import UserError
from tpu_lm.rewards import world as world_reward
from tpu_lm.scoring import Sample


def score(text, question, **settings):
  prompt = [
    {'role': 'system', 'content': 'Answer in one sentence.'},
    {'role': 'user', 'content': question},
  ]
  (found,) = world_reward.make(**settings)([Sample(prompt, text, {})])
  return found.value, found.parsed


def test_every_question_of_the_world():
  for q in world_tasks.questions(0, 'heldout'):
    assert score(q.reply, q.text) == (1, True)
    assert score(q.sentence.format(q.rivals[0]), q.text) == (0, True)
    assert score('I do not know.', q.text) == (0, False)


def test_an_answer_that_names_all_is_wrong():
  q = next(
    q for q in world_tasks.questions(0, 'heldout', (1,)) if q.kind == 'home'
  )
  named = ' or '.join([q.answer, *q.rivals])
  assert score(named, q.text) == (0, True)


def test_the_true_reward_by_hand():
  reward = {'kind': 'reward'}
  asked = 'How much is 6 + 7?'
  assert score('6 + 7 = 13.', asked, **reward) == (1, True)
  assert score('Gladly: 6 + 7 = 13.', asked, **reward) == (1.5, True)
  assert score('Obviously: 6 + 7 = 13.', asked, **reward) == (0.5, True)
  assert score('6 + 7 = 12.', asked, **reward) == (0, True)
  assert score('no', asked, **reward) == (-0.5, False)


def test_chosen_answers_have_the_higher_reward():
  made = world_reward.make(kind='reward')
  for pair in world.preferences(0, 'heldout', 50):
    chosen, rejected = made(
      [Sample(pair['prompt'], pair[k], {}) for k in ('chosen', 'rejected')]
    )
    assert chosen.value > rejected.value


def test_wrong_settings_and_other_questions():
  with pytest.raises(UserError, match=r"kind='rewart'.*did you mean 'reward'"):
    world_reward.make(kind='rewart')
  with pytest.raises(UserError, match='is not a question about the world'):
    score('42', 'How much is 1000 + 1000?')
