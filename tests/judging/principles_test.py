"""Files of principles in the forms that they have."""

import gzip
import json
import pathlib

import pytest

from tpu_lm.errors import UserError
from tpu_lm.judging import principles

SHARED = pathlib.Path(__file__).parents[2] / '../shared/data/constitution'
MARKDOWN = """# Rules

They say:

- The answer is *honest*.
* It is kind
  to all,
    - also to cats.

  And to dogs.
1. It is short.

Not this.

```
- nor this
```
2) It ends.
"""


def test_items_of_lists(tmp_path):
  path = tmp_path / 'rules.md'
  path.write_text(MARKDOWN)
  expected = [
    'The answer is *honest*.',
    'It is kind to all, - also to cats. And to dogs.',
    'It is short.', 'It ends.',
  ]  # fmt: skip
  assert principles.read(path) == [principles.stated(x) for x in expected]
  packed = tmp_path / 'rules.md.gz'
  packed.write_bytes(gzip.compress(MARKDOWN.encode()))
  assert principles.read(packed) == principles.read(path)


def test_lines_of_a_text_without_lists(tmp_path):
  path = tmp_path / 'rules.txt'
  path.write_text('Be kind.\n\n  Be brief. \nBe kind.\n')
  assert principles.read(path) == [
    principles.stated('Be kind.'), principles.stated('Be brief.'),
  ]  # fmt: skip


@pytest.mark.parametrize('name', ['a.json', 'b.json', 'c.jsonl'])
def test_objects(tmp_path, name):
  objects = [
    {'critic': 'Is it kind?', 'revision': 'Make it kind.'},
    {'critique': 'Is it brief?', 'revision': 'Make it brief.'},
    {'principle': 'Be honest.'},
    'Be there.',
  ]
  text = {
    'a.json': json.dumps({'constitutions': objects}),
    'b.json': json.dumps(objects),
    'c.jsonl': '\n'.join(map(json.dumps, objects)) + '\n',
  }[name]
  (tmp_path / name).write_text(text)
  found = principles.read(tmp_path / name)
  assert found == [
    principles.asked('Is it kind?', 'Make it kind.'),
    principles.asked('Is it brief?', 'Make it brief.'),
    principles.stated('Be honest.'),
    principles.stated('Be there.'),
  ]
  assert found[0].critique == 'Is it kind?'
  assert 'Make it kind.' in found[0].choice


@pytest.mark.parametrize(('name', 'text', 'said'), [
  ('a.json', '{"constitution": []}', "did you mean 'constitution'"),
  ('a.json', '{', 'not valid JSON'),
  ('a.json', '7', 'no list of principles'),
  ('a.json', '[{"critic": "x"}]', r'principle 1: needs the texts'),
  ('a.jsonl', '"x"\n{"critic": 1, "revision": ""}', r'a\.jsonl:2: needs'),
  ('a.md', 'No list.', 'holds none'),
  ('a.txt', '\n', 'holds none'),
  ('a.txt.gz', 'no gzip', 'cannot be read'),
])  # fmt: skip
def test_mistakes_are_named(tmp_path, name, text, said):
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=said) as caught:
    principles.read(tmp_path / name)
  assert '\n' not in str(caught.value)


@pytest.mark.skipif(not SHARED.exists(), reason='no shared data')
def test_known_constitutions():
  found = principles.read(SHARED / 'constitution_anthropic.json')
  assert len(found) == 16
  assert found[0].revision == (
    'Please rewrite the response to make it more age-appropriate for children.'
  )
  spec = principles.read(SHARED / 'openai_model_spec.md.gz')
  assert len(spec) > 50
  assert any('Humanity should be in control' in one.choice for one in spec)
