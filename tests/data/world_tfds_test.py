"""The little world as a TFDS dataset."""

import json
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from tpu_lm.data import world, world_tfds


def test_text_is_what_the_generator_yields(tmp_path):
  made = world_tfds.builder('text', tmp_path, 3, num_train=30, num_heldout=10)
  for split, size in (('train', 30), ('heldout', 10)):
    source = made.as_data_source(split)
    assert len(source) == size
    told = {x.id: x for x in world.documents(3, split, size)}
    for row in source:
      x = told.pop(row['id'].decode())
      assert row['text'].decode() == x.text
      assert row['bits'] == pytest.approx(x.bits)
    assert not told


@pytest.mark.parametrize('kind', ['chat', 'preference', 'problems'])
def test_records_are_what_the_generators_yield(tmp_path, kind):
  made = world_tfds.builder(kind, tmp_path, num_train=20, num_heldout=10)
  told = {x['id']: x for x in world_tfds.GENERATORS[kind](0, 'heldout', 10)}
  for row in made.as_data_source('heldout'):
    found = {
      k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()
    }
    for field in ('messages', 'prompt'):
      if field in found:
        found[field] = json.loads(found[field])
    assert found == told.pop(found['id'])
  assert not told


def test_it_is_found_by_name_and_reused(tmp_path):
  sizes = {'num_train': 20, 'num_heldout': 5}
  first = world_tfds.builder('text', tmp_path, **sizes)
  again = world_tfds.builder('text', tmp_path, **sizes)
  assert again.data_path == first.data_path
  assert tfds.builder_cls('world') is world_tfds.World
  named = tfds.builder('world/text', data_dir=tmp_path)
  assert named.builder_config.num_train == 20_000
  assert named.data_path != first.data_path


def test_unknown_configs_and_sizes_are_refused(tmp_path):
  with pytest.raises(ValueError, match="config is 'txt'"):
    world_tfds.builder('txt', tmp_path)
  with pytest.raises(ValueError, match='must be >= 1'):
    world_tfds.builder('text', tmp_path, num_train=0)


def test_it_needs_no_tensorflow(tmp_path):
  code = (
    'import sys\n'
    'from tpu_lm.data import world_tfds\n'
    f'b = world_tfds.builder("text", {str(tmp_path)!r}, num_train=5)\n'
    'print(len(b.as_data_source("train")), "tensorflow" in sys.modules)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.split()[-2:] == ['5', 'False']
