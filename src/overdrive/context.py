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

    # What most requests never touch is the class's: each value set here costs every request.

    trace_id: str | None = None
    span_id: str | None = None
    query = ""
    #: The `Overdrive` that serves this request.
    runtime: Any = None
    #: What cursors may be signed with; new ones with the first.
    cursor_keys: tuple[bytes, ...] = ()
    #: Returns the template of the route that a scope was led to, once the router has noted it there.
    find_route: Callable[[Any, Any], str | None] | None = None
    #: The request as the router sees it, which notes there where it leads to; and as it came to the router.
    scope: Any = None
    asked: Any = None
    #: What the client sends, where it may be looked at before the app asks for it.
    incoming: Any = None
    #: Whose data the request is about, where the app has tenants.
    tenant: str | None = None
    #: When the request's time runs out, by `time.monotonic`; None where it has as much as it likes.
    deadline: float | None = None
    #: FastAPI's response object, on which dependencies set headers and cookies.
    response: Any = None
    #: The page parameters the client sent, where the route declares a page.
    page: Any = None
    #: The request as admission sees it, once it has asked for a database; and why it was not admitted to it.
    visit: Any = None
    refused: str | None = None
    #: The cache's write clock when the request came in, and the request's passage through the cache.
    instant: Any = None
    exchange: Any = None
    #: Whether this is a request once more, behind an answer that has expired, to make it anew.
    refreshing = False
    #: How often each statement may be executed, and has been, where that is counted.
    repeated_statements: int | None = None
    repeats: Any = None
    #: The end of a log line of this request, once it is encoded.
    log_end: bytes | None = None

    status: int | None = None
    duration = 0.0
    bytes_sent = 0
    cache_status: str | None = None
    admission_wait = 0.0
    pool_wait = 0.0
    statements = 0
    database_time = 0.0
    rows = 0
    page_style: str | None = None
    outcome: Outcome = "ok"
    _route: str | None = None

    def __init__(self, request_id: str, method: str, path: str) -> None:
        self.request_id = request_id
        self.method = method
        self.path = path

        #: The sessions to be ended before the first byte.
        self.work: list[UnitOfWork] = []
        self.reads = Reads()
        #: Tags this request's committed or open transactions have written.
        self.wrote: set[str] = set()
        #: What `bind` added, for every record and the event.
        self.fields: dict[str, Any] = {}
        #: By handler, the lines that are held until the request has ended; none are from then on.
        self.tails: dict[Any, Any] | None = {}

    @property
    def route(self) -> str | None:
        """The template of the route that serves this request, as far as that is known by now."""
        if self._route is None and self.find_route is not None:
            return self.find_route(self.scope, self.asked)
        return self._route

    @route.setter
    def route(self, template: str | None) -> None:
        self._route = template

    @property
    def lacks_tenant(self) -> bool:
        """Say whether nobody knows whose data this request is about, in an app that has tenants."""
        return self.tenant is None and self.runtime is not None and self.runtime.tenant is not None


_request: ContextVar[RequestContext | None] = ContextVar("overdrive_request", default=None)
_collectors: ContextVar[tuple[Reads, ...]] = ContextVar("overdrive_collectors", default=())
_unbound_fields: ContextVar[dict[str, Any]] = ContextVar("overdrive_fields", default={})  # noqa: B039


#: Returns the request being served here, if one is.
current: Callable[[], RequestContext | None] = _request.get
#: What `serving` does, without what that costs each request.
serve, serve_no_more = _request.set, _request.reset


@contextmanager
def serving(context: RequestContext) -> Iterator[RequestContext]:
    """Make `context` the current request, and its reads the outermost collector."""
    before = serve(context)
    try:
        yield context
    finally:
        serve_no_more(before)


@contextmanager
def collecting() -> Iterator[Reads]:
    """Collect what is read inside, as well as for every collector already open."""
    reads = Reads()
    token = _collectors.set((*collectors(), reads))
    try:
        yield reads
    finally:
        _collectors.reset(token)


def collectors() -> tuple[Reads, ...]:
    """Return the open collectors, outermost first: in a request that is its own."""
    context, opened = current(), _collectors.get()
    # Those of whoever sends a request from within another are not the inner one's.
    if context is not None and (not opened or opened[0] is not context.reads):
        return (context.reads,)
    return opened


def bind(**fields: Any) -> None:
    """Add fields to every log record, and to the event, of this request; outside a request, of this task."""
    if (context := current()) is not None:
        context.fields.update(fields)
        context.log_end = None
    else:
        _unbound_fields.set({**_unbound_fields.get(), **fields})


def bound() -> dict[str, Any]:
    """Return the fields `bind` has added here."""
    context = current()
    return context.fields if context is not None else _unbound_fields.get()
