import math

import jax.numpy as jnp
import numpy as np
import pytest

from tpu_lm.models import rope
from tpu_lm.models.rope import Scaling

PLAIN = Scaling()


def angles(positions, head_dim=8, theta=100.0, scaling=PLAIN):
  return rope.sinusoids(jnp.asarray(positions)[None], head_dim, theta, scaling)


def test_half_rotation_by_hand():
  # Head of 4, theta 16: pair 0 turns by 1 radian a position, pair 1 by 1/4.
  cos, sin = angles([3], head_dim=4, theta=16.0)
  x = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
  found = rope.rotate(jnp.asarray(x)[None, None, None], cos, sin)[0, 0, 0]
  c, s = np.cos([3.0, 0.75]), np.sin([3.0, 0.75])
  expected = [
    1 * c[0] - 3 * s[0],  # entry 0 against entry 2, not against entry 1
    2 * c[1] - 4 * s[1],
    3 * c[0] + 1 * s[0],
    4 * c[1] + 2 * s[1],
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_position_zero_is_not_rotated_and_lengths_are_kept():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 5, 2, 8)).astype(np.float32)
  found = rope.rotate(jnp.asarray(x), *angles(range(5)))
  np.testing.assert_array_equal(found[:, 0], x[:, 0])
  np.testing.assert_allclose(
    np.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
  )
  assert not np.allclose(found[:, 1], x[:, 1])


@pytest.mark.parametrize(
  'scaling',
  [
    Scaling(),
    Scaling('linear', factor=4.0),
    Scaling('llama3', factor=8.0, original_length=64),
    Scaling('yarn', factor=4.0, original_length=64),
  ],
)
def test_scores_depend_on_distance_alone(scaling):
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 8)).astype(np.float32)

  def score(at_q, at_k):
    pair = jnp.asarray(np.stack([q, k]))[None, :, None]
    a, b = rope.rotate(pair, *angles([at_q, at_k], scaling=scaling))[0, :, 0]
    return float(a @ b)

  assert score(7, 4) == pytest.approx(score(103, 100), abs=2e-4)
  assert score(4, 7) == pytest.approx(score(100, 103), abs=2e-4)
  assert abs(score(7, 4) - score(7, 5)) > 1e-2


def test_positions_of_several_rows_are_their_own():
  positions = jnp.array([[0, 1, 2], [5, 0, 1]])
  cos, sin = rope.sinusoids(positions, 8, 100.0)
  assert cos.shape == sin.shape == (2, 3, 4)
  np.testing.assert_array_equal(cos[1, 1:], cos[0, :2])
  np.testing.assert_allclose(sin[1, 0], angles([5])[1][0, 0])


# Frequencies, from the formulas of the papers, one dimension at a time.


def plain(head_dim, theta):
  return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def test_plain_frequencies():
  found, factor = rope.frequencies(64, 10_000.0)
  np.testing.assert_allclose(found, plain(64, 10_000.0), rtol=1e-6)
  assert factor == 1.0


def test_linear_scaling_divides_positions():
  found, factor = rope.frequencies(64, 10_000.0, Scaling('linear', factor=8.0))
  np.testing.assert_allclose(
    found, np.array(plain(64, 10_000.0)) / 8, rtol=1e-6
  )
  assert factor == 1.0


def test_llama3_scaling():
  """Wavelengths against those of the context it was trained on (8,192)."""
  length, factor, low, high = 8192, 8.0, 1.0, 4.0
  expected, kinds = [], set()
  for f in plain(128, 500_000.0):
    wavelength = 2 * math.pi / f
    if wavelength < length / high:
      kinds.add('kept')
      expected.append(f)
    elif wavelength > length / low:
      kinds.add('divided')
      expected.append(f / factor)
    else:
      kinds.add('between')
      smooth = (length / wavelength - low) / (high - low)
      expected.append((1 - smooth) * f / factor + smooth * f)
  assert kinds == {'kept', 'divided', 'between'}
  scaling = Scaling(
    'llama3', factor=factor, original_length=length, low=low, high=high
  )
  found, temperature = rope.frequencies(128, 500_000.0, scaling)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert temperature == 1.0


@pytest.mark.parametrize('attention_factor', [0.0, 1.25])
def test_yarn_scaling(attention_factor):
  """NTK by parts: gamma ramps over the dimensions of 32 to 1 rotations."""
  length, factor, head_dim, theta = 4096, 16.0, 128, 10_000.0

  def dimension(rotations):
    """The pair that turns so often within the trained length."""
    return (
      head_dim * math.log(length / (2 * math.pi * rotations))
      / (2 * math.log(theta))
    )  # fmt: skip

  # The ramp is between whole dimensions, as in the paper's own code.
  low, high = math.floor(dimension(32)), math.ceil(dimension(1))
  assert 0 < low < high < head_dim // 2
  expected = []
  for i, f in enumerate(plain(head_dim, theta)):
    gamma = 1 - min(max((i - low) / (high - low), 0.0), 1.0)
    expected.append((1 - gamma) * f / factor + gamma * f)
  scaling = Scaling(
    'yarn', factor=factor, original_length=length,
    attention_factor=attention_factor,
  )  # fmt: skip
  found, temperature = rope.frequencies(head_dim, theta, scaling)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  # On q and k each, so that scores are multiplied with its square.
  wanted = attention_factor or 0.1 * math.log(16) + 1
  assert temperature == pytest.approx(wanted)
  cos, sin = rope.sinusoids(jnp.array([[3]]), head_dim, theta, scaling)
  np.testing.assert_allclose(cos**2 + sin**2, wanted**2, rtol=1e-5)


def test_an_unknown_scaling_is_refused():
  with pytest.raises(ValueError, match='ntk'):
    rope.frequencies(8, 10_000.0, Scaling('ntk'))
