"""The `overdrive` command in processes of its own, without the second that an interpreter takes to import it all.

Run as a module it is the process that has imported everything and forks for each command; a fork has the command's
arguments, directory, environment and streams, and ends as an interpreter does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Command = Callable[..., "subprocess.CompletedProcess[str]"]

#: Seconds a command may take.
_TIMEOUT = 60


@contextmanager
def shell() -> Iterator[Command]:
    """A function that runs `overdrive` with its arguments, and with environment variables, and waits for its end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-m", "shell"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        orders, statuses = process.stdin, process.stdout
        assert orders is not None
        assert statuses is not None

        def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
            with tempfile.TemporaryDirectory() as directory:
                streams = [Path(directory) / name for name in ("out", "err")]
                order = [arguments, os.getcwd(), {**os.environ, **variables}, *map(str, streams)]
                print(json.dumps(order), file=orders, flush=True)
                status = int(statuses.readline())
                return subprocess.CompletedProcess(arguments, status, *(each.read_text() for each in streams))

        yield run
        orders.close()


def _serve() -> None:
    """Fork for each order, and return in the fork."""
    for line in sys.stdin:
        arguments, directory, environment, out, err = json.loads(line)
        if (child := os.fork()) == 0:
            os.chdir(directory)
            os.environ.clear()
            os.environ.update(environment)
            for number, path in enumerate((os.devnull, out, err)):
                opened = os.open(path, os.O_RDWR | os.O_CREAT)
                os.dup2(opened, number)
                os.close(opened)
            sys.argv = ["overdrive", *arguments]
            signal.alarm(_TIMEOUT)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    import typer  # noqa: F401 - which a command would import

    from overdrive.cli import main

    _serve()
    main()
