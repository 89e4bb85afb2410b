"""The commands: `tpu_lm COMMAND --config=FILE[:VARIANT] --workdir=DIR …`.

A mistake of the user's ends with exit status 2 and one line on stderr.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from tpu_lm import __version__, options
from tpu_lm.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
  """argparse that raises instead of printing its usage and exiting."""

  def __init__(self, **options):
    # A shortened option would hide a mistyped one.
    super().__init__(allow_abbrev=False, **options)

  def error(self, message: str):
    raise UserError(f'{self.prog}: {message}; see `{self.prog} --help`')


def train(args: argparse.Namespace, overrides: list) -> int:
  """Trains to the last step, or goes on where the directory stopped."""
  from tpu_lm import devices

  devices.set_up(args.devices)
  of = args.coordinator, args.processes, args.process
  with devices.connected(*of):
    config = _config(args, overrides)
    from tpu_lm import goodput, run

    began = goodput.process_start() if args.is_process else None
    run.execute(config, args.workdir, began=began, spec=args.config)
  return 0


def prepare(args: argparse.Namespace, overrides: list) -> int:
  """Tokenises and packs data, or writes them by a constitution."""
  if args.constitution:
    return _by_constitution(args, overrides)
  if not args.config:
    raise UserError('prepare: give --config=FILE, or --constitution=FILE')
  config = _config(args, overrides)
  if not (args.workdir or config.data.dir):
    raise UserError('prepare: give --workdir=DIR or --config.data.dir=DIR')
  from tpu_lm import run
  from tpu_lm.data import prepare as preparing

  preparing.prepare(config, run.data_dir(config, args.workdir))
  return 0


def _by_constitution(args: argparse.Namespace, overrides: list) -> int:
  _no_overrides(overrides)
  for name in ('backend', 'source', 'to'):
    if not getattr(args, name):
      raise UserError(f'prepare: --constitution needs --{name} too')
  from tpu_lm import constitution, devices

  devices.set_up()
  names = (
    'backend', 'source', 'model', 'key_env', 'judge', 'judge_model',
    'judge_key_env', 'max_calls', 'max_tokens', 'limit', 'kind', 'rounds',
    'seed', 'temperature', 'max_new_tokens',
  )  # fmt: skip
  chosen = {name: getattr(args, name) for name in names}
  constitution.prepare(args.to, principles=args.constitution, **chosen)
  return 0


def generate(args: argparse.Namespace, overrides: list) -> int:
  """Streams a continuation of a prompt."""
  _no_overrides(overrides)
  from tpu_lm import devices, start
  from tpu_lm.data import chat
  from tpu_lm.generate import stream

  try:
    args.prompt.encode()
  except UnicodeEncodeError as error:
    raise UserError('--prompt: is not UTF-8; give UTF-8 text') from error
  if args.draft and args.int8_cache:
    raise UserError('--int8_cache: not together with --draft yet; leave it out')
  chosen = _sampler(args)
  devices.set_up()
  loaded = start.load(args.workdir, base=args.base)
  prompt, stop_ids = args.prompt, ()
  if args.chat:
    template = chat.load('', loaded.tokenizer, args.workdir / 'tokenizer')
    system = [{'role': 'system', 'content': args.system}] if args.system else []
    prompt = template.prompt([*system, {'role': 'user', 'content': prompt}])
    stop_ids = (template.stop_id,)
  elif args.system:
    raise UserError('--system: only a chat has a system turn; add --chat')
  guessing = _guessing(args, loaded)
  pieces = stream.stream(
    loaded.model,
    loaded.params,
    loaded.tokenizer,
    prompt,
    max_new_tokens=args.max_new_tokens,
    sampler=chosen,
    seed=args.seed,
    stop=args.stop,
    stop_ids=stop_ids,
    quantised_cache=args.int8_cache,
    guessing=guessing,
  )
  stream.show('' if args.chat else args.prompt, pieces, sys.stdout)
  return 0


def evaluate(args: argparse.Namespace, overrides: list) -> int:
  """Prints the held-out figures of what a working directory trained."""
  _no_overrides(overrides)
  from tpu_lm import devices, reading, stage, start

  devices.set_up()
  loaded = start.load(args.workdir, base=args.base)
  scores = {}
  with reading.opened(loaded, args.workdir, args.source) as (run, rows):
    for name in loaded.config.evals:
      module = stage.find('tpu_lm.evals', name, 'evals')
      if args.source and not getattr(module, 'READS_ROWS', True):
        print(f'evals={name}: asks its own; left out', file=sys.stderr)
        continue
      scores |= module.make(run, rows)(loaded.params)
  print(f'{args.source or "held-out split"}, step {loaded.step:,}')
  for name, value in scores.items():
    text = f'{value:,}' if isinstance(value, int) else f'{value:,.4f}'
    print(f'  {name:<20} {text:>14}')
  return 0


def answer(args: argparse.Namespace, overrides: list) -> int:
  """Writes a model's answers to prompts as conversations to train on."""
  _no_overrides(overrides)
  from tpu_lm import devices
  from tpu_lm.generate import answer_file

  chosen = _sampler(args)
  devices.set_up()
  answer_file.write(
    args.workdir,
    args.source,
    args.to,
    sampler=chosen,
    max_new_tokens=args.max_new_tokens or 64,
    seed=args.seed,
    base=args.base,
    best=answer_file.Best(args.best_of, args.reward, args.least),
  )
  return 0


