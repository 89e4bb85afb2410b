"""The life of a model: a folder of runs, such as a quickstart makes.

Read beside the runs, each only if it is there:

  summary.json  {stage: {figure: number}}
  answers.json  {"prompts": [text], "stages": {stage: [text a prompt]}}, and
                "expected": [text] where the right answers are known
  reward/calibration.json  {"confidence": [], "accuracy": [], "count": []}
"""

import pathlib
from typing import Any, NamedTuple

from markupsafe import Markup

from tpu_lm.errors import UserError
from tpu_lm.report import chart as charts
from tpu_lm.report import (
  curves,
  figures,
  glossary,
  preferences,
  records,
  rewards,
  rollouts,
  run_page,
)
from tpu_lm.report.markup import (
  clipped,
  colour,
  figure,
  folded,
  html,
  is_number,
  join,
  number,
  size,
  spell,
  swatch,
  table,
)
from tpu_lm.report.records import Record

_PROMPTS = 12  # shown side by side
_OPEN = 4  # of them at once
_LETTERS = 300  # of an answer


class Life(NamedTuple):
  """All that lies in the folder."""

  folder: pathlib.Path
  runs: dict[str, Record]  # in the order of a life
  summary: dict[str, dict[str, float]]
  answers: dict[str, Any]
  notes: list[str]

  @property
  def stages(self) -> list[str]:
    """Of the summary, in order."""
    return in_order(self.summary)

  def figure(self, stage: str, name: str) -> float | None:
    return self.summary.get(stage, {}).get(name)


def in_order(names: Any) -> list[str]:
  """Stages as a life goes; those without a place in it at the end."""
  known = list(glossary.STAGES)
  place = {name: i for i, name in enumerate(known)}
  return sorted(names, key=lambda name: (place.get(name, len(known)), name))


def read(folder: pathlib.Path, names: list[str]) -> Life:
  """Reads the runs `names` of a folder and what lies beside them.

  Raises:
    UserError: a file of them is damaged.
  """
  runs = {
    name: records.read(folder / name, alone=False) for name in in_order(names)
  }
  notes = []
  summary = records.json_of(folder / 'summary.json')
  if summary is None:
    notes.append('summary.json is not there: the figures of the stages.')
  elif not _is_summary(summary):
    raise UserError(
      f'{folder / "summary.json"}: is not {{stage: {{figure: number}}}}; run '
      '`tpu_lm quickstart` again, or move the file away'
    )
  answers = records.json_of(folder / 'answers.json')
  if answers is None:
    notes.append('answers.json is not there: the same prompts at every stage.')
  elif not _is_answers(answers):
    notes.append('answers.json is not of the form that is read; left out.')
    answers = None
  notes += [
    f'{name} has not run here.'
    for name in glossary.STAGES
    if name not in (*runs, 'untrained')
  ]
  for name, record in runs.items():
    notes += [f'{name}: {text}' for text in run_page.missing(record)]
  return Life(folder, runs, summary or {}, answers or {}, notes)


def _is_summary(found: Any) -> bool:
  return isinstance(found, dict) and all(
    isinstance(figures, dict) for figures in found.values()
  )


def _is_answers(found: Any) -> bool:
  def texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)

  return (
    isinstance(found, dict)
    and texts(found.get('prompts'))
    and isinstance(found.get('stages'), dict)
    and all(map(texts, found['stages'].values()))
  )


def lead(life: Life) -> Markup:
  """The first paragraph: what was made, of what, in what time."""
  base = life.runs.get('pretrain') or next(iter(life.runs.values()))
  whole = records.sizes(base).whole
  what = f'{size(whole)} parameters' if whole else run_page.network(base)
  seconds = sum(r.seconds or 0 for r in life.runs.values())
  tokens = sum(r.tokens or 0 for r in life.runs.values())
  text = html(
    'A network of {} ({}) went through {} of training on {} tokens in {}.',
    what,
    run_page.network(base),
    f'{len(life.runs)} stage{"s" if len(life.runs) > 1 else ""}',
    size(tokens),
    spell(seconds),
  )
  floor = life.figure('pretrain', 'true_bits_per_byte')
  if is_number(floor):
    text += html(
      ' Its world is generated, so the truth is known: the entropy of its '
      'text, the right answer to every question, and how good an answer '
      'truly is.'
    )
  return html('<p class="lead">{}</p>\n{}', text, figures.judged(life))


def _headline(life: Life, stage: str) -> str:
  """The figure that a stage is judged by, in a few words."""
  said = {
    'pretrain': ('bits_per_byte', '{} bits per byte', 'number'),
    'sft': ('accuracy', '{} of questions right', 'percent'),
    'reward': ('pair_accuracy', '{} of pairs in order', 'percent'),
    'dpo': ('win_rate', 'wins {} over SFT', 'percent'),
    'lora': ('relative_score', '{} of SFT’s score', 'percent'),
    'qlora': ('relative_score', '{} of SFT’s score', 'percent'),
    'distill': ('student_bits_per_byte', '{} bits per byte', 'number'),
    'grpo': ('exact_after', '{} exact', 'percent'),
    'ppo': ('true_reward_after', 'true reward {}', 'number'),
  }
  if stage == 'student':
    value = life.figure('distill', 'baseline_bits_per_byte')
    return f'{number(value)} bits per byte' if is_number(value) else ''
  name, text, kind = said.get(stage, ('', '', ''))
  value = life.figure(stage, name)
  return text.format(number(value, kind)) if is_number(value) else ''


