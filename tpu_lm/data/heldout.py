"""Which text is trained on and which is held out to measure by.

`tail` holds out the last share of every text file (of n characters the first
floor(n (1 - share)) are trained on) and the last share of the records of every
other source. `document` holds out the documents whose md5 is in the lowest
share of its range: the same text is always on the same side, whatever the
order or number of files. Where there are so few that all are on one side, the
lowest is held out, or the highest trained on. `auto` is tail for text files,
document for records. Of records that stay whole (prepare_records.py) the md5 is
that of what the conversation opens with.
"""

import fractions
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tpu_lm.data.files import Document, Reading
from tpu_lm.data.sources import Source
from tpu_lm.errors import UserError, nearest

RULES = ('auto', 'tail', 'document')


class Rule(NamedTuple):
  """`share` is in (0, 1), `by` one of RULES."""

  share: float
  by: str


class Measure(NamedTuple):
  num_characters: int
  md5: bytes
  blank: bool


def check(share: float, by: str) -> Rule:
  """The rule that the configuration asks for."""
  if by not in RULES:
    raise UserError(
      f'data.heldout_by={by}: unknown rule{nearest(by, RULES)}; there are '
      f'{", ".join(RULES)}'
    )
  if not 0 < share < 1:
    raise UserError(
      f'data.heldout_share={share}: must be above 0 and below 1, e.g. 0.1; '
      'or name a held-out text with --config.data.heldout_source=PATH'
    )
  return Rule(share, by)


def measure(document: Document) -> Measure:
  md5, count, blank = hashlib.md5(), 0, True
  for piece in document.pieces():
    md5.update(piece.encode())
    count += len(piece)
    blank = blank and not piece.strip()
  return Measure(count, md5.digest(), blank)


def divide(
  source: Source, rule: Rule | None, reading: Reading
) -> Iterator[tuple[str, Document]]:
  """Yields ('train' | 'heldout' | 'empty', document).

  Args:
    source: what to divide.
    rule: how; None puts all into 'train'.
    reading: counts what is read.
  """
  by_number = rule is not None and rule.by == 'tail'
  total = 0
  if by_number:
    counted = Reading(tolerant=reading.tolerant)
    total = sum(not document.is_file for document in source.documents(counted))
  first_held_out = math.floor(total * _trained(rule)) if total else 0
  threshold = b'' if rule is None else _threshold(source, rule, reading)
  number = 0
  for document in source.documents(reading):
    measured = measure(document)
    if measured.blank:
      yield 'empty', document
    elif rule is None:
      yield 'train', document
    elif document.is_file and rule.by != 'document':
      end = math.floor(measured.num_characters * _trained(rule))
      yield from _cut_in_two(document, end, measured.num_characters)
    elif by_number:
      yield 'train' if number < first_held_out else 'heldout', document
    else:
      yield 'heldout' if measured.md5 < threshold else 'train', document
    number += not document.is_file


def _threshold(source: Source, rule: Rule, reading: Reading) -> bytes:
  """The md5 below which a document is held out.

  Reads no further than until there are documents on both sides.
  """
  if rule.by == 'tail':
    return b''
  threshold = _share_of_md5(rule)
  found = set()
  for document in source.documents(Reading(tolerant=reading.tolerant)):
    if document.is_file and rule.by == 'auto':
      continue
    measured = measure(document)
    if not measured.blank:
      found.add(measured.md5)
      if min(found) < threshold <= max(found):
        return threshold
  return _one_sided(found, threshold)


def _share_of_md5(rule: Rule) -> bytes:
  share = fractions.Fraction(str(rule.share))
  return int(share * 2**128).to_bytes(16, 'big')


def _one_sided(found: set[bytes], threshold: bytes) -> bytes:
  """The threshold where all of `found` lie on one side of the one wanted."""
  if len(found) < 2:
    return b''  # of one document, none is held out
  # All but the lowest, or the highest alone, are trained on.
  return sorted(found)[1] if min(found) >= threshold else max(found)


def marks(keys: Sequence[bytes], rule: Rule | None) -> np.ndarray:
  """Which records are held out: bool[records], in the order of `keys`.

  Args:
    keys: an md5 of each record, in the order in which they were read.
    rule: how; None holds out nothing.
  """
  if rule is None:
    return np.zeros(len(keys), bool)
  if rule.by == 'tail':
    return np.arange(len(keys)) >= math.floor(len(keys) * _trained(rule))
  threshold, found = _share_of_md5(rule), set(keys)
  if not found or not min(found) < threshold <= max(found):
    threshold = _one_sided(found, threshold)
  return np.array([key < threshold for key in keys], bool)


def _trained(rule: Rule) -> fractions.Fraction:
  """1 - share, of the share as it is written in decimals."""
  return 1 - fractions.Fraction(str(rule.share))


def _cut_in_two(
  document: Document, end: int, total: int
) -> Iterator[tuple[str, Document]]:
  for split, first, last in (('train', 0, end), ('heldout', end, total)):
    part = Document(
      document.origin,
      lambda first=first, last=last: _characters(document, first, last, total),
    )
    if first < last and not measure(part).blank:
      yield split, part


def _characters(
  document: Document, first: int, last: int, total: int
) -> Iterator[str]:
  """The pieces of characters first..last of `document`."""
  at = 0
  for piece in document.pieces():
    text = piece[max(0, first - at) : max(0, last - at)]
    at += len(piece)
    if text:
      yield text
  if at != total:
    raise UserError(
      f'{document.origin}: changed while it was read ({total} characters, '
      f'then {at}); start again'
    )
