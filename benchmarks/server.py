"""One rival in a process of its own, and its CPU time on demand.

Run as `python -m benchmarks.server module:factory`: it prints its port, then, for each line it reads, the CPU
time it has used so far. It ends with its standard input, so that no server outlives the run.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from importlib import import_module

import uvicorn


def main() -> None:
    """Serve the app that the factory named on the command line returns."""
    module, _, factory = sys.argv[1].partition(":")
    app = getattr(import_module(f"benchmarks.rivals.{module}"), factory)()
    # In a storm, the kernel's queue is not what is measured.
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    threading.Thread(target=_answer, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    # Clients keep their connections while others have their turn.
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=600)
    uvicorn.Server(config).run(sockets=[listener])


def _answer() -> None:
    for _ in sys.stdin:
        # Of all threads, those that have ended too: a log's writer counts.
        print(time.process_time(), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
