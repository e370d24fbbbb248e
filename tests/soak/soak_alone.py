"""Processes come, look and leave at random: no two that are there at once believe to be alone."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from overdrive.cache import alone

_PROCESSES = 4


#: Seconds of a round.
_ROUND = 4


def test_nobody_is_overlooked(tmp_path: Path, rounds: Iterator[int]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for number in rounds:
        (tmp_path / "board").write_bytes(bytes(_PROCESSES))
        started = [
            subprocess.Popen(
                [sys.executable, __file__, str(tmp_path), str(own), str(number)],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for own in range(_PROCESSES)
        ]
        assert [process.communicate()[0].strip() for process in started] == ["0"] * _PROCESSES


def main(directory: str, own: int, seed: str) -> None:
    tempfile.tempdir, alone._LOOK_INTERVAL = directory, 0.05
    chance, until, overlooked = random.Random(f"{own} {seed}"), time.monotonic() + _ROUND, 0
    neighbours = alone.Neighbours("soak")
    with open(f"{directory}/board", "r+b") as file:
        # Who says here that it is there has told the others before.
        board = mmap.mmap(file.fileno(), _PROCESSES)
    while time.monotonic() < until:
        neighbours.alone_since()
        board[own] = 1
        for _ in range(chance.randrange(1, 40)):
            there = [number for number in range(_PROCESSES) if number != own and board[number]]
            is_alone = neighbours.alone_since() is not None
            overlooked += bool(is_alone and there and all(board[number] for number in there))
        board[own] = 0
        neighbours.leave()
        time.sleep(chance.random() * 0.002)
    print(overlooked)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
