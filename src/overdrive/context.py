"""The request's one object, and the stack of read collectors. Standard library only, below everything else.

The object is mutable and found through a context variable, so that an endpoint in a thread, a task it starts and
the middleware that called it all write to the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Protocol

#: `shed`: refused, as there was too much to do.
Outcome = Literal["ok", "error", "cancelled", "disconnected", "shed"]


class UnitOfWork(Protocol):
    """A session of this request that must be ended before the response's first byte."""

    def settle(self, status: int) -> bool:
        """Do what `end` would, where that waits for nothing; say whether it was done."""

    async def end(self, status: int) -> None:
        """Commit or roll back as `status` asks, and give the connection back."""

    async def abandon(self) -> None:
        """Roll back and give the connection back."""


#: What a tag of rows has after its table's: `engine/table#1f03` for some of them, `engine/table#` for those that a
#: write does not name.
OF_ROWS = "#"


class Reads:
    """What was read from databases while this collector was open.

    tags: what a later write must name to make the reading outdated (`engine/table`, tags of rows, `engine/*`).
    unknown: why the reading cannot be described by tags, where it cannot.
    """

    __slots__ = ("tags", "unknown")

    def __init__(self) -> None:
        self.tags: set[str] = set()
        self.unknown: list[str] = []


class RequestContext:
    """One HTTP request or websocket, from its first line to its event.

    The first group is set by the middleware, the second by the parts that serve the request, the third is what
    the request's event carries. Durations are seconds, sizes bytes.
    """

    __slots__ = (
        "admission_wait",
        "bytes_sent",
        "cache_status",
        "cursor_keys",
        "database_time",
        "deadline",
        "duration",
        "exchange",
        "fields",
        "find_route",
        "instant",
        "log_end",
        "method",
        "outcome",
        "page",
        "page_style",
        "path",
        "pool_wait",
        "query",
        "reads",
        "refreshing",
        "refused",
        "repeats",
        "request_id",
        "response",
        "route",
        "rows",
        "runtime",
        "span_id",
        "statements",
        "status",
        "tails",
        "tenant",
        "trace_id",
        "visit",
        "work",
        "wrote",
    )

    def __init__(
        self,
        *,
        request_id: str,
        method: str,
        path: str,
        query: str = "",
        cursor_keys: tuple[bytes, ...] = (),
        runtime: Any = None,
        trace_id: str | None = None,
        span_id: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.trace_id = trace_id
        self.span_id = span_id
        self.method = method
        self.path = path
        self.query = query
        #: What cursors may be signed with; new ones with the first.
        self.cursor_keys = cursor_keys
        #: The `Overdrive` that serves this request.
        self.runtime = runtime

        #: Whose data the request is about, where the app has tenants.
        self.tenant: str | None = None
        #: The sessions to be ended before the first byte.
        self.work: list[UnitOfWork] = []
        #: When the request's time runs out, by `time.monotonic`; None where it has as much as it likes.
        self.deadline: float | None = None
        #: FastAPI's response object, on which dependencies set headers and cookies.
        self.response: Any = None
        #: The page parameters the client sent, where the route declares a page.
        self.page: Any = None
        #: The request as admission sees it, where it takes part; and why it was not admitted to a database.
        self.visit: Any = None
        self.refused: str | None = None
        self.reads = Reads()
        #: The cache's write clock when the request came in, and the request's passage through the cache.
        self.instant: Any = None
        self.exchange: Any = None
        #: Whether this is a request once more, behind an answer that has expired, to make it anew.
        self.refreshing = False
        #: How often it has executed each statement, where that is counted.
        self.repeats: Any = None
        #: Tags this request's committed or open transactions have written.
        self.wrote: set[str] = set()
        #: What `bind` added, for every record and the event.
        self.fields: dict[str, Any] = {}
        #: The end of a log line of this request, once it is encoded.
        self.log_end: bytes | None = None
        #: By handler, the lines that are held until the request has ended; none are from then on.
        self.tails: dict[Any, Any] | None = {}

        self.route: str | None = None
        #: Returns the template of the route that serves the request, once the router has found it.
        self.find_route: Callable[[], str | None] | None = None
        self.status: int | None = None
        self.duration = 0.0
        self.bytes_sent = 0
        self.cache_status: str | None = None
        self.admission_wait = 0.0
        self.pool_wait = 0.0
        self.statements = 0
        self.database_time = 0.0
        self.rows = 0
        self.page_style: str | None = None
        self.outcome: Outcome = "ok"

    @property
    def served_by(self) -> str | None:
        """The template of the route that serves this request, as far as that is known by now."""
        return self.route or (self.find_route() if self.find_route is not None else None)

    @property
    def lacks_tenant(self) -> bool:
        """Say whether nobody knows whose data this request is about, in an app that has tenants."""
        return self.tenant is None and self.runtime is not None and self.runtime.tenant is not None


_request: ContextVar[RequestContext | None] = ContextVar("overdrive_request", default=None)
_collectors: ContextVar[tuple[Reads, ...]] = ContextVar("overdrive_collectors", default=())
_unbound_fields: ContextVar[dict[str, Any]] = ContextVar("overdrive_fields", default={})  # noqa: B039


#: Returns the request being served here, if one is.
current: Callable[[], RequestContext | None] = _request.get


class serving:  # noqa: N801 - a context manager, of which a generator would cost each request three times as much
    """Make `context` the current request, and its reads the outermost collector."""

    __slots__ = ("_collectors", "_context", "_request")

    def __init__(self, context: RequestContext) -> None:
        self._context = context

    def __enter__(self) -> RequestContext:
        self._request, self._collectors = _request.set(self._context), _collectors.set((self._context.reads,))
        return self._context

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        # Not where the block has raised: the server is about to log that, and its record belongs to this request
        # too. Nothing is left behind, as a server runs each request in a context of its own.
        if kind is None:
            _collectors.reset(self._collectors)
            _request.reset(self._request)


@contextmanager
def collecting() -> Iterator[Reads]:
    """Collect what is read inside, as well as for every collector already open."""
    reads = Reads()
    token = _collectors.set((*_collectors.get(), reads))
    try:
        yield reads
    finally:
        _collectors.reset(token)


def collectors() -> tuple[Reads, ...]:
    """Return the open collectors, outermost first."""
    return _collectors.get()


def bind(**fields: Any) -> None:
    """Add fields to every log record, and to the event, of this request; outside a request, of this task."""
    if (context := _request.get()) is not None:
        context.fields.update(fields)
        context.log_end = None
    else:
        _unbound_fields.set({**_unbound_fields.get(), **fields})


def bound() -> dict[str, Any]:
    """Return the fields `bind` has added here."""
    context = _request.get()
    return context.fields if context is not None else _unbound_fields.get()
