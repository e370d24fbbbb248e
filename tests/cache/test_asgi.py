"""The middleware over a scripted origin: what it asks the app, and what its clients are answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, TypeVar

import httpx2
import pytest
from starlette.types import Message, Receive, Scope, Send

from overdrive import CacheMiddleware
from overdrive.testing import Clock

pytestmark = pytest.mark.anyio

START = 1_800_000_000.0

Result = TypeVar("Result")


def date(offset: float = 0) -> str:
    return formatdate(START + offset, usegmt=True)


def headers(text: str) -> list[tuple[bytes, bytes]]:
    lines = (line.strip().partition(":") for line in text.strip().splitlines() if line.strip())
    return [(name.lower().encode(), value.strip().encode()) for name, _, value in lines]


@dataclass
class Answer:
    """What the origin answers: its headers as lines, and its body as messages."""

    headers: str = ""
    status: int = 200
    chunks: tuple[bytes, ...] = (b"body",)
    #: Waited for before anything is sent.
    gate: asyncio.Event | None = None
    #: Raised before anything is sent, or after the start.
    error: Exception | None = None
    late_error: Exception | None = None


@dataclass
class Origin:
    """An app that gives its answers in turn, the last one again and again."""

    answers: list[Answer] = field(default_factory=list)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append((scope["method"], {name.decode(): value.decode() for name, value in scope["headers"]}))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer.gate is not None:
            await answer.gate.wait()
        if answer.error is not None:
            raise answer.error
        await send({"type": "http.response.start", "status": answer.status, "headers": headers(answer.headers)})
        if answer.late_error is not None:
            raise answer.late_error
        for number, chunk in enumerate(answer.chunks, 1):
            more = number < len(answer.chunks)
            await send({"type": "http.response.body", "body": chunk, "more_body": more})


class Cached:
    """An origin behind the middleware, and its client."""

    def __init__(self, *answers: Answer, **options: Any) -> None:
        self.origin = Origin(list(answers))
        self.clock = Clock(START)
        self.app = CacheMiddleware(self.origin, clock=self.clock, **options)
        self.http = httpx2.AsyncClient(transport=httpx2.ASGITransport(self.app), base_url="http://service")

    async def ask(self, request: str = "", method: str = "GET", path: str = "/a") -> httpx2.Response:
        return await self.http.request(method, path, headers=headers(request))

    @property
    def count(self) -> int:
        return len(self.origin.asked)


FRESH = "Cache-Control: max-age=60"
HIT, FORWARDED = 1, 2


# A table: a response, what comes after it, and whether the app is asked again


CASES: list[tuple[str, Answer, dict[str, Any], int]] = [
    ("max-age", Answer(FRESH), {}, HIT),
    ("s-maxage", Answer("Cache-Control: s-maxage=60"), {}, HIT),
    ("s-maxage over max-age", Answer("Cache-Control: s-maxage=60, max-age=1"), {"tick": 30}, HIT),
    ("max-age gone by", Answer(FRESH), {"tick": 60}, FORWARDED),
    ("Expires", Answer(f"Expires: {date(60)}"), {"tick": 59}, HIT),
    ("Expires gone by", Answer(f"Expires: {date(60)}"), {"tick": 60}, FORWARDED),
    ("Expires and Date", Answer(f"Date: {date(-20)}\nExpires: {date(10)}"), {"tick": 9}, HIT),
    ("Expires invalid", Answer("Expires: 0"), {}, FORWARDED),
    ("max-age over Expires", Answer(f"{FRESH}\nExpires: 0"), {}, HIT),
    ("Age counts", Answer(f"{FRESH}\nAge: 59"), {"tick": 1}, FORWARDED),
    ("Age of the past", Answer(f"{FRESH}\nAge: 60"), {}, FORWARDED),
    ("Age not understood", Answer(f"{FRESH}\nAge: abc"), {}, HIT),
    ("Date of the past", Answer(f"{FRESH}\nDate: {date(-60)}"), {}, FORWARDED),
    ("Date of the future", Answer(f"{FRESH}\nDate: {date(600)}"), {"tick": 59}, HIT),
    ("CDN-Cache-Control is another's", Answer("CDN-Cache-Control: max-age=60"), {}, FORWARDED),
    ("nothing said", Answer(), {}, FORWARDED),
    ("no-store", Answer("Cache-Control: no-store, max-age=60"), {}, FORWARDED),
    ("no-cache", Answer("Cache-Control: no-cache, max-age=60"), {}, FORWARDED),
    ("private", Answer("Cache-Control: private, max-age=60"), {}, FORWARDED),
    ("Pragma of a response says nothing", Answer(f"{FRESH}\nPragma: no-cache"), {}, HIT),
    ("Set-Cookie", Answer(f"{FRESH}\nSet-Cookie: a=b"), {}, FORWARDED),
    ("Last-Modified alone", Answer(f"Last-Modified: {date(-9999)}"), {}, FORWARDED),
    *((f"status {each}", Answer(FRESH, each), {}, HIT) for each in (200, 203, 299, 301, 302, 307, 404, 410, 499)),
    *((f"status {each}", Answer(FRESH, each), {}, HIT) for each in (500, 503, 599)),
    *((f"status {each}", Answer(FRESH, each, (b"",)), {}, HIT) for each in (204, 205)),
    *((f"status {each}", Answer(FRESH, each), {}, FORWARDED) for each in (206, 304)),
    ("Content-Range", Answer(f"{FRESH}\nContent-Range: bytes 0-3/9"), {}, FORWARDED),
    ("no-cache asked", Answer(FRESH), {"then": "Cache-Control: no-cache"}, FORWARDED),
    ("max-age=0 asked", Answer(FRESH), {"then": "Cache-Control: max-age=0", "tick": 1}, FORWARDED),
    ("max-age asked", Answer(FRESH), {"then": "Cache-Control: max-age=9", "tick": 9}, HIT),
    ("min-fresh asked", Answer(FRESH), {"then": "Cache-Control: min-fresh=50", "tick": 11}, FORWARDED),
    ("max-stale asked", Answer(FRESH), {"then": "Cache-Control: max-stale=9", "tick": 69}, HIT),
    ("max-stale too old", Answer(FRESH), {"then": "Cache-Control: max-stale=9", "tick": 70}, FORWARDED),
    ("no-store asked", Answer(FRESH), {"first": "Cache-Control: no-store"}, FORWARDED),
    ("no-store asked of what is stored", Answer(FRESH), {"then": "Cache-Control: no-store"}, HIT),
    ("two Cache-Control lines asked", Answer(FRESH), {"then": "Cache-Control: x\nCache-Control: no-cache"}, FORWARDED),
    ("Pragma asked", Answer(FRESH), {"then": "Pragma: no-cache"}, FORWARDED),
    ("Pragma asked with Cache-Control", Answer(FRESH), {"then": "Pragma: no-cache\nCache-Control: x"}, HIT),
    ("If-Range without Range", Answer(FRESH), {"then": "If-Range: x"}, HIT),
    ("Range first", Answer(FRESH), {"first": "Range: bytes=0-1"}, FORWARDED),
    ("Range of what is stale", Answer(FRESH), {"then": "Range: bytes=0-1", "tick": 60}, FORWARDED),
    ("Range out of bounds", Answer(FRESH), {"then": "Range: bytes=4-"}, FORWARDED),
    ("Range of an error", Answer(FRESH, 404), {"then": "Range: bytes=0-1"}, FORWARDED),
    ("Range of HEAD", Answer(FRESH), {"then": "Range: bytes=0-1", "method": "HEAD"}, FORWARDED),
    ("If-Match asked", Answer(FRESH), {"then": "If-Match: x"}, FORWARDED),
    ("content", Answer(FRESH), {"then": "Content-Length: 0"}, FORWARDED),
    ("Authorization first", Answer(FRESH), {"first": "Authorization: x"}, FORWARDED),
    ("Authorization then", Answer(FRESH), {"then": "Authorization: x"}, FORWARDED),
    ("Authorization, public", Answer(f"{FRESH}, public"), {"first": "Authorization: x"}, HIT),
    ("Authorization, s-maxage", Answer("Cache-Control: s-maxage=60"), {"first": "Authorization: x"}, HIT),
    ("Authorization, must-revalidate", Answer(f"{FRESH}, must-revalidate"), {"first": "Authorization: x"}, HIT),
    ("Vary, same", Answer(f"{FRESH}\nVary: Foo"), {"first": "Foo: 1", "then": "Foo: 1"}, HIT),
    ("Vary, other", Answer(f"{FRESH}\nVary: Foo"), {"first": "Foo: 1", "then": "Foo: 2"}, FORWARDED),
    ("Vary, lines", Answer(f"{FRESH}\nVary: Foo"), {"first": "Foo: 1, 2", "then": "Foo: 1\nFoo: 2"}, HIT),
    ("Vary, everything", Answer(f"{FRESH}\nVary: *"), {}, FORWARDED),
    ("HEAD of a GET", Answer(FRESH), {"method": "HEAD"}, HIT),
    ("POST", Answer(FRESH), {"method": "POST"}, FORWARDED),
    ("OPTIONS", Answer(FRESH), {"method": "OPTIONS"}, FORWARDED),
    ("another path", Answer(FRESH), {"path": "/b"}, FORWARDED),
    ("another query", Answer(FRESH), {"path": "/a?b=1"}, FORWARDED),
    ("another spelling", Answer(FRESH), {"path": "/%61"}, FORWARDED),
    ("another host", Answer(FRESH), {"then": "Host: other"}, FORWARDED),
    ("a host in capitals", Answer(FRESH), {"then": "Host: SERVICE"}, HIT),
    ("several messages with their length", Answer(f"{FRESH}\nContent-Length: 4", chunks=(b"bo", b"d", b"y")), {}, HIT),
    ("a body of unknown length", Answer(FRESH, chunks=(b"bo", b"dy")), {}, HIT),
    ("a single chunk and its end", Answer(FRESH, chunks=(b"body", b"")), {}, HIT),
    ("a body of unknown length and its end", Answer(FRESH, chunks=(b"bo", b"dy", b"")), {}, HIT),
    ("a stream too large", Answer(FRESH, chunks=(b"x",) * 101), {"options": {"max_body": 100}}, FORWARDED),
    ("too short", Answer(f"{FRESH}\nContent-Length: 5"), {}, FORWARDED),
    ("too long", Answer(f"{FRESH}\nContent-Length: 3"), {}, FORWARDED),
    ("too large", Answer(FRESH, chunks=(b"x" * 101,)), {"options": {"max_body": 100}}, FORWARDED),
    ("as large as may be", Answer(FRESH, chunks=(b"x" * 100,)), {"options": {"max_body": 100}}, HIT),
    ("larger than it all", Answer(FRESH), {"options": {"max_bytes": 500}}, FORWARDED),
    ("heuristics", Answer(f"Last-Modified: {date(-100)}"), {"options": {"heuristics": True}, "tick": 9}, HIT),
]


@pytest.mark.parametrize(("answer", "options", "count"), [pytest.param(*each, id=name) for name, *each in CASES])
async def test_whether_the_app_is_asked_again(answer: Answer, options: dict[str, Any], count: int) -> None:
    cached = Cached(answer, **options.get("options", {}))
    first = await cached.ask(options.get("first", ""))
    cached.clock.tick(options.get("tick", 0))
    then = await cached.ask(options.get("then", ""), options.get("method", "GET"), options.get("path", "/a"))
    assert cached.count == count
    assert (first.status_code, first.content) == (answer.status, b"".join(answer.chunks))
    assert then.status_code == answer.status
    if options.get("method", "GET") == "GET":
        assert then.content == first.content
    assert then.headers["cache-status"].startswith("overdrive; hit; ttl=" if count == HIT else "overdrive; fwd=")


async def test_a_hit_is_the_miss_with_its_age() -> None:
    cached = Cached(Answer(f"{FRESH}\nX-A: 1\nConnection: X-Hop\nX-Hop: 1\nProxy-Authenticate: x"))
    miss = await cached.ask()
    cached.clock.tick(7.9)
    hit = await cached.ask()
    assert (miss.headers["cache-status"], "age" in miss.headers) == ("overdrive; fwd=uri-miss; stored", False)
    assert dict(hit.headers) == {
        "cache-control": "max-age=60",
        "x-a": "1",
        "etag": miss.headers["etag"],
        "content-length": "4",
        "age": "7",
        "cache-status": "overdrive; hit; ttl=53",
    }
    head = await cached.ask(method="HEAD")
    assert (dict(head.headers), head.content) == (dict(hit.headers), b"")
    cached.clock.tick(1)
    later = await cached.ask()
    assert (later.headers["age"], later.headers["cache-status"]) == ("8", "overdrive; hit; ttl=52")


async def test_a_whole_body_has_a_length_and_no_chunks() -> None:
    cached = Cached(Answer(f"{FRESH}\nTransfer-Encoding: chunked"))
    for _ in range(2):
        answer = await cached.ask()
        assert (answer.headers["content-length"], "transfer-encoding" in answer.headers) == ("4", False)


async def test_the_status_can_be_hidden() -> None:
    cached = Cached(Answer(FRESH), hide_status=True)
    answers = [await cached.ask(), await cached.ask(), await cached.ask(method="POST")]
    assert not any("cache-status" in answer.headers for answer in answers)


@pytest.mark.parametrize(
    ("request_", "method", "status"),
    [
        ("", "GET", "overdrive; fwd=uri-miss"),
        ("", "POST", "overdrive; fwd=method"),
        ("Range: bytes=0-1", "GET", "overdrive; fwd=bypass"),
        ("Cache-Control: no-store", "GET", "overdrive; fwd=request"),
    ],
)
async def test_the_status_says_why_a_request_is_forwarded(request_: str, method: str, status: str) -> None:
    assert (await Cached(Answer()).ask(request_, method)).headers["cache-status"] == status


async def test_only_if_cached_is_never_forwarded() -> None:
    cached = Cached(Answer(FRESH))
    refused = await cached.ask("Cache-Control: only-if-cached")
    # What is made here of no stored response has none (RFC 9211, section 2).
    assert (refused.status_code, "cache-status" in refused.headers) == (504, False)
    assert (await cached.ask("Cache-Control: only-if-cached\nRange: bytes=0-1")).status_code == 504
    assert cached.count == 0
    await cached.ask()
    assert (await cached.ask("Cache-Control: only-if-cached")).status_code == 200


async def test_a_part_of_what_is_stored_is_a_hit() -> None:
    cached = Cached(Answer(f'{FRESH}\nETag: "a"'))
    await cached.ask()
    answer = await cached.ask("Range: bytes=1-2")
    assert (answer.status_code, answer.content) == (206, b"od")
    assert [answer.headers[name] for name in ("content-range", "content-length", "etag")] == ["bytes 1-2/4", "2", '"a"']
    assert answer.headers["cache-status"] == "overdrive; hit; ttl=60"
    assert (await cached.ask('Range: bytes=1-2\nIf-None-Match: "a"')).status_code == 304
    assert (await cached.ask()).content == b"body"
    assert cached.count == 1


async def test_variants_are_kept_beside_each_other() -> None:
    cached = Cached(*(Answer(f"{FRESH}\nVary: Foo", chunks=(body,)) for body in (b"1", b"2", b"3")))
    assert [(await cached.ask(f"Foo: {each}")).content for each in "12121"] == [b"1", b"2", b"1", b"2", b"1"]
    third = await cached.ask("Foo: 3")
    assert third.headers["cache-status"] == "overdrive; fwd=vary-miss; stored"


@pytest.mark.parametrize(("dates", "body"), [((0, 0), b"2"), ((-5, -9), b"1"), ((-9, -5), b"2")])
async def test_of_several_variants_the_latest_is_sent(dates: tuple[float, float], body: bytes) -> None:
    first, second = (f"Cache-Control: max-age=60\nDate: {date(each)}" for each in dates)
    cached = Cached(Answer(f"{first}\nVary: A", chunks=(b"1",)), Answer(f"{second}\nVary: B", chunks=(b"2",)))
    await cached.ask("A: 1")
    await cached.ask("B: 1")
    assert (await cached.ask("A: 1\nB: 1")).content == body
    assert cached.count == 2


async def test_there_are_not_more_variants_than_one_can_look_through() -> None:
    cached = Cached(Answer(f"{FRESH}\nVary: Foo"))
    for number in range(65):
        await cached.ask(f"Foo: {number}")
    await cached.ask("Foo: 1")
    assert cached.count == 65
    await cached.ask("Foo: 0")
    assert cached.count == 66


# Validation


@pytest.mark.parametrize(
    ("validator", "question"),
    [('ETag: "a"', {"if-none-match": '"a"'}), (f"Last-Modified: {date(-9)}", {"if-modified-since": date(-9)})],
)
async def test_a_stale_response_is_validated_and_updated(validator: str, question: dict[str, str]) -> None:
    updated = Answer(f"{FRESH}\n{validator}\nX-A: 2\nContent-Length: 0", 304, ())
    cached = Cached(Answer(f"{FRESH}\n{validator}\nX-A: 1\nX-B: 1"), updated)
    await cached.ask()
    cached.clock.tick(60)
    answer = await cached.ask('If-None-Match: "other"')
    asked = {name: value for name, value in cached.origin.asked[1][1].items() if name.startswith("if-")}
    assert asked == question
    assert (answer.status_code, answer.content) == (200, b"body")
    assert answer.headers["cache-status"] == "overdrive; fwd=stale; fwd-status=304; stored"
    hit = await cached.ask()
    assert cached.count == 2
    assert [hit.headers[name] for name in ("x-a", "x-b", "content-length", "age")] == ["2", "1", "4", "0"]


async def test_the_app_is_never_asked_about_a_tag_made_here() -> None:
    cached = Cached(Answer(f"{FRESH}\nLast-Modified: {date(-9)}"), Answer("", 304, ()))
    tags = set()
    for _ in range(3):
        tags.add((await cached.ask()).headers.get("etag"))
        cached.clock.tick(60)
    assert len(tags) == 1
    assert cached.count == 3
    assert not any("if-none-match" in asked for _, asked in cached.origin.asked)


async def test_a_changed_response_takes_the_place_of_a_stale_one() -> None:
    cached = Cached(Answer(f'{FRESH}\nETag: "a"'), Answer(f'{FRESH}\nETag: "b"', chunks=(b"new",)))
    await cached.ask()
    cached.clock.tick(60)
    assert [(await cached.ask()).content for _ in range(2)] == [b"new", b"new"]
    assert cached.count == 2


async def test_a_304_of_something_else_is_not_believed() -> None:
    new = Answer(f'{FRESH}\nETag: "b"', chunks=(b"new",))
    cached = Cached(Answer(f'{FRESH}\nETag: "a"'), Answer('ETag: "b"', 304, ()), new)
    await cached.ask()
    cached.clock.tick(60)
    assert (await cached.ask()).content == b"new"
    assert "if-none-match" not in cached.origin.asked[2][1]


async def test_who_is_asked_a_second_time_reads_the_request_a_second_time() -> None:
    count = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal count
        count += 1
        assert (await receive())["type"] == "http.request"
        status, tag = [(200, '"a"'), (304, '"b"'), (200, '"b"')][count - 1]
        await send({"type": "http.response.start", "status": status, "headers": headers(f"{FRESH}\nETag: {tag}")})
        await send({"type": "http.response.body", "body": b""})

    clock = Clock(START)
    cache = CacheMiddleware(app, clock=clock)
    for _ in range(2):
        said: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive(said: list[Message] = said) -> Message:
            return said.pop() if said else {"type": "http.disconnect"}

        await cache(scope(), receive, nowhere)
        clock.tick(60)
    assert count == 3


async def test_what_may_no_longer_be_stored_takes_the_stale_response_along() -> None:
    cached = Cached(Answer(f'{SIE}\nETag: "a"'), Answer("Cache-Control: no-store"), Answer("", 500))
    await cached.ask()
    cached.clock.tick(60)
    assert [(await cached.ask()).status_code for _ in range(2)] == [200, 500]


async def test_a_304_that_forbids_storing_is_the_last() -> None:
    cached = Cached(Answer(f'{FRESH}\nETag: "a"'), Answer("Cache-Control: no-store", 304, ()), Answer())
    await cached.ask()
    cached.clock.tick(60)
    answer = await cached.ask()
    assert (answer.content, answer.headers["cache-control"]) == (b"body", "no-store")
    await cached.ask()
    assert (cached.count, "if-none-match" in cached.origin.asked[2][1]) == (3, False)


@pytest.mark.parametrize("request_", ["", 'If-None-Match: "1"'])
async def test_a_cookie_that_comes_with_a_304_is_its_clients_alone(request_: str) -> None:
    cached = Cached(
        Answer('Cache-Control: max-age=60\nETag: "1"'),
        Answer('Cache-Control: max-age=60\nETag: "1"\nSet-Cookie: a=1\nSet-Cookie: b=2', status=304, chunks=(b"",)),
    )
    await cached.ask()
    cached.clock.tick(60)
    validated = await cached.ask(request_)
    assert validated.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert (await cached.ask()).headers.get_list("set-cookie") == []
    assert cached.count == 2


async def test_clients_are_answered_304_by_tags_made_here() -> None:
    cached = Cached(Answer(FRESH))
    tag = (await cached.ask()).headers["etag"]
    for _ in range(2):
        answer = await cached.ask(f'If-None-Match: "x", W/{tag}')
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
        assert "content-length" not in answer.headers
        # Once more after it has expired, when the app knows nothing of the tag.
        cached.clock.tick(60)
    assert "if-none-match" not in cached.origin.asked[1][1]
    assert (await cached.ask('If-None-Match: "x"')).status_code == 200


async def test_a_clients_question_about_what_is_not_stored_is_the_apps() -> None:
    cached = Cached(Answer(f'{FRESH}\nETag: "a"', 304, (b"",)), Answer(f'{FRESH}\nETag: "a"'))
    assert (await cached.ask('If-None-Match: "a"')).status_code == 304
    assert (await cached.ask()).content == b"body"


@pytest.mark.parametrize(
    ("answer", "count", "x"),
    [
        (Answer("X-A: 2\nContent-Length: 4\nCache-Control: max-age=60", chunks=(b"",)), 2, "2"),
        (Answer("Content-Length: 5", chunks=(b"",)), 3, "3"),
        (Answer('ETag: "b"', chunks=(b"",)), 3, "3"),
        (Answer("", 410, (b"",)), 3, "3"),
        (Answer("", 500, (b"",)), 3, "3"),
    ],
)
async def test_what_a_head_says_of_the_stored_response(answer: Answer, count: int, x: str) -> None:
    cached = Cached(Answer(f"{FRESH}\nX-A: 1"), answer, Answer(f"{FRESH}\nX-A: 3"))
    await cached.ask()
    cached.clock.tick(60)
    await cached.ask(method="HEAD")
    assert ((await cached.ask()).headers["x-a"], cached.count) == (x, count)


# Invalidation


@pytest.mark.parametrize(
    ("method", "status", "response", "count"),
    [
        ("POST", 200, "", 3),
        ("PUT", 204, "", 3),
        ("DELETE", 302, "", 3),
        ("M-SEARCH", 200, "", 3),
        ("POST", 404, "", 2),
        ("POST", 500, "", 2),
        ("OPTIONS", 200, "", 2),
    ],
)
async def test_writes_invalidate(method: str, status: int, response: str, count: int) -> None:
    cached = Cached(Answer(FRESH), Answer(response, status), Answer(FRESH))
    await cached.ask()
    await cached.ask(method=method)
    await cached.ask()
    assert cached.count == count


@pytest.mark.parametrize("name", ["Location", "Content-Location"])
@pytest.mark.parametrize(("origin", "count"), [("", 3), ("http://service", 3), ("http://other", 2)])
async def test_writes_invalidate_what_they_name_of_the_same_origin(name: str, origin: str, count: int) -> None:
    cached = Cached(Answer(FRESH), Answer(f"{name}: {origin}/a?b=%201", 201), Answer(FRESH))
    await cached.ask(path="/a?b=%201")
    await cached.ask(method="POST", path="/list")
    await cached.ask(path="/a?b=%201")
    assert cached.count == count


async def test_what_was_being_made_during_a_write_is_not_stored() -> None:
    gate = asyncio.Event()
    cached = Cached(Answer(FRESH, gate=gate), Answer(), Answer(FRESH, chunks=(b"new",)))
    reading = asyncio.create_task(cached.ask())
    await until(lambda: cached.count == 1)
    await cached.ask(method="POST")
    gate.set()
    assert (await reading).content == b"body"
    assert (await cached.ask()).content == b"new"


async def test_a_head_does_not_bring_back_what_was_invalidated_meanwhile() -> None:
    gate = asyncio.Event()
    cached = Cached(Answer(FRESH), Answer(FRESH, chunks=(b"",), gate=gate), Answer(), Answer(FRESH))
    await cached.ask()
    cached.clock.tick(60)
    heading = asyncio.create_task(cached.ask(method="HEAD"))
    await until(lambda: cached.count == 2)
    await cached.ask(method="POST")
    gate.set()
    await heading
    await cached.ask()
    assert cached.count == 4


# Stale responses

SWR = "Cache-Control: max-age=60, stale-while-revalidate=30"
SIE = "Cache-Control: max-age=60, stale-if-error=30"


async def at_once(work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` comes to without waiting for anybody."""
    task = asyncio.create_task(work)
    await until(task.done)
    return task.result()


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError


