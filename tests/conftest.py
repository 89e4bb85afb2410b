"""Eight simulated devices for every test, and programs compiled once."""

import jax

from tpu_lm import devices

devices.set_up(num_cpu_devices=8)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
