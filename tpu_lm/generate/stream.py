"""Text as it is generated: never half a character, never a stop string.

What happens beyond the length that the model was trained on: a prompt longer
than it is refused, and a completion that would pass it goes on after a warning,
for RoPE does badly at positions it has not seen (arXiv 2306.15595, section 1).
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from tpu_lm.errors import UserError
from tpu_lm.generate import engine, speculative
from tpu_lm.generate.sampler import Sampler
from tpu_lm.generate.speculative import Guessing
from tpu_lm.models.transformer import Transformer
from tpu_lm.tokenizer import Tokenizer

_BROKEN = '\ufffd'  # what decoding gives for bytes that are no character (yet)
_CONTEXT = 16  # tokens decoded again, so that what follows joins them rightly
_BLOCK = 8  # tokens a call of the decode program
_DEFAULT_NEW = 256  # tokens, where the trained length is not known


class Detokenizer:
  """Decodes tokens as they come; text is given out once it is complete."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._ids: list[int] = []
    self._num_given = 0  # characters of the text of _ids

  def push(self, ids: Sequence[int]) -> str:
    """Returns the text that has become complete with these tokens."""
    self._ids += ids
    text = self._tokenizer.decode(self._ids)
    # The bytes of an unfinished character decode to at most a few of these;
    # more of them are there to stay.
    held = min(len(text) - len(text.rstrip(_BROKEN)), 2 * _CONTEXT)
    given = text[self._num_given : len(text) - held]
    self._num_given += len(given)
    if not held and len(self._ids) > 4 * _CONTEXT:
      self._ids = self._ids[-_CONTEXT:]
      self._num_given = len(self._tokenizer.decode(self._ids))
    return given

  def flush(self) -> str:
    """Returns what is left at the end, complete or not."""
    rest = self._tokenizer.decode(self._ids)[self._num_given :]
    self._num_given += len(rest)
    return rest


class StopStrings:
  """Passes text on up to the first of some strings."""

  def __init__(self, stops: Sequence[str]):
    if '' in stops:
      raise UserError("stop='': a stop string must not be empty")
    self._stops = tuple(stops)
    self._held = ''
    self.met = False

  def push(self, text: str) -> str:
    """Returns what can be shown: no part of a stop string."""
    text = self._held + text
    found = [text.find(stop) for stop in self._stops if stop in text]
    if found:
      self.met, self._held = True, ''
      return text[: min(found)]
    held = max((_overlap(text, stop) for stop in self._stops), default=0)
    self._held = text[len(text) - held :]
    return text[: len(text) - held]

  def flush(self) -> str:
    """Returns what was held back: no stop string came of it."""
    rest, self._held = self._held, ''
    return rest


def _overlap(text: str, stop: str) -> int:
  """Returns how many characters at the end of `text` may begin `stop`."""
  for size in range(min(len(stop) - 1, len(text)), 0, -1):
    if text.endswith(stop[:size]):
      return size
  return 0


def stream(
  model: Transformer,
  params: Any,
  tokenizer: Tokenizer,
  prompt: str | Sequence[int],
  *,
  max_new_tokens: int | None = None,
  sampler: Sampler = Sampler(),  # noqa: B008
  seed: int = 0,
  stop: Sequence[str] = (),
  stop_ids: Sequence[int] = (),
  quantised_cache: bool = False,
  guessing: Guessing | None = None,
  warn: Callable[[str], None] | None = None,
) -> Iterator[str]:
  """Returns an iterator over the pieces of the text that follows `prompt`.

  A prompt that is text begins a document. Generation ends with the document,
  with a token of `stop_ids`, before the first stop string, or with
  max_new_tokens.

  Args:
    model: the network; `config.max_length` is the trained length.
    params: its parameters.
    tokenizer: of the model.
    prompt: text, which may be empty, or the ids of a chat template's prompt.
    max_new_tokens: by default what is left of the trained length.
    sampler: how tokens are drawn.
    seed: the same seed gives the same text.
    stop: strings that end the text and are not part of it.
    stop_ids: tokens that end it, besides the one that ends documents.
    quantised_cache: keys and values in 8 bits.
    guessing: for speculative decoding; None: token by token.
    warn: is told if the text may pass the trained length; by default it is
      printed on standard error.

  Raises:
    UserError: at once, if the prompt or another value cannot be used.
  """
  ids = prompt
  if isinstance(prompt, str):
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
  max_new_tokens = _check_length(
    model.config.max_length, len(ids), max_new_tokens, warn or _warn
  )
  sampler.check(model.config.vocab_size)
  if guessing is not None:
    guessing.check(model, sampler)
    if quantised_cache:
      raise UserError('quantised_cache: not with speculative decoding yet')
  stop_ids = (tokenizer.eot_id, *stop_ids)
  asked = model, params, ids, max_new_tokens, sampler, stop_ids, seed
  grown = _grown(*_ways(*asked, quantised_cache, guessing), max_new_tokens)
  return _texts(grown, Detokenizer(tokenizer), StopStrings(stop))


