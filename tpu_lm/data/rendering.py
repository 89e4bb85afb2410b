"""Text of chat templates, in which what a record says can be told apart.

Chat templates are Jinja programs from anywhere, so they run in a sandbox. They
alone may write special tokens: every character of the record that could begin
or end one is rendered as a stand-in from Unicode's private area, so whatever
special token is found in the rendered text is the template's own, and the
stand-ins are turned back in the pieces between. Strings that the template
itself looks for, such as '</think>', are left as they are.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from tpu_lm.errors import UserError, nearest

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

OPEN, CLOSE = '\U0010fffc', '\U0010fffd'  # stand where marks stood
_FIRST_PRIVATE = 0x100000  # of plane 16, where stand-ins are taken from
_PRIVATE = '\U00100000-\U0010ffff'
_VARIABLES = ('messages', 'tools', 'documents', 'add_generation_prompt')


class _Unknown(jinja2.UndefinedError):
  """The template uses a variable that nothing gives it."""


class _Marks(jinja2.ext.Extension):
  """Renders {% generation %} and {% endgeneration %} as OPEN and CLOSE."""

  tags = frozenset({'generation'})

  def parse(self, parser: Any) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    marks = [
      jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]).set_lineno(line)
      for mark in (OPEN, CLOSE)
    ]
    return jinja2.nodes.Scope([marks[0], *body, marks[1]]).set_lineno(line)


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """JSON as chat templates expect it; stand-ins are never escaped."""
  text = json.dumps(
    value,
    ensure_ascii=False,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )
  if not ensure_ascii:
    return text
  return re.sub(
    rf'[^\x00-\x7f{_PRIVATE}]+', lambda m: json.dumps(m.group())[1:-1], text
  )


def _undefined(known: set[str], assigned: set[str]) -> type[jinja2.Undefined]:
  """Undefined values: fields may be absent, variables only if `is defined`.

  A variable that the template itself sets in some branch may be absent in
  the others.
  """

  class Absent(jinja2.Undefined):
    __slots__ = ()

    def __init__(
      self,
      hint: str | None = None,
      obj: Any = jinja2.utils.missing,
      name: str | None = None,
      exc: type[Exception] = jinja2.UndefinedError,
    ):
      if hint is None and obj is jinja2.utils.missing and name not in assigned:
        exc = _Unknown
        hint = (
          f"the variable '{name}' is not known{nearest(str(name), known)}; "
          f'there are {", ".join(sorted(known))}'
        )
      super().__init__(hint, obj, name, exc)

    def _check(self) -> None:
      if self._undefined_exception is _Unknown:
        self._fail_with_undefined_error()

    def __str__(self) -> str:
      self._check()
      return ''

    def __iter__(self) -> Iterator[Any]:
      self._check()
      return iter(())

    def __bool__(self) -> bool:
      self._check()
      return False

    def __len__(self) -> int:
      self._check()
      return 0

    def __eq__(self, other: object) -> bool:
      self._check()
      return isinstance(other, jinja2.Undefined)

    def __hash__(self) -> int:
      return id(type(self))

  return Absent


def _environment() -> jinja2.Environment:
  """A sandbox with the names that chat templates are written for."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Marks, 'jinja2.ext.loopcontrols'],
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _refuse
  environment.globals['strftime_now'] = lambda form: (
    datetime.datetime.now().strftime(form)
  )
  return environment


