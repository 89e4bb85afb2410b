"""1 where the whole answer is `record['answer']`, letter for letter, else 0."""

from collections.abc import Sequence

from tpu_lm.errors import UserError
from tpu_lm.scoring import RewardFn, Sample, Score


def make(
  *, strip: bool = True, casefold: bool = False, key: str = 'answer'
) -> RewardFn:
  """Makes the reward.

  Args:
    strip: whether white space at both ends is left out of the comparison.
    casefold: whether 'Yes' is 'yes'.
    key: of the record. Several answers may stand there in a list; any will do.
  """

  def plain(text: object) -> str:
    text = str(text).strip() if strip else str(text)
    return text.casefold() if casefold else text

  def score(sample: Sample) -> Score:
    if key not in sample.record:
      raise UserError(
        f'rewards: exact.key={key!r}: the record has '
        f'{", ".join(map(repr, sample.record)) or "nothing"}'
      )
    known = sample.record[key]
    known = known if isinstance(known, list | tuple) else [known]
    value = float(plain(sample.text) in map(plain, known))
    return Score(value, bool(sample.text.strip()), ' or '.join(map(str, known)))

  def scores(samples: Sequence[Sample]) -> list[Score]:
    return [score(sample) for sample in samples]

  return scores
