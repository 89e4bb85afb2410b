"""The little world as a TFDS dataset; needs no network.

  builder = world_tfds.builder('text', data_dir='/tmp/tfds', seed=0)
  source = builder.as_data_source('train')   # random access, no TensorFlow
  source[0]                                  # {'id': …, 'text': …, 'bits': …}

Importing this module also registers the dataset, so that afterwards
`tfds.builder('world/text', data_dir=…)` finds it. Strings are read as bytes.

  text        id, text, bits (float32): `world.documents`
  chat        id, messages: `world.conversations`
  preference  id, prompt, chosen, rejected: `world.preferences`
  problems    id, prompt, answer, kind, level: `world.problems`
  sums        the same, of three numbers each, which no conversation shows

`messages` and `prompt` are JSON: a list of {"role", "content"}.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from tpu_lm.data import world

GENERATORS = {
  'text': lambda *a: map(dataclasses.asdict, world.documents(*a)),
  'chat': world.conversations,
  'preference': world.preferences,
  'problems': world.problems,
  'sums': lambda *a: world.problems(*a, levels=(3,), kinds=('plus',)),
}
FIELDS = {
  'text': ('id', 'text', 'bits'),
  'chat': ('id', 'messages'),
  'preference': ('id', 'prompt', 'chosen', 'rejected'),
  'problems': ('id', 'prompt', 'answer', 'kind', 'level'),
  'sums': ('id', 'prompt', 'answer', 'kind', 'level'),
}
NUMBERS = {'bits': np.float32, 'level': np.int32}
SIZES = {  # train, held out
  'text': (20_000, 1_000),
  'chat': (4_000, 400),
  'preference': (4_000, 400),
  'problems': (2_000, 400),
  'sums': (200, 50),  # each of them once
}


@dataclasses.dataclass(kw_only=True)
class Config(tfds.core.BuilderConfig):
  """What is generated: the kind of record, the world's seed, the sizes."""

  kind: str = 'text'
  seed: int = 0
  num_train: int = 0
  num_heldout: int = 0


def config(
  kind: str,
  seed: int = 0,
  num_train: int | None = None,
  num_heldout: int | None = None,
) -> Config:
  """Returns a config whose name is `kind`, and tells what is not default."""
  if kind not in SIZES:
    raise ValueError(f'config is {kind!r}; it must be one of {list(SIZES)}')
  sizes = tuple(
    default if size is None else size
    for size, default in zip((num_train, num_heldout), SIZES[kind], strict=True)
  )
  if min(sizes) < 1:
    raise ValueError(f'num_train, num_heldout are {sizes}; both must be >= 1')
  name = kind
  if seed != 0 or sizes != SIZES[kind]:
    name = f'{kind}-{seed}-{sizes[0]}-{sizes[1]}'
  return Config(
    name=name,
    description=f'{kind} of the world of seed {seed}',
    kind=kind,
    seed=seed,
    num_train=sizes[0],
    num_heldout=sizes[1],
  )


class World(tfds.core.GeneratorBasedBuilder):
  """The little world; see `tpu_lm.data.world`."""

  # Stale records are not read.
  VERSION = tfds.core.Version(f'1.0.{world.version()}')
  # What TFDS would find out with importlib_resources, which it does not ask for
  # among its requirements.
  code_path = epath.Path(__file__)
  BUILDER_CONFIGS = [config(kind) for kind in SIZES]  # noqa: RUF012

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    fields = FIELDS[self.builder_config.kind]
    return tfds.core.DatasetInfo(
      builder=self,
      description='A generated world of 24 people with a known entropy.',
      features=tfds.features.FeaturesDict(
        {x: NUMBERS.get(x, text) for x in fields}
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    del dl_manager  # nothing is downloaded
    sizes = self.builder_config
    return {
      'train': self._generate_examples('train', sizes.num_train),
      'heldout': self._generate_examples('heldout', sizes.num_heldout),
    }

  def _generate_examples(self, split: str, num_examples: int) -> Iterator:
    of = self.builder_config
    for record in GENERATORS[of.kind](of.seed, split, num_examples):
      for field in ('messages', 'prompt'):
        if field in record:
          record[field] = json.dumps(record[field], ensure_ascii=False)
      yield record['id'], record


def builder(
  config_name: str = 'text',
  data_dir: str | os.PathLike | None = None,
  seed: int = 0,
  num_train: int | None = None,
  num_heldout: int | None = None,
) -> World:
  """Returns the builder of one config, prepared.

  Args:
    config_name: 'text', 'chat', 'preference' or 'problems'.
    data_dir: where datasets lie; None is TFDS's own default.
    seed: of the world.
    num_train: records; None for SIZES.
    num_heldout: likewise.
  """
  asked = config(config_name, seed, num_train, num_heldout)
  known = World.builder_configs
  made = World(
    data_dir=None if data_dir is None else os.fspath(data_dir),
    # TFDS wants its own object where the config is one of BUILDER_CONFIGS.
    config=known.get(asked.name, asked),
    file_format='array_record',
  )
  if not made.is_prepared():
    made.download_and_prepare(file_format='array_record')
  return made
