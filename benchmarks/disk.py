"""A log whose reader keeps up, is slow, or takes nothing for a minute: what that does to those who wait for answers.

Rivals are asked at the same instants, side by side, as what is looked for takes a minute and is a thousand times
what they differ in otherwise.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import quantiles
from threading import Timer

from benchmarks.comparisons import Rival
from benchmarks.load import run_side_by_side
from benchmarks.process import Server
from benchmarks.results import DiskEntry, DiskState

TITLE = "Five log lines a request into a pipe"
RIVALS = [
    Rival("logging off", "disk_log:off", "/log"),
    Rival("logging off (A/A)", "disk_log:off", "/log"),
    Rival("logging FileHandler", "disk_log:file_handler", "/log"),
    Rival("logging QueueHandler", "disk_log:queue_handler", "/log"),
    Rival("loguru enqueue", "disk_log:loguru_enqueue", "/log"),
    Rival("structlog + orjson", "disk_log:structlog_orjson", "/log"),
    Rival("Overdrive LogHandler", "disk_log:log_handler", "/log", ours=True),
    Rival("Overdrive log_directly", "disk_log:direct", "/log", ours=True),
]
#: Requests a second each is asked, and seconds after which a client gives up.
_RATE, _DEADLINE = 40, 1.0
#: What the reader takes, in bytes a second (0: all there is), and for how many seconds.
_STATES = [("healthy", 0, 10), ("5 kB/s", 5_000, 10), ("stopped", 0, 60)]
#: Seconds that a reader works before it is stopped.
_BEFORE = 0.5


def measure(random: Random) -> list[DiskState]:
    """Return what becomes of every rival in every state of the reader."""
    return [_state(name, speed, seconds, list(_instants(seconds, random))) for name, speed, seconds in _STATES]


def _instants(seconds: float, random: Random) -> Iterator[float]:
    now = random.expovariate(_RATE)
    while now < seconds:
        yield now
        now += random.expovariate(_RATE)


def _state(name: str, speed: int, seconds: float, instants: list[float]) -> DiskState:
    with ExitStack() as stack:
        pipes: list[Path] = []
        readers: list[subprocess.Popen[str]] = []
        servers: list[Server] = []
        for rival in RIVALS:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            pipes.append(directory / "log.txt")
            os.mkfifo(pipes[-1])
            readers.append(_reader(pipes[-1], speed, stack))
            servers.append(Server(rival.factory, directory, {}))
            stack.callback(servers[-1].stop)
            servers[-1].get(rival.path)
        stops = [Timer(_BEFORE, reader.send_signal, [signal.SIGSTOP]) for reader in readers if name == "stopped"]
        for each in stops:
            each.start()
        answers = run_side_by_side([server.port for server in servers], "/log", instants, _DEADLINE)
        for each in stops:
            each.join()
        entries = []
        for rival, server, reader, pipe, given in zip(RIVALS, servers, readers, pipes, answers, strict=True):
            # Whoever waits for the pipe is let go on, to say how long that was.
            _reader(pipe, 0, stack)
            reader.kill()
            calls = sorted(json.loads(server.get("/calls")))
            good = [answer.latency for answer in given if answer.status == 200]
            entries.append(
                DiskEntry(
                    rival.name,
                    rival.ours,
                    len(good) / len(given),
                    quantiles(good, n=100)[98] if len(good) > 1 else None,
                    calls[len(calls) // 2],
                    calls[len(calls) * 999 // 1000],
                    calls[-1],
                )
            )
    return DiskState(name, seconds, entries)


def _reader(pipe: Path, speed: int, stack: ExitStack) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.reader", str(pipe), str(speed)]
    reader = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    stack.callback(reader.wait)
    stack.callback(reader.kill)
    assert reader.stdout is not None
    stack.callback(reader.stdout.close)
    reader.stdout.readline()
    return reader
