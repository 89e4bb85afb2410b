"""Learning from rewards, end to end on a tiny model, and what it must hold."""

import json

import jax
import numpy as np
import pytest
import tiny
from stages_test import assert_close, gradient

from tpu_lm import check, drill, meters, metrics, run, stage, start, train
from tpu_lm import config as configs
from tpu_lm.errors import UserError
from tpu_lm.phases import Phases

PLAIN = {'mesh.data': 1, 'optimizer.schedule': 'constant'}
REWARDS = """
import math


def vowels(sample, per=10):
  return sum(c in 'aeiou' for c in sample.text) / per


def same(sample):
  return 1.0


def lost(sample):
  return math.nan if 'What is 3?' in sample.prompt[0]['content'] else 0.5


def odd(sample):
  number = int(sample.record['answer'])
  return len(sample.text) + number if number % 2 else 0.5


def digits(sample):
  return sum(c.isdigit() for c in sample.text) / 10
"""
CONFIG = """
from tpu_lm import config as configs


def get_config():
  config = configs.base()
  config.steps = 4
  config.batch_size = 4
  config.log_every = 1
  config.eval_every = 2
  config.checkpoint.every = 2
  config.data.length = 64
  config.data.heldout_share = 0.2
  config.optimizer.learning_rate = 0.01
  config.optimizer.warmup = 0
  config.evals = ()
  config.stage_name = 'grpo'
  config.stage.group = 4
  config.stage.max_new_tokens = 8
  return config
"""
PPO = {
  'stage_name': 'ppo', 'model.scalar_head': True, 'stage.group': 2,
  'stage.beta': 0.1,
}  # fmt: skip


def quiet(_):
  """Takes what a run reports."""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('rl')
  run.execute(tiny.config(folder, steps=4, **PLAIN), folder / 'base', quiet)
  (folder / 'tune.py').write_text(CONFIG)
  (folder / 'rewards.py').write_text(REWARDS)
  lines = [
    json.dumps({'prompt': f'What is {n}?', 'answer': str(n)}) for n in range(40)
  ]
  (folder / 'prompts.jsonl').write_text('\n'.join(lines))
  return folder


def config(folder, **overrides):
  shared = {
    'data.source': folder / 'prompts.jsonl',
    'data.dir': folder / 'rows',
    'init_from': folder / 'base',
    'stage.reward': f'{folder}/rewards.py:vowels',
  }
  given = shared | PLAIN | overrides
  return configs.load(
    str(folder / 'tune.py'), [(k, str(v)) for k, v in given.items()]
  )


def trained(folder, name, **overrides):
  run.execute(config(folder, **overrides), folder / name, quiet)
  return folder / name


def lines(workdir, split='train'):
  found = metrics.read(workdir / 'metrics.jsonl')
  return [line for line in found if line['split'] == split]


def answers(workdir, step):
  path = workdir / 'rollouts' / f'{step:08d}.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def grpo(folder):
  return trained(folder, 'grpo', **{
    'stage.true_reward': f'{folder}/rewards.py:digits', 'stage.beta': 0.05,
    'evals': "('rewards',)",
  })  # fmt: skip


def test_answers_are_written_with_their_rewards(grpo):
  assert {path.name for path in (grpo / 'rollouts').iterdir()} == {
    f'{step:08d}.jsonl' for step in range(1, 5)
  }
  found = answers(grpo, 2)
  assert len(found) == 4 * 4
  for one in found:
    text = one['text']
    assert one['reward'] == pytest.approx(sum(c in 'aeiou' for c in text) / 10)
    true = sum(c.isdigit() for c in text) / 10
    assert one['rewards']['true'] == pytest.approx(true)
    assert 1 <= len(one['tokens']) <= 8
  groups = [{one['prompt'][0]['content'] for one in found[i : i + 4]}
            for i in range(0, 16, 4)]  # fmt: skip
  assert all(len(group) == 1 for group in groups)


def test_meters_are_always_on(grpo):
  for line in lines(grpo):
    found = answers(grpo, line['step'])
    rewards = [one['reward'] for one in found]
    assert line['reward'] == pytest.approx(np.mean(rewards), rel=1e-5)
    assert line['sampler_gap_max'] < 1e-4
    assert line['ratio_max'] == pytest.approx(1, abs=1e-4)
    assert {'entropy', 'truncated', 'answer_tokens', 'dead_groups', 'kl',
            'true_reward', 'not_judged'} <= line.keys()  # fmt: skip
  assert lines(grpo)[0]['kl'] == pytest.approx(0, abs=1e-6)
  assert lines(grpo)[-1]['kl'] > 0
  assert {'exact', 'reward', 'pass8', 'true_reward'} <= lines(grpo, 'heldout')[
    0
  ].keys()