def _stages(life: Life) -> Markup:
  """The stages in order, with time and tokens as bars."""
  longest = max((r.seconds or 0 for r in life.runs.values()), default=0) or 1
  most = max((r.tokens or 0 for r in life.runs.values()), default=0) or 1

  def bar(stage: str, value: float | None, full: float, text: str) -> Markup:
    return html(
      '<span class="bar c-{}" style="--share: {:.3f}">{}</span>',
      colour(stage),
      (value or 0) / full,
      text,
    )

  rows = [
    (
      html('<a href="#stage-{}">{}</a>', _anchor(life, name), swatch(name)),
      glossary.STAGES.get(name, f'A run of the stage {r.config.stage_name}.'),
      run_page.folder_name(r.config.init_from) or 'random weights',
      bar(name, r.seconds, longest, number(r.seconds, 'seconds')),
      bar(name, r.tokens, most, size(r.tokens) if r.tokens else '–'),
      _headline(life, name),
    )
    for name, r in life.runs.items()
  ]
  heads = ('stage', 'what it does', 'starts from', 'time', 'tokens', 'result')
  return table('The stages in order', heads, rows, kind='folds stages')


def _anchor(life: Life, name: str) -> int:
  return list(life.runs).index(name) + 1


def _answers(life: Life) -> Markup:
  """The same prompts through every stage."""
  stages = life.answers.get('stages', {})
  prompts = life.answers.get('prompts', [])
  expected = life.answers.get('expected', [])
  if not (stages and prompts):
    return Markup()
  blocks = []
  for i, prompt in enumerate(prompts[:_PROMPTS]):
    voices = [
      html(
        '<div><dt>{}</dt><dd class="said">{}</dd></div>',
        swatch(stage),
        _in_a_row(stages[stage][i]) or _silence(),
      )
      for stage in in_order(stages)
      if i < len(stages[stage])
    ]
    if isinstance(expected, list) and i < len(expected):
      voices.append(
        html(
          '<div class="truth"><dt>in truth</dt><dd class="said">{}</dd></div>',
          clipped(str(expected[i]), _LETTERS),
        )
      )
    blocks.append(
      html(
        '<section class="prompt"><h3 class="said">{}</h3>\n<dl>\n{}\n</dl>'
        '</section>',
        clipped(prompt.strip(), _LETTERS) or '(an empty prompt)',
        join(voices),
      )
    )
  shown = html('<div class="prompts">\n{}\n</div>', join(blocks[:_OPEN]))
  if len(blocks) > _OPEN:
    more = html('<div class="prompts">\n{}\n</div>', join(blocks[_OPEN:]))
    shown += folded(f'More of them: {len(blocks) - _OPEN}', more)
  return (
    _text(
      'Every stage is given the same prompts. A model that has only read text '
      'goes on as text would; ↵ is a new line.'
    )
    + shown
  )


def _in_a_row(text: str) -> str:
  """An answer whose new lines take no room."""
  return clipped(text.strip().replace('\n', ' ↵ '), _LETTERS)


def _text(*sentences: str) -> Markup:
  """A paragraph of the story."""
  return html('<p>{}</p>', ' '.join(sentence for sentence in sentences))


def _silence() -> Markup:
  return html('<em class="none">(nothing)</em>')


def _in_bits(record: Record) -> tuple[list, float | None]:
  """Training loss in bits a byte, by the held-out text's bytes a token."""
  for line in reversed(record.of('heldout')):
    loss, bits = line.get('loss'), line.get('bits_per_byte')
    if is_number(loss) and is_number(bits) and loss > 0:
      name = 'nll' if record.points('nll', 'train') else 'loss'
      points = record.points(name, 'train')
      scale = bits / loss
      return [(x, y and y * scale) for x, y in points], scale
  return [], None


def _floor(life: Life) -> list[tuple[str, float]]:
  value = life.figure('pretrain', 'true_bits_per_byte')
  return [('true entropy', value)] if is_number(value) else []


def _language(life: Life) -> Markup:
  """Pretraining against the floor."""
  record = life.runs.get('pretrain')
  if not record:
    return Markup()
  train, _ = _in_bits(record)
  intro = _text(
    'The model reads text and learns to say what comes next.',
    f'It read {size(record.tokens)} tokens in {spell(record.seconds)}.'
    if record.tokens and record.seconds
    else '',
  )
  found = [
    charts.Series('training', train, 'pretrain', 'faint'),
    charts.Series(
      'held out',
      record.points('bits_per_byte', 'heldout'),
      'pretrain',
      'dotted',
    ),
  ]
  if not any(one.points for one in found):
    return intro + curves.grid(record)
  floors = _floor(life)
  text = html(
    'Bits that the model needs for a byte of text, held-out text and the '
    'batches it trains on (their loss, at the held-out text’s bytes a token).'
  )
  ended = record.last('bits_per_byte')
  if floors and is_number(ended):
    text += html(
      ' The dashed line is the true entropy, which no model can beat: it ends '
      '{} above.',
      number(ended / floors[0][1] - 1, 'percent'),
    )
  return intro + figure(
    'Bits per byte, against the true entropy' if floors else 'Bits per byte',
    charts.lines('Bits per byte', found, floors=floors),
    text,
    'hero',
  )


