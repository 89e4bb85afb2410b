"""How well a model answers questions about the generated world.

A base model has no form of answering, so its knowledge is measured by cloze:
it goes on from the answer's own sentence ('Olga lives in') greedily, and is
right if that sentence then names the answer and no other. An assistant is
asked the question, and answers greedily. Both are asked the same questions,
which are held out: no conversation asks them, but documents tell the facts.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tpu_lm.data import chat, world, world_tasks
from tpu_lm.data.world_tasks import Question
from tpu_lm.errors import UserError
from tpu_lm.generate import answers, engine
from tpu_lm.generate.sampler import Sampler
from tpu_lm.start import Loaded

_NEW = 32  # tokens: twice the longest answer


def questions(seed: int = 0) -> list[Question]:
  """Those whose sentence ends with the answer, so that a cloze can ask."""
  asked = world_tasks.questions(seed, 'heldout', (1,))
  return [q for q in asked if not q.sentence.startswith('{}')]


def _prompt(q: Question) -> list[dict[str, str]]:
  return [{'role': 'user', 'content': q.text}]


def _is_right(q: Question, text: str) -> bool:
  problem = {'prompt': _prompt(q), 'kind': q.kind, 'answer': q.answer}
  return world.check(problem, text)


def knowledge(loaded: Loaded) -> float:
  """The share of `questions` that a base model can complete rightly."""
  asked, tokens = questions(), loaded.tokenizer
  clozes = [q.sentence.split('{}')[0].rstrip() for q in asked]
  found = engine.generate(
    loaded.model,
    loaded.params,
    [[tokens.eot_id, *tokens.encode(cloze)] for cloze in clozes],
    _NEW,
    answers.GREEDY,
    (tokens.eot_id,),
  )
  texts = [
    cloze + tokens.decode(one.tokens)
    for cloze, one in zip(clozes, found, strict=True)
  ]
  sentences = [text.split('\n')[0].split('. ')[0] for text in texts]
  return float(np.mean(list(map(_is_right, asked, sentences))))


class Asked(NamedTuple):
  """What an assistant's answers to `questions` are worth."""

  texts: list[str]
  well_formed: float  # share that is one full sentence and stops by itself
  accuracy: float  # share that is right
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
    float(np.mean(list(map(_is_right, asked, texts)))),
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
    'accuracy': found.accuracy,
    'reward': float(found.rewards.mean()),
  }


def make(run: Any, rows: pathlib.Path) -> Callable[[Any], dict[str, float]]:
  """The evaluation that a run does: params -> figures of its answers."""
  return lambda params: _figures(
    Loaded(run.config, run.tokenizer, run.model, params, 0, run.mesh), rows
  )


def score(
  loaded: Loaded, workdir: pathlib.Path, source: str = ''
) -> dict[str, float]:
  """The figures of a working directory; the questions are always the same."""
  if source:
    raise UserError('--source: evals=world_answers asks its own questions')
  return _figures(loaded, pathlib.Path(workdir) / 'tokenizer')
