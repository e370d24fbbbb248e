"""Another process that uses a database: it does what it is told on its standard input."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from overdrive.cache import alone


class Neighbour:
    """Another process."""

    def __init__(self, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def do(self, what: str) -> str:
        """Have it look, write or leave; return what it has seen."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def neighbour(name: str) -> Iterator[Neighbour]:
    """Start another process that uses a database of this name, of which nobody knows yet."""
    other = Neighbour(name)
    try:
        yield other
    finally:
        other.kill()


def main(name: str) -> None:
    alone._LOOK_INTERVAL = 0
    own = alone.neighbours(name)
    for line in sys.stdin:
        match line.strip():
            case "look":
                print("alone" if own.alone_since() else "several", flush=True)
            case "write":
                asyncio.run(alone.LoneStore(0, [name]).bump(["default/items"]))
                print("written", flush=True)
            case "leave":
                own.leave()
                print("left", flush=True)
            case "fork":
                # As when gunicorn's arbiter ends, and a worker it has forked goes on.
                looked, has_looked = os.pipe()
                if os.fork():
                    os.read(looked, 1)
                    os._exit(0)
                own.alone_since()
                os.write(has_looked, b".")
                print("forked", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
