"""What an answer is worth: rewards, their weights, and their sum.

`rewards/NAME.py` holds `make(*, hyper-parameters…) -> RewardFn`; the file name
is the registration, and the keyword arguments with their defaults are the
schema. Rewards are host code: they run in threads while the device works.

`parse` reads what a configuration asks for, as in

  math + 0.1 * format(form="boxed") - 0.5 * length(limit=200) + 0 * exact
  math + 0.2 * path/to/file.py:function(k=1)

A reward of weight 0 is computed and logged, and is no part of the total.

A function of the user's, named by its file, is called with one `Sample` and
returns its reward: a number, NaN for "cannot be judged", or a `Score`. If its
first parameter is called `samples`, it is called with a list of them and
returns as many rewards. Further arguments come by name from the brackets.
"""

import ast
import concurrent.futures
import functools
import importlib.util
import inspect
import itertools
import math
import pathlib
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpu_lm.errors import UserError, nearest


class Sample(NamedTuple):
  """An answer to judge."""

  prompt: list[dict]  # messages of the conversation, the user's last
  text: str  # what the assistant said, special tokens left out
  record: dict  # what the data know of the prompt: answer, tests, …
  num_tokens: int = 0  # of the answer, its stop token included
  finished: bool = True  # it stopped by itself; else it was cut off


class Score(NamedTuple):
  """What one reward makes of one answer."""

  # NaN: it could not be judged, by a failure of ours; the sample is masked
  # and counted, and is never a zero.
  value: float
  # False: nothing could be read from the answer; the value is then that of a
  # wrong answer, and it is counted apart.
  parsed: bool = True
  note: str = ''  # one line for the rollout's file: what was compared with what


# Host code, called from worker threads, one batch after the other; may have
# `close()`.
RewardFn = Callable[[Sequence[Sample]], list[Score]]


class Scored(NamedTuple):
  """Rewards of n answers, in their order."""

  total: np.ndarray  # float64 [n], NaN where a part with a weight is NaN
  values: dict[str, np.ndarray]  # float64 [n] of each reward, without weight
  parsed: dict[str, np.ndarray]  # bool [n]
  notes: dict[str, list[str]]


class Part(NamedTuple):
  """One reward of a sum."""

  name: str
  weight: float
  score: RewardFn


class Scoring:
  """A weighted sum of rewards.

  Batches are scored one after the other, the rewards of a batch side by side.
  """

  def __init__(self, parts: Sequence[Part]):
    self.parts = tuple(parts)
    self._batches = concurrent.futures.ThreadPoolExecutor(1, 'rewards')
    self._each = concurrent.futures.ThreadPoolExecutor(len(parts), 'reward')

  @property
  def names(self) -> tuple[str, ...]:
    """Of the rewards, each once: regex, regex_2."""
    return tuple(part.name for part in self.parts)

  def __call__(self, samples: Sequence[Sample]) -> Scored:
    """Scores a batch and waits for it."""
    return self.start(samples).result()

  def start(
    self, samples: Sequence[Sample]
  ) -> concurrent.futures.Future[Scored]:
    """Scores a batch in other threads; `result()` raises what they raise."""
    return self._batches.submit(self._scored, list(samples))

  def _scored(self, samples: list[Sample]) -> Scored:
    running = [
      self._each.submit(_checked, part, samples) for part in self.parts
    ]
    concurrent.futures.wait(running)
    total = np.zeros(len(samples))
    values, parsed, notes = {}, {}, {}
    for part, found in zip(self.parts, running, strict=True):
      scores = found.result()
      values[part.name] = np.array([s.value for s in scores], np.float64)
      parsed[part.name] = np.array([s.parsed for s in scores], bool)
      notes[part.name] = [s.note for s in scores]
      if part.weight:
        total += part.weight * values[part.name]
    return Scored(total, values, parsed, notes)

  def close(self) -> None:
    """Waits for what has begun, and ends what the rewards have started."""
    self._batches.shutdown(cancel_futures=True)
    self._each.shutdown()
    _close(self.parts)

  def __enter__(self) -> 'Scoring':
    return self

  def __exit__(self, *error: object) -> None:
    self.close()


