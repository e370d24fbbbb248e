"""Who reads a log from a named pipe: `python -m benchmarks.reader path bytes_per_second`; 0 is as fast as can be."""

from __future__ import annotations

import fcntl
import os
import select
import sys
import time

_AT_ONCE = 64 * 1024
#: Seconds between two reads of one that is slow.
_PAUSE = 0.05


def main() -> None:
    """Read until killed."""
    # For both, so that neither this waits for a writer nor one that comes later for a reader.
    pipe, speed = os.open(sys.argv[1], os.O_RDWR), int(sys.argv[2])
    # As small as can be, or it would be some seconds before anybody notices.
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, select.PIPE_BUF)
    print("reading", flush=True)
    while True:
        os.read(pipe, round(speed * _PAUSE) or _AT_ONCE)
        if speed:
            time.sleep(_PAUSE)


if __name__ == "__main__":
    main()