@pytest.mark.parametrize('extra', [{}, PPO], ids=['grpo', 'ppo'])
def test_a_resumed_run_ends_in_the_same_bits(folder, extra):
  name = extra.get('stage_name', 'grpo')
  options = {'stage.updates': 2, 'stage.minibatches': 2} | extra
  whole = trained(folder, f'{name}-whole', **options)
  trained(folder, f'{name}-cut', **options | {'steps': 2})
  resumed = trained(folder, f'{name}-cut', **options)
  a, b = (start.load(workdir).params for workdir in (whole, resumed))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert answers(whole, 4) == answers(resumed, 4)


def test_answers_that_stand_together_train_alike(folder, grpo):
  workdir = trained(folder, 'together', **{
    'stage.beta': 0.05, 'stage.together': 2, 'steps': 2, 'microbatches': 2,
    'stage.drop_unfinished': True,
  })  # fmt: skip
  alone = trained(folder, 'alone', **{
    'stage.beta': 0.05, 'steps': 2, 'stage.drop_unfinished': True,
  })  # fmt: skip
  for line, expected in zip(lines(workdir), lines(alone), strict=True):
    for name in ('loss', 'kl', 'reward', 'gradient_norm', 'targets'):
      assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6)
  texts = [
    sorted(one['text'] for one in answers(of, 2)) for of in (workdir, alone)
  ]
  assert texts[0] == texts[1]


@pytest.mark.slow
def test_check_proves_what_a_policy_has_answered(folder, capsys):
  """Though random parameters earn nothing, which alone would prove nothing."""
  asked = config(folder, **{
    'stage.reward': 'exact', 'stage.together': 2, 'stage.beta': 0.1,
  })  # fmt: skip
  assert check.check(asked, folder / 'check', 1)
  assert f'{"documents unpacked":<28}  the same' in capsys.readouterr().out


def test_every_point_at_which_drill_kills_is_reached(folder):
  options = {'steps': 1, 'eval_every': 0}
  with Phases(watchdog_seconds=0) as phases:
    one = run.Run(config(folder, **options), folder / 'points', phases, quiet)
    with jax.set_mesh(one.mesh):
      train.fold(one)
    one.close()
  assert set(drill.SAMPLING) <= phases.seconds.keys()


def test_groups_without_variance_make_way_for_others(folder):
  """Dynamic sampling (DAPO): half of the prompts teach nothing."""
  options = {
    'stage.reward': f'{folder}/rewards.py:odd', 'batch_size': 8, 'steps': 1,
    'eval_every': 0,
  }  # fmt: skip
  plain = trained(folder, 'flagged', **options)
  found = trained(folder, 'resampled', **options | {'stage.resample': 9})
  (before,), (after,) = lines(plain), lines(found)
  assert before['dead_groups'] > 0.2
  assert after['dead_groups'] == 0
  asked = [one['prompt'][0]['content'] for one in answers(found, 1)]
  assert all(int(text[8:-1]) % 2 for text in asked)
  # A group that teaches something stays.
  rewards = np.reshape([one['reward'] for one in answers(plain, 1)], (-1, 4))
  teaches = np.repeat(rewards.std(axis=1) > 0, 4)
  for one, other, stays in zip(
    answers(plain, 1), answers(found, 1), teaches, strict=True
  ):
    assert (one['text'] == other['text']) == stays


def test_the_schedule_is_of_steps_whatever_the_updates(folder):
  workdir = trained(folder, 'schedule', **PPO | {
    'optimizer.schedule': 'linear', 'optimizer.final': 0.0, 'eval_every': 0,
    'stage.updates': 2, 'stage.minibatches': 2,
  })  # fmt: skip
  rates = [line['learning_rate'] for line in lines(workdir)]
  np.testing.assert_allclose(rates, [0.01, 0.0075, 0.005, 0.0025], rtol=1e-5)


def test_a_run_of_answers_that_never_end_says_so(folder):
  with pytest.raises(UserError, match='no target was left 2 steps in a row'):
    trained(folder, 'endless', **{
      'stage.drop_unfinished': True, 'stage.max_new_tokens': 1, 'steps': 3,
      'guard.bad_in_a_row': 2, 'eval_every': 0,
    })  # fmt: skip


