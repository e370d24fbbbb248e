"""The rules end to end: the middleware over a reverse proxy, both servers real, and a client on a socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from typing import Any

import httpx2
import pytest
from starlette.types import Receive, Scope, Send
from support import on_uvicorn

from overdrive import CacheMiddleware
from overdrive.testing import Clock

pytestmark = pytest.mark.anyio


@dataclass
class Answer:
    """What the origin says: headers as lines, and a body that is the number of the request unless it is given."""

    headers: str = "Cache-Control: max-age=60"
    status: int = 200
    chunks: tuple[bytes, ...] | None = None
    #: Whether the connection breaks before the body is whole.
    breaks: bool = False


@dataclass
class Origin:
    """Gives each path's answers in turn, the last one again and again, and counts what it is asked."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    asked: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        asked = self.asked.setdefault(scope["path"], [])
        asked.append({name.decode(): value.decode() for name, value in scope["headers"]})
        answers = self.answers[scope["path"]]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        chunks = answer.chunks or (b"" if answer.status in (204, 304) else b"%d" % len(asked),)
        await send({"type": "http.response.start", "status": answer.status, "headers": lines(answer.headers)})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            # Apart from the next one, so that the proxy reads them one by one.
            await asyncio.sleep(0.01)
        if answer.breaks:
            raise ConnectionAbortedError
        await send({"type": "http.response.body", "body": b""})


def lines(text: str) -> list[tuple[bytes, bytes]]:
    pairs = (line.strip().partition(":") for line in text.strip().splitlines())
    return [(name.encode(), value.strip().encode()) for name, _, value in pairs]


class Proxy:
    """Hands every request on, and what is answered back, message by message."""

    def __init__(self, host: str, port: int) -> None:
        self.origin = f"http://{host}:{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        url = f"{self.origin}{scope['raw_path'].decode()}?{scope['query_string'].decode()}"
        content = (await receive()).get("body")
        async with (
            httpx2.AsyncClient() as http,
            http.stream(scope["method"], url, headers=scope["headers"], content=content) as answer,
        ):
            start = {"type": "http.response.start", "status": answer.status_code}
            await send({**start, "headers": [(name.lower(), value) for name, value in answer.headers.raw]})
            async for chunk in answer.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


@dataclass
class Service:
    """The origin, and where the cache is to be asked about a path of its own."""

    origin: Origin
    clock: Clock
    url: str
    path: str = "/"


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    origin, clock = Origin(), Clock(time.time())
    with (
        on_uvicorn(origin) as address,
        on_uvicorn(CacheMiddleware(Proxy(*address), clock=clock)) as (host, port),
    ):
        yield Service(origin, clock, f"http://{host}:{port}")


@pytest.fixture
def service(running: Service) -> Service:
    # The servers' clock stands beside ours, and tells it in Date.
    running.clock.now = time.time()
    return replace(running, path=f"/{len(running.origin.asked)}")


@dataclass
class Ask:
    """A request, how long it comes after the one before, and what it is answered."""

    body: bytes
    headers: str = ""
    method: str = "GET"
    status: int = 200
    later: float = 0


def past(seconds: float) -> str:
    return formatdate(time.time() - seconds, usegmt=True)


ONE, TWO = Ask(b"1"), Ask(b"2")
TAG = 'ETag: "a"'
FRESH = "Cache-Control: max-age=60"
#: The origin's clock is a minute behind by then.
LATER = "Cache-Control: max-age=600\n"

