import math

import numpy as np

from tpu_lm.stages import simpo


def test_loss_by_hand():
  # beta (m_c - m_r) - gamma = 2 * 0.75 - 0.5.
  found = simpo.losses(np.float32(-1.0), np.float32(-1.75), 2.0, 0.5)
  np.testing.assert_allclose(found, math.log(1 + math.exp(-1.0)), rtol=1e-6)