def test_it_learns_what_it_is_rewarded_for(folder):
  workdir = trained(folder, 'learns', **{
    'steps': 30, 'stage.group': 8, 'eval_every': 0,
    'optimizer.learning_rate': 0.02,
  })  # fmt: skip
  rewards = [line['reward'] for line in lines(workdir)]
  assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15


def test_ppo_learns_too_and_stays_near(folder):
  workdir = trained(folder, 'ppo-learns', **PPO | {
    'steps': 30, 'stage.group': 8, 'eval_every': 0, 'stage.beta': 0.01,
    'optimizer.learning_rate': 0.01,
  })  # fmt: skip
  found = lines(workdir)
  rewards = [line['reward'] for line in found]
  assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
  assert found[-1]['kl'] > 0
  assert found[-1]['value'] != 0


@pytest.mark.slow
def test_a_student_answers_and_its_teacher_judges(folder):
  """On-policy distillation: it comes nearer to another model."""
  taught = {'stage_name': 'distill', 'stage.teacher': folder / 'base'}
  workdir = trained(folder, 'on-policy', **taught | {
    'init_from': '', 'data.tokenizer': folder / 'base' / 'tokenizer',
    'model.dim': 32, 'model.num_layers': 2, 'model.hidden_dim': 48,
    'model.num_heads': 2, 'stage.alpha': 1.0, 'stage.divergence': 'reverse_kl',
    'stage.reward': '', 'stage.group': 2, 'steps': 20, 'data.rows': 'prompts',
  })  # fmt: skip
  found = [line['divergence'] for line in lines(workdir)]
  assert np.mean(found[-3:]) < 0.7 * np.mean(found[:3])
  assert len(answers(workdir, 3)) == 4 * 2


def test_equal_rewards_teach_nothing(folder):
  workdir = trained(folder, 'dead', **{
    'stage.reward': f'{folder}/rewards.py:same', 'steps': 1,
    'optimizer.weight_decay': 0.0,
  })  # fmt: skip
  (line,) = lines(workdir)
  assert line['dead_groups'] == 1
  assert line['gradient_norm'] == 0
  before, after = (start.load(folder / x).params for x in ('base', 'dead'))
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_adapters_learn_and_their_base_is_the_reference(folder):
  workdir = trained(folder, 'lora', **{
    'transforms': 'lora(rank=2, alpha=4)', 'stage.beta': 0.1, 'steps': 2,
  })  # fmt: skip
  assert lines(workdir)[0]['kl'] == pytest.approx(0, abs=1e-6)
  assert lines(workdir)[1]['kl'] != 0


def test_what_was_not_judged_stops_the_run_if_it_is_much(folder):
  with pytest.raises(UserError, match='could not be judged'):
    trained(folder, 'lost', **{
      'stage.reward': f'{folder}/rewards.py:lost', 'batch_size': 16,
      'stage.max_new_tokens': 1, 'steps': 20,
    })  # fmt: skip


@pytest.mark.parametrize('minibatches', [1, 2])
def test_another_policy_than_the_trainer_stops_the_run(folder, minibatches):
  name = f'gap-{minibatches}'
  with pytest.raises(UserError, match=r'sampler and trainer differ'):
    trained(folder, name, **{
      'stage.max_gap': 1e-12, 'stage.minibatches': minibatches, 'steps': 1,
    })  # fmt: skip
  assert not list((folder / name).glob('checkpoints/*'))


# At temperature 1, see the meters above.
@pytest.mark.parametrize(('temperature', 'minibatches'), [(0.6, 1), (1.3, 2)])
def test_sampler_and_trainer_agree(folder, temperature, minibatches):
  """Both ways of measuring it: in the one update, and before several."""
  workdir = trained(folder, f'heat-{temperature}', **{
    'stage.temperature': temperature, 'stage.minibatches': minibatches,
    'steps': 1, 'eval_every': 0,
  })  # fmt: skip
  (line,) = lines(workdir)
  assert 0 < line['sampler_gap'] <= line['sampler_gap_max'] < 1e-4


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('stage.group', 1, 'must be at least 2'),
    ('stage.together', 3, 'must divide group=4'),
    ('stage.minibatches', 5, 'cannot be divided into minibatches'),
    ('evals', "('heldout',)", 'evals=heldout: reads rows of text'),
    ('stage.reward', '', 'name a reward'),
    ('stage.temperature', 0.0, 'must be above 0'),
    ('stage.kind', 'clop', 'one of clip'),
    ('stage.scale', 'grop', 'one of group'),
    ('stage.grop', 3, 'did you mean .group.'),
    ('stage.aggregation', 'constant', 'the most tokens'),
    ('stage.reward', 'mth', 'mth'),
  ],
)
def test_mistakes_are_named(folder, key, value, message):
  with pytest.raises(UserError, match=message):
    trained(folder, 'mistake', **{key: value})


