"""Records of conversations, preferences and ratings, in the forms they have.

A record is recognised by its fields and brought to one shape; FORMS lists
what is known. Whatever would be trained wrongly in silence is refused: turns
out of order, empty answers, a file of pairs where conversations are wanted.
Messages are those of messages.py; single turns are those of Alpaca
({"instruction", "input", "output"}) or {"prompt", "completion"}. Records to be
answered need ask only, by any of these or by {"question"}, {"problem"}, or
{"input", "target"}.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tpu_lm.data.messages import (
  Message,
  from_json,
  list_of,
  messages,
  ordered,
  plain,
  sound,
  spoken,
  text_of,
)
from tpu_lm.errors import nearest

Tools = list[dict[str, Any]] | None


class Chat(NamedTuple):
  """A conversation, of which every answer is trained."""

  messages: list[Message]
  tools: Tools = None


class Pair(NamedTuple):
  """Two ways in which a conversation goes on; the first is the better."""

  prompt: list[Message]
  chosen: list[Message]
  rejected: list[Message]
  margin: float = 0.0  # by which it is better; 0 where none is given
  tools: Tools = None


class Rated(NamedTuple):
  """An answer and how good it is; labels true and false are 1 and 0."""

  prompt: list[Message]
  completion: list[Message]
  score: float
  tools: Tools = None


class Question(NamedTuple):
  """A conversation that waits for the assistant's answer."""

  messages: list[Message]
  tools: Tools = None


KINDS = {
  'chat': Chat,
  'pairs': Pair,
  'rated': Rated,
  'scored': Rated,
  'prompts': Question,
}
FORMS = (
  ('messages',),
  ('conversations',),
  ('prompt', 'completion'),
  ('prompt', 'response'),
  ('instruction', 'output'),
)
_PAIR = ('chosen', 'rejected')
_CONVERSING = ('prompt', 'messages', 'conversations', 'instruction')
# What asks where there is no conversation, and what must stand beside it: an
# 'input' alone is mostly a part of a question.
_ASKING = {'question': '', 'problem': '', 'input': 'target'}
ASKING = (*_CONVERSING, *_ASKING, 'system', 'history', 'tools')
# Parts of a question without which it cannot be answered.
_NEEDED = ('choices', 'options', 'context', 'passage')
_RATING = ('label', 'score')
_SCORES = ('score_chosen', 'score_rejected')
_STAGES = {
  'chat': 'conversations, for stage_name=sft',
  'pairs': 'pairs (chosen, rejected), for stage_name=dpo or reward',
  'rated': (
    "answers with a 'label', for stage_name=kto; without that field they "
    'are conversations'
  ),
}


def canonical(
  record: Mapping[str, Any], rows: str
) -> tuple[str, Chat | Pair | Rated | Question]:
  """The name of a record's form, e.g. 'instruction/output', and the record.

  Args:
    record: as it was read. Values may be bytes or numpy's, and lists of
      messages may be JSON text; null is as if the field were not there.
    rows: what is to be made of it: chat, pairs, rated, scored or prompts.

  Raises:
    ValueError: one line that says what is wrong, without file and line.
  """
  assert rows in KINDS, rows
  if not isinstance(record, Mapping):
    raise ValueError(
      f'a record must be a JSON object, not {type(record).__name__}'
    )
  fields = _fields(record)
  if rows == 'prompts':
    return _question(fields)
  kind = _kind(fields)
  if rows == 'pairs':
    if kind in ('chat', 'rated'):
      raise ValueError(f'these are {_STAGES[kind]}')
    return _pair(fields)
  if kind == 'pairs' or (kind == 'rated' and rows == 'chat'):
    raise ValueError(f'these are {_STAGES[kind]}')
  if not kind:
    incomplete = any(name in fields for name in _PAIR)
    raise ValueError(_missing(fields, [_PAIR] if incomplete else FORMS))
  form, prompt, completion = _conversation(fields)
  if rows == 'chat':
    return form, Chat(ordered(prompt + completion), _tools(fields))
  name = next((name for name in _RATING if name in fields), '')
  if not name:
    raise ValueError(
      f"has no 'label' or 'score'{_near(_RATING, fields)}; without one these "
      f'are {_STAGES["chat"]}'
    )
  score = _number(fields, name)
  ordered(prompt + completion)
  return f'{form}/{name}', Rated(prompt, completion, score, _tools(fields))


def question(record: Mapping[str, Any]) -> Question:
  """What a record of any form asks; an answer in it is left out.

  Raises:
    ValueError: as `canonical` does.
  """
  return _question(_fields(record))[1]


