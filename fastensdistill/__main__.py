"""``python -m fastensdistill`` and ``torchrun -m fastensdistill``: the command line."""

import sys

from fastensdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
