"""How well a model answers questions about the generated world.

All level-1 questions that are held out are asked once, greedily: look-ups
(who lives where, owns what, …) and sums. No conversation and no document asks
them; documents tell the facts. A base model has no form of answering: it is
given the bare question, as its documents ask others, and is right if the
sentence that it goes on with names the answer and no other. An assistant is
asked through its chat template.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tpu_lm import processes
from tpu_lm.data import chat, world, world_sums, world_tasks
from tpu_lm.data.world_tasks import Question
from tpu_lm.generate import answers, engine
from tpu_lm.generate.sampler import Sampler
from tpu_lm.start import Loaded

READS_ROWS = False  # it asks its own questions
_NEW = 32  # tokens: twice the longest answer


def questions(seed: int = 0) -> tuple[Question, ...]:
  """What is asked: look-ups about people and towns, then sums."""
  return world_tasks.questions(seed, 'heldout', (1,))


def _prompt(q: Question) -> list[dict[str, str]]:
  return [{'role': 'user', 'content': q.text}]


class Right(NamedTuple):
  """Shares of right answers, in [0, 1]."""

  every: float  # of all questions
  facts: float  # of look-ups
  sums: float

  def figures(self) -> dict[str, float]:
    """As summaries name them."""
    names = 'accuracy', 'facts_accuracy', 'sums_accuracy'
    return dict(zip(names, self, strict=True))


def _right(texts: Sequence[str]) -> Right:
  found: dict[bool, list[bool]] = {True: [], False: []}
  for q, text in zip(questions(), texts, strict=True):
    problem = {'prompt': _prompt(q), 'kind': q.kind, 'answer': q.answer}
    is_sum = q.kind in world_sums.SIGNS
    found[is_sum].append(world.check(problem, text))
  shares = map(np.mean, (found[False] + found[True], found[False], found[True]))
  return Right(*map(float, shares))


def knowledge(loaded: Loaded) -> Right:
  """What a base model answers to the bare questions."""
  tokens = loaded.tokenizer
  found = engine.generate(
    loaded.model,
    loaded.params,
    [[tokens.eot_id, *tokens.encode(q.text)] for q in questions()],
    _NEW,
    answers.GREEDY,
    (tokens.eot_id,),
  )
  texts = [tokens.decode(one.tokens) for one in found]
  return _right([text.split('\n')[0].split('. ')[0] for text in texts])


class Asked(NamedTuple):
  """What an assistant's answers to `questions` are worth."""

  texts: list[str]
  well_formed: float  # share that is one full sentence and stops by itself
  right: Right
  rewards: np.ndarray  # float64 [questions], `world.true_reward`


def ask(loaded: Loaded, template: chat.Template) -> Asked:
  """Asks every question once, greedily."""
  asked = questions()
  found = answers.answers(
    loaded, template, [_prompt(q) for q in asked], max_new_tokens=_NEW
  )
  texts = [one.text for one in found]
  formed = [one.finished and world.well_formed(one.text) for one in found]
  rewards = [
    world.true_reward(_prompt(q), text)
    for q, text in zip(asked, texts, strict=True)
  ]
  return Asked(
    texts,
    float(np.mean(formed)),
    _right(texts),
    np.array(rewards),
  )


def divergence(
  loaded: Loaded, reference: Loaded, template: chat.Template
) -> float:
  """KL(model || reference) in nats an answer, on answers that it samples."""
  prompts = [_prompt(q) for q in questions()]
  found = answers.answers(
    loaded,
    template,
    prompts,
    max_new_tokens=_NEW,
    sampler=Sampler(temperature=1.0),
  )
  theirs = answers.logps(
    reference, template, prompts, [one.tokens for one in found]
  )
  return float(np.mean([sum(a.logps) for a in found]) - np.mean(theirs))


def _figures(loaded: Loaded, folder: pathlib.Path) -> dict[str, float]:
  found = ask(loaded, chat.load('', loaded.tokenizer, folder))
  return {
    'well_formed': found.well_formed,
    **found.right.figures(),
    'reward': float(found.rewards.mean()),
  }


def make(run: Any, rows: pathlib.Path) -> Callable[[Any], dict[str, float]]:
  """The evaluation that a run does: params -> figures of its answers.

  Of several processes each asks all questions, on its own devices.
  """

  def evaluate(params: Any) -> dict[str, float]:
    params, mesh = processes.local(params, run.mesh)
    with jax.set_mesh(mesh):
      loaded = Loaded(run.config, run.tokenizer, run.model, params, 0, mesh)
      return _figures(loaded, rows)

  return evaluate