async def test_stale_while_one_task_revalidates() -> None:
    gate = asyncio.Event()
    cached = Cached(Answer(SWR), Answer(SWR, chunks=(b"new",), gate=gate))
    await cached.ask()
    cached.clock.tick(70)
    answers = [await cached.ask(), await cached.ask(method="HEAD"), await cached.ask()]
    assert [answer.headers["cache-status"] for answer in answers] == ["overdrive; hit; ttl=-10"] * 3
    await until(lambda: cached.count == 2)
    gate.set()
    await until(lambda: not cached.app._refreshing)
    assert [method for method, _ in cached.origin.asked] == ["GET", "GET"]
    assert (await cached.ask()).content == b"new"
    assert cached.count == 2


async def test_a_revalidation_has_a_client_that_stays_until_it_is_over() -> None:
    heard: list[Message] = []
    methods: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        methods.append(scope["method"])
        scope["state"]["of"] = methods[-1]
        heard.append(await receive())
        listening = asyncio.create_task(receive())
        await asyncio.sleep(0)
        assert scope["state"]["of"] == methods[-1]
        assert not listening.done() or len(methods) == 1
        await send({"type": "http.response.start", "status": 200, "headers": headers(SWR)})
        await send({"type": "http.response.body", "body": b""})
        heard.append(await listening)

    clock = Clock(START)
    cache = CacheMiddleware(app, clock=clock)
    await cache(scope(state={}), nothing_more, nowhere)
    clock.tick(70)
    state: dict[str, object] = {}
    await cache(scope(method="HEAD", state=state), nothing_more, nowhere)
    await until(lambda: not cache._refreshing)
    assert [message["type"] for message in heard[2:]] == ["http.request", "http.disconnect"]
    assert (methods, state) == (["GET", "GET"], {})


