"""Whether the machine has an accelerator, asked before JAX is imported."""

import glob

_FILES = ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia0', '/dev/kfd')


def are_there() -> bool:
  """Whether the system has a file of a TPU's or a GPU's driver."""
  return any(glob.glob(pattern) for pattern in _FILES)
