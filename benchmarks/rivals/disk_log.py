"""Apps that log five lines a request into the pipe `log.txt`, and know how long each call has taken."""

import asyncio
import logging
import logging.handlers
import queue
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import structlog
from fastapi import FastAPI
from loguru import logger as loguru_logger

from benchmarks.rivals.shop import LINES
from overdrive import LogHandler, log_directly

_PATH = "log.txt"


def off() -> FastAPI:
    """Return an app whose lines are below its level."""
    return _stdlib(logging.NullHandler(), logging.WARNING)


def file_handler() -> FastAPI:
    """Return an app that writes each line where it logs it."""
    return _stdlib(_file())


def queue_handler() -> FastAPI:
    """Return an app that writes each line in a thread of its own, as the logging cookbook advises."""
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.handlers.QueueListener(records, _file()).start()
    return _stdlib(logging.handlers.QueueHandler(records))


def loguru_enqueue() -> FastAPI:
    """Return an app that writes each line in loguru's thread."""
    loguru_logger.remove()
    loguru_logger.add(_PATH, level="INFO", enqueue=True)
    braces = {line: line.replace("%s", "{}").replace("%d", "{}").replace("%.2f", "{:.2f}") for line, _ in LINES}
    return _app(lambda line, argument: loguru_logger.info(braces[line], argument))


def structlog_orjson() -> FastAPI:
    """Return an app that writes each line where it logs it, as JSON."""
    import orjson  # which only the whole bench brings along

    structlog.configure(
        cache_logger_on_first_use=True,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        logger_factory=structlog.BytesLoggerFactory(Path(_PATH).open("ab")),  # noqa: SIM115 - for the process's life
    )
    return _app(structlog.get_logger().info)


def log_handler() -> FastAPI:
    """Return an app that logs with Overdrive's handler."""
    return _stdlib(LogHandler(_PATH))


def direct() -> FastAPI:
    """Return an app whose loggers hand what they are told straight to Overdrive's handler."""
    log_directly()
    return _stdlib(LogHandler(_PATH))


def _file() -> logging.Handler:
    handler = logging.FileHandler(_PATH)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    return handler


def _stdlib(handler: logging.Handler, level: int = logging.INFO) -> FastAPI:
    logging.basicConfig(handlers=[handler], level=level)
    return _app(logging.getLogger("shop").info)


def _app(log: Callable[[str, Any], object]) -> FastAPI:
    app = FastAPI()
    calls: list[float] = []

    @app.get("/log")
    async def five_lines() -> dict[str, str]:
        for line, argument in LINES:
            started = perf_counter()
            log(line, argument)
            calls.append(perf_counter() - started)
        return {"status": "done"}

    @app.get("/calls")
    async def seconds_of_each_call() -> list[float]:
        # After what is still to be logged for those who have given up.
        await asyncio.sleep(0)
        return calls

    return app
