"""Lengths are rounded up, so that few shapes are compiled."""

_SMALLEST = 16  # tokens; shorter ones are not worth a program


def bucket(count: int, smallest: int = 1) -> int:
  """Returns the next power of two, at least `smallest`."""
  return max(smallest, 1 << max(count - 1, 0).bit_length())


def room_for(count: int, smallest: int = _SMALLEST) -> int:
  """Returns a length of a row: four of them to a doubling."""
  step = max(bucket(count) // 8, smallest)
  return -(-count // step) * step
