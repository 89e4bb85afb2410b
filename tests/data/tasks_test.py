"""seqio reads our sources, and we read seqio's Tasks and Mixtures."""

import json
import os
import subprocess
import sys

import pytest

RUN = """
import json, sys
import numpy as np
import seqio
import tensorflow as tf
from tpu_lm import config, tokenizer
from tpu_lm.data import heldout, loader, prepare, tasks
from tpu_lm.errors import UserError

folder = sys.argv[1]
own = tokenizer.train([], 'byte')
vocabulary = tasks.vocabulary(own)
text = 'h\\u00e9llo <|endoftext|>'
assert vocabulary.encode(text) == own.encode(text)
assert vocabulary.encode_tf(text).numpy().tolist() == own.encode(text)
assert vocabulary.decode(own.encode(text)) == text
ids = tf.constant(own.encode(text))
assert vocabulary.decode_tf(ids).numpy().decode() == text
assert vocabulary == tasks.vocabulary(tokenizer.train([], 'byte'))
assert vocabulary.vocab_size == own.vocab_size

rule = heldout.Rule(0.2, 'document')
tasks.register('a', folder + '/a.jsonl', own, rule=rule)
tasks.register('b', folder + '/b.jsonl', own, rule=rule)
tasks.register_mixture('both', {'a': 3.0, 'b': 1.0})

# Long documents come in pieces that lose nothing.
texts = {json.loads(line)['text'] for line in open(folder + '/a.jsonl')}
found = set()
for split in ('train', 'validation'):
  dataset = seqio.get_mixture_or_task('a').get_dataset(
    sequence_length={'targets': 16}, split=split, shuffle=False)
  ids = []
  for example in dataset.as_numpy_iterator():
    assert len(example['targets']) <= 16
    ids += example['targets'].tolist()
  ends = np.flatnonzero(np.array(ids) == own.eot_id)
  for part in np.split(ids, ends + 1)[:-1]:
    found.add(own.decode(part[:-1]))
assert found == texts

# A Mixture is prepared as parts, mixed by their rates.
c = config.base()
c.data.source, c.data.tokenizer, c.data.length = 'seqio:both', 'byte', 32
made = prepare.prepare(c, folder + '/data', lambda line: None)
assert [(p['name'], p['weight']) for p in made.content['parts']] == [
  ('a', 3.0), ('b', 1.0)]
rows = loader.Loader(made.directory, 'train', 8, 0, made.vocab_size)
names = [n for step in range(100) for n, _ in rows.rows(step)]
assert names.count('0-train-00000') == 600
held = loader.Loader(made.directory, 'heldout', 8, 0, 260, shuffle=False)
assert held.num_rows == made.total('heldout', 'rows')
for spec in ('seqio:bath', 'seqio:both@tests', 'seqio:no.such.module:both'):
  c.data.source = spec
  try:
    prepare.prepare(c, folder + '/data')
  except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_seqio(tmp_path):
  for name in 'ab':
    lines = [
      json.dumps({'text': f'{name}: document {i} é' * 3}) for i in range(60)
    ]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  done = subprocess.run(
    [sys.executable, '-c', RUN, str(tmp_path)],
    env=os.environ | {'PYTHONIOENCODING': 'utf-8'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  lines = done.stdout.splitlines()
  assert "no Task or Mixture bath (did you mean 'both'?)" in lines[0]
  assert 'has no split tests' in lines[1]
  assert 'cannot import no.such.module' in lines[2]
