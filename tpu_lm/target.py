"""For which devices programs are traced: those here, or those of a plan.

Kernels and sizes are chosen by the device. `tpu_lm plan` compiles for devices
that are not here, and says so by `planned`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_PLANNED: contextvars.ContextVar[Any]
_PLANNED = contextvars.ContextVar('planned', default=None)


@contextlib.contextmanager
def planned(device: jax.Device) -> Iterator[None]:
  """What is traced within is for devices like this one."""
  token = _PLANNED.set(device)
  try:
    yield
  finally:
    _PLANNED.reset(token)


def platform() -> str:
  """'cpu', 'gpu' or 'tpu'."""
  device = _PLANNED.get()
  return jax.default_backend() if device is None else device.platform
