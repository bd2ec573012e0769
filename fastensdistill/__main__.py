"""``fastensdistill``, ``python -m fastensdistill`` and ``torchrun -m fastensdistill``: the command line."""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command line. Ctrl-C is quiet from the first moment on, while PyTorch is being imported too."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, _leave)
    from fastensdistill import cli

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


def _leave(number: int, frame: FrameType | None) -> None:
    # Not an exception: raised inside an import, libraries turn it into errors of their own, or lose it
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
