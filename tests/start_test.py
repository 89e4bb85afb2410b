"""What runs start from: bases, adapters alone, kept columns, merging."""

import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny

from tpu_lm import checkpoint, metrics, run, start, weights
from tpu_lm import config as configs
from tpu_lm.data import chat
from tpu_lm.errors import UserError
from tpu_lm.evals import heldout
from tpu_lm.generate import answer_file, answers
from tpu_lm.generate.sampler import Sampler
from tpu_lm.models import transformer

PLAIN = {'mesh.data': 1, 'optimizer.schedule': 'constant'}
LORA = {'transforms': 'lora(rank=2, alpha=4)'}
QLORA = {'transforms': 'nf4, lora(rank=2, alpha=4)'}
CHAT = {'stage_name': 'sft', 'data.length': 64, 'optimizer.weight_decay': 0.0}
DPO = CHAT | {'stage_name': 'dpo', 'evals': "('heldout',)"}

# Without any key of the network: it comes from init_from.
CONFIG = """
from tpu_lm import config as configs


def get_config():
  config = configs.base()
  config.steps = 4
  config.batch_size = 4
  config.log_every = 1
  config.eval_every = 2
  config.checkpoint.every = 2
  config.data.heldout_share = 0.2
  config.optimizer.learning_rate = 0.01
  config.optimizer.warmup = 0
  return config
"""


