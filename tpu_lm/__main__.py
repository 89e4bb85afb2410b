"""`python -m tpu_lm COMMAND`, and the console script."""

import importlib.util
import os
import sys

from tpu_lm import accelerators, cli, phases


def run() -> None:
  """Runs the command of the command line and ends the process."""
  _look_for_no_tpu()
  try:
    status = cli.main()
  except KeyboardInterrupt:
    # Training handles it by itself; this is before it, or another command.
    print('stopped', file=sys.stderr)
    status = 130
  phases.leave(status)


def _look_for_no_tpu() -> None:
  """Spares a machine that has libtpu only to plan its search for TPUs.

  It would take a second and print a page of warnings with every command.
  """
  if importlib.util.find_spec('libtpu') is None or sys.platform != 'linux':
    return
  if not accelerators.are_there():
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')


if __name__ == '__main__':
  run()
