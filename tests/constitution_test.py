"""Revisions and preferences by principles, checked against known rules."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny
from judging import chat_server

from tpu_lm import config as configs
from tpu_lm import constitution, run
from tpu_lm.data import records
from tpu_lm.errors import UserError
from tpu_lm.judging import backends

PRINCIPLES = [
  {'critic': f'Is it {x}?', 'revision': f'Make it {x}.'}
  for x in ('kind', 'brief', 'true')
]
COUNT = 24


def speak(body):
  """A model that follows rules, one for each thing that it is asked."""
  messages = body['messages']
  last = messages[-1]['content']
  if messages[0]['role'] == 'system' and 'compare' in messages[0]['content']:
    return chat_server.letters_e(messages)
  said = [m['content'] for m in messages if m['role'] == 'assistant']
  if last.startswith('Make it'):
    what = last.split('\n')[0].removeprefix('Make it ').removesuffix('.')
    return f'{said[-2]} {what}'
  if last.startswith('Is it'):
    return f'critique of "{said[-1]}"'
  # Answers with 0 to 3 letters e, by prompt and seed.
  drawn = hashlib.sha256(f'{last}{body["seed"]}'.encode()).digest()[0] % 4
  return 'y' + 'e' * drawn


@pytest.fixture
def server():
  with chat_server.serving(None) as server:
    server.drawn = speak
    yield server


@pytest.fixture
def files(tmp_path):
  """(principles, prompts)."""
  rules = tmp_path / 'rules.json'
  rules.write_text(json.dumps({'constitutions': PRINCIPLES}))
  asked = [{'prompt': f'Question {n}?'} for n in range(COUNT)]
  return rules, written(tmp_path / 'asked.jsonl', asked)


def written(path, lines):
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def made(server, files, to, **options):
  rules, asked = files
  shared = {
    'backend': server and server.url, 'model': 'm', 'principles': str(rules),
    'source': str(asked), 'report': lambda _: None,
  }  # fmt: skip
  return constitution.prepare(to, **shared | options)


def content(folder):
  """Of all files; the summary without the name of the source."""
  found = {path.name: path.read_text() for path in folder.iterdir()}
  summary = json.loads(found['summary.json'])
  return found | {'summary.json': summary | {'source': ''}}


def test_revisions_are_what_is_trained(server, files, tmp_path):
  to = tmp_path / 'made'
  counts = made(server, files, to, rounds=2)
  assert counts['sft'] == counts['prompts'] == COUNT
  assert counts['sft_refused'] == counts['sft_unchanged'] == 0
  assert sorted(path.name for path in to.iterdir()) == [
    'sft.jsonl', 'steps.jsonl', 'summary.json'
  ]  # fmt: skip
  assert not to.with_name('made.tmp').exists()
  assert len(server.asked) == COUNT * 5  # answer, 2 * (critique, revision)
  data, steps = lines(to / 'sft.jsonl'), lines(to / 'steps.jsonl')
  asked = set()
  for one, step in zip(data, steps, strict=True):
    answer, (first, second) = step['answers'][0], step['rounds']
    drawn = [part['principle'][6:-1] for part in (first, second)]
    assert first['critique'] == f'critique of "{answer}"'
    assert first['revision'] == f'{answer} {drawn[0]}'
    # The second round goes on from the first.
    assert second['critique'] == f'critique of "{first["revision"]}"'
    assert second['revision'] == f'{answer} {drawn[0]} {drawn[1]}'
    assert one['messages'][-1]['content'] == second['revision']
    assert one['messages'][:-1] == step['prompt']
    _, chat = records.canonical(one, 'chat')
    asked.add(chat.messages[0]['content'])
  assert asked == {f'Question {n}?' for n in range(COUNT)}
  used = {part['principle'] for step in steps for part in step['rounds']}
  assert used == {one['critic'] for one in PRINCIPLES}
  # No two rounds alike: 1 of 3 by chance.
  alike = sum(
    s['rounds'][0]['principle'] == s['rounds'][1]['principle'] for s in steps
  )
  assert 0 < alike < COUNT


def test_preferences_follow_the_rule_of_the_judge(server, files, tmp_path):
  to = tmp_path / 'made'
  counts = made(server, files, to, kind='pairs')
  pairs, steps = lines(to / 'pairs.jsonl'), lines(to / 'steps.jsonl')
  expected = {}
  for step in steps:
    one, other = (text.count('e') for text in step['answers'])
    if one != other:
      expected[step['prompt'][0]['content']] = (
        max(one, other),
        min(one, other),
      )
  found = {
    pair['prompt'][0]['content']: tuple(
      pair[name].count('e') for name in ('chosen', 'rejected')
    )
    for pair in pairs
  }
  assert found == expected
  assert 10 < len(found) < COUNT  # three of four differ
  assert counts['pairs'] == len(found)
  assert counts['pairs_tied'] == COUNT - len(found)
  assert {step['choice']['better'] for step in steps} == {
    'first', 'second', 'tie'
  }  # fmt: skip
  judged = [step for step in steps if step['choice']['replies']]
  assert all(len(step['choice']['replies']) == 2 for step in judged)
  for pair in pairs:
    records.canonical(pair, 'pairs')
  # Two answers each, and two orders where they differ.
  assert len(server.asked) == COUNT * 2 + len(found) * 2


def test_both_share_the_first_answer(server, files, tmp_path):
  counts = made(server, files, tmp_path / 'both', kind='both')
  made(server, files, tmp_path / 'sft')
  assert counts['sft'] == COUNT
  assert counts['pairs'] > 10
  asked = [lines(tmp_path / name / 'steps.jsonl') for name in ('both', 'sft')]
  assert [s['answers'][0] for s in asked[0]] == [
    s['answers'][0] for s in asked[1]
  ]
  assert (tmp_path / 'both/sft.jsonl').read_text() == (
    tmp_path / 'sft/sft.jsonl'
  ).read_text()


def test_neither_order_nor_neighbours_change_a_byte(server, files, tmp_path):
  rules, asked = files
  made(server, files, tmp_path / 'one', kind='both')
  shuffled = lines(asked)
  random.Random(0).shuffle(shuffled)
  # A prompt that is there twice is asked once; and other forms are the same.
  shuffled += shuffled[:3]
  shuffled[5] = {'messages': [
    {'role': 'user', 'content': shuffled[5]['prompt']},
    {'role': 'assistant', 'content': 'An answer that is left out.'},
  ]}  # fmt: skip
  other = (rules, written(tmp_path / 'other.jsonl', shuffled))
  counts = made(server, other, tmp_path / 'two', kind='both', cache='')
  assert counts['repeated'] == 3
  one, two = content(tmp_path / 'one'), content(tmp_path / 'two')
  two['summary.json']['counts']['repeated'] = 0
  assert one == two
  made(server, files, tmp_path / 'three', kind='both', seed=1)
  three = content(tmp_path / 'three')
  assert three['steps.jsonl'] != one['steps.jsonl']
  # Of a part of the prompts, every line is one of the whole.
  counts = made(server, files, tmp_path / 'four', kind='both', limit=7)
  assert counts['prompts'] == 7
  four = (tmp_path / 'four/steps.jsonl').read_text().splitlines()
  assert set(four) < set(one['steps.jsonl'].splitlines())


def test_a_run_that_was_stopped_pays_for_nothing_twice(server, files, tmp_path):
  made(server, files, tmp_path / 'whole', kind='both')
  whole, server.asked[:] = len(server.asked), []
  to, paid = tmp_path / 'made', 0
  for limit in (10, 30, 40):
    with pytest.raises(UserError, match=f'max_calls={limit} would be passed'):
      made(server, files, to, kind='both', max_calls=limit)
    assert not to.exists()
    assert not to.with_name('made.tmp').exists()
    paid += limit
  to.with_name('made.tmp').mkdir()  # as a run that was killed leaves it
  made(server, files, to, kind='both', max_calls=whole - paid)
  assert len(server.asked) == whole
  assert content(to) == content(tmp_path / 'whole')
  with pytest.raises(UserError, match='is there already'):
    made(server, files, to)


_KILLED = """
import sys
from tpu_lm import constitution
constitution.prepare(
  sys.argv[1], backend=sys.argv[2], model='m', principles=sys.argv[3],
  source=sys.argv[4], kind='both',
)
"""


def test_a_run_that_was_killed_goes_on(server, files, tmp_path):
  made(server, files, tmp_path / 'whole', kind='both')
  whole, server.asked[:] = len(server.asked), []
  server.pause, to = 0.05, tmp_path / 'made'
  run_ = subprocess.Popen(
    [sys.executable, '-c', _KILLED, to, server.url, *map(str, files)],
    stdout=subprocess.DEVNULL,
  )
  while len(server.asked) < 70 and run_.poll() is None:
    time.sleep(0.005)
  run_.kill()
  assert run_.wait() == -signal.SIGKILL
  assert not to.exists()
  server.pause = 0.0
  made(server, files, to, kind='both')
  assert content(to) == content(tmp_path / 'whole')
  # Only what was under way is lost: 8 calls side by side.
  assert whole <= len(server.asked) <= whole + 8


def test_bad_answers_are_refused_and_counted(server, files, tmp_path):
  def rule(body):
    asked = body['messages'][0]['content']
    said = speak(body)
    late = len(body['messages']) > 1
    if 'Question 3?' in asked and not late:
      return ' '
    if 'Question 4?' in asked and said.startswith('critique'):
      return ''
    if 'Question 5?' in asked and late and not said.startswith('critique'):
      return '<think>so many thoughts'
    return said

  server.drawn = rule
  to = tmp_path / 'made'
  counts = made(server, files, to)
  assert (counts['sft'], counts['sft_refused']) == (COUNT - 3, 3)
  steps = {s['prompt'][0]['content']: s for s in lines(to / 'steps.jsonl')}
  assert len(steps) == COUNT
  assert [steps[f'Question {n}?']['refused'] for n in (3, 4, 5, 6)] == [
    {'sft': 'the answer is empty'}, {'sft': 'critique 1 is empty'},
    {'sft': 'revision 1 is empty'}, {},
  ]  # fmt: skip
  said = r'sft: the answers to 3 of 24 prompts are empty or cut off'
  with pytest.raises(UserError, match=said):
    made(server, files, tmp_path / 'again', max_bad_share=0.1)
  assert not (tmp_path / 'again').exists()


def test_answers_that_were_cut_off_are_no_pairs(server, files, tmp_path):
  server.faults = ['length'] * 5
  counts = made(server, files, tmp_path / 'made', kind='pairs')
  # Which five calls came first is by chance: they are of 3 to 5 prompts.
  assert 3 <= counts['pairs_refused'] <= 5


def test_a_judge_that_cannot_be_read_gives_no_pairs(server, files, tmp_path):
  with chat_server.serving(lambda _: 'hm') as judge:
    others = {'judge': judge.url, 'judge_model': 'm', 'retries': 1}
    with pytest.raises(UserError, match=r'pairs: nothing is left to write'):
      made(server, files, tmp_path / 'made', kind='pairs', **others)
    assert judge.asked
    # A limit is of both together.
    told = len(server.asked) + len(judge.asked)
    with pytest.raises(UserError, match='max_calls=50'):
      made(
        server, files, tmp_path / 'made', kind='pairs', max_calls=50, seed=1,
        **others,
      )  # fmt: skip
    assert len(server.asked) + len(judge.asked) == told + 50


def test_a_request_that_fails_stops_before_anything_is_written(
  server, files, tmp_path
):
  server.faults = [400]
  with pytest.raises(UserError, match=r'1 of 24 requests failed \(HTTP 400'):
    made(server, files, tmp_path / 'made')
  assert not (tmp_path / 'made').exists()
  made(server, files, tmp_path / 'made')
  assert len(server.asked) == COUNT * 3 + 1


def test_what_is_told(server, files, tmp_path):
  said = []
  made(server, files, tmp_path / 'made', kind='both', report=said.append)
  assert said[0] == '24 prompts, 3 principles'
  assert said[1].startswith('answers: 48 calls, 96 prompt and 48 completion')
  assert [x.split(':')[0] for x in said[2:4]] == [
    'revisions 1 of 1', 'preferences'
  ]  # fmt: skip
  assert '24 sft' in said[4]


@pytest.mark.parametrize(('options', 'said'), [
  ({'kind': 'dpo'}, 'must be sft, pairs, both'),
  ({'rounds': 0}, 'rounds=0'),
  ({'limit': -1}, 'limit=-1'),
  ({'kind': 'pairs', 'temperature': 0.0}, 'would be the same'),
  ({'principles': 'none.md'}, 'cannot be read'),
  ({'source': 'none.jsonl'}, 'no such file'),
])  # fmt: skip
def test_mistakes_are_named(server, files, tmp_path, options, said):
  with pytest.raises(UserError, match=said):
    made(server, files, tmp_path / 'made', **options)
  assert not server.asked


def test_prompts_with_tools_are_left_out(server, files, tmp_path):
  tool = {'type': 'function', 'function': {'name': 'f', 'parameters': {}}}
  asked = [{'prompt': 'One?'}, {'prompt': 'Two?', 'tools': [tool]}]
  other = (files[0], written(tmp_path / 'tools.jsonl', asked))
  counts = made(server, other, tmp_path / 'made')
  assert (counts['prompts'], counts['with_tools']) == (1, 1)


CONFIG = """
from tpu_lm import config as configs