def _close(parts: Sequence[Part]) -> None:
  for part in parts:
    if hasattr(part.score, 'close'):
      part.score.close()


def _checked(part: Part, samples: list[Sample]) -> list[Score]:
  scores = list(part.score(samples))
  if len(scores) != len(samples):
    raise ValueError(
      f'{part.name}: {len(scores)} scores of {len(samples)} samples'
    )
  return scores


# What a configuration may say.


class _Mistake(ValueError):
  """In the words of a configuration."""


def parse(text: str, key: str = 'rewards') -> Scoring:
  """Reads a sum of rewards; see the module.

  Args:
    text: say 'math + 0.1 * format(form="boxed")'.
    key: of the configuration, for messages.

  Raises:
    UserError: what is wrong with the text, or with a file that it names.
  """
  paths: list[str] = []
  try:
    tree = ast.parse(_without_paths(text.strip(), paths), mode='eval').body
    terms = list(_terms(tree, 1.0, paths))
  except (SyntaxError, _Mistake, RecursionError) as error:
    why = f' ({error})' if isinstance(error, _Mistake) else ''
    raise UserError(
      f'{key}={text!r}: cannot be read{why}; write it like '
      "math + 0.1 * format(form='boxed') - 0.5 * length(limit=200)"
    ) from error
  parts: list[Part] = []
  try:
    for name, weight, options in terms:
      score = _made(name, options, key)
      named = _unused(name.rpartition(':')[2], [part.name for part in parts])
      parts.append(Part(named, weight, score))
  except UserError:
    _close(parts)
    raise
  return Scoring(parts)


def _unused(name: str, taken: Sequence[str]) -> str:
  """regex, regex_2, …"""
  names = itertools.chain([name], (f'{name}_{i}' for i in itertools.count(2)))
  return next(x for x in names if x not in taken)


