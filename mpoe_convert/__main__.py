"""The command's entry: `mpoe-convert` and `python -m mpoe_convert`."""

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line. An interrupt while it is being imported ends it in one line, too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from .cli import main as command

    command(prog_name="mpoe-convert")


def _stop(number: int, frame: FrameType | None) -> None:
    """End at once: nothing has been begun, and an exception may be lost inside an import."""
    os.write(2, f"Stopped by {signal.Signals(number).name}; no output was written.\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()
