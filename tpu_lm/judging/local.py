"""A model of ours that is asked, by its working directory."""

import itertools
import pathlib
import threading
from collections.abc import Callable, Sequence

from tpu_lm import start
from tpu_lm.data import chat
from tpu_lm.errors import UserError
from tpu_lm.generate import engine
from tpu_lm.generate.sampler import Sampler
from tpu_lm.judging.asked import Messages, Request, Sampling
from tpu_lm.judging.cache import Reply, key
from tpu_lm.judging.spending import Ledger


class Local:
  """Answers in batches; a reply depends on its own request alone.

  Attributes:
    name: tells its replies from those of other weights or templates; the
      directory may move.

  Raises:
    UserError: nothing was trained there.
  """

  def __init__(self, workdir: str, batch_size: int = 32):
    self._loaded = start.load(pathlib.Path(workdir).expanduser())
    tokens = self._loaded.tokenizer
    folder = pathlib.Path(workdir, 'tokenizer').expanduser()
    self._template = chat.load('', tokens, folder)
    self._batch_size = batch_size
    self._lock = threading.Lock()  # one batch at a time
    self.origin = workdir
    self.name = [
      'local',
      start.fingerprint(workdir, self._loaded.step),
      self._template.digest,
    ]

  def answer(
    self,
    requests: Sequence[Request],
    sampling: Sampling,
    ledger: Ledger,
    done: Callable[[int, Reply], None],
  ) -> None:
    """Calls `done(index, reply)` for each request."""
    prompts = [self._prompt(request.messages) for request in requests]
    # Prompts of like length side by side.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with self._lock:
      while order:
        costs = [len(prompts[i]) + sampling.max_new_tokens for i in order]
        fits = itertools.takewhile(
          lambda cost: ledger.reserve(cost, wait=False),
          costs[: self._batch_size],
        )
        batch = order[: len(list(fits))]
        order = order[len(batch) :]
        self._batch(batch, prompts, requests, sampling, ledger, done)

  def close(self) -> None:
    """Nothing is held but memory."""

  def _batch(self, batch, prompts, requests, sampling, ledger, done) -> None:
    tokens = self._loaded.tokenizer
    stop_ids = (self._template.stop_id, tokens.eot_id)
    # Always as many rows: one program a length.
    missing = self._batch_size - len(batch)
    rows = batch + batch[:1] * missing
    found = engine.generate(
      self._loaded.model,
      self._loaded.params,
      [prompts[i] for i in rows],
      [sampling.max_new_tokens] * len(batch) + [1] * missing,
      Sampler(temperature=sampling.temperature),
      stop_ids,
      sampling.seed,
      sequence_ids=[_number(requests[i]) for i in rows],
    )
    for i, one in zip(batch, found, strict=False):
      prompt, completion = len(prompts[i]), len(one.tokens)
      ledger.settle(prompt + sampling.max_new_tokens, prompt, completion)
      text = tokens.decode(one.tokens)
      done(i, Reply(text, one.finished, prompt, completion))

  def _prompt(self, messages: Messages) -> list[int]:
    try:
      return self._template.prompt(messages)
    except ValueError as error:
      if messages[0]['role'] != 'system':
        raise UserError(f'{self.origin}: {error}') from error
    # Some templates know no system turn.
    system, first, *others = messages
    content = f'{system["content"]}\n\n{first["content"]}'
    return self._prompt([first | {'content': content}, *others])


def _number(request: Request) -> int:
  """Tells its random numbers from those of the others, whatever the batch."""
  return int(key(request.messages, request.number)[:7], 16)
