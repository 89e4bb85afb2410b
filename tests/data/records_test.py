"""Every form of a record, and every refusal with its line."""

import json

import numpy as np
import pytest

from tpu_lm.data import records
from tpu_lm.data.records import Chat, Pair, Question, Rated

USER = {'role': 'user', 'content': 'q'}
GOOD = {'role': 'assistant', 'content': 'good'}
WORSE = {'role': 'assistant', 'content': 'worse'}
SYSTEM = {'role': 'system', 'content': 's'}
TOOLS = [{'name': 'add', 'parameters': {'type': 'object'}}]
CALL = {
  'type': 'function',
  'function': {'name': 'add', 'arguments': {'a': 1}},
}
CALLED = [
  USER,
  {'role': 'assistant', 'content': '', 'tool_calls': [CALL]},
  {'role': 'tool', 'content': '3'},
  GOOD,
]
TURN = json.dumps(CALL['function'])
SHARE = [
  {'from': 'human', 'value': 'q'},
  {'from': 'function_call', 'value': TURN},
  {'from': 'observation', 'value': '3'},
  {'from': 'gpt', 'value': 'good'},
]

CHATS = [
  ({'messages': [USER, GOOD]}, 'messages', [USER, GOOD]),
  ({'messages': [SYSTEM, *CALLED], 'id': 7}, 'messages', [SYSTEM, *CALLED]),
  ({'prompt': 'q', 'completion': 'good'}, 'prompt/completion', [USER, GOOD]),
  ({'prompt': 'q', 'response': 'good'}, 'prompt/response', [USER, GOOD]),
  (
    {'prompt': [SYSTEM, USER], 'completion': [GOOD]},
    'prompt/completion',
    [SYSTEM, USER, GOOD],
  ),
  (
    {'instruction': 'q', 'input': ' ', 'output': 'good'},
    'instruction/output',
    [USER, GOOD],
  ),
  (
    {'instruction': 'q', 'input': 'x', 'output': 'good'},
    'instruction/output',
    [{'role': 'user', 'content': 'q\n\nx'}, GOOD],
  ),
  (
    {
      'system': 's',
      'instruction': 'q',
      'output': 'good',
      'history': [['q', 'worse']],
    },
    'instruction/output',
    [SYSTEM, USER, WORSE, USER, GOOD],
  ),
  ({'conversations': SHARE}, 'conversations', CALLED),
  (
    {'conversations': SHARE, 'system': 's'},
    'conversations',
    [SYSTEM, *CALLED],
  ),
  (
    {'conversations': [{'from': 'system', 'value': 's'}, *SHARE[:2]]},
    'conversations',
    [SYSTEM, *CALLED[:2]],
  ),
  # Said and called in one turn.
  (
    {'conversations': [SHARE[0], SHARE[3], *SHARE[1:]]},
    'conversations',
    [USER, {**CALLED[1], 'content': 'good'}, *CALLED[2:]],
  ),
  # As TFDS gives it: bytes, JSON text, objects of sequences.
  (
    {'messages': json.dumps([USER, GOOD]).encode()},
    'messages',
    [USER, GOOD],
  ),
  (
    {
      'messages': {
        'role': np.array([b'user', b'assistant'], object),
        'content': np.array([b'q', b'good'], object),
      }
    },
    'messages',
    [USER, GOOD],
  ),
  ({'prompt': b'q', 'completion': b'good'}, 'prompt/completion', [USER, GOOD]),
  (
    {'prompt': json.dumps([SYSTEM, USER]), 'completion': '[1, 2]'},
    'prompt/completion',
    [SYSTEM, USER, {'role': 'assistant', 'content': '[1, 2]'}],
  ),
  # As OpenAI writes it: arguments as text, null contents, texts in parts.
  (
    {
      'messages': [
        {'role': 'user', 'content': [{'type': 'text', 'text': 'q'}]},
        {
          'role': 'assistant',
          'content': None,
          'tool_calls': [
            {
              'type': 'function',
              'function': {'name': 'add', 'arguments': '{"a": 1}'},
            }
          ],
        },
        {'role': 'tool', 'content': {'sum': 'ü'}, 'name': None},
        GOOD,
      ]
    },
    'messages',
    [
      *CALLED[:2],
      {'role': 'tool', 'content': '{"sum": "ü"}'},
      GOOD,
    ],
  ),
  # A score beside a conversation, or a label that is a text, says nothing.
  (
    {'prompt': 'q', 'completion': 'good', 'score': 3, 'label': 'news'},
    'prompt/completion',
    [USER, GOOD],
  ),
  ({'prompt': 'q', 'output': None, 'response': 'good'}, None, [USER, GOOD]),
]