async def test_who_forbids_storing_revalidates_nothing() -> None:
    cached = Cached(Answer(SWR))
    await cached.ask()
    cached.clock.tick(70)
    assert (await cached.ask("Cache-Control: no-store")).headers["cache-status"] == "overdrive; hit; ttl=-10"
    assert not cached.app._refreshing


async def test_a_part_of_what_is_stale_revalidates_all_of_it() -> None:
    cached = Cached(Answer(SWR), Answer(SWR, chunks=(b"new",)))
    await cached.ask()
    cached.clock.tick(70)
    assert (await cached.ask("Range: bytes=0-1")).content == b"bo"
    await until(lambda: cached.count == 2 and not cached.app._refreshing)
    assert "range" not in cached.origin.asked[1][1]
    assert (await cached.ask()).content == b"new"


async def test_a_failing_revalidation_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    cached = Cached(Answer(SWR), Answer(error=ValueError("no")))
    await cached.ask()
    cached.clock.tick(70)
    assert (await cached.ask()).content == b"body"
    await until(lambda: caplog.records)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.parametrize("failure", [Answer("", 500), Answer("", 503), Answer(error=ValueError("no"))])
@pytest.mark.parametrize("control", [SIE, f"{SIE}, must-revalidate"])
@pytest.mark.parametrize("tick", [60, 90])
async def test_stale_if_error(failure: Answer, control: str, tick: float) -> None:
    cached = Cached(Answer(control), failure)
    await cached.ask()
    cached.clock.tick(tick)
    if control == SIE and tick == 60:
        answer = await cached.ask()
        assert (answer.status_code, answer.content) == (200, b"body")
        assert answer.headers["cache-status"] == f"overdrive; fwd=stale; fwd-status={max(failure.status, 500)}"
    elif failure.error is not None:
        with pytest.raises(ValueError, match="no"):
            await cached.ask()
    else:
        assert (await cached.ask()).status_code == failure.status


