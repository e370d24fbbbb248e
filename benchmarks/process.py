"""The processes of a run: the rivals on the first core, everything else on the others."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.load import HOST

_STOP_SECONDS = 10
_DATABASES = ("postgres", "redis-server")
#: Empty where a process cannot be bound to a core.
_CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


def keep_off_the_first_core() -> None:
    """Leave the first core to the rivals, for this process and for those it starts from now on."""
    if len(_CORES) > 1:
        os.sched_setaffinity(0, _CORES[1:])


def database_cpu() -> float:
    """CPU time in seconds that the databases this process started have used so far."""
    children = psutil.Process().children(recursive=True)
    used = 0.0
    for child in children:
        # PostgreSQL's workers come and go.
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith(_DATABASES):
                times = child.cpu_times()
                used += times.user + times.system
    return used


class RivalError(Exception):
    """A rival that does not start, or does not answer: in its own words."""


class Server:
    """A rival in a process of its own, with a directory of its own, until `stop`.

    Raises `RivalError` if it ends before it has said its port.
    """

    def __init__(self, factory: str, directory: Path, environment: dict[str, str]) -> None:
        self._log = directory / "stderr.txt"
        root = Path(__file__).parent.parent
        # The tree this stands in, whatever is installed; and a machine of its own, as it were: in-process caches look
        # for others that use the same database.
        own = {"PYTHONPATH": os.pathsep.join((str(root), str(root / "src"))), "TMPDIR": str(directory)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.server", factory],
                cwd=directory,
                env={**os.environ, **environment, **own},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        if _CORES:
            os.sched_setaffinity(self._process.pid, _CORES[:1])
        try:
            self.port = int(self._read())
        except RivalError:
            self.stop()
            raise

    def cpu(self) -> float:
        """CPU time in seconds that the server has used so far, in all its threads."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._read())

    def cpu_unasked(self) -> float:
        """The same in ticks of 10 ms, without a word to the server."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def get(self, path: str) -> bytes:
        """Return the body of an answer; raises `RivalError` for any but a 200."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=60) as response:
                body: bytes = response.read()
        except OSError as error:
            raise RivalError(f"{error}: {self._last_words()}") from None
        return body

    def stop(self) -> None:
        """End the process, which does so with its standard input."""
        self._process.communicate(timeout=_STOP_SECONDS)

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RivalError(self._last_words())
        return line

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