@pytest.mark.parametrize(('record', 'form', 'messages'), CHATS)
def test_conversations(record, form, messages):
  found, chat = records.canonical(record, 'chat')
  assert chat == Chat(messages)
  assert found == (form or found)


@pytest.mark.parametrize(
  ('given', 'tools'),
  [
    (TOOLS, TOOLS),
    (json.dumps(TOOLS), TOOLS),
    ('[]', None),
    ('', None),
    ([], None),
    (None, None),
  ],
)
def test_tools(given, tools):
  _, chat = records.canonical({'conversations': SHARE, 'tools': given}, 'chat')
  assert chat.tools == tools
  assert chat.messages == CALLED


PAIRS = [
  (
    {'prompt': 'q', 'chosen': 'good', 'rejected': 'worse'},
    'prompt/chosen/rejected',
    Pair([USER], [GOOD], [WORSE]),
  ),
  (
    {
      'instruction': 'q',
      'input': '',
      'output': 'good',
      'chosen': 'good',
      'rejected': 'worse',
    },
    'instruction/chosen/rejected',
    Pair([USER], [GOOD], [WORSE]),
  ),
  (
    {'chosen': [USER, GOOD], 'rejected': [USER, WORSE]},
    'chosen/rejected',
    Pair([USER], [GOOD], [WORSE]),
  ),
  # The common beginning, answers included, is the prompt.
  (
    {
      'prompt': 'q',
      'chosen': json.dumps([SYSTEM, USER, WORSE, USER, GOOD]),
      'rejected': json.dumps([SYSTEM, USER, WORSE, USER, WORSE]),
      'score_chosen': np.float32(8.5),
      'score_rejected': 6,
    },
    'prompt/chosen/rejected',
    Pair([SYSTEM, USER, WORSE, USER], [GOOD], [WORSE], 2.5),
  ),
  (
    {
      'prompt': [SYSTEM, USER],
      'chosen': [GOOD],
      'rejected': [WORSE, USER, GOOD],
      'margin': 0.5,
      'tools': TOOLS,
    },
    'prompt/chosen/rejected',
    Pair([SYSTEM, USER], [GOOD], [WORSE, USER, GOOD], 0.5, TOOLS),
  ),
  (
    {'system': 's', 'chosen': [USER, GOOD], 'rejected': [USER, WORSE]},
    'chosen/rejected',
    Pair([SYSTEM, USER], [GOOD], [WORSE]),
  ),
  (
    {
      'conversations': SHARE[:1],
      'chosen': {'from': 'gpt', 'value': 'good'},
      'rejected': {'from': 'gpt', 'value': 'worse'},
    },
    'conversations/chosen/rejected',
    Pair([USER], [GOOD], [WORSE]),
  ),
]


@pytest.mark.parametrize(('record', 'form', 'pair'), PAIRS)
def test_pairs(record, form, pair):
  assert records.canonical(record, 'pairs') == (form, pair)


@pytest.mark.parametrize('rows', ['rated', 'scored'])
def test_ratings(rows):
  for value, score in ((True, 1.0), (False, 0.0), (-1, -1.0), (2.5, 2.5)):
    for name in ('label', 'score'):
      for given in (value, np.asarray(value)[()]):
        record = {'prompt': b'q', 'completion': 'good', name: given}
        form, rated = records.canonical(record, rows)
        assert form == f'prompt/completion/{name}'
        assert rated == Rated([USER], [GOOD], score)
        assert type(rated.score) is float
  record = {'messages': [USER, WORSE, USER, GOOD], 'score': 1, 'tools': TOOLS}
  form, rated = records.canonical(record, rows)
  assert form == 'messages/score'
  assert rated == Rated([USER, WORSE, USER], [GOOD], 1.0, TOOLS)