async def test_an_error_leaves_what_is_stored() -> None:
    cached = Cached(Answer(f'{FRESH}\nETag: "a"'), Answer("", 500), Answer(FRESH, 304, ()))
    await cached.ask()
    cached.clock.tick(60)
    assert [(await cached.ask()).status_code for _ in range(2)] == [500, 200]


# Concurrency


async def test_concurrent_misses_are_one() -> None:
    gate = asyncio.Event()
    cached = Cached(Answer(FRESH, gate=gate))
    asking = [asyncio.create_task(cached.ask()) for _ in range(5)]
    await until(lambda: cached.count == 1)
    gate.set()
    answers = await asyncio.gather(*asking)
    assert cached.count == 1
    assert sorted(answer.headers["cache-status"] for answer in answers) == [
        *["overdrive; fwd=uri-miss; collapsed"] * 4,
        "overdrive; fwd=uri-miss; stored",
    ]
    assert cached.app._fills == {}


@pytest.mark.parametrize(
    "first",
    [
        Answer("Cache-Control: no-store"),
        Answer(f"{FRESH}\nContent-Length: 5"),
        Answer(f"{FRESH}\nVary: *"),
        Answer("", 500),
        Answer(error=ValueError("no")),
        Answer(f"{FRESH}\nContent-Length: 4", late_error=ValueError("no")),
    ],
)
async def test_who_waited_in_vain_asks_the_app_itself(first: Answer) -> None:
    gate = first.gate = asyncio.Event()
    cached = Cached(first, Answer())
    asking = [asyncio.create_task(cached.ask()) for _ in range(4)]
    await until(lambda: cached.count == 1)
    for _ in range(20):
        await asyncio.sleep(0)
    gate.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert cached.count == 4
    failed = bool(first.error or first.late_error)
    assert [isinstance(answer, ValueError) for answer in answers] == [failed, False, False, False]
    assert cached.app._fills == {}


