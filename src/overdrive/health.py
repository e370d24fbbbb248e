"""What an orchestrator asks: whether the process lives, and whether it is to be sent requests.

Annotations of endpoints are read by FastAPI at run time, so this module does not postpone them.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from contextvars import Context
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncEngine

from .config import AdmissionSettings
from .context import current
from .errors import ConfigurationError, NotInstalledError
from .pool.engine import capacity_of, ping
from .pool.observe import observation_of
from .pool.tasks import start

#: Seconds for which an answer of the database is good, and seconds it has for one.
_GOOD_FOR, _PATIENCE = 1.0, 1.0


class Readiness:
    """Whether a process is to be sent requests: between its start-up and its end, and while its database answers.

    The database is asked once a second at most, whoever asks for that, and nobody waits for its answer but the first,
    and while it was last seen away.
    """

    def __init__(self, engine: AsyncEngine, settings: AdmissionSettings) -> None:
        #: A server that knows no lifespan says nothing of start-up.
        self.state: Literal["starting", "ready", "draining"] = "ready"
        self._engine = engine
        self._settings = settings
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None
        self._away_since: float | None = None

    async def reason(self) -> str | None:
        """Say in a word why no requests are to be sent; None where they are."""
        if self.state != "ready":
            return self.state
        first = self._asked_at == float("-inf")
        now = time.monotonic()
        if now - self._asked_at >= _GOOD_FOR and (self._asking is None or self._asking.done()):
            self._asked_at = now
            # It is nobody's request, and asks no gate.
            self._asking = Context().run(start, self._ask())
        if (first or self._away_since is not None) and self._asking is not None:
            await asyncio.wait([self._asking], timeout=_PATIENCE)
        away = self._away_since is not None and time.monotonic() - self._away_since >= self._settings.away_after
        return "database" if away else None

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                await ping(self._engine)
        except (ConfigurationError, TimeoutError):
            # One that has too much to do is not away.
            self._away_since = None if self._is_busy() else self._away_since or time.monotonic()
        else:
            self._away_since = None

    def _is_busy(self) -> bool:
        """Say whether there was no connection to ask on, though those who have one get answers."""
        pool: Any = self._engine.pool
        capacity = capacity_of(pool)
        if capacity is None or pool.checkedout() < capacity:
            return False
        observation = observation_of(self._engine.sync_engine)
        return observation is None or not observation.is_silent(_PATIENCE)

    # Life

    def begin(self) -> None:
        """Note that start-up is done; from now on, learn of SIGTERM before the server does."""
        self.state = "ready"
        if threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGTERM)
        # Without one the process ends at once, and it is not for a library to change that.
        if callable(handler):
            signal.signal(signal.SIGTERM, self._draining(handler, asyncio.get_running_loop()))

    def _draining(self, handler: Callable[[int, Any], Any], loop: asyncio.AbstractEventLoop) -> Any:
        def drain(number: int, frame: Any) -> None:
            # A second signal means now.
            if self.state == "draining" or not self._settings.drain:
                self.state = "draining"
                handler(number, frame)
                return
            self.state = "draining"
            loop.call_soon_threadsafe(loop.call_later, self._settings.drain, handler, number, None)

        return drain


health_router = APIRouter(tags=["health"])


@health_router.get("/live", include_in_schema=False)
async def live() -> JSONResponse:
    """Answer, as long as the event loop does."""
    return JSONResponse({"status": "live"})


@health_router.get("/ready", include_in_schema=False)
async def ready() -> JSONResponse:
    """Answer 200 if requests may be sent here, otherwise 503 with the reason: `starting`, `draining` or `database`."""
    context = current()
    if context is None or context.runtime is None:
        raise NotInstalledError("/ready tells of an Overdrive: create Overdrive(app) for the app that serves it")
    reason = await context.runtime.readiness.reason()
    headers = {"cache-control": "no-store"}
    if reason is None:
        return JSONResponse({"status": "ready"}, headers=headers)
    return JSONResponse({"status": "unready", "reason": reason}, 503, headers)