def merge(args: argparse.Namespace, overrides: list) -> int:
  """Writes a run of adapters or quantised weights as a plain model."""
  _no_overrides(overrides)
  from tpu_lm import devices, start

  devices.set_up()
  start.merge(args.workdir, args.to, args.base)
  return 0


def report(args: argparse.Namespace, overrides: list) -> int:
  """Writes a page about a run, or about a whole quickstart."""
  _no_overrides(overrides)
  from tpu_lm import report as reports

  print(reports.write(args.workdir, args.to))
  return 0


def check(args: argparse.Namespace, overrides: list) -> int:
  """Shows rows of a batch, and proves invariances of loss and gradient."""
  from tpu_lm import devices

  devices.set_up(args.devices or 8)
  config = _config(args, overrides)
  from tpu_lm import check as checking

  return 0 if checking.check(config, args.workdir, args.rows) else 1


def plan(args: argparse.Namespace, overrides: list) -> int:
  """Says what a run would need and take on devices that are not here."""
  from tpu_lm.plan import topology

  topology.set_up()  # before JAX is imported
  from tpu_lm import devices
  from tpu_lm.plan import command

  devices.set_up()
  names = [name for name in args.topology.split(',') if name]
  if not names:
    raise UserError('--topology: is empty; name one, such as v5e-256')
  fits = command.plan(
    args.config,
    overrides,
    names,
    to=args.to,
    price=args.price,
    tries=args.search,
  )
  return 0 if fits else 1


def drill(args: argparse.Namespace, overrides: list) -> int:
  """Kills and resumes a run, and proves that the end is bit-identical."""
  config = _config(args, overrides)  # its mistakes are named before the wait
  from tpu_lm import drill as drills
  from tpu_lm import stage

  samples = stage.rows_of(config) == 'prompts'
  points = drills.POINTS + drills.SAMPLING * samples
  given = [f'--config={args.config}']
  given += [f'--config.{key}={value}' for key, value in overrides]
  drilled = drills.drill(given, args.kills, args.workdir, points=points)
  return 0 if drilled else 1


def doctor(args: argparse.Namespace, overrides: list) -> int:
  """Tells what JAX sees, what is missing, and the exact mend."""
  del args
  _no_overrides(overrides)
  from tpu_lm import doctor as doctors

  return doctors.report()


def quickstart(args: argparse.Namespace, overrides: list) -> int:
  """Takes a tiny model through its whole life on this machine."""
  from tpu_lm import devices
  from tpu_lm import quickstart as quickstarts

  devices.set_up()
  quickstarts.execute(args.workdir, overrides)
  return 0


def _sampler(args: argparse.Namespace):
  from tpu_lm.generate import sampler

  if not 0 <= args.seed < 2**32:
    raise UserError(f'--seed={args.seed}: must be from 0 to 2**32 - 1')
  return sampler.Sampler(
    args.temperature,
    args.top_k,
    args.top_p,
    args.min_p,
    args.repetition_penalty,
  )


