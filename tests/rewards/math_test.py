r"""Where the final answer stands, what equals what, and what is no answer."""

import gzip
import json
import math
import pathlib
import random
import re
import time

import pytest

from tpu_lm import scoring
from tpu_lm.errors import UserError
from tpu_lm.rewards import math as math_reward
from tpu_lm.rewards.math import final_answer
from tpu_lm.scoring import Sample

DATA = pathlib.Path(__file__).parents[2] / '../shared/data/verifiable'

# (the reference, the answer in the box). Numbers, words, groups.
EQUAL = (
  ('42', '42'), ('42', '42.0'), ('42', '42.'), ('42', '+42'), ('42', '{42}'),
  ('42', '(42)'), ('42', r'\mathbf{42}'), ('42', '$42'), ('42', r'\$42'),
  ('42', '42 apples'), ('42', r'42 \text{ apples}'), ('42', 'about 42'),
  ('42', r'\text{She has } 42'), ('42', '84/2'), ('18 dollars', '$18'),
  ('1200', '1,200'), ('1,200', '1200'), ('10000', '10{,}000'),
  ('10000', r'10\,000'), ('10000', r'10,\!000'), ('1234567.5', '1,234,567.5'),
  ('-7', '−7'), ('-7', 'negative 7'), ('-7', '-$7'), ('-7', r'-\$7.00'),
  ('1/2', '0.5'), ('.5', '1/2'), ('0.5', r'\frac{1}{2}'), ('0.5', r'\frac12'),
  ('0.5', r'\dfrac{1}{2}'), ('-0.5', r'-\frac{1}{2}'), ('1/2', '½'),
  ('-0.5', r'\frac{-1}{2}'), ('2/4', '1/2'), ('3.5', r'3\frac{1}{2}'),
  ('3.5', '3 1/2'), ('7/2', '3½'), ('1/6', '0.1666666667'), ('0.3', '.30'),
  ('0.3', '0.30000000000000004'), ('50%', r'50\%'), ('50', '50%'),
  ('50%', '50'), ('0.5', '50%'), ('50%', '0.5'), ('50%', '50 percent'),
  ('320000', r'3.2 \times 10^5'), ('320000', '3.2e5'), ('0.02', '2*10^{-2}'),
  ('3000000', '3 million'), ('5', 'x = 5'), ('5', r'f(x) = 5'),
  ('72', '48 + 24 = 72'), ('12', r'12\text{ cm}^2'), ('12 cm^2', '12 cm²'),
  ('90', r'90^\circ'), ('5 m', '5 meters'), ('5 hours', '5 hrs'),
  ('1, 2', '2, 1'), ('1,2', r'x=1 \text{ or } x=2'), (r'\{1,2\}', r'\{2, 1\}'),
  ('1, 2', r'\{1,2\}'), ('(1,2)', r'\left(1, 2\right)'), ('(1,2]', '(1, 2]'),
  (r'(\frac12, 3)', '(0.5, 3)'), ('6:5', '6 : 5'), ('Monday', 'monday'),
  ('Monday', r'\text{Monday}'), ('A', '(A)'), (42, '42'), (0.25, '1/4'),
)  # fmt: skip
UNEQUAL = (
  ('42', '43'), ('42', '-42'), ('42', '420'), ('42', '4.2'), ('42', '0.42'),
  ('42', '42.1'), ('1000000', '1000001'), ('1000000', '999999'),
  ('1e300', '1e301'), ('1/2', '1/3'), ('1/2', '2'), ('1/3', '0.33'),
  ('0.5', '5%'), ('50', '0.5'), ('5 m', '5 cm'), ('5 dollars', '5 cents'),
  ('3', '3 million'), ('2', '1 or 2 or 3'), ('3', '1, 2, 3'), ('3', '2 and 3'),
  ('3', r'\{1,2,3\}'), ('5', '4;5'), ('5', 'x=4,5'), ('1,2', '1,2,3'),
  ('(1,2)', '(2,1)'), ('(1,2)', '[1,2]'), ('(1,2]', '(1,2)'), ('6:5', '5:6'),
  ('Monday', 'Tuesday'), ('A', 'B'), ('5', 'x=4=5=6'), ('72', '48+24'),
  ('42', '6*7'), ('42', '4²'), ('3.5', '3,5'), ('10', '2x=10'),
)  # fmt: skip
# What says nothing that can be compared.
UNREAD = (
  '', '  ', '?', 'no idea', 'not 42', '42 is wrong', 'at least 42', 'over 42',
  'less than 42', 'between 41 and 42', 'two times 42', 'square root of 42',
  '42 squared', '4 2', '1 2 42', '٤٢', '４２', '42 @ 17', "42 ' 17", '42..100',
  '9**9**9**9', '9^{9^{9^9}}', '10^{99999999}', '99999!+0', r'42 \ldots',
  r'\sqrt{2} \sqrt{3', '42' * 300,
)  # fmt: skip
# What only the library can compare.
EQUAL_EXPRESSIONS = (
  (r'2\sqrt{3}', r'\sqrt{12}'), ('4', r'\sqrt{16}'), ('8', '2^3'),
  ('8', '2**3'), ('120', '5!'), (r'\frac{\pi}{4}', r'\pi/4'), (r'\pi', 'π'),
  ('x^2+2x+1', '(x+1)^2'), ('1+x', 'x+1'), ('2+3i', '3i+2'), ('x=5', '5'),
  (r'(-\infty, 3)', r'\left(-\infty,3\right)'), (r'[3,\infty)', r'x \ge 3'),
  (r'(\sqrt{2}, 1)', r'(\sqrt2, 1)'), (r'\pm 2', '2, -2'), ('x/2', '0.5x'),
  (r'\sqrt{2}', 'sqrt(2)'), ('0.3', '0.1+0.2+0x'), ('2x', 'x+x'),
  (r'\begin{pmatrix}1\\2\end{pmatrix}', r'\begin{pmatrix} 1 \\ 2\end{pmatrix}'),
)  # fmt: skip
UNEQUAL_EXPRESSIONS = (
  (r'2\sqrt{3}', r'\sqrt{13}'), ('3', r'2\sqrt{3}'), ('5', '5x'), ('5', 'x>5'),
  ('3', '3!'), ('3', '3^2'), ('5', r'5\cup 6'), ('5', r'x \in \{5,6\}'),
  ('2x', '2y'), ('x', 'y'), (r'\pi', '3'), ('42', '42 | 17'),
  ('42', r'42 \\ 17'), ('42', r'42 \lor 17'), ('4', 'x^2=16'),
  (r'2\pi', r'3\pi=2\pi'), (r'(-\infty, 3)', r'(-\infty, 3]'),
)  # fmt: skip


