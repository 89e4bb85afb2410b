"""Eight simulated devices for every test, and programs compiled once."""

import gc

import jax
import pytest

from tpu_lm import devices

devices.set_up(num_cpu_devices=8)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


@pytest.fixture(scope='module', autouse=True)
def _programs_of_other_files_are_let_go():
  """A worker that kept all it compiled took 5 GB, and one crashed in LLVM."""
  yield
  jax.clear_caches()
  gc.collect()
