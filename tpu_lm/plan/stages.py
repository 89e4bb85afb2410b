"""The other programs of a stage: scoring, and for answers prefill and decode.

A stage that compares with a reference scores rows before the update; one that
learns from its own answers reads prompts and decodes besides. Weights lie as
for the update, so that decoding gathers them at each token where they are
shared out: that is what such a run does, and what its time shows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_lm import compiler, flops, rollouts, sharding, stage, target, weights
from tpu_lm.generate import engine
from tpu_lm.models import ring, transformer
from tpu_lm.plan import estimate, hlo, memory, programs
from tpu_lm.plan.chips import Topology

_SCORES = ('dpo', 'kto')  # rows that were prepared, by a reference


def others(config: Any, topology: Topology, devices: list[Any]) -> list[dict]:
  """Records of the programs that this stage runs beside its update."""
  how = rollouts.sampling_of(config)
  if how is None and config.stage_name not in _SCORES:
    return []
  parts = programs.assemble(config, devices)
  found = [_score(config, topology, parts)]
  if how is not None:
    length = config.data.length + how.max_new_tokens
    slots = min(how.slots, config.batch_size * how.group)
    found.append(_prefill(config, topology, parts))
    found.append(_decode(topology, parts, slots, length, config.compiler))
  return found


def _params(parts: programs.Parts) -> Any:
  return weights.combine(parts.state.params, parts.frozen)


def _score(config: Any, topology: Topology, parts: programs.Parts) -> dict:
  """Log-probabilities of the rows of an update."""
  prefix = 'chosen_' if config.stage_name == 'dpo' else ''
  names = ('tokens', 'loss_mask', 'segment_ids', 'positions')
  rows = {name: parts.batch[prefix + name] for name in names}

  def score(params, rows):
    return stage.token_logps(parts.model, params, rows)[0]

  count, width = rows['tokens'].shape
  a_token = flops.forward_per_token(parts.model.config, width - 1)
  compiled = _compiled(score, (_params(parts), rows), parts, config.compiler)
  return _record(
    'scoring', compiled, topology, parts, count * (width - 1), a_token
  )


def _prefill(config: Any, topology: Topology, parts: programs.Parts) -> dict:
  """Reads all prompts of a batch."""
  shape = config.batch_size, config.data.length
  tokens, lengths = _rows(parts.mesh, shape), _rows(parts.mesh, shape[:1])

  def prefill(params, tokens, lengths):
    hidden_PD, kept = engine.prefilled(parts.model, params, tokens, lengths)
    return transformer.logits(parts.model.config, params, hidden_PD), kept

  a_token = flops.forward_per_token(parts.model.config, shape[1])
  arguments = _params(parts), tokens, lengths
  compiled = _compiled(prefill, arguments, parts, config.compiler)
  count = shape[0] * shape[1]
  return _record('prefill', compiled, topology, parts, count, a_token)


def _decode(
  topology: Topology,
  parts: programs.Parts,
  slots: int,
  length: int,
  groups: str,
) -> dict:
  """One token of each of `slots` answers, behind `length` tokens."""
  config, mesh = parts.model.config, parts.mesh
  with target.planned(mesh.devices.flat[0]):
    cache = jax.eval_shape(lambda: ring.init_cache(config, slots, length))
  rows, tensor = sharding.rows_over(mesh), mesh.shape['tensor']

  def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    over = rows if x.shape[0] % sharding.num_batch_shards(mesh) == 0 else None
    heads = 'tensor' if x.ndim > 1 and x.shape[1] % tensor == 0 else None
    place = NamedSharding(mesh, P(over, *[heads][: x.ndim - 1]))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  cache = jax.tree.map(placed, cache)
  tokens = placed(jax.ShapeDtypeStruct((slots,), jnp.int32))

  def decode(params, cache, token_B, position_B):
    hidden_B1D, cache = parts.model.apply(
      {'params': params}, token_B[:, None], position_B[:, None], cache=cache
    )
    return cache, transformer.logits(config, params, hidden_B1D[:, 0])

  arguments = _params(parts), cache, tokens, tokens
  compiled = _compiled(decode, arguments, parts, groups, donate=1)
  a_token = 2 * flops.matmul_parameters(config)
  made = _record('decode', compiled, topology, parts, slots, a_token)
  return made | {'cache': memory.num_bytes(cache)}


def _rows(mesh: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  place = NamedSharding(mesh, P(sharding.rows_over(mesh)))
  return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)


def _compiled(function, arguments, parts, groups: str, donate: int = -1):
  donated = {'donate_argnums': donate} if donate >= 0 else {}
  options = compiler.options(groups, parts.mesh)
  return programs.compiled(
    jax.jit(function, **donated), arguments, parts.mesh, options
  )


def _record(
  name: str,
  made: programs.Compiled,
  topology: Topology,
  parts: programs.Parts,
  tokens: int,
  a_token: float,
) -> dict:
  record = {'program': name, 'fits': not made.refusal, 'refusal': made.refusal}
  record['compile_s'] = made.seconds
  if made.refusal:
    return record
  record['compiled'] = made.num_bytes
  record['parameters'] = memory.num_bytes(_params(parts))
  held = 1 / parts.mesh.shape['expert']
  return record | estimate.time_of(
    hlo.parse(made.text), topology, tokens, a_token, held
  )
