"""Answers of a model to conversations, through its chat template.

An answer depends on its own prompt, the seed and its number alone.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tpu_lm import stage
from tpu_lm.data import answer_rows
from tpu_lm.data.chat import Template
from tpu_lm.generate import batching
from tpu_lm.generate.sampler import Sampler
from tpu_lm.start import Loaded

Messages = list[dict[str, Any]]
GREEDY = Sampler(temperature=0.0)


class Answer(NamedTuple):
  """What a model said."""

  text: str
  finished: bool  # it stopped by itself; else it was cut off
  tokens: list[int]  # its stop token, if there is one, included
  logps: list[float]  # of the tokens under the model, in nats


def answers(
  loaded: Loaded,
  template: Template,
  conversations: Sequence[Messages],
  *,
  tools: Sequence[Any] | None = None,
  max_new_tokens: int = 64,
  sampler: Sampler = GREEDY,
  seed: int = 0,
  copies: int = 1,
  slots: int = 64,
) -> list[Answer]:
  """The assistant's next message in each conversation, in their order.

  Args:
    loaded: the model, its parameters and tokenizer.
    template: of the model.
    conversations: messages, a user's or a tool's last.
    tools: that each may call; None: none.
    max_new_tokens: of an answer, its stop token included.
    sampler: how tokens are drawn; the likeliest by default.
    seed: of the drawing.
    copies: answers to each conversation, side by side.
    slots: answers at a time.
  """
  stop_ids = (template.stop_id, loaded.tokenizer.eot_id)
  tools = tools or [None] * len(conversations)
  prompts = list(map(template.prompt, conversations, tools))
  found: list[Answer | None] = [None] * (len(prompts) * copies)
  completions = batching.completed(
    loaded.model,
    loaded.params,
    prompts,
    max_new_tokens,
    sampler,
    stop_ids,
    seed,
    copies=copies,
    slots=slots,
  )
  for i, one in completions:
    text = loaded.tokenizer.decode(one.tokens)
    found[i] = Answer(text, one.finished, one.tokens, one.logps)
  return found


def logps(
  loaded: Loaded,
  template: Template,
  conversations: Sequence[Messages],
  tokens: Sequence[Sequence[int]],
) -> np.ndarray:
  """Log-probabilities of given answers, in nats, summed over their tokens.

  Args:
    loaded: the model that judges.
    template: of the model.
    conversations: what is answered.
    tokens: of each answer, its stop token included.

  Returns:
    float32 [answers].
  """
  prompts = [template.prompt(messages) for messages in conversations]
  batch = answer_rows.rows(prompts, tokens)
  return np.asarray(_summed(loaded.params, batch, model=loaded.model))


@functools.partial(jax.jit, static_argnames='model')
def _summed(params, batch, *, model):
  return stage.token_logps(model, params, batch)[0].sum(axis=1)