def _guessing(args: argparse.Namespace, loaded):
  from tpu_lm import start
  from tpu_lm.generate import speculative

  if not args.draft:
    return None
  if args.draft == 'lookup':
    return speculative.Guessing(None, args.ahead)
  draft = start.load(pathlib.Path(args.draft))
  if draft.tokenizer.digest != loaded.tokenizer.digest:
    raise UserError(
      f'--draft={args.draft}: has another tokenizer than {args.workdir}; '
      'take a draft of the same tokenizer'
    )
  return speculative.Guessing(
    speculative.Draft(draft.model, draft.params), args.ahead
  )


def _config(args: argparse.Namespace, overrides: list):
  from tpu_lm import config

  return config.load(args.config, overrides)


def _no_overrides(overrides: list) -> None:
  if overrides:
    raise UserError(
      f'--config.{overrides[0][0]}: this command reads the configuration of '
      'the working directory; leave it out'
    )


# What a user types, the function, its options.
COMMANDS = {
  'quickstart': (quickstart, [options.folder('runs/quickstart')]),
  'train': (
    train,
    [options.CONFIG, options.folder(None), options.DEVICES, *options.PROCESSES],
  ),
  'generate': (
    generate,
    [
      options.folder(None),
      *options.PROMPT,
      *options.SAMPLING,
      options.STOP,
      *options.SPEED,
      options.BASE,
    ],
  ),
  'answer': (
    answer,
    [
      options.folder(None),
      options.PROMPTS,
      options.TO,
      *options.BEST,
      *options.SAMPLING,
      options.BASE,
    ],
  ),
  'eval': (evaluate, [options.folder(None), options.SOURCE, options.BASE]),
  'merge': (merge, [options.folder(None), options.TO, options.BASE]),
  'report': (report, [options.folder(None), options.PAGE]),
  'prepare': (
    prepare,
    [
      (options.CONFIG[0], options.CONFIG[1] | options.OPTIONAL),
      options.folder(''),
      *options.CONSTITUTION,
    ],
  ),
  'check': (
    check,
    [
      options.CONFIG,
      options.folder('runs/check'),
      options.ROWS,
      options.DEVICES,
    ],
  ),
  'plan': (plan, [options.CONFIG, *options.PLAN]),
  'drill': (drill, [options.CONFIG, options.folder(None), options.KILLS]),
  'doctor': (doctor, []),
}


def make_parser() -> Parser:
  """Declares every command with its options."""
  parser = Parser(
    prog='tpu_lm', description='Trains language models end to end in JAX.'
  )
  parser.add_argument('--version', action='version', version=__version__)
  commands = parser.add_subparsers(dest='command', required=True)
  for name, (function, declared) in COMMANDS.items():
    text = function.__doc__
    one = commands.add_parser(name, help=text, description=text)
    one.set_defaults(function=function)
    for flag, how in declared:
      one.add_argument(flag, **how)
  return parser


def split_overrides(
  argv: Sequence[str],
) -> tuple[list[str], list[tuple[str, str]]]:
  """Takes `--config.KEY=VALUE` (or `--config.KEY VALUE`) out of `argv`.

  A key without a value is a switch that is turned on.
  """
  rest, overrides = [], []
  words = list(argv)
  while words:
    word = words.pop(0)
    if not word.startswith('--config.'):
      rest.append(word)
      continue
    key, is_given, value = word.removeprefix('--config.').partition('=')
    if not is_given:
      is_value = words and not words[0].startswith('--')
      value = words.pop(0) if is_value else 'true'
    overrides.append((key, value))
  return rest, overrides


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns its exit status."""
  is_process = argv is None  # else another program calls it
  argv = list(sys.argv[1:] if is_process else argv)
  try:
    rest, overrides = split_overrides(argv)
    parser = make_parser()
    args, unknown = parser.parse_known_args(rest)
    if unknown:
      known = [
        option
        for action in parser._subparsers._group_actions[0]
        .choices[args.command]
        ._actions
        for option in action.option_strings
      ]
      raise UserError(
        f'{unknown[0]}: unknown option{nearest(unknown[0], known)}; see '
        f'`tpu_lm {args.command} --help`'
      )
    args.is_process = is_process
    return args.function(args, overrides)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    return 2
  except BrokenPipeError:  # `tpu_lm generate … | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
