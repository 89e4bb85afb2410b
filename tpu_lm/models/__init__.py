"""Model families: one network, and a preset a family."""

import dataclasses
from typing import Any

from tpu_lm.errors import UserError, nearest

# Files of this folder that hold no PRESET.
_PARTS = (
  'attention', 'block', 'grouped', 'moe', 'remat', 'ring', 'rope',
  'splash', 'transformer',
)  # fmt: skip


def families() -> list[str]:
  """The names that `make` knows."""
  from tpu_lm import stage

  return [name for name in stage.known(__name__) if name not in _PARTS]


def make(name: str, options: dict[str, Any], vocab_size: int, length: int):
  """Makes the model of the configuration's `model_name` and `model`.

  Args:
    name: a file of this folder that holds a `PRESET`.
    options: fields of `transformer.Config` that differ from the preset.
    vocab_size: the tokenizer's.
    length: tokens of a training row.

  Raises:
    UserError: an unknown family, or a field that cannot be.
  """
  from tpu_lm import stage
  from tpu_lm.models import transformer

  names = families()
  if name not in names:
    raise UserError(
      f'model_name={name!r}: unknown{nearest(name, names)}; there are '
      f'{", ".join(names)}'
    )
  preset = stage.find(__name__, name, 'model_name').PRESET
  options = dict(options)
  options['vocab_size'] = options.get('vocab_size') or vocab_size
  options['max_length'] = options.get('max_length') or length
  if options['vocab_size'] < vocab_size:
    raise UserError(
      f'model.vocab_size={options["vocab_size"]}: the tokenizer has '
      f'{vocab_size} ids; raise it, or leave it at 0'
    )
  try:
    config = dataclasses.replace(preset, **options)
  except ValueError as error:
    raise UserError(str(error)) from error
  return transformer.Transformer(config)