PAIR = {'prompt': 'q', 'chosen': 'good', 'rejected': 'worse'}
BAD = [
  # What it is for.
  ('chat', PAIR, r'these are pairs .*stage_name=dpo or reward'),
  ('rated', PAIR, 'these are pairs'),
  ('chat', {**PAIR, 'output': 'good', 'instruction': 'q'}, 'these are pairs'),
  ('pairs', {'messages': [USER, GOOD]}, 'conversations, for stage_name=sft'),
  (
    'pairs',
    {'prompt': 'q', 'completion': 'good', 'label': True},
    "a 'label', for stage_name=kto",
  ),
  (
    'chat',
    {'prompt': 'q', 'completion': 'good', 'label': False},
    'for stage_name=kto; without that field',
  ),
  (
    'scored',
    {'prompt': 'q', 'completion': 'good', 'scores': 1},
    r"no 'label' or 'score' \(did you mean 'scores'\?\); without",
  ),
  ('chat', {'text': 'once'}, 'only a text, for stage_name=pretrain'),
  ('chat', {'instruction': 'q', 'instances': []}, "a list 'instances'"),
  # Fields.
  ('chat', ['q'], 'must be a JSON object, not list'),
  ('chat', {}, 'it is empty'),
  ('chat', {'message': [USER]}, r"\(did you mean 'message'\?\)"),
  (
    'chat',
    {'instruction': 'q', 'outputs': 'a'},
    r"has 'instruction' but no 'output' \(did you mean 'outputs'\?\); its",
  ),
  (
    'chat',
    {'prompt': 'q', 'responce': 'a'},
    r"has 'prompt' but no 'response' \(did you mean 'responce'\?\)",
  ),
  ('chat', {'prompt': 'q', 'chosen': 'a'}, "has 'chosen' but no 'rejected'"),
  ('pairs', {'prompt': 'q', 'chosen': 'a'}, "has 'chosen' but no 'rejected'"),
  ('pairs', {'chosen': 'a', 'rejected': 'b'}, "has no 'prompt'"),
  ('chat', {'prompt': 'q', 'completion': 42}, r'holds 42 \(int\), not text'),
  ('chat', {'prompt': 'q', 'completion': None}, "but no 'completion'"),
  ('chat', {'prompt': 'q', 'completion': '\ud800'}, 'is no valid text'),
  ('chat', {'prompt': b'\xff', 'completion': 'a'}, "'prompt' is not UTF-8"),
  ('chat', {'messages': 'hello'}, "'messages' is not valid JSON"),
  ('chat', {'messages': '{"a": 1}'}, "'messages' holds .*, not a list"),
  ('chat', {'messages': 3}, 'not a list'),
  ('chat', {'messages': [USER, GOOD], 'tools': 'add'}, "'tools' is not valid"),
  ('chat', {'messages': [USER, GOOD], 'tools': ['add']}, "'tools' holds 'add'"),
  (
    'chat',
    {'messages': [SYSTEM, USER, GOOD], 'system': 't'},
    "a system turn and a field 'system'",
  ),
  ('chat', {'instruction': 'q', 'output': 'a', 'history': [['b']]}, 'pairs of'),
  ('pairs', {**PAIR, 'margin': 'big'}, r"'margin' holds 'big' \(str\)"),
  ('pairs', {**PAIR, 'margin': float('nan')}, "'margin' holds nan"),
  ('pairs', {**PAIR, 'score_chosen': 1}, "but no 'score_rejected'"),
  (
    'rated',
    {'prompt': 'q', 'completion': 'a', 'label': 'good'},
    r"'label' holds 'good' \(str\), not a number",
  ),
  # Turns.
  ('chat', {'messages': []}, "'messages' is empty"),
  ('chat', {'messages': ['q']}, "'messages' turn 1 is no object"),
  ('chat', {'messages': [{'content': 'q'}]}, "turn 1 has no 'role'; it needs"),
  (
    'chat',
    {'messages': [USER, {'Role': 'assistant', 'content': 'a'}]},
    r"turn 2 has no 'role' \(did you mean 'Role'\?\)",
  ),
  ('chat', {'messages': [USER, {'role': 'assistant'}]}, "turn 2 has no 'cont"),
  (
    'chat',
    {'messages': [USER, {'role': 'asistant', 'content': 'a'}]},
    r"unknown role 'asistant' \(did you mean 'assistant'\?\); there are",
  ),
  ('chat', {'messages': [{'role': ['u'], 'content': 'a'}]}, 'unknown role'),
  ('chat', {'conversations': [{'from': 'bing', 'value': 'a'}]}, 'unknown role'),
  ('chat', {'conversations': [{'from': 'gpt', 'text': 'a'}]}, "no 'value'"),
  (
    'chat',
    {'conversations': [SHARE[0], {'from': 'function_call', 'value': 'add()'}]},
    r'turn 2 \(function_call\) is not valid JSON',
  ),
  (
    'chat',
    {'conversations': [SHARE[0], {'from': 'function_call', 'value': '{}'}]},
    'a tool call without a name',
  ),
  (
    'chat',
    {'messages': [{'role': 'user', 'content': [{'type': 'image'}]}, GOOD]},
    r'parts that are no text \(image\)',
  ),
  ('chat', {'messages': [SYSTEM, GOOD]}, 'turn 2 is of the assistant, but af'),
  ('chat', {'messages': [GOOD]}, 'at the beginning comes the system or the us'),
  ('chat', {'messages': [USER, SYSTEM, GOOD]}, 'turn 2 is of the system'),
  ('chat', {'messages': [USER, USER, GOOD]}, 'after the user comes the assis'),
  ('chat', {'messages': [USER, GOOD, GOOD]}, 'after the assistant comes the u'),
  (
    'chat',
    {'messages': [USER, GOOD, {'role': 'tool', 'content': '3'}, GOOD]},
    'turn 3 is of the tool, but after the assistant comes',
  ),
  ('chat', {'messages': [*CALLED[:3], USER, GOOD]}, 'the tool or the assistan'),
  ('chat', {'messages': [USER]}, 'must end with the assistant, not with the u'),
  ('chat', {'messages': [USER, GOOD, USER]}, 'leave out the turns after'),
  ('chat', {'messages': CALLED[:3]}, 'not with the tool'),
  ('chat', {'prompt': 'q', 'completion': ' \n'}, 'the assistant, is empty'),
  ('chat', {'prompt': '', 'completion': 'a'}, 'turn 1, of the user, is empty'),
  # Pairs.
  ('pairs', {**PAIR, 'rejected': 'good'}, 'are the same'),
  ('pairs', {**PAIR, 'rejected': ''}, "'rejected': turn 2, of the assistant,"),
  (
    'pairs',
    {'chosen': [USER, GOOD], 'rejected': [USER, GOOD, USER, WORSE]},
    "'chosen' is empty or only the beginning",
  ),
  ('pairs', {**PAIR, 'chosen': []}, "'chosen' is empty or"),
  (
    'pairs',
    {'chosen': [USER, GOOD], 'rejected': [{**USER, 'content': 'r'}, WORSE]},
    "must share all turns .*'chosen' goes on with the user",
  ),
  (
    'pairs',
    {'prompt': 'r', 'chosen': [USER, GOOD], 'rejected': [USER, WORSE]},
    "do not begin with 'prompt'",
  ),
  ('pairs', {**PAIR, 'prompt': [USER, GOOD]}, "'chosen': turn 3 is of the ass"),
]