def get_config():
  config = configs.base()
  config.steps = 60
  config.batch_size = 8
  config.stage_name = 'sft'
  config.data.length = 256
  config.data.tokenizer = 'byte'
  config.model_name = 'qwen3'
  config.model.num_layers = 2
  config.model.dim = 32
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.hidden_dim = 48
  config.optimizer.learning_rate = 0.01
  config.optimizer.warmup = 0
  config.mesh.data = 1
  return config
"""


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A model that has learnt to answer in a word, and to stop."""
  folder = tmp_path_factory.mktemp('policy')
  talks = []
  for n in range(64):
    # Answers, critiques and revisions are words of y and e alike.
    said = [
      {'role': role, 'content': text}
      for turn, asked in enumerate((f'Question {n}?', 'Is it kind?', 'Be so.'))
      for role, text in (
        ('user', asked), ('assistant', 'y' + 'e' * ((n + turn) % 4))
      )
    ]  # fmt: skip
    talks.append({'messages': said})
  source = written(folder / 'talks.jsonl', talks)
  (folder / 'tune.py').write_text(CONFIG)
  config = configs.load(
    str(folder / 'tune.py'),
    [('data.source', str(source)), ('data.dir', str(folder / 'rows'))],
  )
  run.execute(config, folder / 'policy', lambda _: None)
  return folder / 'policy'


