"""`remora`, the same as `python -m remora`; can be stopped before anything heavy is imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def run() -> int:
    """Run the command line; SIGTERM exits with 75 even before `train` installs its handler."""
    if sys.argv[1:2] == ["train"]:
        signal.signal(signal.SIGTERM, _stop)
    from remora.cli import main
    from remora.runtime import launch

    try:
        code = main()
    except SystemExit as end:  # of a process without results to show
        if launch.world_size() == 1 or isinstance(end.code, str):
            raise
        code = end.code or 0
    if sys.argv[1:2] == ["train"]:  # the exit code is decided
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if launch.world_size() > 1:
            launch.leave(code)
    return code


def _stop(number: int, frame: FrameType | None) -> None:
    """Exit with the code of `errors.Stopped`, whatever is running."""
    del number, frame
    os.write(2, b"error: stopped (SIGTERM); run the same command again to resume\n")
    os._exit(75)


if __name__ == "__main__":
    sys.exit(run())