@pytest.mark.parametrize(('rows', 'record', 'line'), BAD)
def test_refusals(rows, record, line):
  with pytest.raises(ValueError, match=line) as caught:
    records.canonical(record, rows)
  assert '\n' not in str(caught.value)


QUESTIONS = [
  ({'question': 'q', 'answer': '#### 1'}, 'question', [USER]),
  ({'problem': 'q', 'solution': 's', 'level': 'Level 5'}, 'problem', [USER]),
  ({'input': 'q', 'target': 43.0}, 'input', [USER]),
  ({'prompt': b'q', 'test': 'x', 'input': '1'}, 'prompt', [USER]),
  ({'prompt': [SYSTEM, USER], 'question': 'r'}, 'prompt', [SYSTEM, USER]),
  (
    {'prompt': json.dumps([USER]).encode(), 'level': np.int32(2)},
    'prompt',
    [USER],
  ),
  ({'system': 's', 'question': 'q'}, 'question', [SYSTEM, USER]),
  ({'question': [SYSTEM, USER]}, 'question', [SYSTEM, USER]),
  ({'question': 'q', 'choices': [], 'context': ''}, 'question', [USER]),
  (
    {'instruction': 'q', 'input': 'x', 'target': 1},
    'instruction',
    [{'role': 'user', 'content': 'q\n\nx'}],
  ),
  # Answers at the end are left out.
  ({'messages': [USER, WORSE, USER, GOOD]}, 'messages', [USER, WORSE, USER]),
  ({'messages': CALLED}, 'messages', CALLED[:3]),
  ({'conversations': SHARE[:2]}, 'conversations', [USER]),
  ({'prompt': 'q', 'completion': 'a', 'label': True}, 'prompt', [USER]),
  # Of pairs, what the stages of pairs take for the prompt.
  (PAIR, 'prompt/chosen/rejected', [USER]),
  (
    {
      'prompt': 'q',
      'chosen': [SYSTEM, USER, WORSE, USER, GOOD],
      'rejected': [SYSTEM, USER, WORSE, USER, WORSE],
    },
    'prompt/chosen/rejected',
    [SYSTEM, USER, WORSE, USER],
  ),
  (
    {'chosen': [USER, GOOD], 'rejected': [USER, WORSE]},
    'chosen/rejected',
    [USER],
  ),
  ({'question': 'q', 'chosen': 'a', 'rejected': 'b'}, 'question', [USER]),
]