def _question(fields: Mapping[str, Any]) -> tuple[str, Question]:
  """The name of the field that asks, and the question."""
  form, turns = _prompt(fields)
  if not form:
    form, turns = _asked(fields)
  if form not in _ASKING and all(name in fields for name in _PAIR):
    # Whole conversations begin before their 'prompt'.
    form, pair = _pair(fields)
    turns = pair.prompt
  if not form:
    there = f'its fields are {", ".join(fields)}' if fields else 'it is empty'
    names = [name + f' (with {by})' * bool(by) for name, by in _ASKING.items()]
    raise ValueError(
      f'asks nothing, by none of {", ".join([*_CONVERSING, *names])}; {there}'
    )
  while turns and turns[-1]['role'] == 'assistant':
    turns = turns[:-1]
  if not turns or turns[-1]['role'] == 'system':
    raise ValueError(f"'{form}' asks nothing")
  answer = {'role': 'assistant', 'content': 'any'}
  ordered([*turns, answer])
  return form, Question(turns, _tools(fields))


def _asked(fields: Mapping[str, Any]) -> tuple[str, list[Message]]:
  """What asks in a record without a conversation; '' where nothing does."""
  for name, by in _ASKING.items():
    if name not in fields or (by and by not in fields):
      continue
    for part in _NEEDED:
      if fields.get(part):
        raise ValueError(
          f"has '{part}' beside '{name}', which alone may not be enough to "
          "answer; write all that is asked into 'prompt'"
        )
    return name, _with_system(fields, _turns(fields, name, 'user'))
  return '', []