async def test_who_waits_for_a_cancelled_leader_asks_the_app_itself() -> None:
    cached = Cached(Answer(FRESH, gate=asyncio.Event()), Answer(FRESH, chunks=(b"new",)))
    leader = asyncio.create_task(cached.ask())
    await until(lambda: cached.count == 1)
    follower = asyncio.create_task(cached.ask())
    for _ in range(20):
        await asyncio.sleep(0)
    leader.cancel()
    assert (await follower).content == b"new"
    assert leader.cancelled()
    assert cached.app._fills == {}


async def test_a_follower_that_goes_away_disturbs_nobody() -> None:
    gate = asyncio.Event()
    cached = Cached(Answer(FRESH, gate=gate))
    asking = [asyncio.create_task(cached.ask()) for _ in range(3)]
    await until(lambda: cached.count == 1)
    for _ in range(20):
        await asyncio.sleep(0)
    asking[1].cancel()
    gate.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [False, True, False]
    assert cached.count == 1


async def test_nobody_waits_longer_than_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.cache.asgi._PATIENCE", 0)
    gate = asyncio.Event()
    cached = Cached(Answer(FRESH, gate=gate), Answer(FRESH, chunks=(b"new",)))
    leader = asyncio.create_task(cached.ask())
    await until(lambda: cached.count == 1)
    assert (await cached.ask()).content == b"new"
    gate.set()
    await leader


