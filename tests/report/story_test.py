import json
import re

import pytest
from html_page import Page
from made_runs import heldout, make_run, train

from tpu_lm import report
from tpu_lm.errors import UserError
from tpu_lm.report import figures, story

SUMMARY = {
  'sft': {'well_formed': 1.0, 'accuracy': 0.7, 'reward': 0.75, 'seconds': 30},
  'pretrain': {
    'bits_per_byte': 0.44,
    'true_bits_per_byte': 0.42,
    'accuracy': 0.78,
    'sums_accuracy': 0.9,
  },
  'dpo': {'win_rate': 0.9, 'kl': 2.5, 'reward': 1.1},
  'ppo': {'true_reward_before': 0.75, 'true_reward_after': 1.0, 'kl': 4.0},
  'grpo': {
    'exact_before': 0.3,
    'exact_after': 0.61,
    'pass8_before': 0.7,
    'pass8_after': 0.69,
  },
}


def write(folder, **files):
  for name, value in files.items():
    (folder / f'{name}.json').write_text(json.dumps(value))


@pytest.fixture
def life(tmp_path):
  """A life of six stages."""
  base = tmp_path / 'pretrain'
  lines = [train(s, loss=4.0 - s / 10) for s in (10, 20)]
  lines += [heldout(20, loss=2.0, bits_per_byte=0.5)]
  make_run(base, '', lines)
  start = [('init_from', str(base))]
  make_run(tmp_path / 'sft', 'sft', [train(5), train(10)], start)
  pairs = [train(5, accuracy=0.8, margin=1.0, confidence=0.9, brier=0.1)]
  pairs += [
    heldout(0, accuracy=0.0, margin=0.0, confidence=0.5, brier=0.25),
    heldout(5, accuracy=0.95, margin=2.0, confidence=0.9, brier=0.05),
  ]
  make_run(tmp_path / 'reward', 'reward', pairs, start)
  make_run(tmp_path / 'dpo', 'dpo', [train(5, margin=1.0)], start)
  for name in ('ppo', 'grpo'):
    lines = [
      train(s, reward=s / 5, true_reward=0.7, dead_groups=0.25, kl=s / 10)
      for s in (1, 2)
    ]
    make_run(tmp_path / name, 'sft', lines, start)
  write(tmp_path, summary=SUMMARY)
  return tmp_path


def shown(folder):
  text = report.write(folder).read_text()
  return text, Page(text)


def test_the_life_is_told_in_order(life):
  text, found = shown(life)
  table = text[text.index('id="stages"') : text.index('id="language"')]
  names = re.findall(r'class="stage c-(\w+)"', table)
  assert names == ['pretrain', 'sft', 'reward', 'dpo', 'ppo', 'grpo']
  assert 'through 6 stages of training' in found.text
  headings = re.findall(r'<h2>(.*?)</h2>', text)
  assert headings == [
    'The stages, in order',
    'Learning the language',
    'Learning to answer',
    'Learning what people prefer',
    'Learning from rewards',
    'Every figure',
    'To repeat each stage',
    'What is not here',
  ]
  for anchor in re.findall(r'href="#([^"]+)"', text):
    assert f'id="{anchor}"' in text


def test_pretraining_is_held_against_the_true_entropy(life):
  text, found = shown(life)
  label = next(
    one['aria-label']
    for one in found.all('svg')
    if one['aria-label'].startswith('Bits per byte, by step.')
  )
  # 3 and 2 nats a token, at the held-out 0.5 bits a byte for 2 nats a token.
  assert 'training: 0.75 at 10, 0.5 at 20.' in label
  assert 'held out: 0.5 at 20.' in label
  assert 'it ends 19.0% above' in found.text  # 0.5 / 0.42
  assert '>true entropy</text>' in text


def test_targets_are_judged(life):
  _, found = shown(life)
  # Missed: 0.7 < 0.78 and 0.69 < 0.7. Reached: 0.44 / 0.42 = 1.048, 1.0, 0.9,
  # 1.0 > 0.75 and 0.61 - 0.3 = 0.31.
  assert '5 of 7 targets are reached.' in found.text
  missed = found.text[found.text.index('Not reached:') :][:200]
  assert 'sft.accuracy is 70.0%, asked: what the base model knows' in missed
  assert 'grpo.pass8_after is 69.0%, asked: no lower than before' in missed


@pytest.mark.parametrize(
  ('summary', 'reached'),
  [
    ({'grpo': {'exact_before': 0.3, 'exact_after': 0.6}}, True),
    ({'grpo': {'exact_before': 0.3, 'exact_after': 0.59}}, False),
    ({'grpo': {'exact_after': 0.9}}, None),
    ({'lora': {'trained_share': 0.03}}, True),
    ({'lora': {'trained_share': 0.031}}, False),
    ({'pretrain': {'bits_per_byte': 0.5, 'true_bits_per_byte': 0.4}}, False),
    ({'dpo': {'win_rate': float('nan')}}, None),
  ],
)
def test_a_target_needs_what_it_is_compared_with(tmp_path, summary, reached):
  life = story.Life(tmp_path, {}, summary, {}, [])
  found = [ok for _, _, ok in figures.asked(life)]
  assert found == ([] if reached is None else [reached])