def test_a_model_of_ours_with_a_judge_behind_an_endpoint(
  workdir, server, files, tmp_path
):
  rules = written(
    tmp_path / 'rules.jsonl', [{'critic': 'Is it kind?', 'revision': 'Be so.'}]
  )
  options = {
    'backend': str(workdir), 'model': '', 'judge': server.url,
    'judge_model': 'm', 'kind': 'both', 'max_new_tokens': 16,
  }  # fmt: skip
  told = made(server, (rules, files[1]), tmp_path / 'one', **options)
  assert told['sft'] >= COUNT // 2
  assert told['pairs'] >= 3
  for pair in lines(tmp_path / 'one/pairs.jsonl'):
    assert pair['chosen'].count('e') > pair['rejected'].count('e')
  # Without its cache, and in other batches, it writes the same.
  rules_ = (rules, files[1])
  judged = len(server.asked)
  made(server, rules_, tmp_path / 'two', **options, cache=str(tmp_path / 'c'))
  assert content(tmp_path / 'one') == content(tmp_path / 'two')
  assert len(server.asked) == 2 * judged
  # With it, nothing is computed again.
  with backends.make(str(workdir), cache=str(tmp_path / 'c')) as backend:
    constitution.write(
      backend, rules, str(files[1]), tmp_path / 'three', max_new_tokens=16,
      report=lambda _: None,
    )  # fmt: skip
    assert backend.price.calls == 0
    assert backend.price.kept > 2 * COUNT


def test_the_teacher_of_other_tests_does_not_end_its_answers(files, tmp_path):
  """A model that was never fine-tuned is refused with the reason."""
  teacher, _ = tiny.teacher()
  with pytest.raises(UserError, match='is the model fine-tuned'):
    made(None, files, tmp_path / 'made', backend=teacher, model='',
         max_new_tokens=2, limit=4)  # fmt: skip
  assert not (tmp_path / 'made').exists()
