"""The options of the command line, each declared once.

An option is its flag and what argparse takes for it; several that always come
together are a tuple of options.
"""

import argparse
import math
import pathlib
from collections.abc import Callable


def number(kind: Callable, low: float) -> Callable:
  """A type of options: numbers from `low` on."""

  def parse(text: str):
    value = kind(text)
    if not low <= value < math.inf:  # nor is what is no number
      raise argparse.ArgumentTypeError(f'{text}: must be at least {low}')
    return value

  parse.__name__ = kind.__name__  # argparse tells it: "invalid int value"
  return parse


def option(flag: str, text: str, **how) -> tuple[str, dict]:
  """An option, its help, and what else argparse takes."""
  return flag, {'help': text, **how}


def folder(default: str | None) -> tuple[str, dict]:
  """`--workdir`; default None: it is required, '': it need not be there."""
  how = {'default': default or None, 'required': default is None}
  return option('--workdir', 'the folder of the run', type=path, **how)


def path(text: str) -> pathlib.Path:
  """A type of options; an empty one would be the folder one stands in."""
  if not text:
    raise argparse.ArgumentTypeError('is empty; name a file or folder')
  if '://' in text:  # pathlib would make a folder `gs:` of it
    raise argparse.ArgumentTypeError(
      f'{text}: cannot be on cloud storage; mount a file system that all hosts '
      'share, and name a folder there'
    )
  return pathlib.Path(text)


CONFIG = option(
  '--config',
  'a file of configs/; --config.KEY=VALUE changes a key of it',
  required=True,
  metavar='FILE[:VARIANT]',
)
DEVICES = option(
  '--devices',
  'simulate so many devices on the CPU',
  type=number(int, 1),
  default=0,
)
PROCESSES = (
  option(
    '--coordinator',
    'HOST:PORT of process 0, or auto on Cloud TPU',
    default='',
  ),
  option(
    '--processes',
    'how many processes make up the run',
    type=number(int, 1),
    default=1,
  ),
  option(
    '--process',
    'which of them this is, from 0',
    type=number(int, 0),
    default=0,
  ),
)
BASE = option(
  '--base', 'where the base of an adapter lies now', default='', metavar='DIR'
)
TO = option('--to', 'what is written', required=True, type=path)
PAGE = option(
  '--to', 'the page; by default WORKDIR/report.html', type=path, default=None
)
PROMPT = (
  option('--prompt', 'how the text begins', default=''),
  option(
    '--chat',
    'the prompt is what a user says, and an assistant answers',
    action='store_true',
  ),
  option('--system', 'the system turn of a chat', default=''),
)
SAMPLING = (
  option(
    '--max_new_tokens',
    'default: up to the trained length',
    type=number(int, 1),
    default=None,
  ),
  option('--temperature', '0: the likeliest', type=float, default=0.8),
  option('--top_k', '0: no limit', type=int, default=0),
  option('--top_p', '1: no limit', type=float, default=1.0),
  option(
    '--min_p',
    "share of the likeliest token's probability; 0: no limit",
    type=float,
    default=0.0,
  ),
  option('--repetition_penalty', '1: none', type=float, default=1.0),
  option('--seed', 'the same gives the same text', type=int, default=0),
)
STOP = option(
  '--stop',
  'end before this text; may be given again',
  action='append',
  default=[],
  metavar='TEXT',
)
SPEED = (
  option('--int8_cache', 'keys and values in 8 bits', action='store_true'),
  option(
    '--draft',
    'speculative decoding: the folder of a smaller model of the same '
    'tokenizer, or `lookup`: by what stood before in the text',
    default='',
    metavar='DIR',
  ),
  option(
    '--ahead', 'tokens that a draft guesses', type=number(int, 1), default=4
  ),
)
PLAN = (
  option(
    '--topology',
    'v5e-256, 2xv5e-256 (two slices), v5p-128, v5e:4x4, h100-8; several with '
    'commas',
    required=True,
  ),
  option(
    '--search',
    'compile so many of the most promising meshes, microbatches and remat '
    'policies; 0: only what the configuration says',
    type=number(int, 0),
    default=0,
    nargs='?',
    const=4,
  ),
  option(
    '--price', 'of a chip for an hour', type=number(float, 0), default=0.0
  ),
  option(
    '--to',
    'a folder; by default beside the configuration',
    type=path,
    default=None,
  ),
)
ROWS = option('--rows', 'shown of the batch', type=number(int, 1), default=2)
KILLS = option(
  '--kills',
  'at random moments, besides one at each named point',
  type=number(int, 0),
  default=20,
)
SOURCE = option(
  '--source', 'other text; the default is the held-out split', default=''
)
PROMPTS = option(
  '--source',
  'records with prompts or conversations: as data.source',
  required=True,
)
BEST = (
  option(
    '--best_of',
    'answers to a prompt, of which the best is written',
    type=number(int, 1),
    default=1,
  ),
  option('--reward', 'what is best: as stage.reward', default=''),
  option('--least', 'an answer must have more of it', type=float, default=0.0),
)
OPTIONAL = {'required': False, 'default': ''}
CONSTITUTION = (
  option(
    '--constitution', 'principles by which answers are revised', default=''
  ),
  option(
    '--backend', 'what answers: a working directory, or http://…', default=''
  ),
  option('--model', 'its name at an endpoint', default=''),
  option('--key_env', 'the environment variable with its key', default=''),
  option('--judge', 'what prefers, as --backend; the same', default=''),
  option('--judge_model', 'its name at an endpoint', default=''),
  option(
    '--judge_key_env', 'the environment variable with its key', default=''
  ),
  option('--source', 'records with prompts', default=''),
  option('--to', 'a new folder', type=path, default=None),
  option(
    '--kind',
    'sft: revised answers, pairs: preferences, or both',
    default='both',
  ),
  option('--rounds', 'of revision', type=number(int, 1), default=1),
  option('--limit', 'prompts; 0: all', type=number(int, 0), default=0),
  option('--max_calls', 'in all; 0: any', type=number(int, 0), default=0),
  option('--max_tokens', 'in all; 0: any', type=number(int, 0), default=0),
  option('--max_new_tokens', 'of a reply', type=number(int, 1), default=512),
  option('--temperature', 'of answers and revisions', type=float, default=1.0),
  option('--seed', 'of all that is drawn', type=number(int, 0), default=0),
)