class _StandIns:
  """Stand-ins for the characters of a record that special tokens are made of.

  No special token then begins or ends in what the record says, however the
  template cuts and joins it, nor lies within the template's own text around a
  whole string of it.

  Args:
    specials: the spellings of the special tokens.
    literals: the strings of the template, which it may look for in a record.
  """

  def __init__(self, specials: list[str], literals: set[str]):
    edges = {end for special in specials for end in (special[0], special[-1])}
    self._alphabet = sorted({OPEN, CLOSE}.union(*specials))
    self._inner = '\0'.join(special[1:-1] for special in specials)
    self._longest = max(map(len, specials))
    self._literals = literals
    kept = [
      re.escape(literal)
      for literal in sorted(literals, key=len, reverse=True)
      if edges.intersection(literal) and not _touches(literal, specials)
    ]
    edge = f'[{"".join(map(re.escape, sorted(edges)))}{_PRIVATE}]'
    self._edge = re.compile(edge)
    self._found = re.compile('|'.join([*kept, edge]))

  def put(
    self, messages: Messages, tools: Tools
  ) -> tuple[Messages, Tools, dict[int, str]]:
    """The record with stand-ins, and what each of them stands for."""
    strings = list(_strings(messages))
    if tools:
      strings += _leaves(tools)
    if not any(map(self._is_affected, strings)):
      return messages, tools, {}
    taken = {ord(c) for s in strings for c in s if ord(c) >= _FIRST_PRIVATE}
    size, base = len(self._alphabet), _FIRST_PRIVATE
    while taken.intersection(range(base, base + size)):
      base += size
    put = {char: chr(base + i) for i, char in enumerate(self._alphabet)}
    messages = [
      {
        key: value if _is_role(key, value) else self._changed(value, put)
        for key, value in message.items()
      }
      for message in messages
    ]
    tools = self._changed(tools, put)
    return messages, tools, {ord(new): old for old, new in put.items()}

  def _is_affected(self, text: str) -> bool:
    return bool(self._edge.search(text)) or self._is_inner(text)

  def _is_inner(self, text: str) -> bool:
    """Whether a special token could be written around the whole of it."""
    if len(text) > 2 * self._longest or text in self._literals:
      return False
    text = text.strip()
    return bool(text) and text in self._inner

  def _changed(self, value: Any, put: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
      return {
        self._swapped(key, put): self._changed(part, put)
        for key, part in value.items()
      }
    if isinstance(value, list | tuple):
      return [self._changed(part, put) for part in value]
    if not isinstance(value, str):
      return value
    if self._is_inner(value):
      start = len(value) - len(value.lstrip())
      first = put.get(value[start], value[start])
      value = value[:start] + first + value[start + 1 :]
    return self._swapped(value, put)

  def _swapped(self, text: str, put: dict[str, str]) -> str:
    return self._found.sub(lambda m: put.get(m.group(), m.group()), text)


def _is_role(key: str, value: Any) -> bool:
  """Whether it is a role, which templates may write into a special token."""
  return key == 'role' and isinstance(value, str) and value.isidentifier()


def _strings(messages: Messages) -> Iterator[str]:
  """All that a conversation says."""
  for message in messages:
    for key, value in message.items():
      if isinstance(value, str):
        if not _is_role(key, value):
          yield value
      else:
        yield from _leaves(value)


def _leaves(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    for key, part in value.items():
      yield key
      yield from _leaves(part)
  elif isinstance(value, list | tuple):
    for part in value:
      yield from _leaves(part)


def _touches(literal: str, specials: list[str]) -> bool:
  """Whether a special token could begin, lie or end in the literal."""
  return any(
    special in literal
    or any(special.startswith(literal[i:]) for i in range(len(literal)))
    or any(special.endswith(literal[:i]) for i in range(1, len(literal) + 1))
    for special in specials
  )


def _literals(tree: jinja2.nodes.Template) -> set[str]:
  """The strings that are written out in a template."""
  values = {node.value for node in tree.find_all(jinja2.nodes.Const)}
  return {value for value in values if isinstance(value, str) and value}


class Renderer:
  """A compiled template.

  Args:
    text: of the template.
    origin: where it comes from, for messages.
    names: the variables that it may use besides messages and tools.
    specials: the spellings of the special tokens.

  Attributes:
    has_marks: whether it has {% generation %} marks, which are rendered as
      OPEN and CLOSE.
  """

  def __init__(
    self,
    text: str,
    origin: str,
    names: Mapping[str, str],
    specials: Sequence[str],
  ):
    environment = _environment()
    try:
      tree = environment.parse(text)
      data = tree.find_all(jinja2.nodes.TemplateData)
      self.has_marks = any(OPEN in node.data for node in data)
      self._stand_ins = _StandIns(specials, _literals(tree))
      found = list(tree.find_all(jinja2.nodes.Name))
      assigned = {name.name for name in found if name.ctx != 'load'}
      environment.undefined = _undefined({*_VARIABLES, *names}, assigned)
      compiled = environment.from_string(tree)
    except jinja2.TemplateSyntaxError as error:
      raise UserError(
        f'{origin}:{error.lineno}: not a chat template ({error.message})'
      ) from error
    self._origin = origin
    self._render = functools.partial(compiled.render, documents=None, **names)

  def put(
    self, messages: Messages, tools: Tools
  ) -> tuple[Messages, Tools, dict[int, str]]:
    """The record with stand-ins, and what each of them stands for."""
    return self._stand_ins.put(messages, tools)

  def text(self, messages: Messages, tools: Tools, prompt: bool) -> str:
    """What the template makes of a record with stand-ins.

    Args:
      messages: of the record.
      tools: of the record.
      prompt: whether the beginning of an answer is to follow.

    Raises:
      ValueError: one line; the template cannot render the record.
      UserError: it uses a variable that nothing gives it.
    """
    try:
      return self._render(
        messages=messages, tools=tools, add_generation_prompt=prompt
      )
    except _Unknown as error:
      raise UserError(f'{self._origin}: {error}') from error
    except jinja2.TemplateError as error:
      line = ' '.join(str(error).split())
      raise ValueError(f'the chat template refuses it ({line})') from error
    except Exception as error:  # whatever a program from anywhere may raise
      raise ValueError(
        f'the chat template cannot render it ({type(error).__name__}: {error})'
      ) from error
