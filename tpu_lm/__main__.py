"""`python -m tpu_lm COMMAND`, and the console script."""

from tpu_lm import cli, phases


def run() -> None:
  """Runs the command of the command line and ends the process."""
  phases.leave(cli.main())


if __name__ == '__main__':
  run()
