"""Messages of a conversation, whatever way they are written.

Chat messages of OpenAI's API ({"role", "content"}, with tool calls) and those
of ShareGPT ({"from", "value"}) are brought to one shape: a role of ROLES, a
text, and tool calls whose arguments are objects, as chat templates expect it.
What is no such message is refused by a ValueError of one line.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tpu_lm.errors import nearest

Message = dict[str, Any]  # role, content, maybe tool_calls, name, …

ROLES = ('system', 'user', 'assistant', 'tool')
_SHAREGPT = {
  'human': 'user',
  'gpt': 'assistant',
  'function_call': 'assistant',
  'observation': 'tool',
} | {role: role for role in ROLES}
_KEPT = ('name', 'tool_call_id', 'reasoning_content')  # for templates

# What may come after which; 'call' is an assistant's turn that calls tools.
_FOLLOWING = {
  '': ('system', 'user'),
  'system': ('user',),
  'user': ('assistant',),
  'assistant': ('user',),
  'call': ('tool', 'user'),
  'tool': ('tool', 'assistant'),
}
_SPOKEN = {
  '': 'nothing',
  'system': 'the system',
  'user': 'the user',
  'assistant': 'the assistant',
  'call': "the assistant's call",
  'tool': 'the tool',
}


def messages(value: Any, name: str) -> list[Message]:
  """The messages in `value`, a list, its JSON text or one message alone."""
  if isinstance(value, dict):
    columns = list(value.values())
    is_columns = columns and all(isinstance(c, list) for c in columns)
    # TFDS gives a sequence of objects as an object of sequences.
    value = _transposed(value, name) if is_columns else [value]
  found: list[Message] = []
  for number, turn in enumerate(list_of(value, f"'{name}'"), start=1):
    where = f"'{name}' turn {number}"
    if not isinstance(turn, dict):
      raise ValueError(f'{where} is no object with role and content')
    turn = {key: part for key, part in turn.items() if part is not None}
    message = _message(turn, where)
    last = found[-1] if found else {}
    if turn.get('from') == 'function_call' and (
      last.get('role') == 'assistant' and 'tool_calls' not in last
    ):
      last['tool_calls'] = message['tool_calls']  # said and called in one turn
    else:
      found.append(message)
  return found


def _transposed(columns: dict[str, list], name: str) -> list[dict[str, Any]]:
  if len({len(column) for column in columns.values()}) > 1:
    raise ValueError(f"'{name}' has columns of unlike lengths")
  rows = zip(*columns.values(), strict=True)
  return [dict(zip(columns, row, strict=True)) for row in rows]


def from_json(text: str) -> list[Any] | None:
  """The list of messages that a text is the JSON of, or None."""
  if not text.lstrip().startswith('['):
    return None
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):
    return None
  first = value[0] if value else None
  is_message = isinstance(first, dict) and (
    {'role', 'content'} <= first.keys() or {'from', 'value'} <= first.keys()
  )
  return value if is_message else None


def _message(turn: Mapping[str, Any], where: str) -> Message:
  if 'role' not in turn and 'from' in turn:
    return _sharegpt(turn, where)
  if 'role' not in turn:
    raise ValueError(
      f"{where} has no 'role'{nearest('role', turn)}; it needs role and content"
    )
  role = turn['role']
  if role not in ROLES:
    raise ValueError(_unknown(where, role, ROLES))
  message: Message = {'role': role, 'content': _content(turn, where)}
  calls = turn.get('tool_calls')
  if calls and role == 'assistant':
    message['tool_calls'] = [
      _call(call, where) for call in list_of(calls, f'{where} tool_calls')
    ]
  for key in _KEPT:
    if turn.get(key):
      message[key] = text_of(turn[key], f'{where} {key}')
  return message


def _sharegpt(turn: Mapping[str, Any], where: str) -> Message:
  speaker = turn['from']
  role = _SHAREGPT.get(speaker) if isinstance(speaker, str) else None
  if role is None:
    raise ValueError(_unknown(where, speaker, _SHAREGPT))
  if 'value' not in turn:
    raise ValueError(f"{where} has no 'value'{nearest('value', turn)}")
  value = turn['value']
  if speaker != 'function_call':
    return {'role': role, 'content': text_of(value, f'{where} value')}
  if isinstance(value, str):
    value = _parsed(value, f'{where} (function_call)')
  calls = value if isinstance(value, list) else [value]
  calls = [_call(call, where) for call in calls]
  return {'role': role, 'content': '', 'tool_calls': calls}


def _unknown(where: str, role: Any, known: Iterable[str]) -> str:
  hint = nearest(role, known) if isinstance(role, str) else ''
  return (
    f'{where} has the unknown role {role!r:.40}{hint}; there are '
    f'{", ".join(known)}'
  )


def _content(turn: Mapping[str, Any], where: str) -> str:
  """The text of a message; it may come in parts, or be a tool's object."""
  content = turn.get('content')
  if content is None:
    if turn.get('tool_calls'):
      return ''
    raise ValueError(f"{where} has no 'content'{nearest('content', turn)}")
  if isinstance(content, list) and content:
    kinds = {
      str(part.get('type')) if isinstance(part, dict) else type(part).__name__
      for part in content
    }
    if kinds == {'text'}:
      return ''.join(text_of(part.get('text'), where) for part in content)
    if turn['role'] != 'tool':
      raise ValueError(
        f'{where} has parts that are no text ({", ".join(sorted(kinds))})'
      )
  if turn['role'] == 'tool' and not isinstance(content, str):
    content = json.dumps(content, ensure_ascii=False)
  return text_of(content, f'{where} content')


