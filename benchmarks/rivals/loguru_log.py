"""loguru, writing where it logs and behind its queue."""

from fastapi import FastAPI
from loguru import logger

from benchmarks.rivals.shop import LINES


def plain() -> FastAPI:
    """Return an app that writes each line where it logs it."""
    return _app(enqueue=False)


def enqueue() -> FastAPI:
    """Return an app that writes each line in loguru's thread."""
    return _app(enqueue=True)


def _app(*, enqueue: bool) -> FastAPI:
    logger.remove()
    logger.add("log.txt", level="INFO", enqueue=enqueue)
    # loguru formats with braces.
    lines = [(line.replace("%s", "{}").replace("%d", "{}").replace("%.2f", "{:.2f}"), value) for line, value in LINES]
    app = FastAPI()

    @app.get("/log")
    async def five_lines() -> dict[str, str]:
        for line, argument in lines:
            logger.info(line, argument)
        return {"status": "done"}

    return app