# The losses, on rows as they are prepared.


def rows(count=16):
  """Rows of one answer each behind a prompt, and what prepare adds."""
  rng = np.random.default_rng(0)
  shape = (count, tiny.LENGTH + 1)
  begins, ends = rng.integers(1, 5, count), rng.integers(6, 14, count)
  at = np.arange(shape[1])
  inside = at < ends[:, None]
  targets = (count, tiny.LENGTH)

  def normal(scale=1.0):
    return (scale * rng.normal(size=targets)).astype(np.float32)

  return {
    'tokens': np.where(inside, rng.integers(0, tiny.VOCAB, shape), 0).astype(
      np.int32
    ),
    'segment_ids': inside.astype(np.int32),
    'positions': np.where(inside, at, 0).astype(np.int32),
    'loss_mask': inside & (at >= begins[:, None]),
    'old_logps': normal(0.1) - 3.5,
    'reference_logps': normal(0.1) - 3.5,
    'sampler_logps': normal(0.1) - 3.5,
    'old_values': normal(0.1),
    'returns': normal(),
  }


KINDS = {
  'grpo': {'advantages': 1, 'beta': 0.1, 'sampler_cap': 2.0},
  'gspo': {'advantages': 1, 'level': 'sequence', 'aggregation': 'sequence'},
  'cispo': {'advantages': 1, 'kind': 'cispo', 'clip_low': 1.0},
  'dr_grpo': {'advantages': 1, 'aggregation': 'constant', 'length': 16},
  'rloo': {
    'advantages': 1, 'kind': 'reinforce', 'leave_one_out': True,
    'scale': 'none', 'aggregation': 'constant', 'length': 1,
  },
  'ppo': {'advantages': 2},
  'experts': {'advantages': 1},
}  # fmt: skip


@pytest.fixture(scope='module', params=KINDS)
def made(request):
  """(stage, params, rows) of each method."""
  hparams = {'reward': 'exact'} | KINDS[request.param]
  batch, rng = rows(), np.random.default_rng(1)
  shape = batch['old_logps'].shape[: hparams.pop('advantages')]
  batch['advantages'] = rng.normal(size=shape).astype(np.float32)
  name = 'ppo' if request.param == 'ppo' else 'grpo'
  experts = tiny.MOE if request.param == 'experts' else {}
  model = tiny.model(scalar_head=name == 'ppo', **experts)
  params = tiny.params(model)
  made = stage.make(name, model, lambda: params, hparams)
  return stage.Stage(made.loss), params, batch


def test_accumulation_and_devices_change_nothing(made):
  whole = gradient(*made)
  assert np.isfinite(whole[0])
  loss, grads = gradient(*made, microbatches=2, devices=8)
  # Losses of advantages are near 0, differences of larger numbers.
  assert loss == pytest.approx(whole[0], abs=1e-6)
  assert_close((whole[0], grads), whole)


def test_garbage_in_padding_changes_not_one_bit(made):
  stage_, params, batch = made
  expected = gradient(stage_, params, batch)
  dirty = {k: v.copy() for k, v in batch.items()}
  padding = batch['segment_ids'] == 0
  dirty['tokens'][padding] = 2**31 - 1
  dirty['positions'][padding] = 11
  dirty['loss_mask'][padding] = True
  unread = ~(batch['loss_mask'] & ~padding)[:, 1:]
  for column in dirty.values():
    if column.dtype == np.float32 and column.ndim == 2:
      column[unread] = np.nan
  found = gradient(stage_, params, dirty)
  assert found[0] == expected[0]
  jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_figures_are_means_whatever_the_parts():
  batch = {f'{meters.FIGURE}reward': np.full(8, 0.25, np.float32)}
  (mean,) = meters.figures_of(batch).values()
  assert mean.total / mean.weight == 0.25