def _call(call: Any, where: str) -> dict[str, Any]:
  """A tool call as templates expect it: arguments as an object."""
  inner = call.get('function', call) if isinstance(call, dict) else None
  name = inner.get('name') if isinstance(inner, dict) else None
  if not isinstance(name, str) or not name:
    raise ValueError(f'{where} has a tool call without a name')
  arguments = inner.get('arguments') or {}
  if isinstance(arguments, str):
    arguments = _parsed(arguments, f'{where} (arguments of a tool call)')
  function = sound({'name': name, 'arguments': arguments}, where)
  known = {'id': call['id']} if isinstance(call.get('id'), str) else {}
  return known | {'type': 'function', 'function': function}


def ordered(messages: list[Message], where: str = '') -> list[Message]:
  """The messages, whose roles follow each other as they must.

  A system turn only first; then the user and the assistant in turn; tools
  answer where the assistant has called them; the assistant is last.
  """
  before = ''
  for number, message in enumerate(messages, start=1):
    role = message['role']
    if role not in _FOLLOWING[before]:
      raise ValueError(
        f'{where}turn {number} is of the {role}, but '
        + (f'after {_SPOKEN[before]}' if before else 'at the beginning')
        + f' comes the {" or the ".join(_FOLLOWING[before])}'
      )
    calls = message.get('tool_calls')
    if role in ('user', 'assistant') and not (
      calls or message['content'].strip()
    ):
      raise ValueError(f'{where}turn {number}, of the {role}, is empty')
    before = 'call' if calls else role
  if before not in ('assistant', 'call'):
    raise ValueError(
      f'{where}must end with the assistant, not with {_SPOKEN[before]}; '
      'leave out the turns after its last answer'
    )
  return messages


def plain(value: Any) -> Any:
  """The value without bytes and numpy's types."""
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError as error:
      raise ValueError(f'is not UTF-8 ({error.reason})') from error
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, np.generic):
    return plain(value.item())
  if isinstance(value, Mapping):
    return {str(plain(key)): plain(part) for key, part in value.items()}
  if isinstance(value, list | tuple):
    return [plain(part) for part in value]
  return value


def list_of(value: Any, where: str) -> list[Any]:
  """A list, which may come as its JSON text."""
  if isinstance(value, str):
    value = _parsed(value, where)
  if not isinstance(value, list):
    raise ValueError(f'{where} holds {spoken(value)}, not a list')
  return value


def _parsed(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where} is not valid JSON ({error})') from error


def text_of(value: Any, where: str) -> str:
  if not isinstance(value, str):
    raise ValueError(f'{where} holds {spoken(value)}, not text')
  return sound(value, where)


def sound(value: Any, where: str) -> Any:
  """The value, all of whose text can be written as UTF-8."""
  try:
    if not isinstance(value, str):
      json.dumps(value, ensure_ascii=False).encode()
    elif not value.isascii():
      value.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{where} is no valid text ({error.reason})') from error
  return value


def spoken(value: Any) -> str:
  return 'null' if value is None else f'{value!r:.40} ({type(value).__name__})'
