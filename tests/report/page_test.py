import base64
import hashlib
import json
import re

import pytest
from html_page import Page
from made_runs import heldout, make_run, train

from tpu_lm import report
from tpu_lm.errors import UserError
from tpu_lm.report import page, records, rollouts

HOSTILE = '</script><img src=x onerror=alert(1)>"\'&{0}{name}%s'


def shown(folder):
  text = report.write(folder).read_text(encoding='utf-8')
  return text, Page(text)


@pytest.fixture
def run(tmp_path):
  lines = [train(step, gradient_norm=1.0) for step in (10, 20, 30)]
  lines.append(heldout(30, loss=1.25, bits_per_byte=0.5))
  return make_run(tmp_path / 'mine', lines=lines)


def test_the_page_tells_what_a_run_is_and_came_to(run):
  text, found = shown(run)
  assert found.all('html') == [{'lang': 'en'}]
  assert '<title>mine: a run of pretrain</title>' in text
  for said in (
    'trained for 30 steps on 3.00 k tokens of tfds:world/text@train, in 15 s',
    'qwen3, 4 layers of width 128',
    '30 of 1,500: not finished',
    '--config=configs/quickstart.py',
    'Bits per byte',
    'Gradient norm',
  ):
    assert said in found.text, said
  row = re.search(r'<tr><th scope="row">Loss.*?</tr>', text, re.S)[0]
  assert re.findall(r'>([\d.]+)</td>', row) == ['1', '1.25']  # train, held out
  labels = [one['aria-label'] for one in found.all('svg')]
  assert len(labels) == 4
  assert all(labels)
  assert any(
    label.startswith('Loss, by step. train: 3 at 10, 1 at 30.')
    for label in labels
  )


def test_the_same_run_gives_the_same_bytes(run):
  first = report.write(run).read_bytes()
  assert report.write(run).read_bytes() == first
  other = report.write(run, run.parent / 'new' / 'page.html')
  assert other == run.parent / 'new' / 'page.html'
  assert other.read_bytes() == first
  assert [p.name for p in other.parent.iterdir()] == ['page.html']


def test_the_page_asks_nothing_of_the_network(run):
  text, found = shown(run)
  for tag, attributes in found.tags:
    assert tag not in ('img', 'iframe', 'object', 'embed', 'base')
    for name in ('src', 'srcset', 'data', 'action'):
      assert name not in attributes, (tag, attributes)
    link = attributes.get('href', '#')
    assert link.startswith('#') or link == 'data:,'
  style = re.search(r'<style>(.*?)</style>', text, re.S)[1]
  assert 'url(' not in style
  assert '@import' not in style
  assert 'prefers-color-scheme: dark' in style


def test_no_script_runs_but_the_page_s_own(run):
  text, found = shown(run)
  scripts = re.findall(r'<script>(.*?)</script>', text, re.S)
  assert len(scripts) == len(found.all('script')) == 1
  digest = hashlib.sha256(scripts[0].encode()).digest()
  policy = next(m for m in found.all('meta') if 'http-equiv' in m)['content']
  assert "default-src 'none'" in policy
  assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy


def test_hostile_text_stays_text(tmp_path):
  lines = [
    train(1, **{HOSTILE: 1.0, 'reward': 1.0}),
    train(2, **{HOSTILE: 2.0, 'reward': 2.0}),
    {'step': 2, 'split': HOSTILE, 'loss': 1.0},
  ]
  run = make_run(tmp_path / 'mine', 'sft', lines, [('data.source', HOSTILE)])
  (run / 'rollouts').mkdir()
  rollout = {'prompt': HOSTILE, 'text': HOSTILE + '\ud800\x00', 'reward': 1}
  (run / 'rollouts' / '1.jsonl').write_text(json.dumps(rollout))
  text, found = shown(run)
  assert '<img' not in text
  assert text.count('<script>') == text.count('</script>') == 1
  assert not found.all('img')
  assert not any('onerror' in attributes for _, attributes in found.tags)
  assert found.text.count(HOSTILE) >= 3  # as it was written
  assert '\x00' not in text


def test_what_is_not_finite_is_marked_and_counted(tmp_path):
  lines = [
    train(1),
    train(2, loss=None, nonfinite=['loss']),
    train(3, loss=float('nan')),  # as a foreign writer has it
    train(4, gradient_norm=float('inf')),
  ]
  run = make_run(tmp_path / 'mine', lines=lines)
  text, found = shown(run)
  assert text.count('train: not finite (2)') == 1
  assert text.count('train: not finite (3)') == 1
  assert '1 line(s) of metrics.jsonl hold values' in found.text
  assert not re.search(r'="[^"]*\b(nan|inf)\b', text)


def test_where_the_time_went(tmp_path):
  parts = {'step': 6.0, 'compile': 3.0, 'start_up': 1.0, HOSTILE: 'much'}
  ledger = {'step': 10, 'split': 'goodput', 'parts': parts}
  run = make_run(tmp_path / 'mine', lines=[train(10), ledger])
  text, found = shown(run)
  assert 'Goodput 60.0%' in found.text
  assert 'Where the time went' in found.text
  labels = [one['aria-label'] for one in found.all('svg')]
  assert any(
    'step: step 60.0%; compile: compile 30.0%; start-up' in label
    for label in labels
  ), labels
  assert 'goodput' not in text.replace('Goodput', '')  # it is no split