RULES: list[tuple[str, list[Answer], list[Ask], int]] = [
    ("fresh", [Answer()], [ONE, ONE], 1),
    ("stale", [Answer()], [ONE, Ask(b"2", later=60)], 2),
    ("s-maxage first", [Answer("Cache-Control: max-age=0, s-maxage=60")], [ONE, ONE], 1),
    ("quoted, in capitals", [Answer('Cache-Control: MAX-AGE="60"')], [ONE, ONE], 1),
    ("overflowing", [Answer("Cache-Control: max-age=99999999999999")], [ONE, ONE], 1),
    ("a fraction", [Answer("Cache-Control: max-age=60.5")], [ONE, TWO], 2),
    ("two lifetimes", [Answer("Cache-Control: max-age=60\nCache-Control: max-age=61")], [ONE, TWO], 2),
    ("Expires", [Answer(f"Expires: {past(-600)}")], [ONE, ONE], 1),
    ("Expires that is none", [Answer("Expires: 0")], [ONE, TWO], 2),
    ("Age spent", [Answer(f"{FRESH}\nAge: 60")], [ONE, TWO], 2),
    ("no-store", [Answer("Cache-Control: no-store, max-age=60")], [ONE, TWO], 2),
    ("private", [Answer("Cache-Control: private, max-age=60")], [ONE, TWO], 2),
    ("another final status", [Answer(FRESH, 404)], [Ask(b"1", status=404)] * 2, 1),
    ("no content", [Answer(FRESH, 204)], [Ask(b"", status=204)] * 2, 1),
    (
        "a part",
        [Answer(f"{FRESH}\nContent-Range: bytes 0-0/9", 206)],
        [Ask(b"1", status=206), Ask(b"2", status=206)],
        2,
    ),
    ("several chunks", [Answer(chunks=(b"a", b"b", b"c"))], [Ask(b"abc")] * 2, 1),
    ("another Vary", [Answer(f"{FRESH}\nVary: X")], [Ask(b"1", "X: 1"), Ask(b"2", "X: 2"), Ask(b"1", "X: 1")], 2),
    ("Vary by everything", [Answer(f"{FRESH}\nVary: *")], [ONE, TWO], 2),
    ("Authorization", [Answer()], [Ask(b"1", "Authorization: x"), TWO], 2),
    ("Authorization, public", [Answer(f"{FRESH}, public")], [Ask(b"1", "Authorization: x"), ONE], 1),
    ("no-cache asked", [Answer()], [ONE, Ask(b"2", "Cache-Control: no-cache")], 2),
    ("max-stale asked", [Answer()], [ONE, Ask(b"1", "Cache-Control: max-stale", later=90)], 1),
    ("only-if-cached", [Answer()], [Ask(b"", "Cache-Control: only-if-cached", status=504), ONE], 1),
    ("HEAD of a GET", [Answer()], [ONE, Ask(b"", method="HEAD")], 1),
    ("a client's tag", [Answer(f"{FRESH}\n{TAG}")], [ONE, Ask(b"", 'If-None-Match: "x", W/"a"', status=304)], 1),
    ("a client's date", [Answer(FRESH)], [ONE, Ask(b"", f"If-Modified-Since: {past(-600)}", status=304)], 1),
    ("validated", [Answer(f"{FRESH}\n{TAG}"), Answer(LATER + TAG, 304)], [ONE, Ask(b"1", later=60), ONE], 2),
    ("changed", [Answer(f"{FRESH}\n{TAG}"), Answer(LATER + 'ETag: "b"')], [ONE, Ask(b"2", later=60), TWO], 2),
    (
        "a part of what is stored",
        [Answer(chunks=(b"abc",))],
        [Ask(b"abc"), Ask(b"b", "Range: bytes=1-1", status=206)],
        1,
    ),
    ("a part of what is not", [Answer()], [Ask(b"1", "Range: bytes=0-0"), TWO, TWO], 2),
    ("an error without freshness", [Answer(TAG, 500)], [Ask(b"1", status=500), Ask(b"2", status=500)], 2),
    ("unsafe method", [Answer()], [ONE, Ask(b"2", method="POST"), Ask(b"3")], 3),
    ("unsafe and failed", [Answer(), Answer("", 500)], [ONE, Ask(b"2", method="POST", status=500), ONE], 2),
    (
        "stale if error",
        [Answer(f"{FRESH}, stale-if-error=60"), Answer("", 503)],
        [ONE, Ask(b"1", later=61), Ask(b"3", later=60, status=503)],
        3,
    ),
]


@pytest.mark.parametrize(("answers", "asks", "asked"), [pytest.param(*rule, id=name) for name, *rule in RULES])
async def test_rule(service: Service, answers: list[Answer], asks: list[Ask], asked: int) -> None:
    service.origin.answers[service.path] = list(answers)
    async with httpx2.AsyncClient(base_url=service.url) as http:
        for ask in asks:
            service.clock.tick(ask.later)
            answer = await http.request(ask.method, service.path, headers=lines(ask.headers))
            assert (answer.status_code, answer.content) == (ask.status, ask.body)
    assert len(service.origin.asked[service.path]) == asked


async def one_after_another(service: Service, *answers: Answer) -> list[httpx2.Response]:
    service.origin.answers[service.path] = list(answers)
    async with httpx2.AsyncClient(base_url=service.url) as http:
        return [await http.get(service.path) for _ in range(2)]


async def test_a_body_in_chunks_has_a_length_once_it_is_stored(service: Service) -> None:
    miss, hit = await one_after_another(service, Answer(chunks=(b"a", b"b")))
    assert (miss.headers.get("transfer-encoding"), miss.headers.get("content-length")) == ("chunked", None)
    assert (hit.headers.get("transfer-encoding"), hit.headers.get("content-length")) == (None, "2")


async def test_a_stale_response_is_asked_about_by_its_own_validators(service: Service) -> None:
    tagged = f"Cache-Control: max-age=0\n{TAG}"
    _, second = await one_after_another(service, Answer(tagged), Answer(tagged, 304))
    assert second.content == b"1"
    assert second.headers["cache-status"] == "overdrive; fwd=stale; fwd-status=304; stored"
    assert service.origin.asked[service.path][1]["if-none-match"] == '"a"'


async def test_what_a_write_names_is_asked_for_again(service: Service) -> None:
    service.origin.answers[service.path] = [Answer()]
    service.origin.answers[f"{service.path}/list"] = [Answer(f"Location: {service.path}", 201)]
    async with httpx2.AsyncClient(base_url=service.url) as http:
        await http.get(service.path)
        await http.post(f"{service.path}/list")
        assert (await http.get(service.path)).content == b"2"


async def test_a_broken_body_is_not_stored(service: Service) -> None:
    service.origin.answers[service.path] = [Answer(breaks=True), Answer()]
    async with httpx2.AsyncClient(base_url=service.url) as http:
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.get(service.path)
        assert (await http.get(service.path)).content == b"2"


async def test_what_is_missed_at_once_is_asked_once(service: Service) -> None:
    service.origin.answers[service.path] = [Answer(chunks=(b"a",) * 20)]
    async with httpx2.AsyncClient(base_url=service.url) as http:
        answers: list[Any] = await asyncio.gather(*(http.get(service.path) for _ in range(5)))
    assert [answer.content for answer in answers] == [b"a" * 20] * 5
    assert len(service.origin.asked[service.path]) == 1
