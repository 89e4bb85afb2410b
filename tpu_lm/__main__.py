"""`python -m tpu_lm COMMAND`, and the console script."""

import sys

from tpu_lm import cli, phases


def run() -> None:
  """Runs the command of the command line and ends the process."""
  try:
    status = cli.main()
  except KeyboardInterrupt:
    # Training handles it by itself; this is before it, or another command.
    print('stopped', file=sys.stderr)
    status = 130
  phases.leave(status)


if __name__ == '__main__':
  run()
