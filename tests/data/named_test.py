"""Datasets by name: TFDS without a network or TensorFlow, and Hugging Face."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tpu_lm.data import files, sources
from tpu_lm.errors import UserError

TINY = """
import tensorflow_datasets as tfds

class TinyWords(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = tfds.features.FeaturesDict({'text': tfds.features.Text()})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, manager):
    return {'train': self._generate_examples(20),
            'test': self._generate_examples(3)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {'text': f'w\\u00f6rd {i}'}
"""

READ = """
import sys
import tiny_words
from tpu_lm.data import files, sources
from tpu_lm.errors import UserError

for name in ('tiny_words', 'tiny_words:1.0.0@test', 'tiny_words@test[:2]'):
  source = sources.open('tfds:' + name, 'text')
  for _ in range(2):
    found = [''.join(d.pieces()) for d in source.documents(files.Reading())]
  print(len(found), 'w\\u00f6rd 1' in found)
print('tensorflow' in sys.modules)
for name, field in (('tiny_words@tset', 'text'), ('tiny_word', 'text'),
                    ('tiny_words', 'txt')):
  try:
    list(sources.open('tfds:' + name, field).documents(files.Reading()))
  except UserError as error:
    print(str(error).split(';')[0])
"""


def test_tfds_is_made_and_read_without_tensorflow(tmp_path):
  (tmp_path / 'tiny_words.py').write_text(TINY)
  done = subprocess.run(
    [sys.executable, '-c', READ],
    env=os.environ
    | {
      'PYTHONPATH': f'{tmp_path}:{os.getcwd()}',
      'PYTHONIOENCODING': 'utf-8',
      'TFDS_DATA_DIR': str(tmp_path / 'tfds'),
      'NO_GCE_CHECK': 'true',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines[:3] == ['20 True', '3 True', '2 True']
  assert lines[3] == 'False'
  assert "has no split tset (did you mean 'test'?)" in lines[4]
  assert "no such dataset (did you mean 'tiny_words'?)" in lines[5]
  assert "record 1: has no field 'txt' (did you mean 'text'?)" in lines[6]


@pytest.mark.skipif(
  importlib.util.find_spec('datasets') is not None, reason='it is installed'
)
def test_missing_package_is_named():
  with pytest.raises(UserError, match=r"pip install 'tpu_lm\[hf\]'"):
    sources.open('hf:some/name', 'text')


def test_hugging_face_folders(tmp_path):
  datasets = pytest.importorskip('datasets')
  dataset = datasets.Dataset.from_dict({'text': ['one', 'two']})
  dataset.save_to_disk(tmp_path / 'one')
  datasets.DatasetDict({'test': dataset}).save_to_disk(tmp_path / 'splits')
  for name in ('one', 'splits@test'):
    source = sources.open(f'hf:{tmp_path / name}', 'text')
    found = [''.join(d.pieces()) for d in source.documents(files.Reading())]
    assert found == ['one', 'two']
  with pytest.raises(UserError, match="did you mean 'test'"):
    sources.open(f'hf:{tmp_path / "splits@tests"}', 'text')
