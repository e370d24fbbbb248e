"""Python's own logging: switched off, into a file, and into a file behind a queue."""

import logging
import queue
from logging.handlers import QueueHandler, QueueListener

from fastapi import FastAPI

from benchmarks.rivals.shop import LINES


def off() -> FastAPI:
    """Return an app whose lines are below its level."""
    return _app(logging.NullHandler(), logging.WARNING)


def file_handler() -> FastAPI:
    """Return an app that writes each line where it logs it."""
    return _app(_file())


def queue_handler() -> FastAPI:
    """Return an app that writes each line in a thread of its own, as the logging cookbook advises."""
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    QueueListener(records, _file()).start()
    return _app(QueueHandler(records))


def _file() -> logging.Handler:
    handler = logging.FileHandler("log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    return handler


def _app(handler: logging.Handler, level: int = logging.INFO) -> FastAPI:
    logging.basicConfig(handlers=[handler], level=level)
    logger = logging.getLogger("shop")
    app = FastAPI()

    @app.get("/log")
    async def five_lines() -> dict[str, str]:
        for line, argument in LINES:
            logger.info(line, argument)
        return {"status": "done"}

    return app