_QUOTED_OR_PATH = re.compile(
  r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|([\w~./][\w~./-]*\.py:\w+)"""
)
_PATH_NAME = re.compile(r'path_(\d+)')


def _without_paths(text: str, paths: list[str]) -> str:
  """The text with `path_0` for its first 'file.py:function', and so on."""

  def name(found: re.Match) -> str:
    if found[1]:
      return found[1]
    paths.append(found[2])
    return f'path_{len(paths) - 1}'

  return _QUOTED_OR_PATH.sub(name, text)


def _terms(
  node: ast.expr, weight: float, paths: list[str]
) -> Iterator[tuple[str, float, dict[str, Any]]]:
  """Yields (name, weight, options) of each reward in a sum."""
  match node:
    case ast.BinOp(op=ast.Add() | ast.Sub()):
      yield from _terms(node.left, weight, paths)
      sign = 1 if isinstance(node.op, ast.Add) else -1
      yield from _terms(node.right, sign * weight, paths)
    case ast.UnaryOp(op=ast.USub()):
      yield from _terms(node.operand, -weight, paths)
    case ast.BinOp(op=ast.Mult()):
      number, other = _number(node.left), node.right
      if number is None:
        number, other = _number(node.right), node.left
      if number is None:
        raise _Mistake(f'{ast.unparse(node)} is no number times a reward')
      yield from _terms(other, number * weight, paths)
    case ast.Name() | ast.Call(func=ast.Name(), args=[]):
      keywords = node.keywords if isinstance(node, ast.Call) else []
      name = node.func.id if isinstance(node, ast.Call) else node.id
      if path := _PATH_NAME.fullmatch(name):
        name = paths[int(path[1])] if int(path[1]) < len(paths) else name
      yield name, weight, dict(_option(keyword) for keyword in keywords)
    case ast.Call(func=ast.Name()):
      raise _Mistake(f'{ast.unparse(node)} has an argument without its name')
    case ast.Constant():
      raise _Mistake(f'{ast.unparse(node)} is no reward; weights are factors')
    case _:
      raise _Mistake(f'{ast.unparse(node)} is no sum of rewards')


def _number(node: ast.expr) -> float | None:
  """A finite number that stands in the text; None: something else."""
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    number = _number(node.operand)
    return None if number is None else -number
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    return float(node.value) if math.isfinite(node.value) else None
  return None


def _option(keyword: ast.keyword) -> tuple[str, Any]:
  try:
    if keyword.arg is None:
      raise ValueError('**')
    return keyword.arg, ast.literal_eval(keyword.value)
  except ValueError as error:
    said = ast.unparse(keyword)
    raise _Mistake(f'{said} is no name with a plain value') from error


def _made(name: str, options: dict[str, Any], key: str) -> RewardFn:
  """The reward of a file of this package, or of the user's."""
  if ':' in name:
    return _users(name, options, key)
  # Here, since this module is all that the processes of a reward need of the
  # package, and they need no JAX.
  from tpu_lm import stage

  module = stage.find('tpu_lm.rewards', name, key)
  stage.check_hparams(module.make, options, f'{key}: {name}')
  return module.make(**options)


# Functions of the user's.


def _users(name: str, options: dict[str, Any], key: str) -> RewardFn:
  """Imports 'file.py:function'; relative to the current directory."""
  said, _, function_name = name.rpartition(':')
  path, where = pathlib.Path(said).expanduser(), f'{key}: {name}'
  module = _imported(path, where)
  function = getattr(module, function_name, None)
  if not callable(function):
    known = [k for k, x in vars(module).items() if inspect.isfunction(x)]
    raise UserError(
      f'{where}: {path} has no function {function_name}'
      f'{nearest(function_name, known)}; it has {", ".join(known) or "none"}'
    )
  first, *others = inspect.signature(function).parameters.values() or [None]
  if first is None or first.kind not in (
    first.POSITIONAL_ONLY,
    first.POSITIONAL_OR_KEYWORD,
  ):
    raise UserError(
      f'{where}: must take a sample; write def {function_name}(sample)'
    )
  known = [p.name for p in others if p.kind not in (p.VAR_KEYWORD,)]
  any_name = any(p.kind is p.VAR_KEYWORD for p in others)
  for option in options:
    if option not in known and not any_name:
      raise UserError(
        f'{where}({option}=…): unknown argument{nearest(option, known)}; '
        f'there are {", ".join(known) or "none"}'
      )
  for p in others:
    if p.name not in options and p.default is p.empty and p.name in known:
      raise UserError(f'{where}: needs {p.name}; write {name}({p.name}=…)')
  function = functools.partial(function, **options)
  return functools.partial(
    _of_user, function, first.name == 'samples', path, where
  )


def _imported(path: pathlib.Path, where: str) -> Any:
  if not path.is_file():
    raise UserError(f'{where}: there is no file {path}')
  name = f'tpu_lm_reward_{zlib.crc32(str(path.resolve()).encode()):08x}'
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # dataclasses look their module up
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise UserError(f'{where}: {_one_line(error, path)}') from error
  return module


def _of_user(
  function: Callable,
  whole: bool,
  path: pathlib.Path,
  where: str,
  samples: Sequence[Sample],
) -> list[Score]:
  """Calls the function and checks what it returns."""
  try:
    if whole:
      found = list(function(list(samples)))
    else:
      found = [function(sample) for sample in samples]
  except Exception as error:
    raise UserError(f'{where}: {_one_line(error, path)}') from error
  if len(found) != len(samples):
    raise UserError(
      f'{where}: returned {len(found)} rewards of {len(samples)} samples'
    )
  return [_score(one, where) for one in found]


def _score(found: Any, where: str) -> Score:
  try:
    score = found if isinstance(found, Score) else Score(found)
    value = float(score.value)
    if math.isinf(value):
      raise ValueError
    return score._replace(value=value)
  except (TypeError, ValueError) as error:
    raise UserError(
      f'{where}: returned {str(found)[:60]!r}; must be a finite number, NaN '
      'or a Score'
    ) from error


def _one_line(error: Exception, path: pathlib.Path) -> str:
  """What was raised, and the last line of the user's file on the way."""
  said = ' '.join(str(error).split())[:200]
  frames = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if pathlib.Path(frame.filename).resolve() == path.resolve()
  ]
  place = f' at {path}:{frames[-1].lineno}' if frames else ''
  return f'{type(error).__name__}: {said}{place}'
