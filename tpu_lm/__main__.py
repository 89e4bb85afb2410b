"""`python -m tpu_lm COMMAND`."""

import sys

from tpu_lm.cli import main

if __name__ == '__main__':
  sys.exit(main())
