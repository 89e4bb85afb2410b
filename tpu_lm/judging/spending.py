"""What asking costs, in calls and tokens, and where it has to stop."""

import threading
from typing import NamedTuple

from tpu_lm.errors import UserError


class Price(NamedTuple):
  """What has been asked so far."""

  calls: int = 0  # that were sent, those that failed included
  prompt_tokens: int = 0
  completion_tokens: int = 0
  failed: int = 0  # calls without a reply, which were sent again or given up
  unreported: int = 0  # calls whose tokens are our estimate
  kept: int = 0  # replies that were known and cost nothing

  def __str__(self) -> str:
    asked = (
      f'{self.calls:,} calls, {self.prompt_tokens:,} prompt and '
      f'{self.completion_tokens:,} completion tokens'
    )
    if self.failed:
      asked += f', {self.failed:,} calls failed'
    if self.unreported:
      asked += f', the tokens of {self.unreported:,} calls are estimated'
    return asked + f'; {self.kept:,} replies were known'


class Ledger:
  """Counts what is asked, and refuses what would go beyond a limit.

  Tokens under way are reserved before they are spent, so the limit holds with
  many calls side by side (as far as a prompt's tokens can be estimated).

  Args:
    max_calls: in all; 0: any number.
    max_tokens: of prompts and completions, in all; 0: any number.
  """

  def __init__(self, max_calls: int = 0, max_tokens: int = 0):
    self._max_calls, self._max_tokens = max_calls, max_tokens
    self._price = Price()
    self._changed = threading.Condition()
    self._reserved = self._open = 0

  @property
  def price(self) -> Price:
    with self._changed:
      return self._price

  def known(self, count: int = 1) -> None:
    """Counts replies that cost nothing."""
    with self._changed:
      self._add(kept=count)

  def reserve(self, tokens: int, wait: bool = True) -> bool:
    """Begins a call of about that many tokens.

    Args:
      tokens: of the prompt and, at most, of the completion.
      wait: for calls under way, which may spend less than was reserved.

    Returns:
      False where it does not fit now, and `wait` is false.

    Raises:
      UserError: it does not fit, and nothing is under way.
    """
    with self._changed:
      while (limit := self._limit(tokens)) and self._open and wait:
        self._changed.wait()
      if limit and self._open:
        return False
      if limit:
        raise UserError(
          f'{limit} would be passed; so far {self._price}. What was answered '
          'is kept where a cache is given: raise the limit and run again'
        )
      self._open += 1
      self._reserved += tokens
      self._add(calls=1)
      return True

  def settle(self, reserved: int, prompt: int, completion: int) -> None:
    """Ends a call with the tokens that were counted."""
    with self._changed:
      self._end(reserved)
      self._add(prompt_tokens=prompt, completion_tokens=completion)

  def estimate(self, reserved: int, completion: int) -> None:
    """Ends a call that answered without saying what it took."""
    with self._changed:
      self._end(reserved)
      self._add(
        prompt_tokens=reserved - completion,
        completion_tokens=completion,
        unreported=1,
      )

  def fail(self, reserved: int, paid: bool) -> None:
    """Ends a call without a reply.

    Args:
      reserved: as it was begun.
      paid: it may have been answered for money, and counts in full.
    """
    with self._changed:
      self._end(reserved)
      self._add(failed=1)
      if paid:
        self._add(prompt_tokens=reserved, unreported=1)

  def _limit(self, tokens: int) -> str:
    """The limit that one more call would pass, or ''."""
    price = self._price
    if self._max_calls and price.calls >= self._max_calls:
      return f'max_calls={self._max_calls}'
    spent = price.prompt_tokens + price.completion_tokens + self._reserved
    if self._max_tokens and spent + tokens > self._max_tokens:
      return f'max_tokens={self._max_tokens}'
    return ''

  def _end(self, reserved: int) -> None:
    self._reserved -= reserved
    self._open -= 1
    self._changed.notify_all()

  def _add(self, **counts: int) -> None:
    added = {name: getattr(self._price, name) + n for name, n in counts.items()}
    self._price = self._price._replace(**added)
