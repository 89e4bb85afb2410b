"""Chat templates give the tokens and masks that transformers gives.

Needs TPU_LM_PEER_PYTHON, a Python that has transformers; it runs apart, so
that nothing here depends on it.
"""

import json
import os
import subprocess

import pytest

from tpu_lm import tokenizer as tokenizer_lib
from tpu_lm.data import chat

PEER = os.environ.get('TPU_LM_PEER_PYTHON', '')
pytestmark = pytest.mark.skipif(
  not PEER, reason='TPU_LM_PEER_PYTHON names no Python with transformers'
)

PROGRAM = """
import json, sys
from transformers import PreTrainedTokenizerFast
asked = json.load(sys.stdin)
tokenizer = PreTrainedTokenizerFast.from_pretrained(asked['folder'])
found = []
for messages, tools in asked['records']:
  given = tokenizer.apply_chat_template(
    messages, tools=tools, return_dict=True,
    return_assistant_tokens_mask=asked['marks'])
  prompt = tokenizer.apply_chat_template(
    messages[:-1], tools=tools, return_dict=True, add_generation_prompt=True)
  found.append([given['input_ids'], given.get('assistant_masks'),
                prompt['input_ids']])
json.dump(found, sys.stdout)
"""
# Without generation marks, with texts of all kinds in between.
OTHER = """\
{{- bos_token }}
{%- set ns = namespace(last=none) %}
{%- for message in messages %}
{%- set ns.last = message.role %}
{{- '<|im_start|>' + message['role'] | upper + ':\\n\\n' }}
{%- if message.tool_calls is defined %}
{{- message.tool_calls | tojson(indent=1) }}
{%- endif %}
{%- if message.content is string and not message.content.startswith('x') %}
{{- message.content | trim }}
{%- else %}
{%- continue %}
{%- endif %}
{{- eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt and ns.last is not none %}
{{- '<|im_start|>' + 'assistant' | upper + ':\\n\\n' }}
{%- endif %}
"""


def conversations():
  call = {
    'type': 'function',
    'function': {
      'name': 'add',
      'arguments': {'a': [1.5, None, True], 'b': 'ü<"\'&'},
    },
  }
  tools = [{'type': 'function', 'function': {'name': 'add', 'x': '😀 ü'}}]
  user, assistant, system, tool = 'user', 'assistant', 'system', 'tool'

  def turns(*said):
    return [{'role': role, 'content': text} for role, text in said]

  short = turns((user, 'How many miles?'), (assistant, 'Ten miles.'))
  long = turns(
    (system, 'Be brief.\n'),
    (user, '  a  \n\n'),
    (assistant, ' b  c '),
    (user, "d's é漢字 😀 12345"),
    (assistant, 'def f():\n\treturn 1  # {{ no }}\n'),
  )
  called = [
    *turns((user, 'q')),
    {'role': assistant, 'content': 'Hm.', 'tool_calls': [call, call]},
    *turns((tool, '3'), (tool, '4'), (assistant, 'It is 3.')),
    *turns((user, 'more')),
    {'role': assistant, 'content': '', 'tool_calls': [call]},
  ]
  return [
    (short, None),
    (long, None),
    (long, tools),
    (called, None),
    (called, tools),
    (long[:1] + called, tools),
  ]


@pytest.mark.parametrize('kind', ['byte', 'bpe'])
@pytest.mark.parametrize('text', [chat.CHATML, OTHER])
def test_tokens_and_masks_are_those_of_transformers(tmp_path, kind, text):
  texts = ['How many miles to the user? The assistant says ten miles.\n'] * 9
  tokenizer = tokenizer_lib.train(texts, kind, 320)
  template = chat.Template(text, 'x', tokenizer)
  tokenizer.save(tmp_path)
  template.save(tmp_path)
  records = conversations()
  has_marks = text == chat.CHATML
  ran = subprocess.run(
    [PEER, '-c', PROGRAM],
    input=json.dumps(
      {'folder': str(tmp_path), 'records': records, 'marks': has_marks}
    ),
    capture_output=True,
    text=True,
    check=False,
  )
  assert ran.returncode == 0, ran.stderr
  items = [(messages, 0, tools) for messages, tools in records]
  for (messages, tools), (ids, mask), wanted in zip(
    records,
    template.encode_batch(items),
    json.loads(ran.stdout),
    strict=True,
  ):
    wanted_ids, wanted_mask, wanted_prompt = wanted
    end = len(ids)
    assert ids.tolist() == wanted_ids[:end]
    assert tokenizer.decode(wanted_ids[end:], specials=True) == '\n'
    if has_marks:
      assert mask.tolist() == [bool(m) for m in wanted_mask[:end]]
      assert not any(wanted_mask[end:])
    assert template.prompt(messages[:-1], tools) == wanted_prompt