@pytest.mark.parametrize(('record', 'form', 'messages'), QUESTIONS)
def test_questions(record, form, messages):
  found = records.canonical({**record, 'tools': TOOLS}, 'prompts')
  assert found == (form, Question(messages, TOOLS))
  assert records.question(record) == Question(messages)


NO_QUESTIONS = [
  ({}, 'asks nothing, by none of prompt, .* it is empty'),
  (
    {'code': 'f', 'input': '1', 'output': '2'},
    r'question, problem, input \(with target\); its fields are code, input',
  ),
  ({'question': None, 'answer': '1'}, 'its fields are answer'),
  ({'question': 'q', 'choices': ['a']}, "has 'choices' beside 'question'"),
  ({'problem': 'q', 'options': 'A) b'}, "has 'options' beside 'problem'"),
  ({'question': 'q', 'context': 'c'}, "all that is asked into 'prompt'"),
  ({'question': ''}, 'turn 1, of the user, is empty'),
  ({'input': 3, 'target': 3}, r"'input' holds 3 \(int\), not text"),
  ({'prompt': []}, "'prompt' asks nothing"),
  ({'messages': [SYSTEM]}, "'messages' asks nothing"),
  ({'messages': [GOOD]}, "'messages' asks nothing"),
  ({'messages': [USER, USER]}, 'turn 2 is of the user, but after the user'),
  ({'chosen': 'a', 'rejected': 'b'}, "has no 'prompt'"),
  (['q'], 'must be a JSON object, not list'),
]


@pytest.mark.parametrize(('record', 'line'), NO_QUESTIONS)
def test_what_asks_nothing(record, line):
  with pytest.raises(ValueError, match=line) as caught:
    records.canonical(record, 'prompts')
  assert '\n' not in str(caught.value)


def test_a_record_is_left_as_it_was():
  record = {'conversations': [SHARE[0], SHARE[3], *SHARE[1:]], 'tools': '[]'}
  before = json.dumps(record)
  records.canonical(record, 'chat')
  assert json.dumps(record) == before
