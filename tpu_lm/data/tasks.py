"""seqio Tasks and Mixtures: read as sources, and made of our sources.

`seqio:[MODULE:]NAME[@SPLIT]` is a source; MODULE is imported first, so that it
can register NAME. A Mixture becomes one part per Task, with its rate.
`register` and `register_mixture` let programs that speak seqio, such as T5X,
read the text that is trained on here. Importing seqio imports TensorFlow
(11 s), so it happens inside the functions.
"""

import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tpu_lm.data import files, heldout, sources
from tpu_lm.errors import UserError, nearest
from tpu_lm.tokenizer import Tokenizer

if TYPE_CHECKING:
  import seqio

SPLITS = {'train': 'train', 'validation': 'heldout'}


def source(spec: str) -> sources.Source:
  """The source that `[MODULE:]NAME[@SPLIT]` names; train by default."""
  import seqio

  name, _, split = spec.partition('@')
  module, _, name = name.rpartition(':')
  if module:
    try:
      importlib.import_module(module)
    except ImportError as error:
      raise UserError(f'seqio:{spec}: cannot import {module} ({error})') from (
        error
      )
  known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  if name not in known:
    raise UserError(
      f'seqio:{spec}: no Task or Mixture {name}{nearest(name, known)} is '
      'registered; name the module that registers it: seqio:MODULE:NAME'
    )
  found = seqio.get_mixture_or_task(name)
  split = split or 'train'
  if split not in found.splits:
    raise UserError(
      f'seqio:{spec}: has no split {split}{nearest(split, found.splits)}; '
      f'there are {", ".join(found.splits)}'
    )
  if isinstance(found, seqio.Task):
    return _task(found, split)
  parts = [
    sources.Part(task.name, float(found.get_rate(task)), _task(task, split))
    for task in sorted(found.tasks, key=lambda task: task.name)
  ]
  return sources.Mixture(f'seqio:{spec}', parts)


def _task(task: 'seqio.Task', split: str) -> sources.Source:
  name = f'seqio:{task.name}@{split}'

  def records(_: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    dataset = task.get_dataset(
      sequence_length=None, split=split, shuffle=False, num_epochs=1
    )
    for number, example in enumerate(dataset.as_numpy_iterator(), start=1):
      yield f'{name}: record {number}', _text(task, example)

  return sources.Source(name, [files.Records(name, records, 'text')])


def _text(task: 'seqio.Task', example: Mapping[str, Any]) -> Mapping[str, Any]:
  """`example` with the field `text`: its own, else its targets before they
  were tokenised, else those spelled out."""
  for key in ('text', 'targets_pretokenized', 'targets'):
    if isinstance(example.get(key), bytes):
      return {'text': example[key]}
  if 'targets' in example:
    vocabulary = task.output_features['targets'].vocabulary
    return {'text': vocabulary.decode(example['targets'].tolist())}
  return example


@functools.cache
def _vocabulary_class() -> type:
  import seqio
  import tensorflow as tf

  class Vocabulary(seqio.Vocabulary):
    """One of our tokenizers, as seqio sees it."""

    def __init__(self, tokenizer: Tokenizer):
      super().__init__()
      self._tokenizer = tokenizer

    @property
    def bos_id(self) -> int:
      return self._tokenizer.eot_id

    @property
    def eos_id(self) -> int:
      return self._tokenizer.eot_id

    @property
    def pad_id(self) -> int:
      return self._tokenizer.pad_id

    @property
    def unk_id(self) -> None:
      return None

    @property
    def _base_vocab_size(self) -> int:
      return self._tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
      return self._tokenizer.encode(s)

    def _decode(self, ids: list[int]) -> str:
      return self._tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
      ids = tf.py_function(
        lambda s: tf.constant(self.encode(s.numpy().decode()), tf.int32),
        [s],
        tf.int32,
      )
      ids.set_shape([None])
      return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
      return tf.py_function(
        lambda ids: self._decode(ids.numpy().tolist()), [ids], tf.string
      )

    def __eq__(self, other: object) -> bool:
      return (
        isinstance(other, Vocabulary)
        and self._tokenizer.digest == other._tokenizer.digest
      )

    __hash__ = None

  return Vocabulary


def vocabulary(tokenizer: Tokenizer) -> 'seqio.Vocabulary':
  """A seqio Vocabulary that gives this tokenizer's ids.

  seqio's feature converters fill rows with 0 and take 0 for padding, which is
  the end-of-text token of our own tokenizers: count it by position.
  """
  return _vocabulary_class()(tokenizer)


def register(
  name: str,
  source: str,
  tokenizer: Tokenizer,
  *,
  field: str = 'text',
  rule: heldout.Rule | None = None,
) -> 'seqio.Task':
  """Registers a seqio Task over one of our sources.

  Its splits train and validation are divided as by `prepare`. Its feature
  `targets` is a document's tokens and the end-of-text token, cut into
  examples of the sequence length that is asked for: nothing is trimmed away.

  Args:
    name: of the Task; a second one of that name is an error of seqio's.
    source: as `data.source`.
    tokenizer: that the feature is made with.
    field: of records, the one that holds the text.
    rule: what is held out; a tenth by default.
  """
  import seqio
  import tensorflow as tf

  rule = rule or heldout.check(0.1, 'auto')

  def texts(split: str) -> Iterator[dict[str, str]]:
    opened = sources.open(source, field)
    for found, document in heldout.divide(opened, rule, files.Reading()):
      if found == SPLITS[split]:
        yield {'targets': ''.join(document.pieces())}

  def dataset(
    split: str, shuffle_files: bool = False, seed: int | None = None
  ) -> tf.data.Dataset:
    del shuffle_files, seed  # the trainer shuffles rows, not files
    return tf.data.Dataset.from_generator(
      lambda: texts(split),
      output_signature={'targets': tf.TensorSpec((), tf.string)},
    )

  feature = seqio.Feature(vocabulary(tokenizer), add_eos=True)
  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(dataset, splits=tuple(SPLITS)),
    output_features={'targets': feature},
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
      _chunk,
    ],
  )


def _chunk(dataset: Any, sequence_length: Mapping[str, int] | None) -> Any:
  """Cuts `targets` into examples of at most the sequence length."""
  import tensorflow as tf

  if not sequence_length or not sequence_length['targets']:
    return dataset
  length = sequence_length['targets']

  def pieces(example: dict[str, Any]) -> Any:
    targets = example['targets']
    starts = tf.range(0, tf.size(targets), length, dtype=tf.int32)
    return tf.data.Dataset.from_tensor_slices(starts).map(
      lambda start: example | {'targets': targets[start : start + length]}
    )

  return dataset.flat_map(pieces)


def register_mixture(name: str, rates: Mapping[str, float]) -> 'seqio.Mixture':
  """Registers a seqio Mixture of Tasks by their rates."""
  import seqio

  return seqio.MixtureRegistry.add(name, list(rates.items()))
