"""Figures by name: how they are written, what they mean, what is asked."""

from typing import Any, NamedTuple


class Metric(NamedTuple):
  """How a value of metrics.jsonl is read."""

  title: str
  meaning: str
  kind: str = 'number'


METRICS = {
  'loss': Metric(
    'Loss', 'What training makes small; in nats a token for text.'
  ),
  'nll': Metric('Next-token loss', 'Nats a token against the text itself.'),
  'bits_per_byte': Metric(
    'Bits per byte', 'Bits to write down a byte of unseen text.'
  ),
  'perplexity': Metric(
    'Perplexity', 'Between how many equally likely tokens it wavers.'
  ),
  'divergence': Metric(
    'Divergence from the teacher',
    'How far the student’s distribution is from the teacher’s, nats a token.',
  ),
  'reward': Metric('Reward', 'What the answers earned, on average.'),
  'true_reward': Metric(
    'True reward', 'What the world’s own rule gives the same answers.'
  ),
  'accuracy': Metric('Accuracy', 'Share that is right.', 'percent'),
  'facts_accuracy': Metric(
    'Look-ups right', 'Share of look-ups right.', 'percent'
  ),
  'sums_accuracy': Metric('Sums right', 'Share of sums right.', 'percent'),
  'well_formed': Metric(
    'Well formed', 'Share that is one sentence and stops by itself.', 'percent'
  ),
  'margin': Metric(
    'Margin', 'Reward of the chosen answer above the rejected one.'
  ),
  'chosen_reward': Metric('Chosen', 'Reward of the chosen answers.'),
  'rejected_reward': Metric('Rejected', 'Reward of the rejected answers.'),
  'chosen_logratio': Metric(
    'Chosen, log-ratio', 'Log-probability above the reference’s, a token.'
  ),
  'brier': Metric('Brier score', 'Squared error of its certainty; 0.25: coin.'),
  'confidence': Metric('Confidence', 'How sure it is, on average.', 'percent'),
  'kl': Metric('KL', 'Distance from the reference policy, nats.'),
  'approximate_kl': Metric(
    'KL of the update', 'Distance from the policy that sampled, nats a token.'
  ),
  'entropy': Metric('Entropy', 'Nats a token: how much it still varies.'),
  'dead_groups': Metric(
    'Dead groups',
    'Share of groups whose answers all earn the same: they teach nothing.',
    'percent',
  ),
  'truncated': Metric(
    'Cut off', 'Share of answers that did not stop by themselves.', 'percent'
  ),
  'length': Metric('Answer length', 'Tokens an answer.'),
  'balance_loss': Metric(
    'Expert balance', '1 where all experts have as much to do; more: uneven.'
  ),
  'router_z_loss': Metric(
    'Router logits', 'Square of their log-sum; large: routing loses precision.'
  ),
  'expert_load': Metric(
    'Busiest expert', 'Its load over the mean load; 1: all have as much to do.'
  ),
  'dropped_share': Metric(
    'Dropped', 'Share of tokens’ choices that a full expert refused.', 'percent'
  ),
  'gradient_norm': Metric('Gradient norm', 'The gradient’s length, unclipped.'),
  'learning_rate': Metric('Learning rate', 'How far a step goes.'),
  'tokens_per_second': Metric(
    'Tokens a second', 'Speed of training, without evaluation and saving.'
  ),
  'utilisation': Metric(
    'Utilisation',
    'Of the device’s peak, what the network takes.',
    'percent',
  ),
  'seconds': Metric('Time', 'Wall clock.', 'seconds'),
  'tokens': Metric('Tokens', 'Positions trained on.', 'count'),
}
# What is no figure of learning, or is told elsewhere.
LEFT_OUT = frozenset(
  (
    'step', 'rows_crc', 'skipped', 'targets', 'bytes', 'time_left', 'nonfinite',
    'stage', 'split', 'tokens', 'seconds',
  )
)  # fmt: skip


_PAIRS = Metric(
  'Pairs in the right order',
  'Share in which the preferred answer comes out ahead.',
  'percent',
)


def metric(name: str, pairs: bool = False) -> Metric:
  """How `name` is read, by a run that compares pairs or by another.

  An unknown name speaks for itself.
  """
  if pairs and name == 'accuracy':
    return _PAIRS
  plain = name.replace('_', ' ').replace('/', ': ')
  return METRICS.get(name) or Metric(plain[:1].upper() + plain[1:], '')


class Figure(NamedTuple):
  """A number of summary.json."""

  meaning: str
  kind: str = 'number'
  target: str = ''
  # (value, the figures of all stages) -> whether the target is reached
  reached: Any = None


def _at_least(low: float) -> Any:
  return lambda value, _: value >= low


def _at_most(high: float) -> Any:
  return lambda value, _: value <= high


def _against(stage: str, name: str, test: Any) -> Any:
  """Compares with another figure; None where that is missing."""

  def reached(value: float, summary: dict) -> bool | None:
    other = summary.get(stage, {}).get(name)
    return None if other is None else test(value, other)

  return reached


_TIME = Figure('Wall clock of the stage.', 'seconds')
_RIGHT = Figure('Share of all held-out questions answered right.', 'percent')
_FACTS = Figure(
  'Share of held-out questions about people and towns answered right.',
  'percent',
)
_SUMS = Figure('Share of held-out sums answered right.', 'percent')
_REWARD = Figure('Mean true reward of its answers to held-out questions.')
_BASE = Figure(
  'Bytes that a parameter of the frozen base takes; 4 without quantising.'
)
_FORMED = Figure(
  'Share of answers that are one full sentence and stop by themselves.',
  'percent',
)
_TRAINED = Figure(
  'Parameters trained, as a share of the network.',
  'percent',
  'at most 3%',
  _at_most(0.03),
)
_RELATIVE = 'Right answers, as a share of those of full fine-tuning.'