def quiet(_):
  """Takes what a run reports."""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A base model, conversations, pairs and a configuration of them."""
  folder = tmp_path_factory.mktemp('starts')
  run.execute(tiny.config(folder, steps=4, **PLAIN), folder / 'base', quiet)
  (folder / 'tune.py').write_text(CONFIG)
  names = ('an oak', 'a cat', 'a key', 'a map')
  chats, pairs = [], []
  for n in range(40):
    question, thing = f'What is {n}?', names[n % 4]
    chats.append({'prompt': question, 'completion': f'It is {thing}.'})
    pairs.append({'prompt': question, 'chosen': thing, 'rejected': f'no {n}'})
  for name, records in (('chats', chats), ('pairs', pairs)):
    lines = ''.join(json.dumps(record) + '\n' for record in records)
    (folder / f'{name}.jsonl').write_text(lines)
  return folder


def config(folder, **overrides):
  kind = 'chats' if overrides['stage_name'] == 'sft' else 'pairs'
  shared = {
    'data.source': folder / f'{kind}.jsonl',
    'data.dir': folder / 'rows',
    'init_from': folder / 'base',
  }
  given = shared | PLAIN | overrides
  return configs.load(
    str(folder / 'tune.py'), [(k, str(v)) for k, v in given.items()]
  )


def lines(workdir, split):
  found = metrics.read(workdir / 'metrics.jsonl')
  return [line for line in found if line['split'] == split]


def trained(folder, name, **overrides):
  workdir = folder / name
  run.execute(config(folder, **overrides), workdir, quiet)
  return workdir


@pytest.fixture(scope='module')
def full(folder):
  return trained(folder, 'full', **CHAT)


@pytest.fixture(scope='module')
def lora(folder):
  return trained(folder, 'lora', **CHAT | LORA)


@pytest.fixture(scope='module')
def dpo(folder):
  return trained(folder, 'dpo', **DPO)


def logits(loaded):
  tokens = np.arange(5, 13, dtype=np.int32)[None]
  hidden = loaded.model.apply({'params': loaded.params}, tokens)
  return transformer.logits(loaded.model.config, loaded.params, hidden)


def test_a_run_takes_network_and_tokenizer_from_what_it_starts_from(
  folder, full
):
  base = start.load(folder / 'base')
  loaded = start.load(full)
  assert loaded.model.config.dim == base.model.config.dim == 32
  assert loaded.tokenizer.digest == base.tokenizer.digest
  losses = [line['loss'] for line in lines(full, 'heldout')]
  assert [line['step'] for line in lines(full, 'heldout')] == [0, 2, 4]
  assert losses[-1] < losses[0]


def test_another_network_is_refused_by_the_name_of_the_array(folder):
  wrong = config(folder, **CHAT | {'model.dim': 64})
  with pytest.raises(UserError, match=r'init_from=.*has the shape'):
    run.execute(wrong, folder / 'wrong', quiet)
  with pytest.raises(UserError, match='no working directory'):
    config(folder, **CHAT | {'init_from': folder / 'bse'})


def test_an_adapter_is_saved_alone(full, lora):
  def saved(workdir):
    steps = checkpoint.Checkpoints(workdir / 'checkpoints', read_only=True)
    arrays = steps.content(4)['arrays']
    return {k: v for k, v in arrays.items() if k.startswith('params/')}

  # Of the files themselves, Orbax's own records are most at this size.
  sizes = [
    sum(math.prod(shape) for shape, *_ in saved(workdir).values())
    for workdir in (lora, full)
  ]
  assert 0 < sizes[0] < 0.2 * sizes[1]
  assert all(name.rsplit('/')[-1] in ('a', 'b') for name in saved(lora))


def test_an_adapter_loads_onto_its_base_and_nothing_else(folder, lora):
  moved = folder / 'moved'
  shutil.copytree(folder / 'base', moved)
  np.testing.assert_array_equal(
    logits(start.load(lora)), logits(start.load(lora, base=str(moved)))
  )
  other = folder / 'other'
  run.execute(tiny.config(folder, steps=4, seed=1, **PLAIN), other, quiet)
  with pytest.raises(UserError, match='is not the base that was trained on'):
    start.load(lora, base=str(other))


@pytest.mark.parametrize(
  'kind', ['lora', pytest.param('qlora', marks=pytest.mark.slow)]
)
def test_a_merged_model_gives_the_logits_of_its_adapter(folder, kind):
  transforms = {'lora': LORA, 'qlora': QLORA}[kind]
  workdir = trained(folder, f'merging-{kind}', **CHAT | transforms)
  start.merge(workdir, folder / f'merged-{kind}')
  with_adapter = logits(start.load(workdir))
  merged = start.load(folder / f'merged-{kind}')
  np.testing.assert_allclose(with_adapter, logits(merged), atol=2e-5)
  assert not weights.is_adapted(merged.params)
  with pytest.raises(UserError, match='is there already'):
    start.merge(workdir, folder / f'merged-{kind}')
  # A stage starts from an adapter's run as from any other.
  again = trained(
    folder, f'again-{kind}', **CHAT | {'init_from': workdir, 'steps': 1}
  )
  first = lines(again, 'heldout')[0]['loss']
  assert first == pytest.approx(lines(workdir, 'heldout')[-1]['loss'], rel=1e-4)


@pytest.mark.parametrize(
  'transforms', [{}, LORA, pytest.param(QLORA, marks=pytest.mark.slow)]
)
def test_a_resumed_run_ends_in_the_same_bits(folder, transforms):
  name = transforms.get('transforms', 'plain')[:3]
  whole = trained(folder, f'whole-{name}', **DPO | transforms)
  trained(folder, f'half-{name}', **DPO | transforms | {'steps': 2})
  half = trained(folder, f'half-{name}', **DPO | transforms)
  leaves = [
    jax.tree.leaves(start.load(workdir).params) for workdir in (whole, half)
  ]
  for a, b in zip(*leaves, strict=True):
    np.testing.assert_array_equal(a, b)


def test_partial_training_changes_the_chosen_layers_alone(folder):
  workdir = trained(folder, 'top', **CHAT | {'trainable': 'top:1'})
  before = start.load(folder / 'base').params['layers']
  after = start.load(workdir).params['layers']

  def moved(a, b):
    return [not np.array_equal(x, y) for x, y in zip(a, b, strict=True)]

  changed = jax.tree.map(moved, before, after)
  for first, last in np.reshape(jax.tree.leaves(changed), (-1, 2)):
    assert not first
    assert last


def test_the_first_loss_of_dpo_is_ln_2(dpo):
  assert lines(dpo, 'train')[0]['loss'] == pytest.approx(np.log(2), abs=1e-6)
  assert lines(dpo, 'heldout')[0]['loss'] == pytest.approx(np.log(2), abs=1e-6)


def test_kept_columns_are_computed_once(folder, dpo):
  said = []
  run.execute(config(folder, **DPO), dpo, said.append)
  assert not any('kept' in line for line in said)
  longer = trained_copy(dpo, folder / 'longer')
  run.execute(config(folder, **DPO | {'steps': 5}), longer, said.append)
  done = np.load(next(longer.glob('kept/train-*')) / 'done.npy')
  assert done.sum() == 5 * 4  # the rows of the steps, and no others
  assert said[-2].startswith('kept reference_chosen_logps')


def trained_copy(workdir: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
  shutil.copytree(workdir, to)
  return to


def test_on_the_fly_gives_the_same_run(folder, dpo):
  live = trained(folder, 'live', **DPO | {'stage.on_the_fly': True})
  for a, b in zip(lines(dpo, 'train'), lines(live, 'train'), strict=True):
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-5)
    assert a['rows_crc'] == b['rows_crc']
  assert not (live / 'kept').exists()


def test_rows_kept_with_another_base_are_refused(folder, dpo):
  other = trained_copy(dpo, folder / 'foreign')
  path = next(other.glob('kept/train-*')) / 'meta.json'
  about = json.loads(path.read_text())
  about['base']['fingerprint'] = 'another'
  path.write_text(json.dumps(about))
  with pytest.raises(UserError, match='computed with another base'):
    run.execute(config(folder, **DPO | {'steps': 5}), other, quiet)


def test_the_reference_of_a_resumed_run_is_where_it_began(folder):
  """Full tuning, on the fly: the current parameters would give ln 2 again."""
  live = DPO | {'stage.on_the_fly': True}
  trained(folder, 'resumed', **live | {'steps': 2})
  resumed = trained(folder, 'resumed', **live)
  whole = trained(folder, 'unbroken', **live)
  for a, b in zip(lines(resumed, 'train'), lines(whole, 'train'), strict=True):
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-6)


@pytest.mark.parametrize('name', ['dpo', 'live'])
def test_eval_gives_the_figures_of_the_run(folder, name):
  extra = {'stage.on_the_fly': True} if name == 'live' else {}
  workdir = trained(folder, name, **DPO | extra)
  found = tiny.figures(heldout, start.load(workdir), workdir)
  last = lines(workdir, 'heldout')[-1]
  for key in ('loss', 'accuracy', 'margin'):
    assert found[key] == pytest.approx(last[key], rel=1e-5)


def test_a_file_of_the_wrong_kind_is_refused_with_its_line(folder):
  wrong = CHAT | {'data.source': folder / 'pairs.jsonl'}
  with pytest.raises(UserError, match=r'pairs\.jsonl:1: these are pairs'):
    trained(folder, 'wrong-kind', **wrong)
  assert not (folder / 'wrong-kind' / 'config.json').exists()


def test_answers_are_those_of_single_conversations(folder, full):
  """Whatever their neighbours in the batch; and they can be trained on."""
  loaded = start.load(full)
  template = chat.load('', loaded.tokenizer, full / 'tokenizer')
  asked = [
    [{'role': 'user', 'content': f'What is {"so " * n}{n}?'}] for n in range(5)
  ]
  options = {
    'max_new_tokens': 8, 'sampler': Sampler(temperature=1.0), 'seed': 3
  }  # fmt: skip
  together = answers.answers(loaded, template, asked, **options)
  pairs = answers.answers(loaded, template, asked, slots=2, **options)
  assert [a.tokens for a in together] == [a.tokens for a in pairs]
  logps = answers.logps(loaded, template, asked, [a.tokens for a in together])
  expected = [sum(a.logps) for a in together]
  np.testing.assert_allclose(logps, expected, atol=1e-4)


def test_answers_that_never_end_are_not_written(folder, full):
  to = folder / 'answers.jsonl'
  with pytest.raises(UserError, match='none of its 40 answers ended'):
    answer_file.write(
      full, str(folder / 'chats.jsonl'), to,
      sampler=answers.GREEDY, max_new_tokens=1, seed=0,
    )  # fmt: skip
  assert not to.exists()


def test_the_best_of_some_answers_is_written(folder, full):
  (folder / 'long.py').write_text(
    'def size(sample):\n  return len(sample.text)\n'
  )
  reward, to = f'{folder}/long.py:size', folder / 'best.jsonl'
  options = {
    'sampler': Sampler(temperature=1.0), 'max_new_tokens': 24, 'seed': 0
  }  # fmt: skip
  best = answer_file.Best(4, reward, least=3.0)
  source = str(folder / 'chats.jsonl')
  answer_file.write(full, source, to, best=best, **options)
  loaded = start.load(full)
  template = chat.load('', loaded.tokenizer, full / 'tokenizer')
  asked = [q.messages for q, _ in answer_file.questions(source)]
  every = [messages for messages in asked for _ in range(4)]
  found = answers.answers(loaded, template, every, **options)
  expected = []
  for i, messages in enumerate(asked):
    ended = [a.text for a in found[4 * i : 4 * i + 4] if a.finished]
    longest = max(ended, key=len, default='')
    if len(longest) > 3:
      expected.append([*messages, {'role': 'assistant', 'content': longest}])
  lines = to.read_text().splitlines()
  written = [json.loads(line)['messages'] for line in lines]
  assert written == expected
  assert 0 < len(written) < len(asked)
  for best, message in (
    (answer_file.Best(2), 'needs a --reward'),
    (answer_file.Best(2, reward, 1e9), 'is better than --least'),
  ):
    with pytest.raises(UserError, match=message):
      answer_file.write(
        full, source, folder / 'none.jsonl', best=best, **options
      )
