r"""1 where the whole answer has a form, else 0.

Forms, by name:
  boxed   text with one `\boxed{…}` that is not empty and is closed, with
          braces within up to four deep
  hashes  text whose last line is `#### …`, and no other line begins so
  think   <think>…</think>, then an answer; each tag once
  tags    <think>…</think><answer>…</answer> and nothing else; each tag once
"""

import re
from collections.abc import Sequence

from tpu_lm.errors import UserError, nearest
from tpu_lm.rewards import regex
from tpu_lm.scoring import RewardFn, Sample, Score


def _nested(depth: int) -> str:
  """A character, or braces with some of these within; no box."""
  deeper = rf'|\{{{_nested(depth - 1)}*\}}' if depth else ''
  return rf'(?:\\(?!boxed).|[^{{}}\\]{deeper})'


_NO_BOX = r'(?:(?!\\boxed).)*'
_WITHIN = r'(?:(?!</?(?:think|answer)>).)*'  # no other tag
_FORMS = {
  'boxed': rf'{_NO_BOX}\\boxed\{{{_nested(4)}+\}}{_NO_BOX}',
  'hashes': r'(?:(?!####)[^\n]*\n)*####[^\n#]*[^\s#][^\n#]*\s*',
  'think': rf'\s*<think>{_WITHIN}</think>(?=\s*\S){_WITHIN}',
  'tags': rf'\s*<think>{_WITHIN}</think>\s*<answer>(?=\s*[^\s<]){_WITHIN}'
  r'</answer>\s*',
}


def make(*, pattern: str = '', form: str = '') -> RewardFn:
  """Makes the reward; one of the two must be given.

  Args:
    pattern: a regular expression that the whole answer must match; '.' is any
      character, a newline too.
    form: one of the names above.
  """
  if bool(pattern) == bool(form):
    raise UserError(
      f'rewards: format(pattern={pattern!r}, form={form!r}): give one of them'
    )
  if form and form not in _FORMS:
    raise UserError(
      f'rewards: format.form={form!r}: unknown{nearest(form, _FORMS)}; there '
      f'are {", ".join(_FORMS)}'
    )
  wanted = regex.compiled('format', pattern or _FORMS[form], re.DOTALL)

  def scores(samples: Sequence[Sample]) -> list[Score]:
    return [Score(float(bool(wanted.fullmatch(s.text)))) for s in samples]

  return scores