FIGURES = {
  'pretrain.bits_per_byte': Figure(
    'Bits to write down a byte of held-out text.',
    target='within 8% of the true entropy',
    reached=_against(
      'pretrain', 'true_bits_per_byte', lambda found, true: found <= 1.08 * true
    ),
  ),
  'pretrain.true_bits_per_byte': Figure(
    'The entropy of that text by the generator’s own probabilities: no model '
    'can go below it.'
  ),
  'pretrain.tokens': Figure('Positions trained on.', 'count'),
  'pretrain.tokens_per_second': Figure('Median speed of training.', 'count'),
  'sft.well_formed': _FORMED._replace(
    target='at least 95%', reached=_at_least(0.95)
  ),
  'sft.accuracy': _RIGHT._replace(
    target='what the base model knows, or more',
    reached=_against('pretrain', 'accuracy', lambda a, b: a >= b),
  ),
  'reward.pair_accuracy': Figure(
    'Share of held-out pairs that it puts in the right order.',
    'percent',
    'at least 90%',
    _at_least(0.9),
  ),
  'reward.loss': Figure('Held-out loss, nats a pair; a coin has 0.693.'),
  'dpo.win_rate': Figure(
    'Held-out questions where the true rule prefers its answer to that of SFT.',
    'percent',
    'at least 85%',
    _at_least(0.85),
  ),
  'dpo.tie_rate': Figure('Questions where both answers are equal.', 'percent'),
  'dpo.kl': Figure('How far it moved from SFT, nats an answer.'),
  'lora.relative_score': Figure(
    _RELATIVE, 'percent', 'at least 95%', _at_least(0.95)
  ),
  'lora.trained_share': _TRAINED,
  'qlora.relative_score': Figure(
    _RELATIVE, 'percent', 'at least 90%', _at_least(0.9)
  ),
  'qlora.trained_share': _TRAINED,
  'qlora.base_bytes_per_parameter': _BASE._replace(
    target='at most 0.6', reached=_at_most(0.6)
  ),
  'distill.student_bits_per_byte': Figure(
    'Held-out bits per byte of the student that had a teacher.',
    target='below the same student alone',
    reached=_against('distill', 'baseline_bits_per_byte', lambda a, b: a < b),
  ),
  'distill.baseline_bits_per_byte': Figure(
    'The same student, trained on the text alone.'
  ),
  'distill.student_share': Figure(
    'Parameters of the student, as a share of the teacher’s.', 'percent'
  ),
  'ppo.true_reward_before': Figure(
    'Mean true reward on held-out prompts before PPO.'
  ),
  'ppo.true_reward_after': Figure(
    'The same after PPO against the learned reward model.',
    target='above what it was before',
    reached=_against('ppo', 'true_reward_before', lambda a, b: a > b),
  ),
  'ppo.kl': Figure('How far it moved from where it began, nats an answer.'),
  'ppo.win_rate': Figure(
    'Held-out questions where the true rule prefers its answer to that of SFT.',
    'percent',
  ),
  'grpo.exact_before': Figure(
    'Held-out problems answered exactly before GRPO.', 'percent'
  ),
  'grpo.exact_after': Figure(
    'The same after GRPO.',
    'percent',
    '30 points above what it was before',
    _against('grpo', 'exact_before', lambda a, b: a - b >= 0.3 - 1e-9),
  ),
  'grpo.pass8_before': Figure(
    'Problems that one of eight sampled answers solved, before.', 'percent'
  ),
  'grpo.pass8_after': Figure(
    'The same after GRPO.',
    'percent',
    'no lower than before',
    _against('grpo', 'pass8_before', lambda a, b: a >= b),
  ),
}
_ANYWHERE = {
  'seconds': _TIME,
  'accuracy': _RIGHT,
  'facts_accuracy': _FACTS,
  'sums_accuracy': _SUMS,
  'well_formed': _FORMED,
  'reward': _REWARD,
  'base_bytes_per_parameter': _BASE,
  'kl': Figure('How far it moved from where it began, nats an answer.'),
  'true_reward': Figure('What the world’s own rule gives its answers.'),
  'tokens': Figure('Positions trained on.', 'count'),
  'tokens_per_second': Figure('Speed of training.', 'count'),
}


def figure(stage: str, name: str) -> Figure:
  """What a figure of the summary means; an unknown one speaks for itself."""
  return (
    FIGURES.get(f'{stage}.{name}')
    or _ANYWHERE.get(name)
    or Figure(name.replace('_', ' ').capitalize() + '.')
  )


# Stages of a quickstart, in the order of a life, with what each does.
STAGES = {
  'untrained': 'Random weights.',
  'pretrain': 'Reads text of the world until it can go on with it.',
  'sft': 'Learns from conversations to answer what it is asked, and to stop.',
  'reward': 'Learns from pairs of answers what people prefer.',
  'dpo': 'Learns from the same pairs to give the preferred answers itself.',
  'ppo': 'Samples answers and is paid by the reward model (RLHF).',
  'grpo': 'Samples groups of answers and is paid for the right ones (RLVR).',
  'gamed': 'Is paid for polite words only, and watched by the true rule.',
  'lora': 'The conversations again, through low-rank adapters alone.',
  'qlora': 'Adapters again, on a base held in four bits.',
  'student': 'A network of half the size reads the text alone.',
  'distill': 'The same small network reads with the base model as teacher.',
}