def test_the_same_prompts_stand_side_by_side(life):
  answers = {
    'prompts': ['Where does <b>Vera</b> live?', 'Two?', 'c', 'd', 'e'],
    'stages': {
      'dpo': ['Of course: Ely.', '', 'x', 'x', 'x'],
      'untrained': ['\u202eqzx', 'q'],
      'pretrain': [' Ely.\nWho', 'b', 'x', 'x', 'x'],
    },
    'expected': ['Ely'],
  }
  write(life, answers=answers)
  text, found = shown(life)
  said = found.text[found.text.index('Where does <b>Vera</b>') :]
  first = said[: said.index('Two?')]
  assert re.sub(r'\s+', ' ', first).strip() == (
    'Where does <b>Vera</b> live? untrained \u202eqzx pretrain Ely. ↵ Who '
    'dpo Of course: Ely. in truth Ely'
  )
  assert '(nothing)' in found.text
  assert 'More of them: 1' in found.text
  assert '<b>' not in text


def test_calibration_is_read_from_its_bins_or_from_the_last_line(life):
  _, found = shown(life)
  labels = [one['aria-label'] for one in found.all('svg')]
  one = [x for x in labels if x.startswith('Calibration')]
  assert one == ['Calibration of the reward model. sure 90.0%, right 95.0%.']
  bins = {'confidence': [0.6, 0.9], 'accuracy': [0.5, 1.0], 'count': [1, 3]}
  write(life / 'reward', calibration=bins)
  _, found = shown(life)
  labels = [one['aria-label'] for one in found.all('svg')]
  one = [x for x in labels if x.startswith('Calibration')]
  assert one == [
    'Calibration of the reward model. sure 60.0%, right 50.0%, 1 pairs; '
    'sure 90.0%, right 100.0%, 3 pairs.'
  ]
  assert 'Brier score 0.05 (a coin: 0.25)' in found.text


def test_distance_is_held_against_what_it_bought(life):
  _, found = shown(life)
  labels = [one['aria-label'] for one in found.all('svg')]
  wins = next(x for x in labels if x.startswith('Win rate over SFT'))
  assert 'dpo: KL from SFT, nats an answer 2.5, wins over SFT 90.0%' in wins
  true = next(x for x in labels if x.startswith('True reward against KL'))
  assert 'sft: KL from where it began, nats an answer 0, true' in true
  assert 'ppo: KL from where it began, nats an answer 4, true reward 1' in true
  rows = next(x for x in labels if x.startswith('Before and after GRPO'))
  assert 'exact answers: before 30.0%, after 61.0%' in rows
  dead = next(x for x in labels if x.startswith('Dead groups'))
  assert 'ppo: 25.0% at 1, 25.0% at 2. grpo: 25.0%' in dead
  assert sum(x.startswith('Proxy and true reward') for x in labels) == 2


def test_one_stage_without_a_summary_is_told_with_what_is_missing(tmp_path):
  make_run(tmp_path / 'sft', 'sft', [train(1)])
  _, found = shown(tmp_path)
  assert 'summary.json is not there' in found.text
  assert 'pretrain has not run here.' in found.text
  assert 'through 1 stage of training' in found.text


def test_a_run_that_has_no_place_in_the_order_comes_last(life):
  make_run(life / 'gamed', 'sft', [train(1, true_reward=0.1, reward=9.0)])
  text, found = shown(life)
  table = text[text.index('id="stages"') : text.index('id="language"')]
  assert re.findall(r'class="stage c-(\w+)"', table)[-1] == 'other'
  assert 'gamed: proxy against true reward' in found.text


@pytest.mark.parametrize(
  ('name', 'value'),
  [('summary', '{'), ('summary', '[1]'), ('summary', '{"sft": 3}')],
)
def test_a_damaged_summary_is_one_line(life, name, value):
  (life / f'{name}.json').write_text(value)
  with pytest.raises(UserError, match='summary') as error:
    report.write(life)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'value', [[], {'prompts': 3}, {'prompts': ['a'], 'stages': {'sft': [None]}}]
)
def test_answers_of_another_form_are_left_out_and_named(life, value):
  write(life, answers=value)
  _, found = shown(life)
  assert 'answers.json is not of the form that is read' in found.text


def test_a_life_of_many_long_stages_stays_small(life):
  names = [f'metric_{i}' for i in range(12)]
  start = [('init_from', str(life / 'pretrain'))]
  for name in ('lora', 'qlora', 'distill', 'gamed', 'more'):
    lines = [
      train(s, **dict.fromkeys((*names, 'kl', 'reward'), s % 7 + 0.123456))
      for s in range(1, 400)
    ]
    make_run(life / name, 'sft', lines, start)
  assert report.write(life).stat().st_size < 700_000


def test_a_hostile_life_stays_text_and_small(life):
  bad = '</script><img src=x onerror=alert(1)>'
  write(
    life,
    summary=SUMMARY | {bad[:8] + 'x': {bad: 1.0}},
    answers={'prompts': [bad * 999], 'stages': {bad: [bad * 999]}},
  )
  text, found = shown(life)
  assert '<img' not in text
  assert not found.all('img')
  assert len(text.encode()) < 1_000_000
