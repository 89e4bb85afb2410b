"""How far a long piece of work is: one line on a terminal, plain lines piped.

On a terminal the line is rewritten in place and coloured (not when NO_COLOR is
set, see no-color.org); elsewhere every update is a line of its own.
"""

import os
import shutil
from typing import TextIO

_BAR = 12
_DIM, _BOLD, _PLAIN = '\x1b[2m', '\x1b[1m', '\x1b[0m'


def duration(seconds: float) -> str:
  """Returns e.g. '7 s', '3:05', '2:03:05', '4 d 02 h'."""
  seconds = max(0, round(seconds))
  if seconds < 60:
    return f'{seconds} s'
  if seconds < 3600:
    return f'{seconds // 60}:{seconds % 60:02d}'
  if seconds < 86400:
    return f'{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}'
  return f'{seconds // 86400} d {seconds // 3600 % 24:02d} h'


class Progress:
  """A line of progress, rewritten in place where `out` is a terminal."""

  def __init__(self, out: TextIO):
    self._out = out
    self._is_terminal = out.isatty()
    self._colours = self._is_terminal and 'NO_COLOR' not in os.environ
    self._shown = ''

  def update(self, text: str, share: float | None = None) -> None:
    """Shows `text`; `share` in 0..1 draws a bar on a terminal."""
    if not self._is_terminal:
      self._write(text + '\n')
      return
    # One column short: a full last column makes some terminals wrap.
    width = shutil.get_terminal_size().columns - 1
    bar = ''
    if share is not None and width >= _BAR + 20:
      done = round(_BAR * min(max(share, 0), 1))
      bar = '━' * done
      rest = '─' * (_BAR - done)
      width -= _BAR + 1
      if self._colours:
        bar = f'{_BOLD}{bar}{_PLAIN}{_DIM}{rest}{_PLAIN} '
      else:
        bar = f'{bar}{rest} '
    self._shown = bar + text[:width]
    self._write(f'\r{self._shown}\x1b[K')

  def line(self, text: str) -> None:
    """Prints a line that stays; the progress goes on below it."""
    if self._shown:
      self._write(f'\r\x1b[K{text}\n{self._shown}')
    else:
      self._write(text + '\n')

  def close(self) -> None:
    """Leaves the last line of progress standing."""
    if self._shown:
      self._write('\n')
      self._shown = ''

  def _write(self, text: str) -> None:
    self._out.write(text)
    self._out.flush()
