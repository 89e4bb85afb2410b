import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tpu_lm.digest import digest, names

DTYPES = ('float32', 'bfloat16', 'float16', 'int32', 'int8', 'uint8', 'uint32')


def noise(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  """Any bits at all, NaNs and infinities included."""
  rng = np.random.default_rng(seed)
  dtype = jnp.dtype(dtype)
  count = int(np.prod(shape)) * dtype.itemsize
  return np.frombuffer(rng.bytes(count), dtype).reshape(shape)


@pytest.mark.parametrize('dtype', DTYPES)
def test_digest_is_the_same_under_every_sharding(dtype):
  x = noise(dtype, (8, 16, 3))
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  specs = [(), ('a',), ('b', 'a'), (None, ('a', 'b')), (('a', 'b'), None, None)]
  seen = {digest({'x': x})['x']}
  for spec in specs:
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    seen.add(digest({'x': jax.device_put(x, sharding)})['x'])
  assert len(seen) == 1


def test_digest_notices_every_flipped_bit():
  arrays = {dtype: noise(dtype, (5, 7)) for dtype in DTYPES}
  whole = digest(arrays)
  rng = np.random.default_rng(1)
  for dtype in DTYPES:
    for _ in range(100):
      raw = bytearray(arrays[dtype].tobytes())
      bit = rng.integers(8 * len(raw))
      raw[bit // 8] ^= 1 << (bit % 8)
      flipped = np.frombuffer(bytes(raw), jnp.dtype(dtype)).reshape(5, 7)
      found = digest(arrays | {dtype: flipped})
      assert {k for k in whole if whole[k] != found[k]} == {dtype}


def test_digest_notices_swaps_and_shifts():
  x = noise('float32', (64,))
  # An element and its negative differ by 2^31: a sum weighted by odd numbers
  # would not notice their swap.
  x = np.concatenate([x, -x])
  swapped = x.copy()
  swapped[[3, 67]] = swapped[[67, 3]]
  others = [swapped, np.roll(x, 1), x[::-1], x.reshape(2, 64).T.reshape(-1)]
  assert len({digest([y])['0'] for y in [x, *others]}) == 5


def test_digest_reads_scalars_keys_bools_and_empty_arrays():
  tree = {
    'step': jnp.int32(7),
    'key': jax.random.split(jax.random.key(0), 3),
    'mask': jnp.array([True, False]),
    'none': None,
    'empty': jnp.zeros((0, 4)),
  }
  other = {
    'step': jnp.int32(8),
    'key': jax.random.split(jax.random.key(1), 3),
    'mask': jnp.array([False, True]),
    'none': None,
    'empty': jnp.zeros((0, 4)),
  }
  one, two = digest(tree), digest(other)
  assert [k for k in one if one[k] == two[k]] == ['empty']


def test_names_say_where_a_leaf_is():
  assert names({'a': {'b': 1.0}, 'c': (2, [3])}) == ['a/b', 'c/0', 'c/1/0']