@pytest.fixture(scope='module')
def reward():
  made = math_reward.make(processes=1)
  yield made
  made.close()


def sample(text, answer, question=''):
  return Sample(
    [{'role': 'user', 'content': question}], text, {'answer': answer}
  )


def boxed(pairs):
  return [sample(rf'So \boxed{{{said}}}.', known) for known, said in pairs]


@pytest.fixture
def alone(reward, monkeypatch):
  """The reward, without the library."""
  monkeypatch.setattr(reward, '_verifier', Asked())
  return reward


class Asked:
  """In the library's place, where nothing may be asked of it."""

  def verdicts(self, pairs):
    assert not pairs
    return []


@pytest.mark.parametrize('pair', EQUAL)
def test_equal_numbers_words_and_groups(alone, pair):
  (score,) = alone(boxed([pair]))
  assert (score.value, score.parsed) == (1, True)


@pytest.mark.parametrize('pair', UNEQUAL)
def test_unequal_numbers_words_and_groups(reward, pair):
  (score,) = reward(boxed([pair]))
  assert (score.value, score.parsed) == (0, True)


@pytest.mark.parametrize('said', UNREAD)
def test_what_cannot_be_read_is_counted_apart(alone, said):
  # '42 is wrong' and its like have no place in a box alone.
  for text in (rf'\boxed{{{said}}}', f'The answer is: {said}', f'#### {said}'):
    (score,) = alone([sample(text, '42')])
    assert (score.value, score.parsed) == (0, False), text


def test_expressions_are_compared_by_the_library(reward):
  scores = reward(boxed(EQUAL_EXPRESSIONS))
  wrong = [s.note for s in scores if (s.value, s.parsed) != (1, True)]
  assert not wrong
  wrong = [s.note for s in reward(boxed(UNEQUAL_EXPRESSIONS)) if s.value]
  assert not wrong