def test_a_torn_last_line_is_left_out(run):
  whole = report.write(run).read_bytes()
  with open(run / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 40, "spl')
  assert report.write(run).read_bytes() == whole


@pytest.mark.parametrize('there', [True, False])
def test_a_run_without_figures_says_so(tmp_path, there):
  run = make_run(tmp_path / 'mine')
  if not there:
    (run / 'metrics.jsonl').unlink()
  _, found = shown(run)
  assert 'no step was reported' in found.text
  assert not found.all('svg')


def test_rollouts_are_shown_from_the_first_step_and_the_last(tmp_path):
  run = make_run(tmp_path / 'mine', lines=[train(1, true_reward=0.5)])
  (run / 'rollouts').mkdir()
  for step in (2, 10):  # 10 comes after 2, though not by the alphabet
    with open(run / 'rollouts' / f'step-{step}.jsonl', 'w') as file:
      for i in range(9):
        prompt = [{'role': 'user', 'content': f'question {step}'}]
        line = {'prompt': prompt, 'text': f'answer {i}', 'reward': i / 8}
        file.write(json.dumps(line | {'step': step}) + '\n')
      file.write('torn {')
  _, found = shown(run)
  said = found.text[found.text.index('Best, middle') :]
  order = re.findall(r'(\S+) step (\d+) question \d+ answer (\d)', said)
  assert order == [
    ('1', '2', '8'),
    ('0.5', '2', '4'),
    ('0', '2', '0'),
    ('1', '10', '8'),
    ('0.5', '10', '4'),
    ('0', '10', '0'),
  ]


def test_of_a_long_file_both_ends_are_read(tmp_path, monkeypatch):
  run = make_run(tmp_path / 'mine', lines=[train(1)])
  (run / 'rollouts').mkdir()
  lines = [
    {'prompt': 'q', 'text': f'at {s}', 'reward': 1.0, 'step': s}
    for s in range(1, 500)
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (run / 'rollouts' / 'rollouts.jsonl').write_text(text)
  monkeypatch.setattr(rollouts, '_READ', 1000)
  assert [one.step for one in rollouts.samples(run)] == [1, 499]


def test_a_long_run_stays_small(tmp_path):
  names = [f'metric_{i}' for i in range(40)]
  lines = [
    train(step, **dict.fromkeys(names, step % 97 / 7))
    for step in range(1, 3001)
  ]
  run = make_run(tmp_path / 'mine', lines=lines)
  assert report.write(run).stat().st_size < 500_000


def test_proxy_and_truth_stand_in_one_chart(tmp_path):
  lines = [train(s, reward=s / 10, true_reward=1 - s / 10) for s in (1, 2, 3)]
  run = make_run(tmp_path / 'mine', 'sft', lines)
  _, found = shown(run)
  labels = [one['aria-label'] for one in found.all('svg')]
  both = [label for label in labels if 'True reward: 0.9' in label]
  assert len(both) == 1
  assert 'Reward: 0.1 at 1, 0.3 at 3.' in both[0]


@pytest.mark.parametrize(
  ('make', 'said'),
  [
    (lambda d: None, 'no such folder'),
    (lambda d: d.mkdir(), 'no run is there'),
    (lambda d: d.write_text('x'), 'no such folder'),
    (lambda d: _files(d, {'config.json': '{'}), 'no configuration'),
    (lambda d: _files(d, {'config.json': '[1]'}), 'no configuration'),
    (
      lambda d: _files(d, {'config.json': '{"data": 3}'}),
      'no configuration',
    ),
    (
      lambda d: _files(d, {'config.json': '{}', 'metrics.jsonl': 'x\ny\n'}),
      'metrics.jsonl:1',
    ),
  ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, make, said):
  make(tmp_path / 'there')
  with pytest.raises(UserError, match=said) as error:
    report.write(tmp_path / 'there')
  assert '\n' not in str(error.value)
  assert not list(tmp_path.rglob('*.html'))


def _files(folder, files):
  folder.mkdir()
  for name, text in files.items():
    (folder / name).write_text(text)


def test_a_file_that_cannot_be_written_is_named(run, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot be written'):
    report.write(run, tmp_path / 'file' / 'page.html')


def _palettes():
  style = (page._HERE / 'style.css').read_text()
  light, dark = style.split('prefers-color-scheme: dark')
  colours = re.compile(r'--(\w+): #(\w\w)(\w\w)(\w\w)')
  return [
    {name: [int(v, 16) / 255 for v in rgb] for name, *rgb in colours.findall(t)}
    for t in (light, dark)
  ]


def _luminance(rgb):
  linear = [
    v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb
  ]
  return sum(
    w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
  )


@pytest.mark.parametrize('palette', _palettes(), ids=['light', 'dark'])
def test_every_colour_of_text_can_be_read(palette):
  paper = _luminance(palette['paper'])
  names = palette.keys() - {'paper', 'raised', 'hair'}
  assert len(names) >= 16
  for name in names:
    low, high = sorted((paper, _luminance(palette[name])))
    assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_what_a_stage_has_answered_counts_as_its_tokens(tmp_path):
  """Four updates a step, of which the last is logged."""
  lines = [train(step, tokens=0, targets=10.0 * step) for step in (10, 20)]
  found = records.read(make_run(tmp_path / 'run', 'ppo', lines))
  assert found.tokens == 150 * 4 * 20
