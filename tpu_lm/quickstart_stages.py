"""What `tpu_lm quickstart` does, stage by stage, and what each must show.

A stage is a function of the `Life` so far; its docstring's first line is what
the user reads above it.
"""

import pathlib
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

import jax

from tpu_lm import config as configs
from tpu_lm import metrics, run, start, weights
from tpu_lm.data import chat, world, world_tfds
from tpu_lm.errors import UserError
from tpu_lm.evals import world_answers
from tpu_lm.generate import stream
from tpu_lm.generate.sampler import Sampler
from tpu_lm.progress import duration

_PROMPTS = ('', 'Questions for Tuesday:\n', 'Sold in Luton in June\n')
_CONFIG = pathlib.Path(__file__).parent.parent / 'configs' / 'quickstart.py'
_RULE = '  ' + '─' * 76


class Outcome(NamedTuple):
  """What a stage has to show."""

  figures: dict[str, float]  # of summary.json
  lines: list[tuple[str, str]]  # of the table: what, and how much


class Life:
  """The models made so far, each in a folder of its own."""

  def __init__(self, directory: pathlib.Path, overrides: list[tuple[str, str]]):
    self.directory, self.overrides = directory, overrides
    self._loaded: dict[str, start.Loaded] = {}
    self._asked: dict[str, world_answers.Asked] = {}

  def folder(self, name: str) -> pathlib.Path:
    return self.directory / name

  def train(self, name: str, own: dict[str, str] | None = None) -> dict:
    """Trains `name` by its variant of the configuration.

    Args:
      name: of the variant and of the folder.
      own: dotted keys of the configuration; the user's come after them.

    Returns:
      The last held-out figures.
    """
    if not _CONFIG.is_file():
      raise UserError(
        f'{_CONFIG}: not there; quickstart runs from a clone of the repository '
        '(pip install --editable .)'
      )
    variant = '' if name == 'pretrain' else f':{name}'
    overrides = [(key, str(value)) for key, value in (own or {}).items()]
    overrides += self.overrides
    config = configs.load(f'{_CONFIG}{variant}', overrides)
    last = run.execute(config, self.folder(name))
    if not last or last['step'] < config.steps:
      raise SystemExit(0)  # stopped by a signal; what is done is saved
    return last

  def heldout(self, name: str) -> list[dict]:
    """The held-out lines of its metrics, the first of before it was trained."""
    lines = metrics.read(self.folder(name) / 'metrics.jsonl')
    return [line for line in lines if line['split'] == 'heldout']

  def loaded(self, name: str) -> start.Loaded:
    if name not in self._loaded:
      self._loaded[name] = start.load(self.folder(name))
    return self._loaded[name]

  def template(self, name: str) -> chat.Template:
    folder = self.folder(name) / 'tokenizer'
    return chat.load('', self.loaded(name).tokenizer, folder)

  def asked(self, name: str) -> world_answers.Asked:
    """The answers of an assistant to the held-out questions."""
    if name not in self._asked:
      self._asked[name] = world_answers.ask(
        self.loaded(name), self.template(name)
      )
    return self._asked[name]

  def answers(self, names: Iterable[str]) -> dict:
    """What these stages say to the same prompts, for the report."""
    questions = world_answers.questions()
    shown = range(0, len(questions), len(questions) // 12)
    stages = {'untrained': self._untrained().texts}
    for name in names:
      if name != 'reward':  # it judges
        stages[name] = self.asked(name).texts
    return {
      'prompts': [questions[i].text for i in shown],
      'expected': [questions[i].reply for i in shown],
      'stages': {k: [texts[i] for i in shown] for k, texts in stages.items()},
    }

  def _untrained(self) -> world_answers.Asked:
    loaded = self.loaded('pretrain')
    fresh = loaded.model.init_params(jax.random.key(loaded.config.seed))
    return world_answers.ask(
      loaded._replace(params=fresh), self.template('pretrain')
    )


def _samples(loaded: start.Loaded) -> None:
  print('\nWhat it writes:')
  for prompt in _PROMPTS:
    pieces = stream.stream(
      loaded.model,
      loaded.params,
      loaded.tokenizer,
      prompt,
      sampler=Sampler(temperature=0.7),
      seed=0,
    )
    print(_RULE)
    for line in (prompt + ''.join(pieces)).strip().split('\n'):
      print(textwrap.indent(textwrap.fill(line, 76), '  '))
  print(_RULE, flush=True)


def _dialogue(life: Life, *names: str) -> None:
  """Prints how models answer the same held-out questions."""
  asked = world_answers.questions()
  print(_RULE)
  for i in (0, len(asked) // 3, len(asked) // 2):
    print(f'  {"question":<10}{asked[i].text}')
    for name in names:
      text = ' '.join(life.asked(name).texts[i].split()) or '(nothing)'
      print(f'  {name:<10}{textwrap.shorten(text, 66, placeholder=" …")}')
  print(_RULE, flush=True)


def _speed(folder: pathlib.Path) -> tuple[dict, float]:
  """The last line of training, and the median of tokens a second."""
  lines = metrics.read(folder / 'metrics.jsonl')
  steps = [line for line in lines if line['split'] == 'train']
  # Evaluations and checkpoints are taken out; the first line holds the
  # compilation.
  speeds = sorted(line['tokens_per_second'] for line in steps[1:] or steps)
  return steps[-1], speeds[len(speeds) // 2]


def pretrain(life: Life) -> Outcome:
  """Text of the world to a base model, measured against its true entropy."""
  heldout = list(world.documents(0, 'heldout', world_tfds.SIZES['text'][1]))
  true = world.true_bits_per_byte(heldout)
  print(
    'A generated world of people, towns and things; the generator knows its\n'
    f'own probabilities, so the floor is known: {true:.4f} bits per byte.',
    flush=True,
  )
  last = life.train('pretrain')
  step, speed = _speed(life.folder('pretrain'))
  _samples(life.loaded('pretrain'))
  found = last['bits_per_byte']
  known = world_answers.knowledge(life.loaded('pretrain'))
  figures = {
    'bits_per_byte': found,
    'true_bits_per_byte': true,
    **known.figures(),
    'seconds': last['seconds'],
    'tokens_per_second': speed,
    'tokens': step['tokens'],
  }
  return Outcome(
    figures,
    [
      ('held-out bits per byte', f'{found:.4f}'),
      ('true entropy of that text', f'{true:.4f}'),
      ('above the floor by', f'{found / true - 1:.1%}'),
      ('held-out questions right, bare', f'{known.every:.1%}'),
      ('tokens read', f'{step["tokens"]:,}'),
      ('tokens a second (median)', f'{speed:,.0f}'),
      ('time', duration(last['seconds'])),
    ],
  )


def sft(life: Life) -> Outcome:
  """Conversations to an assistant that answers what it is asked, and stops."""
  last = life.train('sft', {'init_from': life.folder('pretrain')})
  asked = life.asked('sft')
  _dialogue(life, 'pretrain', 'sft')
  return Outcome(
    {
      'well_formed': asked.well_formed,
      **asked.right.figures(),
      'reward': float(asked.rewards.mean()),
      'seconds': last['seconds'],
    },
    [
      ('answers of the asked form', f'{asked.well_formed:.1%}'),
      ('held-out questions right', f'{asked.right.every:.1%}'),
      (
        'look-ups and sums of these',
        f'{asked.right.facts:.1%} and {asked.right.sums:.1%}',
      ),
      ('time', duration(last['seconds'])),
    ],
  )


def reward(life: Life) -> Outcome:
  """Pairs of answers to a model of what people prefer."""
  last = life.train('reward', {'init_from': life.folder('sft')})
  return Outcome(
    {
      'pair_accuracy': last['accuracy'],
      'loss': last['loss'],
      'seconds': last['seconds'],
    },
    [
      ('held-out pairs in the right order', f'{last["accuracy"]:.1%}'),
      ('time', duration(last['seconds'])),
    ],
  )


def dpo(life: Life) -> Outcome:
  """The same pairs to an assistant that people prefer."""
  last = life.train('dpo', {'init_from': life.folder('sft')})
  before, after = life.asked('sft').rewards, life.asked('dpo').rewards
  wins, ties = float((after > before).mean()), float((after == before).mean())
  kl = world_answers.divergence(
    life.loaded('dpo'), life.loaded('sft'), life.template('dpo')
  )
  _dialogue(life, 'sft', 'dpo')
  return Outcome(
    {
      'win_rate': wins,
      'tie_rate': ties,
      'kl': kl,
      'reward': float(after.mean()),
      'accuracy': life.asked('dpo').right.every,
      'seconds': last['seconds'],
    },
    [
      ('wins over sft by the true rule', f'{wins:.1%}'),
      ('ties', f'{ties:.1%}'),
      ('true reward, sft to dpo', f'{before.mean():.2f} to {after.mean():.2f}'),
      ('KL from sft, nats an answer', f'{kl:.2f}'),
      ('time', duration(last['seconds'])),
    ],
  )


def _adapted(life: Life, name: str) -> Outcome:
  last = life.train(name, {'init_from': life.folder('pretrain')})
  loaded = life.loaded(name)
  trainable, frozen = weights.partition(loaded.params, loaded.config.trainable)
  whole = weights.count(life.loaded('pretrain').params)
  share = weights.count(trainable) / whole
  full, found = (life.asked(x).right.every for x in ('sft', name))
  relative = found / full if full else 0.0
  return Outcome(
    {
      'relative_score': relative,
      'trained_share': share,
      **life.asked(name).right.figures(),
      'well_formed': life.asked(name).well_formed,
      'base_bytes_per_parameter': weights.num_bytes(frozen) / whole,
      'seconds': last['seconds'],
    },
    [
      ('of the score of full fine-tuning', f'{relative:.1%}'),
      ('parameters trained', f'{share:.2%}'),
      (
        'bytes a parameter of the base',
        f'{weights.num_bytes(frozen) / whole:.2f}',
      ),
      ('time', duration(last['seconds'])),
    ],
  )


def lora(life: Life) -> Outcome:
  """The same conversations through low-rank adapters alone."""
  return _adapted(life, 'lora')


def qlora(life: Life) -> Outcome:
  """Adapters again, on a base held in four bits."""
  return _adapted(life, 'qlora')


def distill(life: Life) -> Outcome:
  """The base model teaches one of half its size, against that one alone."""
  tokens = life.folder('pretrain') / 'tokenizer' / 'tokenizer.json'
  alone = life.train('student', {'data.tokenizer': tokens})
  taught = life.train('distill', {'stage.teacher': life.folder('pretrain')})
  sizes = [
    weights.count(life.loaded(name).params) for name in ('distill', 'pretrain')
  ]
  gain = 1 - taught['bits_per_byte'] / alone['bits_per_byte']
  return Outcome(
    {
      'student_bits_per_byte': taught['bits_per_byte'],
      'baseline_bits_per_byte': alone['bits_per_byte'],
      'student_share': sizes[0] / sizes[1],
      'seconds': alone['seconds'] + taught['seconds'],
    },
    [
      ('student, parameters of the teacher', f'{sizes[0] / sizes[1]:.0%}'),
      ('taught, bits per byte', f'{taught["bits_per_byte"]:.4f}'),
      ('alone, bits per byte', f'{alone["bits_per_byte"]:.4f}'),
      ('better by', f'{gain:.1%}'),
      ('time', duration(alone['seconds'] + taught['seconds'])),
    ],
  )


def ppo(life: Life) -> Outcome:
  """Reinforcement by the reward model, watched by the true rule."""
  judge = f"model(workdir='{life.folder('reward')}')"
  own = {'init_from': life.folder('sft'), 'stage.reward': judge}
  last = life.train('ppo', own)
  before, after = (life.asked(x).rewards.mean() for x in ('sft', 'ppo'))
  kl = world_answers.divergence(
    life.loaded('ppo'), life.loaded('sft'), life.template('ppo')
  )
  return Outcome(
    {
      'true_reward_before': float(before),
      'true_reward_after': float(after),
      'kl': kl,
      'reward_before': life.heldout('ppo')[0]['reward'],
      'reward_after': last['reward'],
      'accuracy': life.asked('ppo').right.every,
      'seconds': last['seconds'],
    },
    [
      ('true reward, sft to ppo', f'{before:.2f} to {after:.2f}'),
      ('KL from sft, nats an answer', f'{kl:.2f}'),
      ('time', duration(last['seconds'])),
    ],
  )


def _gained(life: Life, name: str, told: dict[str, str], kind: str) -> Outcome:
  """What a stage made of held-out figures; `told` says them, as `kind`."""
  last = life.train(name, {'init_from': life.folder('sft')})
  first = life.heldout(name)[0]
  figures = {'seconds': last['seconds']}
  lines = []
  for key, what in told.items():
    figures |= {f'{key}_before': first[key], f'{key}_after': last[key]}
    lines.append((what, f'{first[key]:{kind}} to {last[key]:{kind}}'))
  return Outcome(figures, [*lines, ('time', duration(last['seconds']))])


def grpo(life: Life) -> Outcome:
  """Sums that no conversation showed, by exact rewards alone."""
  told = {
    'exact': 'held-out sums of three right, greedily',
    'pass8': 'right in one of 8 samples',
  }
  return _gained(life, 'grpo', told, '.1%')


def gamed(life: Life) -> Outcome:
  """A reward made to be cheated (for polite words), and the true one."""
  told = {
    'reward': 'the reward trained for',
    'true_reward': 'the true reward beside it',
  }
  return _gained(life, 'gamed', told, '.2f')


STAGES = {
  stage.__name__: stage
  for stage in (
    pretrain,
    sft,
    reward,
    dpo,
    ppo,
    grpo,
    gamed,
    lora,
    qlora,
    distill,
  )
}
