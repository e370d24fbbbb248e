"""One object a request, wherever the request is worked on; collectors that nest; fields that are bound."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio.to_thread
import pytest
from fastapi import FastAPI
from support import call, client, recorded

from overdrive import Overdrive, bind
from overdrive.context import RequestContext, bound, collecting, collectors, current, serving
from overdrive.instrumentation.events import RequestEvent

pytestmark = pytest.mark.anyio


def request(name: str = "1") -> RequestContext:
    return RequestContext(request_id=name, method="GET", path="/")


async def test_there_is_no_request_where_none_is_served() -> None:
    assert current() is None
    with serving(request()) as context:
        assert current() is context
    assert current() is None


async def test_threads_and_tasks_write_to_the_requests_one_object() -> None:
    def in_thread() -> None:
        context = current()
        assert context is not None
        context.rows += 1

    async def in_task() -> None:
        in_thread()

    with serving(request()) as context:
        await anyio.to_thread.run_sync(in_thread)
        await asyncio.create_task(in_task())
        async with anyio.create_task_group() as group:
            group.start_soon(in_task)
        assert context.rows == 3


async def test_endpoints_of_both_kinds_see_the_middlewares_object(sqlite_url: str) -> None:
    app = FastAPI()
    Overdrive(app, database_url=sqlite_url)
    seen: list[RequestContext | None] = []

    @app.middleware("http")
    async def note(incoming: Any, call_next: Any) -> Any:
        seen.append(current())
        return await call_next(incoming)

    @app.get("/async")
    async def asynchronous() -> None:
        seen.append(current())

    @app.get("/sync")
    def synchronous() -> None:
        seen.append(current())

    for path in ("/async", "/sync"):
        seen.clear()
        await call(app, path)
        assert seen[0] is not None
        assert seen[0] is seen[1]


async def test_two_requests_at_once_do_not_mix(sqlite_url: str) -> None:
    app = FastAPI()
    Overdrive(app, database_url=sqlite_url)
    both = anyio.Event()
    inside: list[str] = []

    @app.get("/{name}")
    async def endpoint(name: str) -> dict[str, Any]:
        bind(name=name)
        inside.append(name)
        if len(inside) == 2:
            both.set()
        with anyio.fail_after(10):
            await both.wait()
        await anyio.to_thread.run_sync(lambda: bind(**{f"thread_{name}": name}))
        return dict(bound())

    with recorded() as events:
        async with client(app) as http:
            answers = await asyncio.gather(http.get("/a"), http.get("/b"))

    assert [answer.json() for answer in answers] == [{"name": name, f"thread_{name}": name} for name in "ab"]
    requests = {event.path: event for event in events if isinstance(event, RequestEvent)}
    assert requests["/a"].fields == {"name": "a", "thread_a": "a"}
    assert requests["/b"].fields == {"name": "b", "thread_b": "b"}
    assert len({answer.headers["x-request-id"] for answer in answers}) == 2


async def test_collectors_nest_and_close() -> None:
    with collecting() as outer:
        with collecting() as inner:
            assert collectors() == (outer, inner)
        assert collectors() == (outer,)
    assert collectors() == ()


async def test_the_requests_own_reads_are_the_outermost_collector_of_it() -> None:
    with collecting() as before, serving(request()) as context:
        # What a request reads is no business of whoever happens to be collecting around its server.
        assert collectors() == (context.reads,)
        with collecting() as inner:
            assert collectors() == (context.reads, inner)
            assert await anyio.to_thread.run_sync(collectors) == (context.reads, inner)
    assert before.tags == set()


async def test_a_collector_closes_where_its_block_raises() -> None:
    with pytest.raises(ZeroDivisionError), collecting():
        raise ZeroDivisionError
    assert collectors() == ()


async def test_fields_bound_in_a_request_reach_its_tasks_threads_and_end_with_it() -> None:
    async def in_task() -> dict[str, Any]:
        bind(task=2)
        return bound()

    with serving(request()) as context:
        bind(user=1)
        await asyncio.create_task(in_task())
        await anyio.to_thread.run_sync(lambda: bind(thread=3))
        assert bound() is context.fields
        assert context.fields == {"user": 1, "task": 2, "thread": 3}
        bind(user=4)
        assert context.fields["user"] == 4
    assert bound() == {}


async def test_fields_bound_outside_a_request_reach_what_is_started_there_and_no_further() -> None:
    async def job(name: str) -> dict[str, Any]:
        bind(job=name)
        inner = await asyncio.create_task(child())
        assert bound() == {"job": name}
        assert await anyio.to_thread.run_sync(bound) == {"job": name}
        return inner

    async def child() -> dict[str, Any]:
        bind(child=True)
        return bound()

    assert await asyncio.gather(job("a"), job("b")) == [{"job": "a", "child": True}, {"job": "b", "child": True}]
    assert bound() == {}
