"""How weights are held: what a leaf of the parameter tree may be.

Models never multiply by a weight themselves: they call `einsum`, which knows
what kind of leaf it was given. Stages and models therefore do not know
whether a weight is plain, quantised (quantize.py), adapted or frozen. The
configuration's `transforms` says what is done to a plain tree, in order.

LoRA (Hu et al., arXiv 2106.09685, equation 3): y = x W + s (x A) B with W
frozen, A normal with variance 1 / (number of inputs), B zero, so that training
starts from W; s = alpha / rank (section 4.1), or alpha / sqrt(rank) as in
rsLoRA (Kalajdzievski, arXiv 2312.03732). The sum W + s A B is never made.

DoRA (Liu et al., arXiv 2402.09353, equation 5): W' = m V / |V|, V = W + s A B,
with a trained magnitude m, at first |W|, and one norm for each output, as the
authors' code has it. The norm counts as a constant in the gradient (section
4.3), and is made without V: |V|^2 = |W|^2 + 2 s <A^T W, B> + s^2 <A^T A B, B>.
"""

import ast
import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tpu_lm import low_precision, per_device, quantize, sharding, stage
from tpu_lm.errors import UserError, nearest
from tpu_lm.quantize import QUANTISED, Int8, Nf4
from tpu_lm.sharding import path_name

Params = Any


@quantize.leaf('scale')
class Lora:
  """The weight is base + scale * a b, or of this direction and length m."""

  base: Any  # [in…, out…], plain or quantised
  a: jax.Array  # [in…, R]
  b: jax.Array  # [R, out…]
  m: jax.Array | None  # [out…]; None: no DoRA
  scale: float


HELD = Lora | QUANTISED  # leaves that are more than one array
_FACTORS = re.compile(r'layers/.*/(a|b|m)$')
ADDED = re.compile(r'(^|/)scalar_head$')  # by a stage: always trained
_QUANTISED_PART = re.compile(r'/(values|scales|codes|peaks|steps|mean)$')
_TABLES = re.compile(r'(^|/)(embedding|head)$')


# Products.


def einsum(
  spec: str, x: jax.Array, weight: Any, dtype: jnp.dtype, matmul: str = ''
) -> jax.Array:
  """`jnp.einsum(spec, x, weight)` in `dtype`; `weight` is a tree's leaf.

  Args:
    spec: 'BL…,…->BL…': rows and positions come first on both sides, and the
      inputs of the weight before its outputs.
    x: [B, L, …].
    weight: a leaf of the parameter tree, of one layer.
    dtype: of the product's operands and result.
    matmul: what plain weights are rounded to for it (low_precision.py).
  """
  x = x.astype(dtype)
  if sharding.splits_sequence():
    return _product(spec, x, weight, matmul)
  # One axis of tokens: XLA's gradient of a weight is 1.5 times slower on CPUs
  # where tokens have two. (Two sharded axes could not be merged.)
  lead = x.shape[:2]
  spec = spec.replace('BL', 'T')
  y = _product(spec, x.reshape(-1, *x.shape[2:]), weight, matmul)
  return y.reshape(*lead, *y.shape[1:])


def _product(spec: str, x: jax.Array, weight: Any, matmul: str) -> jax.Array:
  if isinstance(weight, QUANTISED):
    return quantize.product(spec, x, weight)
  if not isinstance(weight, Lora):
    if matmul:
      return low_precision.einsum(spec, x, weight, matmul)
    return jnp.einsum(spec, x, weight.astype(x.dtype))
  letters, weight_letters, output = quantize.letters_of(spec)
  inputs = ''.join(k for k in weight_letters if k not in output)
  outputs = ''.join(k for k in weight_letters if k in output)
  lead = ''.join(k for k in letters if k not in inputs)
  y = _product(spec, x, weight.base, matmul)
  low = f'{lead}R'
  x_low = jnp.einsum(f'{letters},{inputs}R->{low}', x, weight.a.astype(x.dtype))
  added = jnp.einsum(
    f'{low},R{outputs}->{output}', x_low, weight.b.astype(x.dtype)
  )
  y = y + weight.scale * added
  if weight.m is None:
    return y
  return y * (weight.m / _norms(weight)).astype(y.dtype)