async def test_nobody_waits_for_what_could_not_be_stored_before() -> None:
    gate = asyncio.Event()
    cached = Cached(Answer(), Answer(gate=gate), Answer(chunks=(b"other",)))
    await cached.ask()
    slow = asyncio.create_task(cached.ask())
    await until(lambda: cached.count == 2)
    assert (await at_once(cached.ask())).content == b"other"
    gate.set()
    await slow


async def test_nobody_waits_for_what_is_stale_at_once() -> None:
    gate = asyncio.Event()
    cached = Cached(Answer('ETag: "a"'), Answer("", 304, (), gate), Answer("", 304, ()))
    await cached.ask()
    slow = asyncio.create_task(cached.ask())
    await until(lambda: cached.count == 2)
    assert (await at_once(cached.ask())).content == b"body"
    gate.set()
    assert (await slow).content == b"body"


async def test_who_asks_for_something_waits_for_nobody() -> None:
    gate = asyncio.Event()
    cached = Cached(Answer(FRESH, gate=gate), Answer(FRESH, chunks=(b"new",)))
    slow = asyncio.create_task(cached.ask())
    await until(lambda: cached.count == 1)
    for request in ("Cache-Control: no-cache", "Authorization: x"):
        assert (await at_once(cached.ask(request))).content == b"new"
    gate.set()
    await slow


