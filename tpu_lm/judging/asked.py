"""What is asked of a model, and how it shall answer."""

from typing import Any, NamedTuple

Messages = list[dict[str, Any]]


class Request(NamedTuple):
  """A conversation that waits for the assistant."""

  messages: Messages
  number: int = 0  # tells several replies to the same messages apart


class Sampling(NamedTuple):
  """How a reply is drawn."""

  temperature: float = 0.0  # 0: the likeliest
  max_new_tokens: int = 512  # of a reply
  seed: int = 0