TEXTS = (
  ('The answer is 42.', '42'), ('**Answer:** 42', '42'), ('Answer = 42', '42'),
  ('The answer to the question is 42', '42'), ('The answer is\n\n42', '42'),
  ('The answer is 3.5. I am sure of 17.', '3.5'), ('The answer is 42!', '42'),
  ('answer: 42 apples, because 6 * 7 = 42', '42 apples'),
  ('The answer is 41. No, the answer is 42.', '42'), ('####42', '42'),
  ('#### 1,200', '1,200'), ('#### 41\n#### 42\n', '42'),
  ('#### Step 1\nThe answer is 42', '42'),
  (r'\boxed{41} \boxed{42}, or 43', '42'), (r'\fbox{42} #### 41', '42'),
  (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'), (r'\boxed{\{1\}}', r'\{1\}'),
  (r'#### 41 \boxed{42', None),  # the box is not closed
  ('<think>It is 41. The answer is 41.</think>42', '42'),
  (r'<think>\boxed{42}</think>', None), ('', None), ('\n', None),
  ('42', '42'), ('x = 5', 'x = 5'), ('She sold 72 clips', 'She sold 72 clips'),
  ('It has 5. She sold 72 of 3 kinds!', '3'), ('3 + 4. So 1,200 then', '1200'),
  ('He had 5. 48/2 = <<48/2=24>>24 clips', '24'), ('a. From 2 he got $5', '$5'),
  ('a. It is 1 or 2 or 3', None), ('a. 1, 2, 3', None), ('a. 1 2 3', None),
  ('a. It is 2 and 3', None), ('a. It is not 3', None), ('a. 3x + 2x', None),
  (r'a. It is 2\sqrt{3} b', None), ('a. It is 3^2', None), ('a. 40 + 2', None),
  ('a. It is 5x', None), ('a. It is 5 + b', None), ('a. It is 5 = b', None),
  ('a. at 5:30', None), ('no number. at all', None),
)  # fmt: skip


@pytest.mark.parametrize(('text', 'said'), TEXTS)
def test_where_the_final_answer_stands(text, said):
  found = final_answer(text)
  assert said == (found and found.strip())


def test_the_last_number_can_be_left_out():
  text = 'It has 5. She sold 72 clips of 3 kinds!'
  assert final_answer(text, last_number=False) is None
  assert final_answer('#### 72', last_number=False) == '72'
  made = math_reward.make(last_number=False)
  assert [s.parsed for s in made([sample(text, '3')])] == [False]
  made.close()


def test_repeating_the_question_is_no_answer(reward):
  question = 'Tom has 4 dogs. Ann has 5 cats, how many has Eve?'
  for text in ('Tom has 4 dogs. Ann has 5 cats.', 'Ann has 5 cats', question):
    (score,) = reward([sample(text, '5', question)])
    assert (score.value, score.parsed) == (0, False)
  (score,) = reward([sample('Eve has 5 cats', '5', question)])
  assert score.value == 1
  assert reward([sample('5', '5', question)])[0].value == 1


def test_references_of_every_form(reward):
  for known in ('6 * 7 = <<6*7=42>>42.\n#### 42', r'So \boxed{42}.', 42, 42.0):
    assert reward([sample('42', known)])[0].value == 1
  (score,) = reward([sample('42', 'neither here, nor there; 1!2')])
  assert math.isnan(score.value)
  assert 'cannot be read itself' in score.note
  (score,) = reward([sample(r'\boxed{2\pi}', r'\frac')])
  assert math.isnan(score.value)
  assert 'not compared' in score.note
  (score,) = reward([sample(r'\boxed{\frac}', r'2\pi')])
  assert (score.value, score.parsed) == (0, False)
  with pytest.raises(UserError, match="no 'answer', only 'solution'"):
    reward([Sample([], '42', {'solution': '42'})])


def test_notes_say_what_was_compared(reward):
  (score,) = reward([sample(r'\boxed{41}', 'so\n#### 42')])
  assert score.note == '41 for so #### 42'


def test_integers_compare_exactly_whatever_the_tolerance():
  made = math_reward.make(tolerance=0.01)
  scores = made(boxed([('1000', '1001'), ('1000', '1001.0'), ('1/3', '0.333')]))
  assert [s.value for s in scores] == [0, 1, 1]
  made.close()


def test_wrong_settings_are_refused():
  for wrong in ({'timeout': 0.0}, {'processes': -1}, {'tolerance': 1.0}):
    with pytest.raises(UserError, match=next(iter(wrong))):
      math_reward.make(**wrong)


def test_long_and_nested_answers_take_no_time():
  units = (
    '1 ', 'a 1 ', '1,', '(', '-', '$', r'\text{', r'\boxed{', '1 or ', 'a b ',
    'the answer is ', '#### ', '^', '1/2 ', 'a', '{',
  )  # fmt: skip
  start = time.perf_counter()
  for unit in units:
    found = final_answer(unit * (40_000 // len(unit)) + '1', 'a 1 a')
    if found:
      math_reward.quantities.read(found)
      math_reward.quantities.read(found[:300])
  assert time.perf_counter() - start < 20  # it was 60 s for some


def test_an_expression_without_end_stops_by_time_and_harms_no_neighbour():
  with scoring.parse('math(timeout=1.0, processes=1)') as made:
    endless = r'\boxed{((9^{999})^{999})^{999}}'
    texts = [r'\boxed{\sqrt{16}}', endless, r'\boxed{\sqrt{16}}']
    start = time.perf_counter()
    scored = made([sample(text, '4') for text in texts])
    assert 1 < time.perf_counter() - start < 60
  assert scored.total.tolist() == [1, 0, 1]
  assert scored.parsed['math'].tolist() == [True, False, True]


def read_lines(name):
  path = DATA / name
  if not path.is_file():
    pytest.skip(f'needs ../shared/data/verifiable/{name} beside the checkout')
  with gzip.open(path, 'rt') as lines:
    return [json.loads(line) for line in lines]


def altered(answer: str, rng: random.Random) -> str:
  """Another number: one thing about it is changed."""
  number = answer.replace(',', '')
  place = rng.randrange(len(number.lstrip('-'))) + number.startswith('-')
  digit = rng.choice([x for x in '0123456789' if x != number[place]])
  value = int(number)
  ways = [
    number[:place] + digit + number[place + 1 :],
    f'{number}{rng.randrange(10)}',
    f'{value + 1}',
    f'{value - 1}',
    f'{number}.5',
    f'{number} or {value + 1}',
  ]
  if value:
    ways += [f'{-value}', f'{value * 10}', f'{value / 10}', f'{value}/7']
    ways += [f'{value * 1000:,}', f'{value} million']
  return rng.choice(ways)


def test_all_of_gsm8k_scores_1_and_200_altered_answers_score_0(alone):
  rows = read_lines('gsm8k_train.jsonl.gz')
  scores = alone(
    [sample(x['answer'], x['answer'], x['question']) for x in rows]
  )
  assert len(rows) == 7473
  assert {(s.value, s.parsed) for s in scores} == {(1, True)}
  rng = random.Random(0)
  wrong = []
  for row in rng.sample(rows, 200):
    work, _, known = row['answer'].rpartition('#### ')
    text = f'{work}#### {altered(known, rng)}'
    wrong.append(sample(text, row['answer'], row['question']))
  assert [s.note for s in alone(wrong) if s.value] == []


def test_gsm8k_in_other_words(alone):
  """The answer in other forms, and the solution without its last line."""
  rows = read_lines('gsm8k_train.jsonl.gz')[:2000]
  known = [x['answer'].rpartition('#### ')[2] for x in rows]
  for form in (
    r'\boxed{{{}}}', 'The answer is ${}.', '**Answer:** {} in all', '{}',
    r'It is $\boxed{{{}\text{{ apples}}}}$.', '#### {}.00',
  ):  # fmt: skip
    texts = [form.format(x) for x in known]
    scores = alone(list(map(sample, texts, known)))
    assert {s.value for s in scores} == {1}, form
  # The last number is the answer in most, and never a crash.
  texts = [re.sub('####.*', '', x['answer']) for x in rows]
  scores = alone(list(map(sample, texts, known)))
  assert sum(s.value for s in scores) > 0.95 * len(rows)


@pytest.mark.parametrize('name', ['mawps_addsub', 'mawps_multiarith'])
def test_mawps(alone, name):
  targets = [x['target'] for x in read_lines(f'{name}.jsonl.gz')]
  right = alone([sample(f'So it is {x:.10g} now.', x) for x in targets])
  assert {s.value for s in right} == {1}
  wrong = alone([sample(f'So it is {x + 1:.10g} now.', x) for x in targets])
  assert {s.value for s in wrong} == {0}
