"""`tpu_lm quickstart`: the life of a tiny model on this machine, measured.

Each stage trains in a folder of its own below the working directory, with a
configuration of `configs/`, through the very commands that a user has; what
the stages are and how each is measured stands in `quickstart_stages.py`. The
figures of all stages are in `summary.json`: {stage: {name: number}}.
"""

import json
import pathlib
import sys
import time
from typing import Any

from tpu_lm import report, workdir
from tpu_lm.progress import duration
from tpu_lm.quickstart_stages import STAGES, Life, Outcome


def _heading(number: int, text: str) -> None:
  bold, plain = ('\033[1m', '\033[0m') if sys.stdout.isatty() else ('', '')
  print(f'\n{bold}{number}. {text}{plain}', flush=True)


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
  life = Life(directory, overrides)
  outcomes = {}
  for number, (name, stage) in enumerate(STAGES.items(), 1):
    _heading(number, f'{name}: {stage.__doc__.splitlines()[0]}')
    outcomes[name] = stage(life)
    figures = {name: outcome.figures for name, outcome in outcomes.items()}
    workdir.write_json(directory / 'summary.json', figures)
  workdir.write_json(directory / 'answers.json', life.answers(outcomes))
  page = report.write(directory)
  print(f'\n{_table(outcomes)}')
  spent = duration(time.perf_counter() - start)
  print(f'  {spent} in all; figures in {directory / "summary.json"},')
  print(f'  the whole story in {page}\n')
  print('Go on with your own text:')
  print(
    '  .venv/bin/tpu_lm train --config=configs/pretrain.py:tiny '
    '--config.data.source=YOUR.txt --workdir=runs/mine\n'
    '  .venv/bin/tpu_lm generate --workdir=runs/mine --prompt="Once"\n'
    'or talk to this one:\n'
    f'  .venv/bin/tpu_lm generate --chat --workdir={directory / "dpo"} '
    '--prompt="Where does Vera live?"'
  )
  return json.loads(json.dumps(figures))
