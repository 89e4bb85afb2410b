"""Chat templates: which tokens a conversation becomes, and which are trained.

Templates are the Jinja templates that the ecosystem keeps beside a
tokenizer.json. What the assistant says is trained, its stop token included:
the parts inside {% generation %} marks, or, in a template without any, what
rendering the conversation up to each answer and beyond it shows. Tokens are
cut where a trained part begins, so that a prompt has the same tokens in
training as when it is answered. Text of a record that spells a special token
stays text (rendering.py).
"""

import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpu_lm.data.rendering import CLOSE, OPEN, Messages, Renderer, Tools
from tpu_lm.errors import UserError, nearest
from tpu_lm.tokenizer import IM_END, IM_START, Tokenizer

# ChatML with tool calls written as Qwen's models write them. Tool results are
# turns of their own role.
CHATML = """\
{%- if tools %}
  {{- '<|im_start|>system\\n' }}
  {%- if messages[0].role == 'system' %}
    {{- messages[0].content + '\\n\\n' }}
  {%- endif %}
  {{- '# Tools\\n\\nThese functions can be called:\\n<tools>\\n' }}
  {%- for tool in tools %}
    {{- tool | tojson + '\\n' }}
  {%- endfor %}
  {{- '</tools>\\n\\nA call is written as\\n<tool_call>\\n' }}
  {{- '{"name": "NAME", "arguments": {"KEY": "VALUE"}}\\n</tool_call>' }}
  {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' }}
    {%- generation %}
      {{- message.content }}
      {%- for call in message.tool_calls or [] %}
        {{- '\\n' if message.content or not loop.first }}
        {{- '<tool_call>\\n{"name": ' + call.function.name | tojson }}
        {{- ', "arguments": ' + call.function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
      {%- endfor %}
      {{- '<|im_end|>' }}
    {%- endgeneration %}
    {{- '\\n' }}
  {%- elif message.role != 'system' or not tools %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {{- message.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

FILE = 'chat_template.jinja'
_MARKS = 'put {% generation %} … {% endgeneration %} around what is trained'
_GREETING = ('How do you do?', 'Very well.', 'Is it far?', 'Ten miles.')
PROBE = [
  {'role': role, 'content': text}
  for role, text in zip(('user', 'assistant') * 2, _GREETING, strict=True)
]


class _Piece(NamedTuple):
  """A part of a rendered conversation: a special token or a text."""

  trained: bool
  token_id: int  # -1 of a text
  text: str
  after: str  # what stands before it: 'start', 'special' or 'text'


def _pattern(specials: Sequence[Mapping[str, Any]]) -> re.Pattern:
  """Finds special tokens, with the spaces they swallow, and marks."""
  patterns = []
  for token in sorted(specials, key=lambda t: len(t['content']), reverse=True):
    word = re.escape(token['content'])
    if token['single_word']:
      word = rf'(?<!\w){word}(?!\w)'
    before = r'\s*' if token['lstrip'] else ''
    patterns.append(before + word + (r'\s*' if token['rstrip'] else ''))
  return re.compile('|'.join([*patterns, f'[{OPEN}{CLOSE}]']))


class Template:
  """A chat template and the tokenizer that it is written for.

  Attributes:
    text: of the template.
    origin: where it comes from, for messages.
    digest: sha256 over all that decides what is rendered.
    stop_id: the token by which the assistant ends its answer.

  Raises:
    UserError: not a template, or one that does not train the answers, each
      with its stop token.
  """

  def __init__(self, text: str, origin: str, tokenizer: Tokenizer):
    self.text = text
    self.origin = origin
    self._tokenizer = tokenizer
    names = {'bos_token': '', **tokenizer.names}
    self.digest = hashlib.sha256(
      json.dumps([text, names], sort_keys=True).encode()
    ).hexdigest()
    specials = tokenizer.special_tokens
    self._ids = {token['content']: token['id'] for token in specials}
    self._specials = _pattern(specials)
    self._renderer = Renderer(text, origin, names, list(self._ids))
    self.stop_id = self._probed()

  def encode_batch(
    self, items: Sequence[tuple[Messages, int, Tools]]
  ) -> list[tuple[np.ndarray, np.ndarray] | ValueError]:
    """The tokens of conversations, to the last trained one, and the mask.

    Args:
      items: messages, the index of the first message that may be trained, and
        tools. Trained are the assistant's messages from that index on.

    Returns:
      For each item np.int32[L] ids and bool[L], true where a token is trained;
      or a ValueError, of one line, where the template cannot render it.

    Raises:
      UserError: the template uses a variable that nothing gives it.
    """
    rows: list[list[_Piece] | ValueError] = []
    for messages, first, tools in items:
      try:
        pieces = self._pieces(messages, first, tools)
        if not pieces:
          raise ValueError('the chat template trains nothing of it')
        if pieces[-1].token_id < 0:
          raise ValueError('the chat template does not stop the last answer')
        rows.append(pieces)
      except UserError:
        raise
      except ValueError as error:
        rows.append(error)
    found = self._found(row for row in rows if not isinstance(row, ValueError))
    return [
      row if isinstance(row, ValueError) else _joined(row, found)
      for row in rows
    ]

  def prompt(self, messages: Messages, tools: Tools = None) -> list[int]:
    """The tokens after which the assistant's next message begins.

    Raises:
      ValueError: one line, where the template cannot render them.
    """
    messages, tools, restore = self._renderer.put(messages, tools)
    pieces = self._cut(self._renderer.text(messages, tools, True), restore, 0)
    found = self._found([pieces])
    return [i for piece in pieces for i in found[piece]]

  def save(self, directory: str | os.PathLike) -> None:
    """Writes chat_template.jinja, which `load` and others' programs read."""
    file = pathlib.Path(directory) / FILE
    partial = file.with_name(f'{FILE}.tmp')
    try:
      file.parent.mkdir(parents=True, exist_ok=True)
      partial.write_text(self.text, encoding='utf-8', newline='')
      partial.replace(file)
    except OSError as error:
      raise UserError(
        f'{file}: cannot write the chat template ({error.strerror}); free '
        'space there or choose another folder'
      ) from error

  def _probed(self) -> int:
    """The stop token, from a conversation whose tokens are checked."""
    origin = self.origin
    try:
      pieces = self._pieces(PROBE, 0, None)
    except UserError:
      raise
    except ValueError as error:
      raise UserError(f'{origin}: {error}') from error
    said = ''.join(piece.text for piece in pieces if piece.trained)
    asked, answered = _GREETING[::2], _GREETING[1::2]
    if not any(text in said for text in answered):
      raise UserError(f'{origin}: does not train the answers; {_MARKS}')
    if any(text in said for text in asked):
      raise UserError(
        f'{origin}: trains what the user says, too; {_MARKS} alone'
      )
    missing = [text for text in answered if text not in said]
    if missing:
      raise UserError(
        f'{origin}: trains not every answer of a conversation; {_MARKS}'
      )
    for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
      ends = piece.trained and not (after and after.trained)
      if ends and piece.token_id < 0:
        raise UserError(
          f'{origin}: the trained part ends in {piece.text[-20:]!r}, not in a '
          'special token of the tokenizer that stops the answer; end it right '
          'behind that token, which tokenizer.json must hold as special'
        )
    return pieces[-1].token_id

  def _pieces(
    self, messages: Messages, first: int, tools: Tools
  ) -> list[_Piece]:
    """A conversation in pieces, up to the last that is trained."""
    messages, tools, restore = self._renderer.put(messages, tools)
    text = self._renderer.text(messages, tools, False)
    skipped = 0
    if not self._renderer.has_marks:
      text = self._marked(text, messages, first, tools)
    elif any(message['role'] == 'assistant' for message in messages[:first]):
      skipped = self._renderer.text(messages[:first], tools, False).count(OPEN)
    pieces = self._cut(text, restore, skipped)
    while pieces and not pieces[-1].trained:
      pieces.pop()
    return pieces

  def _marked(
    self, text: str, messages: Messages, first: int, tools: Tools
  ) -> str:
    """The rendered text with marks around the answers from `first` on.

    An answer begins where the prompt before it ends, and ends with the special
    tokens that it has when it is the last.
    """
    marked, end = [], 0
    for i, message in enumerate(messages):
      if i < first or message['role'] != 'assistant':
        continue
      prompt = self._renderer.text(messages[:i], tools, True)
      alone = text
      if i + 1 < len(messages):
        alone = self._renderer.text(messages[: i + 1], tools, False)
      begin = len(prompt)
      is_prefix = text.startswith(prompt) and alone.startswith(prompt)
      wanted = [
        m.group().strip() for m in self._specials.finditer(alone, begin)
      ]
      found = list(self._specials.finditer(text, begin))[: len(wanted)]
      same = wanted == [m.group().strip() for m in found]
      if not is_prefix or not same or begin < end:
        raise ValueError(
          'the chat template renders the beginning of a conversation '
          f'otherwise than the whole, so its answers are not found; {_MARKS}'
        )
      marked += [text[end:begin], OPEN]
      end = found[-1].end() if found else len(alone)
      marked += [text[begin:end], CLOSE]
    return ''.join([*marked, text[end:]])

  def _cut(
    self, text: str, restore: dict[int, str], skipped: int
  ) -> list[_Piece]:
    """The pieces between special tokens and marks, without stand-ins."""
    pieces: list[_Piece] = []
    start, after, trained, opened = 0, 'start', False, 0

    def cut(end: int) -> None:
      nonlocal after
      if end > start:
        piece = text[start:end]
        piece = piece.translate(restore) if restore else piece
        pieces.append(_Piece(trained, -1, piece, after))
        after = 'text'

    for found in self._specials.finditer(text):
      cut(found.start())
      start, mark = found.end(), found.group()
      if mark == OPEN:
        opened += 1
        trained = opened > skipped
      elif mark == CLOSE:
        trained = False
      else:
        name = mark if mark in self._ids else mark.strip()
        pieces.append(_Piece(trained, self._ids[name], name, after))
        after = 'special'
    cut(len(text))
    return pieces

  def _found(self, rows: Iterable[list[_Piece]]) -> dict[_Piece, Sequence[int]]:
    """The ids of all pieces, each text encoded once."""
    pieces = {piece for row in rows for piece in row}
    found = {p: [p.token_id] for p in pieces if p.token_id >= 0}
    for after in ('start', 'special', 'text'):
      chosen = [p for p in pieces if p.token_id < 0 and p.after == after]
      texts = list(dict.fromkeys(piece.text for piece in chosen))
      encoded = self._tokenizer.encode_pieces(texts, after) if texts else []
      ids = dict(zip(texts, encoded, strict=True))
      found.update((piece, ids[piece.text]) for piece in chosen)
    return found