async def test_a_client_that_is_gone_leaves_what_was_made_for_it() -> None:
    cached = Cached(Answer(FRESH))

    async def broken(message: Message) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await cached.app(scope(), nothing_more, broken)
    await cached.ask()
    assert cached.count == 1


# What passes as it is


def scope(**more: Any) -> Scope:
    return {
        "type": "http",
        "method": "GET",
        "scheme": "http",
        "path": "/a",
        "raw_path": b"/a",
        "query_string": b"",
        "headers": [(b"host", b"service")],
        **more,
    }


async def nothing_more() -> Message:
    return {"type": "http.disconnect"}


async def nowhere(message: Message) -> None:
    pass


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_other_scopes_pass(kind: str) -> None:
    passed: list[Any] = []

    async def app(*arguments: Any) -> None:
        passed.extend(arguments)

    arguments = [{"type": kind}, nothing_more, nowhere]
    await CacheMiddleware(app)(*arguments)
    assert all(one is other for one, other in zip(passed, arguments, strict=True))


@pytest.mark.parametrize("control", [FRESH, "Cache-Control: no-store"])
async def test_a_stream_passes_chunk_by_chunk(control: str) -> None:
    events: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers(control)})
        for number in range(3):
            events.append(f"made {number}")
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Message) -> None:
        events.append(message.get("body", "start"))

    await CacheMiddleware(app)(scope(), nothing_more, send)
    expected = ["made 0", b"0", "made 1", b"1", "made 2", b"2", b""]
    assert [event for event in events if event != "start"] == expected
    assert events.index("start") < events.index(b"0")


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "http.response.pathsend", "path": "/x"}],
        [{"type": "http.response.body", "body": b"a"}, {"type": "http.response.trailers", "headers": []}],
        [{"type": "http.response.body", "body": b"a", "more_body": True}],
        [],
    ],
)
async def test_what_is_not_one_whole_body_passes(messages: list[Message]) -> None:
    count = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal count
        count += 1
        trailers = any(message["type"].endswith("trailers") for message in messages)
        start = {"type": "http.response.start", "status": 200, "headers": headers(FRESH), "trailers": trailers}
        for message in (start, *messages):
            await send(message)

    cache = CacheMiddleware(app, hide_status=True)
    for asked in (1, 2):
        sent: list[Message] = []

        async def send(message: Message, sent: list[Message] = sent) -> None:
            sent.append(message)

        await cache(scope(), nothing_more, send)
        assert sent[0]["headers"] == headers(FRESH)
        assert sent[1:] == messages
        assert count == asked