def _norms(leaf: Lora) -> jax.Array:
  """Float32 [out…]: of the adapted weight's outputs, m apart; no gradient."""
  base, a, b = jax.lax.stop_gradient((leaf.base, leaf.a, leaf.b))
  weight = dense(base)
  outputs = weight.shape[a.ndim - 1 :]
  weight_IO = weight.reshape(-1, math.prod(outputs))
  a_IR, b_RO = a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)
  with jax.default_matmul_precision('highest'):
    cross_RO = 2 * a_IR.T @ weight_IO + leaf.scale * (a_IR.T @ a_IR) @ b_RO
  square_O = jnp.square(weight_IO).sum(0)
  square_O += leaf.scale * (cross_RO * b_RO).sum(0)
  # A weight of zeros has no direction: it stays what it is.
  return jnp.sqrt(jnp.maximum(square_O, 1e-24)).reshape(outputs)


def dense(leaf: Any) -> jax.Array:
  """The whole weight as one array; adapters are added to it.

  Args:
    leaf: of one layer, or a table; plain and `Int8` also a stack of layers.
  """
  if isinstance(leaf, QUANTISED):
    return quantize.dense(leaf)
  if not isinstance(leaf, Lora):
    return leaf
  added = jnp.tensordot(leaf.a, leaf.b, 1, precision='highest')
  weight = dense(leaf.base) + leaf.scale * added
  return weight if leaf.m is None else weight * (leaf.m / _norms(leaf))


def rows(name: str, table: Any, ids: jax.Array, dtype: Any) -> jax.Array:
  """table[ids] in `dtype`: what the table `name` [V, D] holds for ids."""
  if not isinstance(table, Int8):
    return per_device.looked_up(name, table.astype(dtype), ids)
  values = per_device.looked_up(f'{name}/values', table.values, ids)
  scales = per_device.looked_up(f'{name}/scales', table.scales, ids)
  return (values.astype(jnp.float32) * scales).astype(dtype)


# What a tree is made of.