def _assistant(life: Life) -> Markup:
  """What is right at each stage, and the curves of fine-tuning."""
  found = [
    charts.Row(
      stage,
      colour(stage),
      [
        ('sums', life.figure(stage, 'sums_accuracy'), True),
        ('questions', life.figure(stage, 'accuracy'), False),
      ],
    )
    for stage in life.stages
  ]
  found = [row for row in found if any(is_number(v) for _, v, _ in row.values)]
  pieces = []
  if found:
    pieces.append(
      figure(
        'Held-out questions answered right',
        charts.rows('Held-out questions right', found, percent=True),
        'Filled: questions about people and towns. Hollow: sums. None of them '
        'was asked in training.',
      )
    )
  tuned = [r for n, r in life.runs.items() if n in ('sft', 'lora', 'qlora')]
  series = [
    charts.Series(r.name, r.points('loss', 'train'), colour(r.name))
    for r in tuned
  ]
  if any(one.points for one in series):
    pieces.append(
      figure(
        'Loss on conversations',
        charts.lines('Loss on conversations', series, zero=True),
        'Nats a token of the answers in each batch: all weights (sft), '
        'low-rank adapters (lora), adapters on a four-bit base (qlora).',
      )
    )
  if not pieces:
    return Markup()
  intro = _text(
    'Conversations turn the base model into an assistant that answers what it '
    'is asked, and stops. They ask other questions than those that are held '
    'out: what it answers there, it knows from its reading.'
  )
  return html('{}<div class="grid two">\n{}\n</div>', intro, join(pieces))


def _student(life: Life) -> Markup:
  """A small network with a teacher and without."""
  series = []
  for name in ('student', 'distill'):
    if name in life.runs:
      record = life.runs[name]
      series.append(
        charts.Series(
          f'{name}, training', _in_bits(record)[0], colour(name), 'faint', False
        )
      )
      series.append(
        charts.Series(
          name,
          record.points('bits_per_byte', 'heldout'),
          colour(name),
          'dotted',
        )
      )
  if not any(one.points for one in series):
    return Markup()
  alone = life.figure('distill', 'baseline_bits_per_byte')
  taught = life.figure('distill', 'student_bits_per_byte')
  text = html('Thin: batches it trains on. Dots: held-out text.')
  if is_number(alone) and is_number(taught) and alone > 0:
    share = life.figure('distill', 'student_share')
    text += html(
      ' {}The teacher saves {} of the bits.',
      f'It has {number(share, "percent")} of the teacher’s parameters. '
      if is_number(share)
      else '',
      number(1 - taught / alone, 'percent'),
    )
  intro = _text(
    'The same small network twice, on the same text: alone, and with the base '
    'model’s probabilities for every next token as its teacher.'
  )
  return intro + figure(
    'Bits per byte, alone (student) and taught (distill)',
    charts.lines('Bits per byte', series, floors=_floor(life)),
    text,
    'hero',
  )


def _each(life: Life) -> Markup:
  """Each stage by itself: what it is, its curves, its command."""
  pieces = []
  for number_, (name, record) in enumerate(life.runs.items(), 1):
    inside = [run_page.facts(record), run_page.repeat(record)]
    inside.append(folded('All its curves', curves.grid(record)))
    figures = run_page.last_figures(record)
    if figures:
      inside.append(folded('Its last figures', figures))
    if answers := rollouts.shown(record.folder):
      inside.append(folded('Answers and what they earned', answers))
    done = f'{record.steps:,} steps'
    if record.seconds:
      done += f', {spell(record.seconds)}'
    pieces.append(
      html(
        '<details class="one" id="stage-{}"><summary>{} {}</summary>\n{}\n'
        '</details>',
        number_,
        swatch(name),
        done,
        join(inside),
      )
    )
  return _text(
    'The command, the configuration and all curves of each stage.'
  ) + join(pieces)


def sections(life: Life) -> list[tuple[str, str, Markup]]:
  """The page of a life: (anchor, heading, content); empty ones left out."""
  found = [
    ('stages', 'The stages, in order', _stages(life)),
    ('answers', 'The same questions, stage after stage', _answers(life)),
    ('language', 'Learning the language', _language(life)),
    ('assistant', 'Learning to answer', _assistant(life)),
    ('preferences', 'Learning what people prefer', preferences.shown(life)),
    ('rewards', 'Learning from rewards', rewards.shown(life)),
    ('student', 'A smaller student', _student(life)),
    ('figures', 'Every figure', figures.shown(life)),
    ('each', 'To repeat each stage', _each(life)),
    ('missing', 'What is not here', run_page.notes(life.notes)),
  ]
  return [section for section in found if section[2]]
