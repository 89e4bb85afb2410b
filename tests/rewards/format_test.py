"""Forms by name and by pattern: the whole answer, or nothing."""

import pytest

from tpu_lm.errors import UserError
from tpu_lm.rewards import format as format_reward
from tpu_lm.scoring import Sample


def value(text, **settings):
  (score,) = format_reward.make(**settings)([Sample([], text, {})])
  assert score.parsed
  return score.value


def test_a_pattern_must_match_the_whole_answer():
  settings = {'pattern': r'The answer is \d+\.'}
  assert value('The answer is 42.', **settings) == 1
  assert value('The answer is 42. Or so.', **settings) == 0
  assert value('So: The answer is 42.', **settings) == 0
  assert value('a\nb', pattern='a.b') == 1


FORMS = {
  'boxed': (
    (r'So \boxed{42}.', r'\boxed{\frac{1}{2}}', r'\boxed{\{1, 2\}}', '\n'
     r'\boxed{\sqrt{\frac{1}{2^{3}}}}' '\n'),
    ('42', r'\boxed{}', r'\boxed{42', r'\boxed{1} \boxed{2}', r'\boxed 42',
     r'\boxed{4{2}', r'\boxed{\boxed{2}}'),
  ),
  'hashes': (
    ('so\n#### 42', '#### 42\n', 'a\n\nb\n####42'),
    ('42', 'so #### 42', '#### 42\nso', '#### 1\n#### 2', '####', '#### \n'),
  ),
  'think': (
    ('<think>a\nb</think>42', ' <think></think>\n42 '),
    ('42', '<think>a</think>', '<think>a</think> \n', '<think>a 42',
     'a<think>b</think>c', '<think>a</think><think>b</think>c',
     '<think>a<think>b</think>c', '<think>a</think>b</think>c'),
  ),
  'tags': (
    ('<think>a</think><answer>42</answer>',
     '<think>a</think>\n<answer>\n42\n</answer>\n'),
    ('<think>a</think>42', '<think>a</think><answer></answer>',
     '<think>a</think><answer> </answer>',
     '<think>a</think><answer>1</answer><answer>2</answer>',
     '<think>a</think><answer>1</answer> more'),
  ),
}  # fmt: skip


@pytest.mark.parametrize('form', FORMS)
def test_forms(form):
  good, bad = FORMS[form]
  assert [text for text in good if not value(text, form=form)] == []
  assert [text for text in bad if value(text, form=form)] == []


def test_long_answers_take_no_time():
  for unit in ('a', '#', '{', r'\boxed{', '<think>', '\n', '####\n', 'a#'):
    for form in FORMS:
      value(unit * 5000, form=form)


def test_wrong_settings():
  for wrong, why in (
    ({}, 'give one of them'),
    ({'pattern': 'a', 'form': 'boxed'}, 'give one of them'),
    ({'form': 'bocksed'}, r"unknown \(did you mean 'boxed'\?\); there are b"),
    ({'pattern': '('}, 'no regular expression'),
  ):
    with pytest.raises(UserError, match=why):
      format_reward.make(**wrong)
