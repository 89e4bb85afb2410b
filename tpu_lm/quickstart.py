"""`tpu_lm quickstart`: the life of a tiny model on this machine, measured.

Each stage trains in a folder of its own below the working directory, with a
configuration of `configs/`, through the very commands that a user has. The
figures of all stages stand in `summary.json`: {stage: {name: number}}.
"""

import json
import pathlib
import sys
import textwrap
import time
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tpu_lm import config as configs
from tpu_lm import metrics, run, workdir
from tpu_lm.data import world, world_tfds
from tpu_lm.errors import UserError
from tpu_lm.generate import stream
from tpu_lm.generate.sampler import Sampler
from tpu_lm.progress import duration

PROMPTS = ('', 'Questions for Tuesday:\n', 'Sold in Luton in June\n')
_CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


class Outcome(NamedTuple):
  """What a stage has to show."""

  figures: dict[str, float]  # of summary.json
  lines: list[tuple[str, str]]  # of the table: what, and how much


def _config(name: str, overrides: list[tuple[str, str]]) -> ConfigDict:
  path = _CONFIGS / f'{name}.py'
  if not path.is_file():
    raise UserError(
      f'{path}: not there; quickstart runs from a clone of the repository '
      '(pip install --editable .)'
    )
  return configs.load(str(path), overrides)


def _heading(number: int, text: str) -> None:
  bold, plain = ('\033[1m', '\033[0m') if sys.stdout.isatty() else ('', '')
  print(f'\n{bold}{number}. {text}{plain}', flush=True)


def _samples(folder: pathlib.Path, seed: int) -> None:
  loaded = run.load(folder)
  for prompt in PROMPTS:
    pieces = stream.stream(
      loaded.model,
      loaded.params,
      loaded.tokenizer,
      prompt,
      sampler=Sampler(temperature=0.7),
      seed=seed,
    )
    print('  ' + '─' * 76)
    for line in (prompt + ''.join(pieces)).strip().split('\n'):
      print(textwrap.indent(textwrap.fill(line, 76), '  '))
  print('  ' + '─' * 76, flush=True)


def pretrain(folder: pathlib.Path, overrides: list) -> Outcome:
  """Text of the world to a base model, measured against its true entropy."""
  config = _config('quickstart', overrides)
  heldout = list(world.documents(0, 'heldout', world_tfds.SIZES['text'][1]))
  true = world.true_bits_per_byte(heldout)
  print(
    'A generated world of people, towns and things; the generator knows its\n'
    f'own probabilities, so the floor is known: {true:.4f} bits per byte.',
    flush=True,
  )
  last = run.execute(config, folder)
  if 'bits_per_byte' not in last:
    raise SystemExit(0)  # stopped by a signal; what is done is saved
  assert config.eval_rows or last['bytes'] == sum(
    len(document.text.encode()) for document in heldout
  ), 'the held-out text is not the one whose entropy was computed'
  lines = metrics.read(folder / 'metrics.jsonl')
  steps = [line for line in lines if line['split'] == 'train']
  # Over the whole run, evaluations and checkpoints taken out; the first line
  # holds the compilation.
  speeds = sorted(line['tokens_per_second'] for line in steps[1:] or steps)
  found = last['bits_per_byte']
  figures = {
    'bits_per_byte': found,
    'true_bits_per_byte': true,
    'seconds': last['seconds'],
    'tokens_per_second': speeds[len(speeds) // 2],
    'tokens': steps[-1]['tokens'],
  }
  return Outcome(
    figures,
    [
      ('held-out bits per byte', f'{found:.4f}'),
      ('true entropy of that text', f'{true:.4f}'),
      ('above the floor by', f'{found / true - 1:.1%}'),
      ('tokens read', f'{figures["tokens"]:,}'),
      ('tokens a second (median)', f'{figures["tokens_per_second"]:,.0f}'),
      ('time', duration(last['seconds'])),
    ],
  )


STAGES = {'pretrain': pretrain}


def _table(outcomes: dict[str, Outcome]) -> str:
  rows = [(s, *line) for s, o in outcomes.items() for line in o.lines]
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  rule = '  ' + '─' * (sum(widths) + 6)
  text, before = [rule], ''
  for stage, what, much in rows:
    name = '' if stage == before else stage
    before = stage
    text.append(
      f'  {name:<{widths[0]}}   {what:<{widths[1]}}   {much:>{widths[2]}}'
    )
  return '\n'.join([*text, rule])


def execute(
  directory: pathlib.Path, overrides: list[tuple[str, str]]
) -> dict[str, Any]:
  """Runs every stage, prints what came of it and writes `summary.json`.

  Args:
    directory: one folder a stage is made in it.
    overrides: of the configuration, as on the command line.
  """
  start = time.perf_counter()
  outcomes = {}
  for number, (name, stage) in enumerate(STAGES.items(), 1):
    _heading(number, f'{name}: {stage.__doc__.splitlines()[0]}')
    outcomes[name] = stage(directory / name, overrides)
    print('\nWhat it writes:')
    _samples(directory / name, seed=0)
  summary = {name: outcome.figures for name, outcome in outcomes.items()}
  workdir.write_json(directory / 'summary.json', summary)
  print(f'\n{_table(outcomes)}')
  spent = duration(time.perf_counter() - start)
  print(f'  {spent} in all; figures in {directory / "summary.json"}\n')
  print('Go on with your own text:')
  print(
    '  .venv/bin/tpu_lm train --config=configs/pretrain.py:tiny '
    '--config.data.source=YOUR.txt --workdir=runs/mine\n'
    '  .venv/bin/tpu_lm generate --workdir=runs/mine --prompt="Once"'
  )
  return json.loads(json.dumps(summary))
