"""An endpoint that speaks the chat-completions JSON of OpenAI's API.

POST URL/chat/completions with {"model", "messages", "temperature",
"max_tokens", "seed"}; many servers speak it (vLLM, llama.cpp, Ollama, …). What
may pass (429, 5xx, a cut connection, no JSON, a time-out) is asked again after
a growing pause; the key goes to that address alone, redirects are refused.
"""

import concurrent.futures
import email.utils
import http.client
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from tpu_lm.errors import UserError
from tpu_lm.judging.asked import Request, Sampling
from tpu_lm.judging.cache import Reply, key
from tpu_lm.judging.spending import Ledger

_AGAIN = {408, 409, 425, 429}  # and 5xx
_OURS = {400, 413, 422}  # one request is wrong; the others may pass
_NO_COMPLETION = (ValueError, LookupError, TypeError, AttributeError,
                  RecursionError)  # fmt: skip
_MOST = 1 << 24  # bytes of a reply
_LONGEST = 60.0  # seconds of a pause


class _Pass(Exception):
  """What another try may mend; `paid` where it may have cost money."""

  def __init__(self, why: str, paid: bool, after: float = 0.0):
    super().__init__(why)
    self.paid, self.after = paid, after


class _Refused(Exception):
  """What no other try of the same request can mend."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
  def redirect_request(self, *args: Any) -> None:
    return None


class Endpoint:
  """Asks with several calls side by side.

  Args:
    url: up to and with /v1.
    model: its name there.
    key_env: the environment variable that holds the key; '': none is sent.
    options: more fields of the request; None takes one away.
    concurrency: calls side by side.
    attempts: of each request.
    timeout: seconds of a call.
    pause: seconds before the second attempt; doubled for each further one.

  Raises:
    UserError: one of these cannot be.
  """

  def __init__(
    self,
    url: str,
    model: str,
    key_env: str = '',
    options: dict[str, Any] | None = None,
    concurrency: int = 8,
    attempts: int = 5,
    timeout: float = 120.0,
    pause: float = 0.5,
  ):
    _check_url(url)
    if not model:
      raise UserError(f"backend={url}: needs the model's name there (model=…)")
    self.origin = url.rstrip('/')
    self._model, self._options = model, options or {}
    self._attempts, self._timeout, self._pause = attempts, timeout, pause
    self._key = _secret(key_env)
    self._opener = urllib.request.build_opener(_NoRedirects())
    self._threads = concurrent.futures.ThreadPoolExecutor(concurrency, 'judge')
    self._ended = threading.Event()
    self._lock = threading.Lock()
    self._failures = 0  # requests given up since the last reply
    self._most_failures = max(8, 2 * concurrency)
    self.name = ['endpoint', self.origin, model, self._options]

  def answer(
    self,
    requests: Sequence[Request],
    sampling: Sampling,
    ledger: Ledger,
    done: Callable[[int, Reply], None],
  ) -> None:
    """Calls `done(index, reply)` for each request, from several threads.

    Raises:
      UserError: a limit is reached, the endpoint refuses every call, or none
        of many was answered. What was under way is waited for.
    """
    stop = threading.Event()

    def one(index: int) -> None:
      if stop.is_set():
        return
      try:
        done(index, self._asked(requests[index], sampling, ledger, stop))
      except BaseException:
        stop.set()  # here: the next request begins at once
        raise

    running = [self._threads.submit(one, i) for i in range(len(requests))]
    try:
      for found in concurrent.futures.as_completed(running):
        found.result()
    except BaseException:
      stop.set()
      for found in running:
        found.cancel()
      concurrent.futures.wait(running)
      raise

  def close(self) -> None:
    """Ends the threads; pauses end at once."""
    self._ended.set()
    self._threads.shutdown(cancel_futures=True)

  def _asked(
    self,
    request: Request,
    sampling: Sampling,
    ledger: Ledger,
    stop: threading.Event,
  ) -> Reply:
    body = self._body(request, sampling)
    # No tokeniser is known here; few texts have more tokens than this.
    reserved = len(body) // 3 + sampling.max_new_tokens
    why = ''
    for attempt in range(self._attempts):
      if stop.is_set() or self._ended.is_set():
        return Reply('', error='ended before it was asked')
      ledger.reserve(reserved)
      try:
        reply = self._read(self._called(body))
      except _Pass as error:
        ledger.fail(reserved, error.paid)
        why, last = str(error), attempt + 1 == self._attempts
        pause = max(self._pause * 2**attempt, error.after)
        if not last:
          self._ended.wait(min(pause, _LONGEST))
      except _Refused as error:
        ledger.fail(reserved, False)
        return self._given_up(str(error))
      except BaseException:
        ledger.fail(reserved, False)
        raise
      else:
        self._settle(reply, reserved, sampling, ledger)
        with self._lock:
          self._failures = 0
        return reply
    return self._given_up(f'{why}, {self._attempts} times')

  def _given_up(self, why: str) -> Reply:
    why = self._safe(why)
    with self._lock:
      self._failures += 1
      if self._failures >= self._most_failures:
        raise UserError(
          f'backend={self.origin}: none of the last {self._failures} requests '
          f'was answered ({why}); see whether it runs, and run again'
        )
    return Reply('', error=why)

  def _settle(self, reply, reserved, sampling, ledger) -> None:
    if reply.prompt_tokens or reply.completion_tokens:
      ledger.settle(reserved, reply.prompt_tokens, reply.completion_tokens)
    else:
      ledger.estimate(reserved, sampling.max_new_tokens)

  def _body(self, request: Request, sampling: Sampling) -> bytes:
    fields = {
      'model': self._model,
      'messages': request.messages,
      'temperature': sampling.temperature,
      'max_tokens': sampling.max_new_tokens,
    }
    if sampling.temperature or request.number:
      # Not every server knows seeds; they are sent only where they matter.
      seed = key(sampling.seed, request.messages, request.number)[:7]
      fields['seed'] = int(seed, 16)
    fields |= self._options
    fields = {name: x for name, x in fields.items() if x is not None}
    return json.dumps(fields).encode()

  def _called(self, body: bytes) -> bytes:
    """What the server answers; one call."""
    headers = {'Content-Type': 'application/json', 'User-Agent': 'tpu_lm'}
    if self._key:
      headers['Authorization'] = f'Bearer {self._key}'
    call = urllib.request.Request(
      f'{self.origin}/chat/completions', body, headers, method='POST'
    )
    try:
      with self._opener.open(call, timeout=self._timeout) as response:
        return _whole(response, time.monotonic() + self._timeout)
    except urllib.error.HTTPError as error:
      with error:
        self._refuse(error)
    except urllib.error.URLError as error:
      # It was not reached, unless it took too long.
      late = isinstance(error.reason, TimeoutError | socket.timeout)
      raise _Pass(f'{error.reason}', late) from error
    except (OSError, http.client.HTTPException) as error:
      why = str(error) or type(error).__name__
      raise _Pass(' '.join(why.split()), True) from error

  def _refuse(self, error: urllib.error.HTTPError) -> None:
    said = _said(error)
    why = f'HTTP {error.code}{": " if said else ""}{said}'
    if error.code in _AGAIN or error.code >= 500:
      raise _Pass(why, False, _after(error.headers.get('Retry-After', '')))
    if error.code in _OURS:
      raise _Refused(why)
    mend = {
      401: 'set key_env to the variable that holds a valid key',
      403: 'the key may not use this model',
      404: 'see the address, which ends with /v1, and the name of the model',
    }.get(error.code, 'see the address')
    raise UserError(self._safe(f'backend={self.origin}: {why}; {mend}'))

  def _read(self, content: bytes) -> Reply:
    try:
      found = json.loads(content)
      choice = found['choices'][0]
      text = choice['message']['content']
      text = '' if text is None else text
      text = text.encode('utf-8', 'replace').decode()  # half of a pair
      usage = found.get('usage') or {}
      counts = [
        int(usage.get(name) or 0)
        for name in ('prompt_tokens', 'completion_tokens')
      ]
      if min(counts) < 0:
        raise ValueError
    except _NO_COMPLETION as e:
      start = content[:60].decode('utf-8', 'replace')
      raise _Pass(f'no chat completion but {start!r}', True) from e
    return Reply(text, choice.get('finish_reason') in (None, 'stop'), *counts)

  def _safe(self, text: str) -> str:
    """The text on one line, without the key, which servers may repeat."""
    text = ' '.join(text.split())
    if not self._key:
      return text
    return text.replace(self._key, '(the key)')


def _check_url(url: str) -> None:
  parts = urllib.parse.urlsplit(url)
  if parts.username or parts.password or parts.query:
    raise UserError(
      'backend: its address must hold no password and no key; put the key '
      'into an environment variable and name that: key_env=NAME'
    )
  if parts.scheme not in ('http', 'https') or not parts.hostname:
    raise UserError(
      f'backend={url}: no address of an endpoint; it looks like '
      'http://localhost:8000/v1'
    )


def _secret(key_env: str) -> str:
  """The key; no message holds what may be one."""
  if not key_env:
    return ''
  if not re.fullmatch(r'[A-Za-z_][A-Za-z0-9_]{0,63}', key_env):
    raise UserError(
      'key_env: is no name of an environment variable; never write the key '
      'itself there, but key_env=NAME after `export NAME=…`'
    )
  key = os.environ.get(key_env, '').strip()
  if not key:
    raise UserError(
      f'key_env={key_env}: the environment has no such variable; write '
      f'`export {key_env}=…`'
    )
  if not key.isascii() or not key.isprintable():
    raise UserError(f'key_env={key_env}: holds characters that no key has')
  return key


def _whole(response: http.client.HTTPResponse, end: float) -> bytes:
  """All of it before `end`, however slowly it drips."""
  content = b''
  while piece := response.read1(1 << 16):
    content += piece
    if time.monotonic() > end:
      raise TimeoutError('timed out')
    if len(content) > _MOST:
      raise OSError(f'a reply of more than {_MOST >> 20} MiB')
  return content


def _said(error: urllib.error.HTTPError) -> str:
  """What the server says is wrong, on one line."""
  try:
    content = error.read(4096)
  except (OSError, http.client.HTTPException):
    return ''
  try:
    found = json.loads(content)['error']
    found = found['message'] if isinstance(found, dict) else found
  except (ValueError, KeyError, TypeError):
    found = content.decode('utf-8', 'replace')
  return ' '.join(str(found).split())[:200]


def _after(said: str) -> float:
  """Seconds of a Retry-After, which may be a date."""
  try:
    return max(0.0, float(said))
  except ValueError:
    pass
  try:
    date = email.utils.parsedate_to_datetime(said)
    return max(0.0, date.timestamp() - time.time())
  except ValueError:
    return 0.0
