"""What a user is told when something of theirs is wrong."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """A mistake that the user can mend.

  The message is one line: where it is (file and line, or configuration key),
  what is wrong, and how to mend it. The command line prints it after
  `error: ` and exits with status 2, without a traceback.
  """


def nearest(word: str, known: Iterable[str]) -> str:
  """Returns " (did you mean 'x'?)" for the known word nearest to `word`."""
  found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  return f" (did you mean '{found[0]}'?)" if found else ''
