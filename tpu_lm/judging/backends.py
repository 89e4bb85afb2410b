"""A model to ask, with its cache, its limits and its price.

`backend` is a working directory of ours or the address of an endpoint that
speaks the chat-completions JSON; the rest of the package does not know which.
"""

import json
import pathlib
import threading
from collections.abc import Sequence

from tpu_lm.errors import UserError
from tpu_lm.judging import cache as caches
from tpu_lm.judging.asked import Request, Sampling
from tpu_lm.judging.cache import Reply
from tpu_lm.judging.endpoint import Endpoint
from tpu_lm.judging.spending import Ledger, Price

GREEDY = Sampling()


class Backend:
  """Asks a model what it has not been asked before.

  Use `make`. Several threads may ask.
  """

  def __init__(self, model, cache: caches.Cache, ledger: Ledger):
    self._model, self._cache, self.ledger = model, cache, ledger
    self._lock = threading.Lock()

  @property
  def origin(self) -> str:
    """The directory or the address, for messages."""
    return self._model.origin

  @property
  def price(self) -> Price:
    """Of all that was asked so far."""
    return self.ledger.price

  def ask(
    self, requests: Sequence[Request], sampling: Sampling = GREEDY
  ) -> list[Reply]:
    """The reply to each request; `error` says why there is none.

    Equal requests are asked once; see Request.number.

    Raises:
      UserError: a limit is reached, or the endpoint cannot be used.
    """
    keys = [self._key(request, sampling) for request in requests]
    found: dict[str, Reply] = {}
    missing: dict[str, Request] = {}
    for key, request in zip(keys, requests, strict=True):
      known = self._cache.get(key)
      if known is not None:
        found[key] = known
      else:
        missing.setdefault(key, request)
    self.ledger.known(sum(key in found for key in keys))
    wanted = list(missing)

    def done(index: int, reply: Reply) -> None:
      if not reply.error:
        self._cache.put(wanted[index], reply)
      with self._lock:
        found[wanted[index]] = reply

    if wanted:
      asked = list(missing.values())
      self._model.answer(asked, sampling, self.ledger, done)
    return [found[key] for key in keys]

  def close(self) -> None:
    """Ends threads and the writing of the cache."""
    self._model.close()
    self._cache.close()

  def __enter__(self) -> 'Backend':
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def _key(self, request: Request, sampling: Sampling) -> str:
    return caches.key(self._model.name, *request, *sampling)


def make(
  backend: str,
  model: str = '',
  key_env: str = '',
  *,
  cache: str = '',
  max_calls: int = 0,
  max_tokens: int = 0,
  concurrency: int = 8,
  attempts: int = 5,
  timeout: float = 120.0,
  pause: float = 0.5,
  options: str = '',
  ledger: Ledger | None = None,
) -> Backend:
  """Opens what is asked.

  Args:
    backend: a working directory, or http://HOST:PORT/v1.
    model: its name at the endpoint.
    key_env: the environment variable that holds the endpoint's key; '': none.
    cache: a file of replies, written as they come; '': they are forgotten.
    max_calls: in all; 0: any number.
    max_tokens: of prompts and completions, in all; 0: any number.
    concurrency: calls side by side, or of a directory sequences a batch.
    attempts: of a call to the endpoint.
    timeout: seconds of a call.
    pause: seconds before the second attempt; doubled for each further one.
    options: a JSON object of more fields for the endpoint; null takes one
      away, as in '{"seed": null, "max_completion_tokens": 512}'.
    ledger: of another backend, which shares its limits; None: an own one.

  Raises:
    UserError: it cannot be opened.
  """
  if not backend:
    raise UserError(
      "backend: is empty; give a working directory, or an endpoint's address "
      'such as http://localhost:8000/v1 with model=NAME'
    )
  for name, value, least in (
    ('max_calls', max_calls, 0),
    ('max_tokens', max_tokens, 0),
    ('concurrency', concurrency, 1),
    ('attempts', attempts, 1),
    ('timeout', timeout, 0.01),
  ):
    if not value >= least:
      raise UserError(f'{name}={value!r}: must be at least {least}')
  ledger = ledger or Ledger(max_calls, max_tokens)
  if '://' in backend:
    fields = _options(options)
    found = Endpoint(
      backend, model, key_env, fields, concurrency, attempts, timeout, pause
    )
  else:
    if model or key_env or options:
      raise UserError(
        f'backend={backend}: a directory needs no model, key_env or options; '
        'the address of an endpoint begins with http:// or https://'
      )
    if not pathlib.Path(backend).expanduser().is_dir():
      raise UserError(
        f'backend={backend}: there is no such directory; the address of an '
        'endpoint begins with http:// or https://'
      )
    # Imports JAX, which an endpoint needs not.
    from tpu_lm.judging.local import Local

    found = Local(str(pathlib.Path(backend).expanduser()), concurrency)
  return Backend(found, caches.Cache(cache), ledger)


def _options(text: str) -> dict:
  if not text:
    return {}
  try:
    found = json.loads(text)
    if not isinstance(found, dict):
      raise ValueError('no object')
  except ValueError as error:
    raise UserError(
      f'options={text!r:.60}: is no JSON object ({error}); write it like '
      '\'{"seed": null}\''
    ) from error
  return found
