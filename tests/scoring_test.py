"""Sums of rewards: what may be written, what comes out, what is refused."""

import concurrent.futures
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tpu_lm import scoring
from tpu_lm.errors import UserError
from tpu_lm.scoring import Part, Sample, Score, Scoring

PROMPT = [{'role': 'user', 'content': 'How much is 6 times 7?'}]
USERS = """
import dataclasses
from tpu_lm.scoring import Score

@dataclasses.dataclass
class Bonus:
  size: float = 1.0

def long(sample, k=1, *, power=1.0):
  return k * len(sample.text) ** power

def ranks(samples):
  order = sorted(len(s.text) for s in samples)
  return (order.index(len(s.text)) for s in samples)

def unsure(sample):
  return Score(float('nan'), False, 'no judge') if not sample.text else True

def needs(sample, k):
  return k

def anything(sample, **options):
  return sum(options.values())

def broken(sample):
  return [][0]

def words(sample):
  return 'many'

def infinite(sample):
  return 1e999

def few(samples):
  return [1.0]

def nothing():
  return 0

limit = 3
"""


def samples(*texts, answer='42'):
  return [Sample(PROMPT, text, {'answer': answer}, len(text)) for text in texts]


@pytest.fixture
def users(tmp_path, monkeypatch):
  (tmp_path / 'my-rewards').mkdir()
  (tmp_path / 'my-rewards/mine.py').write_text(USERS)
  monkeypatch.chdir(tmp_path)
  return 'my-rewards/mine.py'


def scored(text, given):
  with scoring.parse(text) as made:
    return made(given)


def test_a_weighted_sum_by_hand():
  found = scored(
    'math + 0.1 * format(pattern="The answer.*") - 0.5 * length(limit=20)',
    samples('The answer is 42.', '42', 'The answer is forty-two.', ''),
  )
  # Of 20 tokens the last 4 cost more and more.
  np.testing.assert_allclose(found.values['length'], [0.25, 0, 1, 0])
  assert found.values['math'].tolist() == [1, 1, 0, 0]
  assert found.values['format'].tolist() == [1, 0, 1, 0]
  assert found.total.dtype == np.float64
  np.testing.assert_allclose(found.total, [1 + 0.1 - 0.125, 1, 0.1 - 0.5, 0])
  assert found.parsed['math'].tolist() == [True, True, False, False]
  assert found.notes['math'][1] == '42 for 42'


@pytest.mark.parametrize(
  ('text', 'weights'),
  [
    ('math', {'math': 1}),
    ('-math', {'math': -1}),
    ('math * 2', {'math': 2}),
    ('-0.5 * math + exact', {'math': -0.5, 'exact': 1}),
    ('math - -2 * exact', {'math': 1, 'exact': 2}),
    ('2 * (math - 0.5 * exact)', {'math': 2, 'exact': -1}),
    ('math - (exact - world)', {'math': 1, 'exact': -1, 'world': 1}),
    (' math\t+ 0 * exact()', {'math': 1, 'exact': 0}),
    ('exact(key="a.py:b") + exact', {'exact': 1, 'exact_2': 1}),
  ],
)
def test_weights_and_names(text, weights):
  with scoring.parse(text) as made:
    assert {part.name: part.weight for part in made.parts} == weights
    assert made.names == tuple(weights)


def test_a_reward_of_weight_0_is_logged_alone():
  nan = Part('a', 0.0, lambda given: [Score(float('nan'))] * len(given))
  one = Part('b', 2.0, lambda given: [Score(1)] * len(given))
  with Scoring([nan, one]) as made:
    found = made(samples('x'))
  assert found.total.tolist() == [2]
  assert np.isnan(found.values['a']).all()


def test_what_cannot_be_judged_has_no_total(users):
  found = scored(f'exact + 0.1 * {users}:unsure', samples('42', ''))
  assert found.total[0] == pytest.approx(1.1)
  assert np.isnan(found.total[1])
  assert found.values['exact'].tolist() == [1, 0]
  assert found.parsed['unsure'].tolist() == [True, False]
  assert found.notes['unsure'] == ['', 'no judge']


def test_functions_of_the_users(users):
  given = samples('abc', 'a')
  assert scored(f'{users}:long', given).total.tolist() == [3, 1]
  found = scored(f'0.5*{users}:long(k=2, power=2)-./{users}:ranks', given)
  assert found.values['long'].tolist() == [18, 2]
  assert found.values['ranks'].tolist() == [1, 0]
  assert found.total.tolist() == [8, 1]
  assert scored(f'{users}:needs(k=4)', given).total.tolist() == [4, 4]
  assert scored(f'{users}:anything(a=1, b=2)', given).total.tolist() == [3, 3]


