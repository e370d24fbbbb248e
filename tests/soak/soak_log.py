"""Ten thousand requests of every outcome, servers that are stopped, and a minute in which nobody reads the log."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from log.outcomes import play
from log.serving import GUNICORN, UVICORN, Client, serving, stop
from log.stall import stall

pytestmark = pytest.mark.anyio


async def test_every_request_is_one_event(rounds: Iterator[int]) -> None:
    for number in rounds:
        await play(10_000, seed=number)


def test_a_reader_that_stops_for_a_minute_stops_nobody(tmp_path: Path, rounds: Iterator[int]) -> None:
    for number in rounds:
        directory = tmp_path / str(number)
        directory.mkdir()
        stall(directory, seconds=60)


# Not gunicorn by SIGINT: uvicorn's worker does not hear of that, whatever it serves, and is killed in the end.
@pytest.mark.parametrize(
    ("command", "sent"),
    [(UVICORN, signal.SIGINT), (UVICORN, signal.SIGTERM), (GUNICORN, signal.SIGTERM)],
    ids=["uvicorn-int", "uvicorn-term", "gunicorn-term"],
)
def test_nothing_is_lost_when_a_server_is_stopped(
    tmp_path: Path, command: tuple[str, ...], sent: signal.Signals, rounds: Iterator[int]
) -> None:
    for number in rounds:
        directory = tmp_path / str(number)
        directory.mkdir()
        stop(directory, command, sent)


def test_what_a_worker_had_logged_that_is_killed_for_its_silence_is_written(tmp_path: Path) -> None:
    with serving(tmp_path, *GUNICORN, "--timeout", "1") as process:
        with closing(Client(tmp_path)) as client, pytest.raises((OSError, http.client.HTTPException)):
            client.get("/hang")
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    written = [json.loads(line)["message"] for line in (tmp_path / "log").read_bytes().splitlines()]
    assert [each for each in written if each.startswith("line ")] == [f"line {number} of hang" for number in range(5)]