def _fields(record: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a record that are not null."""
  fields = {}
  for name, value in record.items():
    try:
      fields[name] = plain(value)
    except ValueError as error:
      raise ValueError(f"'{name}' {error}") from error
  return {name: value for name, value in fields.items() if value is not None}


def _kind(fields: Mapping[str, Any]) -> str:
  """What the fields make a record; '' where too many are missing.

  A score beside a conversation may be about anything, and a label that is a
  text surely is; a label that is a number or true says how good it is.
  """
  if all(name in fields for name in _PAIR):
    return 'pairs'
  if any(name in fields for name in _PAIR):
    return ''
  if not any(all(name in fields for name in form) for form in FORMS):
    return ''
  is_rated = isinstance(fields.get('label'), bool | int | float)
  return 'rated' if is_rated else 'chat'


def _missing(
  fields: Mapping[str, Any], forms: Iterable[tuple[str, ...]]
) -> str:
  """What is missing from a record of no known form."""
  there = f'its fields are {", ".join(fields)}' if fields else 'it is empty'
  if 'instances' in fields:
    return (
      "holds a list 'instances'; write one record for each of them, with "
      'instruction, input and output'
    )
  names = dict.fromkeys(name for form in forms for name in form)
  others = [name for name in fields if name not in names]
  begun = [form for form in forms if any(name in fields for name in form)]
  if begun:
    form = max(begun, key=lambda form: _near(form, others, fields) != '')
    has = next(name for name in form if name in fields)
    lacks = next(name for name in form if name not in fields)
    return f"has '{has}' but no '{lacks}'{nearest(lacks, others)}; {there}"
  if 'text' in fields:
    return f'has only a text, for stage_name=pretrain; {there}'
  known = ' or '.join(' and '.join(form) for form in forms)
  return f'lacks the fields {known}{_near(names, others)}; {there}'


def _near(
  names: Iterable[str], fields: Iterable[str], there: Iterable[str] = ()
) -> str:
  """A hint at a field that is nearly one of `names` not there, or ''."""
  hints = (nearest(name, fields) for name in names if name not in there)
  return next(filter(None, hints), '')


def _conversation(
  fields: Mapping[str, Any],
) -> tuple[str, list[Message], list[Message]]:
  """The form, what comes before the last answer, and that answer."""
  form = next(f for f in FORMS if all(name in fields for name in f))
  last = form[-1]
  if len(form) == 1:
    turns = _with_system(fields, messages(fields[last], last))
    if not turns:
      raise ValueError(f"'{last}' is empty")
    return last, turns[:-1], turns[-1:]
  _, prompt = _prompt(fields)
  return '/'.join(form), prompt, _turns(fields, last, 'assistant')


def _prompt(fields: Mapping[str, Any]) -> tuple[str, list[Message]]:
  """The name of the field that asks, and its messages."""
  for name in ('prompt', 'messages', 'conversations'):
    if name in fields:
      return name, _with_system(fields, _turns(fields, name, 'user'))
  if 'instruction' not in fields:
    return '', _with_system(fields, [])
  text = text_of(fields['instruction'], "'instruction'")
  more = text_of(fields.get('input', ''), "'input'")
  if more.strip():
    text = f'{text}\n\n{more}' if text.strip() else more
  turns = []
  for turn in list_of(fields.get('history') or [], "'history'"):
    if not isinstance(turn, list) or len(turn) != 2:
      raise ValueError("'history' must hold pairs of a question and an answer")
    turns += [
      {'role': role, 'content': text_of(said, "'history'")}
      for role, said in zip(('user', 'assistant'), turn, strict=True)
    ]
  turns.append({'role': 'user', 'content': text})
  return 'instruction', _with_system(fields, turns)


def _pair(fields: Mapping[str, Any]) -> tuple[str, Pair]:
  if any(name not in fields for name in _PAIR):
    raise ValueError(_missing(fields, [_PAIR]))
  form, prompt = _prompt(fields)
  chosen, rejected = (_turns(fields, name, 'assistant') for name in _PAIR)
  if chosen == rejected:
    raise ValueError("'chosen' and 'rejected' are the same")
  shared = 0
  for one, other in zip(chosen, rejected, strict=False):
    if one != other:
      break
    shared += 1
  if chosen and chosen[0]['role'] in ('system', 'user'):
    prompt = _agreed(prompt, chosen[:shared], form)
  else:
    prompt = prompt + chosen[:shared]
  for name, answer in (('chosen', chosen), ('rejected', rejected)):
    if len(answer) == shared:
      raise ValueError(f"'{name}' is empty or only the beginning of the other")
    role = answer[shared]['role']
    if role != 'assistant':
      raise ValueError(
        "'chosen' and 'rejected' must share all turns before the assistant's "
        f"answer, but '{name}' goes on with the {role}"
      )
    if not prompt:
      raise ValueError(
        f"has no 'prompt'{nearest('prompt', fields)}, and 'chosen' and "
        "'rejected' do not begin with it"
      )
    ordered(prompt + answer[shared:], f"'{name}': ")
  form = '/'.join(filter(None, (form, *_PAIR)))
  chosen, rejected = chosen[shared:], rejected[shared:]
  return form, Pair(prompt, chosen, rejected, _margin(fields), _tools(fields))


def _agreed(
  prompt: list[Message], shared: list[Message], form: str
) -> list[Message]:
  """The prompt of completions that repeat it, as whole conversations do."""
  if not shared or not prompt:
    return shared
  if prompt[0]['role'] == 'system' != shared[0]['role']:
    return prompt[:1] + _agreed(prompt[1:], shared, form)
  said = [message['content'] for message in shared]
  if any(message['content'] not in said for message in prompt):
    raise ValueError(
      f"'chosen' and 'rejected' are whole conversations, but do not begin with "
      f"'{form}'; leave one of the two out"
    )
  return shared


def _margin(fields: Mapping[str, Any]) -> float:
  if 'margin' in fields:
    return _number(fields, 'margin')
  if not any(name in fields for name in _SCORES):
    return 0.0
  if any(name not in fields for name in _SCORES):
    raise ValueError(_missing(fields, [_SCORES]))
  chosen, rejected = (_number(fields, name) for name in _SCORES)
  return chosen - rejected


def _number(fields: Mapping[str, Any], name: str) -> float:
  value = fields[name]
  if isinstance(value, bool | int | float) and math.isfinite(value):
    return float(value)
  raise ValueError(f"'{name}' holds {spoken(value)}, not a number")


def _turns(fields: Mapping[str, Any], name: str, role: str) -> list[Message]:
  """The messages of a field; a text is one message of that role."""
  value = fields[name]
  if isinstance(value, str) and name not in ('messages', 'conversations'):
    found = from_json(value)
    if found is None:
      return [{'role': role, 'content': text_of(value, f"'{name}'")}]
    value = found
  elif not isinstance(value, str | list | dict):
    raise ValueError(f"'{name}' holds {spoken(value)}, not text or messages")
  return messages(value, name)


def _tools(fields: Mapping[str, Any]) -> Tools:
  tools = list_of(fields.get('tools') or [], "'tools'")
  for tool in tools:
    if not isinstance(tool, dict):
      raise ValueError(f"'tools' holds {spoken(tool)}, not an object")
  return sound(tools, "'tools'") or None


def _with_system(
  fields: Mapping[str, Any], turns: list[Message]
) -> list[Message]:
  text = text_of(fields.get('system', ''), "'system'")
  if not text.strip():
    return turns
  if turns and turns[0]['role'] == 'system':
    raise ValueError("has a system turn and a field 'system'; keep one")
  return [{'role': 'system', 'content': text}, *turns]