def _joined(
  pieces: list[_Piece], found: dict[_Piece, Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
  parts = [found[piece] for piece in pieces]
  trained = [piece.trained for piece in pieces]
  ids = np.fromiter(itertools.chain.from_iterable(parts), np.int32)
  return ids, np.repeat(trained, [len(part) for part in parts])


def hand_on(source: pathlib.Path, to: pathlib.Path) -> None:
  """Copies the template beside a tokenizer, if there is one, to another."""
  if (source / FILE).is_file():
    shutil.copy(source / FILE, to / FILE)


def load(
  path: str | os.PathLike, tokenizer: Tokenizer, folder: str | os.PathLike = ''
) -> Template:
  """The chat template of a configuration.

  Args:
    path: data.chat_template, a .jinja file, or '' to look further.
    tokenizer: that it is used with.
    folder: where the tokenizer came from (a tokenizer.json or the folder that
      holds one), whose own template is taken where `path` is ''; '' for one
      that was trained here. Without either it is CHATML.

  Raises:
    UserError: no such file, or a template that cannot be trained on.
  """
  if path:
    file = pathlib.Path(path)
    if not file.is_file():
      around = [str(p) for p in file.parent.glob('*')]
      raise UserError(
        f'data.chat_template={file}: no such file{nearest(str(file), around)}'
      )
    return Template(_read(file), str(file), tokenizer)
  if folder:
    where = pathlib.Path(folder)
    where = where if where.is_dir() else where.parent
    if (where / FILE).is_file():
      return Template(_read(where / FILE), str(where / FILE), tokenizer)
    text = _configured(where / 'tokenizer_config.json')
    if text:
      origin = f'chat_template of {where / "tokenizer_config.json"}'
      return Template(text, origin, tokenizer)
  missing = {IM_START, IM_END}.difference(
    token['content'] for token in tokenizer.special_tokens
  )
  if missing:
    raise UserError(
      f'data.chat_template: the tokenizer has neither a chat template nor '
      f'{" and ".join(sorted(missing))}, which ChatML needs; name a .jinja file'
    )
  return Template(CHATML, 'ChatML', tokenizer)


def _read(file: pathlib.Path) -> str:
  try:
    return file.read_bytes().decode()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{file}: cannot be read as UTF-8 ({error})') from error


def _configured(file: pathlib.Path) -> str:
  """The template in a tokenizer_config.json, or ''."""
  if not file.is_file():
    return ''
  try:
    templates = json.loads(_read(file)).get('chat_template') or ''
  except (ValueError, AttributeError) as error:
    raise UserError(f'{file}: not a JSON file ({error})') from error
  if isinstance(templates, str):
    return templates
  # Some files name several; 'default' is the one for conversations.
  named = {t.get('name'): t.get('template') for t in templates}
  return named.get('default') or ''