@pytest.mark.parametrize(
  ('text', 'why'),
  [
    ('', 'cannot be read; write it like'),
    ('math +', 'cannot be read; write it like'),
    ('math format', 'cannot be read; write it like'),
    ('0.5', '0.5 is no reward'),
    ('math + 1', '1 is no reward'),
    ('math * exact', r'math \* exact is no number times a reward'),
    ('math / 2', 'math / 2 is no sum of rewards'),
    ('1e999 * math', 'no number times a reward'),
    ('math(5)', r'math\(5\) has an argument without its name'),
    ('math(timeout=x)', 'timeout=x is no name with a plain value'),
    ('math(**{})', 'no name with a plain value'),
    ('maths', r"'maths': unknown \(did you mean 'math'\?\); there are"),
    (
      'math(timout=1)',
      r"rewards: math.timout: unknown key \(did you mean 'tim",
    ),
    ('math(timeout="1")', 'rewards: math.timeout=.*must be float, not str'),
    ('regex', 'needs a pattern'),
    ('path_0', "'path_0': unknown"),
  ],
)
def test_what_is_refused(text, why):
  with pytest.raises(UserError, match=why) as raised:
    scoring.parse(text)
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
  ('what', 'why'),
  [
    ('lonk', r"has no function lonk \(did you mean 'long'\?\); it has long, r"),
    ('limit', 'has no function limit'),
    ('long(p=1)', r'long\(p=…\): unknown argument.*; there are k, power'),
    ('needs', r'needs k; write .*mine.py:needs\(k=…\)'),
    ('nothing', r'must take a sample; write def nothing\(sample\)'),
    ('broken', r'IndexError: list index out of range at .*mine.py:26'),
    ('words', "returned 'many'; must be a finite number"),
    ('infinite', "returned 'inf'; must be a finite number"),
    ('few', 'returned 1 rewards of 2 samples'),
  ],
)
def test_mistakes_in_a_function_of_the_users(users, what, why):
  with pytest.raises(UserError, match=why) as raised:
    scored(f'exact + {users}:{what}', samples('a', 'b'))
  assert str(raised.value).startswith(f'rewards: {users}:{what.split("(")[0]}')
  assert '\n' not in str(raised.value)


def test_files_of_the_users_that_cannot_be_used(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r'there is no file gone.py'):
    scoring.parse('gone.py:f')
  (tmp_path / 'bad.py').write_text('def f(sample):\n  return (\n')
  with pytest.raises(UserError, match=r"SyntaxError: '\(' was never closed"):
    scoring.parse('bad.py:f')
  (tmp_path / 'worse.py').write_text('import no_such_module\n')
  with pytest.raises(UserError, match=r'no_such_module.* at worse.py:1'):
    scoring.parse('worse.py:f')


def test_batches_are_scored_in_turn_beside_the_caller():
  order, go, alone = [], threading.Event(), threading.Lock()

  def slow(given):
    assert alone.acquire(blocking=False)
    go.wait(10)
    order.append(given[0].text)
    alone.release()
    return [Score(len(s.text)) for s in given]

  def quick(given):
    return [Score(0.0)] * len(given)

  with Scoring([Part('slow', 1.0, slow), Part('quick', 1.0, quick)]) as made:
    futures = [made.start(samples(text)) for text in ('a', 'bb')]
    assert all(isinstance(x, concurrent.futures.Future) for x in futures)
    time.sleep(0.05)
    assert not futures[0].done()
    go.set()
    assert [x.result().total.tolist() for x in futures] == [[1], [2]]
  assert order == ['a', 'bb']


def test_the_rewards_of_a_batch_run_side_by_side():
  both = threading.Barrier(2)

  def meets(given):
    both.wait(10)  # breaks if the other does not come
    return [Score(1.0)] * len(given)

  with Scoring([Part('a', 1.0, meets), Part('b', 1.0, meets)]) as made:
    assert made(samples('x')).total.tolist() == [2]


def test_closing_closes_every_reward_also_when_a_later_one_is_wrong(
  monkeypatch,
):
  closed = []
  monkeypatch.setattr(
    'tpu_lm.rewards.math.Math.close', lambda self: closed.append('math')
  )
  scoring.parse('math + exact').close()
  assert closed == ['math']
  with pytest.raises(UserError, match='unknown'):
    scoring.parse('math + exat')
  assert closed == ['math', 'math']


def test_a_reward_must_score_every_sample():
  with (
    Scoring([Part('a', 1.0, lambda given: [])]) as made,
    pytest.raises(ValueError, match='a: 0 scores of 1 samples'),
  ):
    made(samples('x'))


def test_no_samples_have_no_rewards():
  found = scored('math + exact', [])
  assert found.total.shape == (0,)
  assert found.values['math'].shape == (0,)


def test_processes_of_rewards_need_no_jax():
  program = (
    'import sys; from tpu_lm import scoring, verifier; '
    'from tpu_lm.rewards import math; assert "jax" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', program], check=True, timeout=60)