def _map(f: Callable[[str, Any], Any], params: Params) -> Params:
  """Maps (path, leaf), where a held weight is one leaf."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: f(path_name(path), leaf), params, is_leaf=_is_held
  )


def _is_held(leaf: Any) -> bool:
  return isinstance(leaf, HELD)


def _has(params: Params, kind: Any) -> bool:
  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, kind))
  return any(isinstance(leaf, kind) for leaf in leaves)


def is_adapted(params: Params) -> bool:
  """Whether some weight has LoRA factors."""
  return _has(params, Lora)


def is_held(params: Params) -> bool:
  """Whether some weight is more than a plain array."""
  return _has(params, HELD)


def count(params: Params) -> int:
  """The number of parameters; a quantised weight counts as what it holds."""

  def number(leaf: Any) -> int:
    if isinstance(leaf, QUANTISED):
      return quantize.count(leaf) if jax.tree.leaves(leaf) else 0
    return math.prod(leaf.shape)

  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QUANTISED))
  return sum(map(number, leaves))


def num_bytes(params: Params) -> int:
  """What all arrays of a tree take, over all devices, replicas not counted."""
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(params)
  )


def merge(params: Params) -> Params:
  """The same network in plain arrays: dequantised, with adapters added."""

  def plain(name: str, leaf: Any) -> jax.Array:
    del name
    # Whatever is not a table is a stack of layers.
    return (
      jax.vmap(dense)(leaf) if isinstance(leaf, Lora | Nf4) else dense(leaf)
    )

  return _map(plain, params)


def unadapt(params: Params) -> Params:
  """The network without its adapters; shares all arrays with `params`."""
  return _map(
    lambda _, leaf: leaf.base if isinstance(leaf, Lora) else leaf, params
  )


def reference(start: Callable[[], Params]) -> Callable[[], Params]:
  """What a stage began with, without adapters; fetched when first asked for."""
  return functools.cache(lambda: unadapt(start()))


# What is trained.


def partition(params: Params, trainable: str) -> tuple[Params, Params]:
  """Splits `params` into what is trained and what is not.

  Args:
    params: arrays, or their shapes.
    trainable: '': all floating arrays, or, where there are adapters, only
      their factors (and what a stage has added); 'top:N': of these, what the
      last N layers hold; else a regular expression over paths. Quantised
      weights are never trained.

  Returns:
    (trainable, frozen): two trees of the same structure; where one has a
    leaf the other has None, which JAX takes for an empty subtree. Of a stack
    that is trained in part both have their layers.

  Raises:
    ValueError: nothing would be trained, or a quantised weight.
  """
  shares = _shares(params, trainable)

  def cut(trains: bool, path: Any, leaf: Any) -> Any:
    share = shares.get(path_name(path), 0)
    if share <= 0 or share == leaf.shape[0]:
      return leaf if bool(share) == trains else None
    split = leaf.shape[0] - share
    return _layers(leaf, split, None) if trains else _layers(leaf, 0, split)

  if not shares:
    raise ValueError(f'no parameter path matches {trainable!r}')
  return tuple(
    jax.tree_util.tree_map_with_path(functools.partial(cut, trains), params)
    for trains in (True, False)
  )


def _shares(params: Params, trainable: str) -> dict[str, int]:
  """{path: how many of the last layers of it are trained, or -1: all of it}."""
  arrays = {
    path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  top, adapted = 0, is_adapted(params)
  if trainable.startswith('top:'):
    top = _num_top(trainable, arrays)
    arrays = {k: x for k, x in arrays.items() if k.startswith('layers/')}
  if trainable and not top:
    chosen = [name for name in arrays if re.search(trainable, name)]
  elif adapted:
    chosen = [k for k in arrays if _FACTORS.search(k) or ADDED.search(k)]
  else:
    chosen = list(arrays)
  fixed = [name for name in chosen if _QUANTISED_PART.search(name)]
  if fixed and trainable:
    raise ValueError(
      f'{trainable!r} would train {fixed[0]}, which is quantised; with lora '
      "in transforms trainable='' trains the adapters, else name other paths"
    )
  return dict.fromkeys([k for k in chosen if k not in fixed], top or -1)


def _num_top(trainable: str, arrays: dict[str, Any]) -> int:
  """The N of 'top:N'."""
  stacks = [x.shape[0] for k, x in arrays.items() if k.startswith('layers/')]
  number = trainable.removeprefix('top:')
  if not number.isdecimal() or not 1 <= int(number) <= min(stacks, default=0):
    raise ValueError(
      f'{trainable!r}: write top:N with N from 1 to the number of layers, '
      f'{min(stacks, default=0)}'
    )
  return int(number)


def _layers(stack: Any, start: int, stop: int | None) -> Any:
  """Some layers of a stack, which may be but a shape."""
  if not isinstance(stack, jax.ShapeDtypeStruct):
    return stack[start:stop]
  count = len(range(stack.shape[0])[start:stop])
  return stack.update(shape=(count, *stack.shape[1:]))


def combine(trainable: Params, frozen: Params) -> Params:
  """Undoes `partition`; a stack that was cut is copied."""

  def joined(above: Any, below: Any) -> Any:
    if above is None or below is None:
      return below if above is None else above
    if isinstance(above, jax.ShapeDtypeStruct):
      count = below.shape[0] + above.shape[0]
      return above.update(shape=(count, *above.shape[1:]))
    return jnp.concatenate([below, above])

  return jax.tree.map(
    joined, trainable, frozen, is_leaf=lambda leaf: leaf is None
  )


# What `transforms` may say.


def transform(params: Params, spec: str, key: jax.Array) -> Params:
  """Holds weights as `spec` says, say 'nf4, lora(rank=8, alpha=16)'.

  `int8`, `nf4`: matrices of the layers, frozen, in 8 or 4 bits; embedding and
  head in 8 bits by either. `lora(rank=8, alpha=16.0, targets='attention|mlp',
  rslora=False, dora=False)`: factors for the matrices of the layers whose path
  the regular expression `targets` is found in.

  Args:
    params: of one whole network; traceable.
    spec: calls in their order, '' for none.
    key: of the factors; each is drawn by the name of its matrix.

  Raises:
    UserError: unknown names or values, or an order that cannot be.
  """
  try:
    for name, options in _calls(spec):
      params = _TRANSFORMS[name](params, key, **options)
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f'transforms={spec!r}: {error}') from error
  return params


def _calls(spec: str) -> list[tuple[str, dict[str, Any]]]:
  """[('nf4', {}), ('lora', {'rank': 8})] for 'nf4, lora(rank=8)'."""
  found = []
  try:
    for node in ast.parse(f'[{spec}]', mode='eval').body.elts:
      call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
      if call.args:
        raise ValueError('an argument without its name')
      options = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
      found.append((call.func.id, options))
  except (SyntaxError, AttributeError, ValueError) as error:
    raise ValueError(
      'cannot be read; write it like nf4, lora(rank=8, alpha=16)'
    ) from error
  for name, options in found:
    if name not in _TRANSFORMS:
      raise ValueError(
        f'{name} is unknown{nearest(name, _TRANSFORMS)}; there are '
        f'{", ".join(_TRANSFORMS)}'
      )
    stage.check_hparams(_TRANSFORMS[name], options, f'transforms: {name}')
  return found


def _quantised(params: Params, matrix: Callable[[Any, int], Any]) -> Params:
  """Quantises matrices by `matrix(stack, num_inputs)` and tables by row."""
  if is_adapted(params):
    raise ValueError(
      'quantise before lora, whose factors are made for what it adapts: '
      'nf4, lora(…)'
    )
  if _has(params, QUANTISED):
    raise ValueError('weights can be quantised once; leave one of them out')

  def held(name: str, leaf: Any) -> Any:
    if _TABLES.search(name):
      return quantize.int8(leaf, -1)
    inputs = sharding.num_inputs(name)
    return matrix(leaf, inputs) if inputs else leaf

  return _map(held, params)


def _int8(params: Params, key: jax.Array) -> Params:
  del key  # rounds to the nearest
  return _quantised(
    params, lambda stack, inputs: quantize.int8(stack, (*range(1, 1 + inputs),))
  )


def _nf4(params: Params, key: jax.Array) -> Params:
  del key
  return _quantised(params, lambda stack, _: jax.vmap(quantize.nf4)(stack))


def _lora(
  params: Params,
  key: jax.Array,
  *,
  rank: int = 8,
  alpha: float = 16.0,
  targets: str = 'attention|mlp',
  rslora: bool = False,
  dora: bool = False,
) -> Params:
  """Adds factors to the matrices whose path `targets` is found in."""
  if rank < 1 or not 0 < alpha < math.inf:
    raise ValueError(f'lora.rank={rank}, lora.alpha={alpha}: must be above 0')
  if is_adapted(params):
    raise ValueError('there are adapters already; ask for lora once')
  matrices = []
  _map(lambda k, _: sharding.num_inputs(k) and matrices.append(k), params)
  try:
    chosen = [name for name in matrices if re.search(targets, name)]
  except re.error as error:
    raise ValueError(
      f'lora.targets={targets!r}: no regular expression ({error})'
    ) from error
  if not chosen:
    words = {word for name in matrices for word in name.split('/')}
    raise ValueError(
      f'lora.targets={targets!r} is found in no path of a matrix'
      f'{nearest(targets, words)}; there are {", ".join(matrices)}'
    )
  scale = alpha / (math.sqrt(rank) if rslora else rank)
  return _map(
    lambda name, leaf: (
      _adapted(name, leaf, key, rank, scale, dora) if name in chosen else leaf
    ),
    params,
  )


def _adapted(
  name: str, stack: Any, key: jax.Array, rank: int, scale: float, dora: bool
) -> Lora:
  """A stack of layers' matrices with new factors."""
  whole = jax.eval_shape(jax.vmap(dense), stack)
  num_layers, *shape = whole.shape
  inputs = sharding.num_inputs(name)
  a = jax.random.normal(
    jax.random.fold_in(key, zlib.crc32(name.encode())),
    (num_layers, *shape[:inputs], rank),
    jnp.float32,
  ) / math.sqrt(math.prod(shape[:inputs]))
  b = jnp.zeros((num_layers, rank, *shape[inputs:]), jnp.float32)
  leaf = Lora(stack, a, b, None, scale)
  if not dora:
    return leaf
  return dataclasses.replace(leaf, m=jax.vmap(_norms)(leaf))


_TRANSFORMS = {'int8': _int8, 'nf4': _nf4, 'lora': _lora}
