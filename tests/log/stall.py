"""A server whose log is read by somebody who has been stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
from log.serving import APP, UVICORN, Load, serving

_MAX_BYTES = 256 * 1024
#: What else a busy server's memory may grow by.
_SLACK = 32 * 1024 * 1024


def stall(directory: Path, seconds: float) -> None:
    """Stop the reader for `seconds`: all is answered, memory stays where it was, and each line is accounted for."""
    reading, writing = os.pipe()
    with (directory / "read").open("wb") as file:
        reader = subprocess.Popen(["cat"], stdin=reading, stdout=file)
    os.close(reading)
    app = APP.replace('LogHandler("log")', f"LogHandler(max_bytes={_MAX_BYTES})")
    try:
        with serving(directory, *UVICORN, "--log-level", "warning", app=app, stderr=writing) as process:
            os.close(writing)
            with Load(directory) as load:
                server = psutil.Process(process.pid)
                before = server.memory_info().rss
                reader.send_signal(signal.SIGSTOP)
                time.sleep(seconds)
                answered = len(load.answered)
                # It is answered as before, long after the last line that had room.
                deadline = time.monotonic() + 20
                while len(load.answered) < answered + 100:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                assert server.memory_info().rss < before + _MAX_BYTES + _SLACK
                reader.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGTERM)
                process.wait(30)
        assert reader.wait(30) == 0
    finally:
        reader.kill()
        reader.wait()
    [ledger] = directory.glob("stats.*")
    emitted, written, sampled, dropped = json.loads(ledger.read_text())
    assert emitted == written + sampled + dropped
    assert dropped > 0
    lines = [json.loads(line) for line in (directory / "read").read_bytes().splitlines()]
    told = [line for line in lines if "dropped" in line]
    assert sum(sum(line["dropped"].values()) for line in told) == dropped
    assert len(lines) - len(told) == written
