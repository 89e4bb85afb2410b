"""Model FLOPs of a decoder, counted analytically, and the peak of a device.

Convention: PaLM, arXiv 2204.02311, appendix B. A multiply and an add are two
FLOPs; the backward pass costs twice the forward pass; only matrix products
count (no norms, softmax or RoPE), nothing that rematerialisation computes
again, and no embedding look-up; the output head counts once, tied or not. So a
token costs 6 FLOPs per matmul parameter, and attention 12 H K a layer and a key
it sees.

What differs: PaLM counts attention over the whole L x L square. We count the
keys that a causal query may see, (L + 1) / 2 on average, fewer in a layer with
a window: nearly half. Packed rows count as one document over the row's length.

The compiler's own count is no substitute: it counts a scanned layer once and
Pallas kernels as nothing.
"""

import functools
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:  # the reader of a metrics file needs no network
  from tpu_lm.models.transformer import Config

# Dense bfloat16 (float16 where a device has no bfloat16) FLOP/s of what JAX
# calls one device, by device_kind. TPU v2, v3 and 7x show two devices a chip.
# Sources: cloud.google.com/tpu/docs (system architecture of each version) and
# NVIDIA's and AMD's data sheets, without sparsity.
_TPUS = {
  'TPU v2': 23e12,
  'TPU v3': 61.5e12,
  'TPU v4': 275e12,
  'TPU v4 lite': 138e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'TPU7x': 1153.5e12,
  'TPU v7x': 1153.5e12,
}
# By whole words of the device_kind; the first that is found counts.
_GPUS = (
  ('H100 PCIe', 756e12),
  ('H100 NVL', 835e12),
  ('H100', 989e12),
  ('H200', 989e12),
  ('GH200', 989e12),
  ('H800', 989e12),
  ('B200', 2250e12),
  ('GB200', 2500e12),
  ('A100', 312e12),
  ('A800', 312e12),
  ('A40', 149.7e12),
  ('A30', 165e12),
  ('A10G', 70e12),
  ('A10', 125e12),
  ('RTX A6000', 154.8e12),
  ('RTX 6000 Ada', 364e12),
  ('L40S', 362e12),
  ('L40', 181e12),
  ('L4', 121e12),
  ('T4', 65e12),
  ('V100-PCIE', 112e12),
  ('V100', 125e12),
  ('RTX 4090', 165e12),
  ('RTX 3090', 71e12),
  ('MI300X', 1307e12),
  ('MI250X', 191.5e12),
)


def matmul_parameters(config: 'Config') -> int:
  """Returns how many parameters take part in a matrix product per token."""
  heads = 2 * config.num_heads + 2 * config.kv_heads  # q and o, k and v
  attention = config.dim * config.head_size * heads
  feed_forward = 3 * config.dim * config.hidden_dim
  if config.num_experts:  # those that a token goes through, and the router
    active = config.experts_per_token + config.shared_experts
    feed_forward = 3 * config.dim * config.expert_size * active
    feed_forward += config.dim * config.num_experts
  head = config.dim * config.vocab_size
  return config.num_layers * (attention + feed_forward) + head


def mean_keys(length: int, window: int = 0) -> float:
  """Returns how many keys a query of a causal row sees on average.

  Args:
    length: tokens of the row.
    window: keys a query sees at most, its own included; 0 means all.
  """
  seen = min(window, length) if window else length
  # The first `seen` queries see 1, 2, …, seen keys, the rest `seen` each.
  return (seen * (seen + 1) / 2 + (length - seen) * seen) / length


def forward_per_token(config: 'Config', length: int) -> float:
  """Returns model FLOPs a token of a forward pass over rows of `length`."""
  keys = sum(mean_keys(length, window) for window in config.windows)
  attention = 4 * config.num_heads * config.head_size * keys
  return 2 * matmul_parameters(config) + attention


def train_per_token(config: 'Config', length: int) -> float:
  """Returns model FLOPs a token of a forward and a backward pass."""
  return 3 * forward_per_token(config, length)


def peak(device: jax.Device) -> float | None:
  """Returns the peak FLOP/s of a device, or None if it is not known.

  Of a CPU it is measured (float32, all cores of the machine, at most 0.3 s
  once a process): simulated devices share it.
  """
  if device.platform == 'cpu':
    return _measured_peak()
  kind = device.device_kind
  if kind in _TPUS:
    return _TPUS[kind]
  for name, flops_per_second in _GPUS:
    if re.search(rf'\b{name}\b', kind):
      return flops_per_second
  return None


def total_peak(devices: Sequence[jax.Device] | None = None) -> float | None:
  """Returns the peak FLOP/s of devices together, or None if one is unknown.

  Args:
    devices: all devices of all processes by default. The CPU devices of one
      process are one machine and count once.
  """
  devices = jax.devices() if devices is None else devices
  if devices[0].platform == 'cpu':
    machines = {device.process_index for device in devices}
    return _measured_peak() * len(machines)
  peaks = [peak(device) for device in devices]
  return None if None in peaks else sum(peaks)


def utilisation(
  flops_per_second: float, devices: Sequence[jax.Device] | None = None
) -> float | None:
  """Returns the share of the peak that is used, or None if that is unknown."""
  total = total_peak(devices)
  return None if total is None else flops_per_second / total


@functools.cache
def _measured_peak(size: int = 768, budget: float = 0.15) -> float:
  """Returns the best FLOP/s of a float32 matrix product on this CPU."""
  device = jax.local_devices(backend='cpu')[0]
  with jax.default_device(device):
    multiply = jax.jit(jnp.matmul)
    a = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply(a, a).block_until_ready()
    best = float('inf')
    end = time.perf_counter() + budget
    while time.perf_counter() < end:
      start = time.perf_counter()
      multiply(a, a).block_until_ready()
      best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best
