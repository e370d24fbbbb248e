"""A hit leaves the span, the route and the duration that a computed answer leaves, whoever measures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer
from opentelemetry.instrumentation._semconv import _OpenTelemetrySemanticConventionStability
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from overdrive import Overdrive, cached

pytestmark = pytest.mark.anyio


class Telemetry:
    """Where spans and measurements end up in a test."""

    def __init__(self) -> None:
        self._spans, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)

    def spans(self) -> list[tuple[str, Any, Any]]:
        """The name, route and status of every request's span."""
        return [
            (span.name, span.attributes.get("http.route"), span.attributes.get("http.response.status_code"))
            for span in self._spans.get_finished_spans()
            if span.kind is SpanKind.SERVER and span.attributes is not None
        ]

    def durations(self, metric: str, route: str) -> dict[tuple[Any, Any], int]:
        """How many requests a histogram has of each route and status; `route` names its attribute."""
        data: Any = self._reader.get_metrics_data()
        metrics = [each for of in data.resource_metrics for scope in of.scope_metrics for each in scope.metrics]
        points = [point for each in metrics if each.name == metric for point in each.data.data_points]
        status = ("http.response.status_code", "http.status_code")
        return {
            (
                point.attributes.get(route),
                next(point.attributes[name] for name in status if name in point.attributes),
            ): point.count
            for point in points
        }


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture(scope="module", autouse=True)
def both_conventions() -> Iterator[None]:
    """Contrib measures under the old names and the new ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", "http/dup")
        # It reads the variable once.
        patch.setattr(_OpenTelemetrySemanticConventionStability, "_initialized", False)
        yield
    _OpenTelemetrySemanticConventionStability._initialized = False


def native(telemetry: Telemetry) -> FastAPI:
    return FastAPI(telemetry={"tracer_provider": telemetry.tracer_provider, "meter_provider": telemetry.meter_provider})


def instrument(app: FastAPI, telemetry: Telemetry) -> None:
    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=telemetry.tracer_provider, meter_provider=telemetry.meter_provider
    )


class Passing:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


@asynccontextmanager
async def serving(
    app: FastAPI, url: str, *, after: Callable[[], None] = lambda: None, root_path: str = ""
) -> AsyncIterator[httpx2.AsyncClient]:
    overdrive = Overdrive(app, database_url=url, cache=True)
    router, inner = APIRouter(), FastAPI()

    async def get_user(user_id: int) -> int:
        return user_id

    router.get("/{user_id}")(cached(get_user))
    app.get("/users/{user_id}")(cached(get_user))
    app.include_router(router, prefix="/included")
    inner.get("/users/{user_id}")(cached(get_user))
    app.get("/own/{user_id}", dependencies=[Depends(HTTPBearer(auto_error=False))])(cached(get_user))
    app.mount("/inner", inner)
    after()
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False, root_path=root_path)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http
    await overdrive.aclose()
    if getattr(app, "_is_instrumented_by_opentelemetry", False):
        # It has changed more than this app.
        FastAPIInstrumentor.uninstrument_app(app)


async def ask(http: httpx2.AsyncClient, path: str) -> None:
    """Ask for what is not there yet, for what is, and for what the client has."""
    miss = await http.get(path)
    hit = await http.get(path)
    has = await http.get(path, headers={"if-none-match": miss.headers["etag"]})
    assert [each.headers["x-cache"] for each in (miss, hit, has)] == ["miss", "hit", "hit"]
    assert [each.status_code for each in (miss, hit, has)] == [200, 200, 304]


PATHS = {
    "/users/1": "/users/{user_id}",
    "/included/1": "/included/{user_id}",
    "/inner/users/1": "/inner/users/{user_id}",
    "/own/1": "/own/{user_id}",
}


@pytest.mark.parametrize("root_path", ["", "/api"])
@pytest.mark.parametrize("with_middleware", [False, True])
@pytest.mark.parametrize(("path", "route"), PATHS.items())
async def test_fastapis_own(
    sqlite_url: str, telemetry: Telemetry, path: str, route: str, with_middleware: bool, root_path: str
) -> None:
    app = native(telemetry)
    if with_middleware:
        app.add_middleware(Passing)
    async with serving(app, sqlite_url, root_path=root_path) as http:
        await ask(http, root_path + path)
    whole = root_path + route
    assert telemetry.spans() == [(f"GET {whole}", whole, status) for status in (200, 200, 304)]
    durations = telemetry.durations("http.server.request.duration", "http.route")
    assert durations == {(whole, 200): 2, (whole, 304): 1}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("with_middleware", [False, True])
@pytest.mark.parametrize(("path", "route"), PATHS.items())
async def test_contribs(
    sqlite_url: str, telemetry: Telemetry, path: str, route: str, with_middleware: bool, when: str
) -> None:
    app = FastAPI()
    if with_middleware:
        app.add_middleware(Passing)
    if when == "before":
        instrument(app, telemetry)
    after = (lambda: instrument(app, telemetry)) if when == "after" else (lambda: None)
    async with serving(app, sqlite_url, after=after) as http:
        await ask(http, path)
    # It knows less of mounts and of included routers than FastAPI, of a hit as of a miss.
    named = "/inner" if path.startswith("/inner") else route
    assert telemetry.spans() == [(f"GET {named}", named, status) for status in (200, 200, 304)]
    assert telemetry.durations("http.server.request.duration", "http.route") == {(named, 200): 2, (named, 304): 1}
    target = route.removeprefix("/included")
    assert telemetry.durations("http.server.duration", "http.target") == {(target, 200): 2, (target, 304): 1}


async def test_both(sqlite_url: str, telemetry: Telemetry) -> None:
    app = native(telemetry)
    instrument(app, telemetry)
    async with serving(app, sqlite_url) as http:
        await ask(http, "/users/1")
    assert telemetry.spans() == [("GET /users/{user_id}", "/users/{user_id}", status) for status in (200, 200, 304)]


async def test_an_error_is_told_and_answered_once(sqlite_url: str, telemetry: Telemetry) -> None:
    app = FastAPI()

    @app.exception_handler(Exception)
    async def answer(_request: Request, _error: Exception) -> Response:
        return Response("ours", 500)

    @app.get("/bad")
    async def bad() -> None:
        raise LookupError

    async with serving(app, sqlite_url, after=lambda: instrument(app, telemetry)) as http:
        answer_to = await http.get("/bad")
    assert (answer_to.status_code, answer_to.text, len(answer_to.headers.get_list("x-request-id"))) == (500, "ours", 1)
    assert telemetry.spans() == [("GET /bad", "/bad", 500)]
