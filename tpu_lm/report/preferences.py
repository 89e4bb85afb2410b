"""Of a life: the reward model, and what moving away from SFT bought."""

from typing import Any

from markupsafe import Markup

from tpu_lm.report import chart, records
from tpu_lm.report.markup import figure, html, is_number, join, number


def _order(life: Any) -> list[Markup]:
  """How often the reward model puts a pair in the right order."""
  record = life.runs.get('reward')
  if not record:
    return []
  series = [
    chart.Series(
      'training', record.points('accuracy', 'train'), 'reward', 'faint'
    ),
    chart.Series(
      'held out',
      # Before the first step all pairs tie, which is neither right nor wrong.
      [p for p in record.points('accuracy', 'heldout') if p[0] > 0],
      'reward',
      'dotted',
    ),
  ]
  if not any(one.points for one in series):
    return []
  drawing = chart.lines(
    'Pairs in the right order', series, percent=True, floors=[('a coin', 0.5)]
  )
  text = 'Share of pairs in which the preferred answer gets the higher reward.'
  return [figure('Reward model: pairs in the right order', drawing, text)]


def _bins(found: Any) -> list[tuple[float, float, float]]:
  """The bins of a calibration.json; [] if it is not of that form."""
  try:
    columns = [found[name] for name in ('confidence', 'accuracy', 'count')]
    rows = list(zip(*columns, strict=True))
  except (KeyError, TypeError, ValueError):
    return []
  return [row for row in rows if all(map(is_number, row)) and row[2] > 0]


def _calibration(life: Any) -> list[Markup]:
  """How often the reward model is right where it is so sure."""
  record = life.runs.get('reward')
  if not record:
    return []
  path = record.folder / 'calibration.json'
  bins = _bins(records.json_of(path)) if path.is_file() else []
  name = 'Calibration of the reward model'
  text = html(
    'Held-out pairs by how sure the model was. On the dashed line it is right '
    'as often as it believes; below, it is too sure. '
  )
  if bins:
    text += html('The area of a dot is its share of the pairs.')
  else:
    bins = [
      (line['confidence'], line['accuracy'], 1)
      for line in record.of('heldout')
      if is_number(line.get('confidence'))
      and is_number(line.get('accuracy'))
      and line['step'] > 0
    ][-1:]
    text += html('One dot: all held-out pairs together, at the last step.')
  if not bins:
    return []
  brier = record.last('brier')
  if is_number(brier):
    text += html(' Brier score {} (a coin: 0.25).', number(brier))
  drawing = chart.reliability(name, bins, 'reward')
  return [figure('Reward model: calibration', drawing, text)]


def _kl(life: Any, stage: str) -> float | None:
  return life.figure(stage, 'kl')


def _win_rates(life: Any) -> list[Markup]:
  """Win rate over SFT at the KL that it cost."""
  spots = [
    chart.Spot(stage, _kl(life, stage), life.figure(stage, 'win_rate'), stage)
    for stage in ('dpo', 'ppo', 'grpo')
    if is_number(_kl(life, stage)) and is_number(life.figure(stage, 'win_rate'))
  ]
  if not spots:
    return []
  drawing = chart.scatter(
    'Win rate over SFT against KL',
    spots,
    x_label='KL from SFT, nats an answer',
    y_label='wins over SFT',
    percent=(False, True),
    floors=[('no better than SFT', 0.5)],
  )
  text = (
    'How often the true rule prefers the answer to that of SFT, and how far '
    'the policy moved for it. Further right is a less familiar model.'
  )
  return [figure('KL against win rate', drawing, text)]


def _true_rewards(life: Any) -> list[Markup]:
  """True reward at the KL that it cost, from SFT on."""
  spots = []
  start = life.figure('sft', 'reward')
  if not is_number(start):
    start = life.figure('ppo', 'true_reward_before')
  if is_number(start):
    spots.append(chart.Spot('sft', 0.0, start, 'sft'))
  ends = (('dpo', 'reward'), ('ppo', 'true_reward_after'))
  for stage, name in ends:
    kl, value = _kl(life, stage), life.figure(stage, name)
    if is_number(kl) and is_number(value):
      spots.append(chart.Spot(stage, kl, value, stage))
  if len(spots) < 2:
    return []
  drawing = chart.scatter(
    'True reward against KL',
    spots,
    x_label='KL from where it began, nats an answer',
    y_label='true reward',
  )
  text = (
    'Mean true reward of answers to held-out questions: 1 for a right one, '
    '0.5 for a courtesy, less for rudeness, bad form and length.'
  )
  return [figure('KL against true reward', drawing, text)]


def shown(life: Any) -> Markup:
  """The section; nothing if no stage of it is there."""
  pieces = [
    *_order(life),
    *_calibration(life),
    *_win_rates(life),
    *_true_rewards(life),
  ]
  if not pieces:
    return Markup()
  return html(
    '<p>People prefer some answers to others. A reward model learns to tell '
    'which; DPO learns from the same pairs without one; PPO is paid by it.</p>'
    '<div class="grid two">\n{}\n</div>',
    join(pieces),
  )