def _ways(model, params, ids, most, sampler, stop_ids, seed, int8, guessing):
  """What begins a completion, reads it, and goes on with it to a length."""
  asked = model, params, [ids], most, sampler, stop_ids, seed
  if guessing is None:
    return (
      lambda: engine.start(*asked, quantised_cache=int8),
      lambda state: engine.completions(state, 1)[0],
      lambda state, to: engine.advance(model, params, state, to, sampler),
    )
  return (
    lambda: speculative.start(*asked, guessing=guessing),
    lambda state: speculative.speculated(state, [len(ids)]).completions[0],
    lambda state, to: speculative.advance(model, state, to, sampler, guessing),
  )


def _grown(begin, read, advance, most: int) -> Iterator[engine.Completion]:
  """The completion of one prompt as it grows, some tokens at a time."""
  state = begin()
  while True:
    one = read(state)
    yield one
    if one.finished or len(one.tokens) >= most:
      return
    state = advance(state, min(len(one.tokens) + _BLOCK, most))


def _texts(
  grown: Iterator[engine.Completion], text: Detokenizer, stops: StopStrings
) -> Iterator[str]:
  num_read = 0
  for one in grown:
    shown = stops.push(text.push(one.tokens[num_read:]))
    if shown:
      yield shown
    num_read = len(one.tokens)
    if stops.met:
      return
  rest = stops.push(text.flush())
  rest += '' if stops.met else stops.flush()
  if rest:
    yield rest


def _check_length(
  trained: int,
  num_prompt: int,
  max_new_tokens: int | None,
  warn: Callable[[str], None],
) -> int:
  """Returns max_new_tokens, filled in; `trained` 0 means unknown."""
  if trained and num_prompt > trained:
    raise UserError(
      f'prompt: {num_prompt} tokens, but the model was trained on {trained} '
      'at most; shorten the prompt'
    )
  if max_new_tokens is None:
    max_new_tokens = trained - num_prompt if trained else _DEFAULT_NEW
    if max_new_tokens < 1:
      raise UserError(
        f'prompt: {num_prompt} tokens leave nothing of the {trained} that the '
        'model was trained on; shorten the prompt or give max_new_tokens'
      )
  if max_new_tokens < 1:
    raise UserError(f'max_new_tokens={max_new_tokens}: must be at least 1')
  if trained and num_prompt + max_new_tokens > trained:
    warn(
      f'warning: prompt and completion may reach '
      f'{num_prompt + max_new_tokens} tokens, but the model was trained on '
      f'{trained}: expect poor text beyond (max_new_tokens='
      f'{trained - num_prompt} stays within)'
    )
  return max_new_tokens


def _warn(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def show(prompt: str, pieces: Iterator[str], out: TextIO) -> None:
  """Writes the prompt and what follows it as it comes.

  On a terminal the prompt is bold, and control characters, which text may
  hold and a terminal would obey, are replaced.
  """
  is_terminal = out.isatty()
  bold = is_terminal and 'NO_COLOR' not in os.environ
  safe = _without_controls if is_terminal else str
  out.write(f'\x1b[1m{safe(prompt)}\x1b[0m' if bold else safe(prompt))
  out.flush()
  for piece in pieces:
    out.write(safe(piece))
    out.flush()
  out.write('\n')
  out.flush()


def _without_controls(text: str) -> str:
  return ''.join(
    c if c in '\n\t' or not (c < ' ' or '\x7f' <= c <= '\x9f') else _BROKEN
    for c in text
  )
