"""However a server ends, whatever its workers had logged is in the file: once, and whole.

`make soak` stops them in more ways, and for longer.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from log.serving import GUNICORN, UVICORN, stop
from log.stall import stall


@pytest.mark.parametrize(
    ("command", "workers"),
    [(UVICORN, 1), (UVICORN, 4), ((*GUNICORN, "--preload"), 2)],
    ids=["uvicorn", "uvicorn-4", "gunicorn-preload"],
)
def test_nothing_is_lost_when_a_server_is_stopped(tmp_path: Path, command: tuple[str, ...], workers: int) -> None:
    stop(tmp_path, command, signal.SIGTERM, workers)


def test_a_reader_that_stops_stops_nobody(tmp_path: Path) -> None:
    stall(tmp_path, seconds=1)