async def test_an_interim_response_passes_and_the_final_one_is_stored() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 103, "headers": [(b"link", b"x")]})
        await send({"type": "http.response.start", "status": 200, "headers": headers(FRESH)})
        await send({"type": "http.response.body", "body": b"body"})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    cache = CacheMiddleware(app)
    for _ in range(2):
        await cache(scope(), nothing_more, send)
    assert [message.get("status") for message in sent] == [103, 200, None, 200, None]
    assert sent[0]["headers"] == [(b"link", b"x")]


async def test_an_app_that_fails_after_its_start_fails_and_stores_nothing() -> None:
    cached = Cached(Answer(FRESH, late_error=ValueError("no")), Answer(FRESH))
    with pytest.raises(ValueError, match="no"):
        await cached.ask()
    assert (await cached.ask()).content == b"body"
    assert cached.count == 2


async def test_messages_are_new_for_each_request() -> None:
    cached = Cached(Answer(FRESH))
    counts: list[int] = []

    async def send(message: Message) -> None:
        counts.append(len(message.setdefault("headers", [])))
        message["headers"].append((b"x", b"y"))
        message["body"] = b"changed"

    for _ in range(3):
        await cached.app(scope(), nothing_more, send)
    assert counts[2::2] == [5, 5]
    assert (await cached.ask()).content == b"body"


async def test_what_is_stored_of_a_stream_is_what_the_app_sent() -> None:
    cached = Cached(Answer(FRESH, chunks=(b"bo", b"d", b"y")))

    async def send(message: Message) -> None:
        message["body"] = b"changed"

    await cached.app(scope(), nothing_more, send)
    assert ((await cached.ask()).content, cached.count) == (b"body", 1)
