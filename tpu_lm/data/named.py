"""Datasets known by a name: TensorFlow Datasets and Hugging Face datasets.

TFDS datasets in the format array_record, our own world among them, are read
without TensorFlow. `datasets` is an optional package.
"""

import contextlib
import importlib.util
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tpu_lm.errors import UserError, nearest

Records = Callable[..., Iterator[tuple[str, Mapping[str, Any]]]]


def tfds_records(spec: str) -> Records:
  """The records of `NAME[/CONFIG][:VERSION][@SPLIT]`, split train by default.

  A dataset that is not there is made, which may download it; `world` is
  generated here and needs no network.
  """
  import tensorflow_datasets as tfds

  name, _, split = spec.partition('@')
  split = split or 'train'
  is_ours = re.split('[/:]', name)[0] == 'world'
  if is_ours:
    from tpu_lm.data import world_tfds  # noqa: F401  registers it
  with _quiet(is_ours):
    builder = _builder(tfds, name)
  known = list(builder.info.splits)
  base = re.split(r'[\[+]', split)[0]
  if base not in known:
    raise UserError(
      f'tfds:{spec}: has no split {base}{nearest(base, known)}; there are '
      f'{", ".join(known)}'
    )
  is_plain = builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD

  def records(_: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if is_plain:
      found = builder.as_data_source(split)
      examples = (found[i] for i in range(len(found)))
    else:
      examples = tfds.as_numpy(builder.as_dataset(split, shuffle_files=False))
    for number, example in enumerate(examples, start=1):
      yield f'tfds:{name}@{split}: record {number}', example

  return records


@contextlib.contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
  """Keeps absl, through which TFDS warns, from warning."""
  logger = logging.getLogger('absl')
  before = logger.level
  logger.setLevel(logging.ERROR if wanted else before)
  yield
  logger.setLevel(before)


def _builder(tfds: Any, name: str) -> Any:
  """The builder of `name`, whose data has been made."""
  try:
    builder = tfds.builder(name)
    if not builder.is_prepared():
      # This format is read without TensorFlow.
      builder = tfds.builder(name, file_format='array_record')
  except tfds.core.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    raise UserError(
      f'tfds:{name}: no such dataset'
      f'{nearest(re.split("[/:]", name)[0], known)}; `tfds.list_builders()` '
      'lists them'
    ) from error
  except (ValueError, AssertionError) as error:
    raise UserError(f'tfds:{name}: {_first_line(error)}') from error
  is_ours = builder.name == 'world'  # made in a second, from nothing
  if is_ours or not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    # It tells what it does on stdout, which belongs to our own results.
    words = io.StringIO() if is_ours else sys.stderr
    with contextlib.redirect_stdout(words):
      builder.download_and_prepare()
  except Exception as error:  # whatever that dataset's own code raises
    raise UserError(
      f'tfds:{name}: cannot be made ({_first_line(error)}); make it with '
      '`tfds build` where there is a network'
    ) from error
  return builder


def hf_records(spec: str) -> Records:
  """The records of `NAME[/CONFIG][@SPLIT]`, split train by default.

  NAME is ORGANISATION/DATASET of the Hugging Face hub, or a local folder,
  also one that `save_to_disk` wrote.
  """
  if importlib.util.find_spec('datasets') is None:
    raise UserError(
      f'hf:{spec}: needs a package that is not installed: pip install '
      "'tpu_lm[hf]'"
    )
  import datasets

  name, _, split = spec.partition('@')
  split = split or 'train'
  try:
    dataset = _hf_dataset(datasets, name, split)
  except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
    raise UserError(
      f'hf:{spec}: cannot be loaded ({_first_line(error)}); check the name, '
      'its configuration (hf:NAME/CONFIG) and split (@SPLIT)'
    ) from error

  def records(_: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, example in enumerate(dataset, start=1):
      yield f'hf:{name}@{split}: record {number}', example

  return records


def _hf_dataset(datasets: Any, name: str, split: str) -> Any:
  if not os.path.exists(name):
    parts = name.split('/')
    config = '/'.join(parts[2:]) or None
    return datasets.load_dataset('/'.join(parts[:2]), config, split=split)
  if os.path.exists(os.path.join(name, 'dataset_dict.json')):
    found = datasets.load_from_disk(name)
    if split not in found:
      raise ValueError(f'no split {split}{nearest(split, found)}')
    return found[split]
  if os.path.exists(os.path.join(name, 'state.json')):
    return datasets.load_from_disk(name)
  return datasets.load_dataset(name, split=split)


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0]}' if lines else repr(error)
