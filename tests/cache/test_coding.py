"""Bodies that are kept as gzip, and who is sent them (RFC 9110, sections 8.8.3.3 and 12.5.3)."""

from __future__ import annotations

import gzip
import threading
from random import Random
from typing import Any

import httpx2
import pytest
from cache.service import Service, serve
from fastapi import Depends, FastAPI, Response
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from hypothesis import given
from hypothesis import strategies as st
from starlette.middleware.gzip import GZipMiddleware
from support import client, on_uvicorn

from overdrive import Overdrive, Settings, cached
from overdrive.cache import coding
from overdrive.cache.coding import accepts_gzip, gzipped, is_worth_it
from overdrive.config import CacheSettings
from overdrive.testing import Clock

pytestmark = pytest.mark.anyio

LONG = "text " * 1_000
NOISE = Random(1).randbytes(2_000).hex()
GZIP = {"Accept-Encoding": "gzip"}
PLAIN = {"Accept-Encoding": "identity"}


def add_long(service: Service, media_type: str = "text/plain", body: str | bytes = LONG, **headers: str) -> None:
    @service.app.get("/long")
    @cached(ttl=10, stale_while_revalidate=30)
    async def long() -> Response:
        service.ran.append("/long")
        return Response(body, media_type=media_type, headers=headers)


def raw(answer: httpx2.Response) -> tuple[str | None, str, str]:
    return answer.headers.get("content-encoding"), answer.headers["content-length"], answer.headers["etag"]


async def test_hits_are_sent_what_they_take(service: Service) -> None:
    add_long(service)
    miss = await service.get("/long", headers=GZIP)
    plain = await service.get("/long", headers=PLAIN)
    packed = await service.get("/long", headers=GZIP)
    assert [each.headers["x-cache"] for each in (miss, plain, packed)] == ["miss", "hit", "hit"]
    assert {each.text for each in (miss, plain, packed)} == {LONG}
    assert {each.headers["vary"] for each in (miss, plain, packed)} == {"Accept-Encoding"}
    assert raw(miss) == raw(plain) == (None, "5000", plain.headers["etag"])
    body = gzip.compress(LONG.encode(), 6, mtime=0)
    assert raw(packed) == ("gzip", str(len(body)), plain.headers["etag"][:-1] + '-gzip"')
    assert service.ran == ["/long"]


async def test_both_tags_are_known_whichever_form_is_at_hand(service: Service) -> None:
    add_long(service)
    for filling in (GZIP, PLAIN):
        await service.overdrive.cache.clear()
        etag = (await service.get("/long", headers=filling)).headers["etag"]
        for tag in (etag, etag[:-1] + '-gzip"', f'W/{etag[:-1]}-gzip"'):
            for taking in (GZIP, PLAIN):
                answer = await service.get("/long", headers={**taking, "If-None-Match": tag})
                assert (answer.status_code, answer.content) == (304, b"")
                # The one it has, so that it finds what it has.
                assert answer.headers["etag"] == tag.removeprefix("W/")
                assert answer.headers["vary"] == "Accept-Encoding"
                assert not {"content-length", "content-encoding", "content-type"} & answer.headers.keys()
        await service.overdrive.cache.clear()
        made = await service.get("/long", headers={**GZIP, "If-None-Match": etag[:-1] + '-gzip"'})
        assert (made.status_code, made.headers["x-cache"], made.headers["etag"]) == (304, "miss", etag[:-1] + '-gzip"')


async def test_who_fills_it_decides(service: Service) -> None:
    add_long(service)
    await service.get("/long", headers=PLAIN)
    assert raw(await service.get("/long", headers=GZIP))[0] is None


async def test_behind_dependencies_and_when_expired(service: Service) -> None:
    bearer: Any = Depends(HTTPBearer())

    @service.app.get("/mine")
    @cached(ttl=10, stale_while_revalidate=30)
    async def mine(token: Any = bearer) -> list[str]:
        return [LONG, token.credentials]

    clock = service.overdrive.cache.clock = Clock()
    headers = {**GZIP, "Authorization": "Bearer alice"}
    assert (await service.get("/mine", headers=headers)).headers.get("content-encoding") is None
    for seconds in (0, 11):
        clock.tick(seconds)
        hit = await service.get("/mine", headers=headers)
        assert (hit.headers["x-cache"], hit.headers["content-encoding"]) == ("hit", "gzip")
        assert hit.json() == [LONG, "alice"]
        assert hit.headers["vary"] == "Accept-Encoding, Authorization"
        plain = hit.headers["etag"].replace("-gzip", "")
        known = await service.get("/mine", headers={**headers, "If-None-Match": plain})
        assert (known.status_code, known.headers["etag"]) == (304, plain)


@pytest.mark.parametrize(
    ("media_type", "body", "headers"),
    [
        ("text/plain", "x" * 1_023, {}),
        ("image/png", LONG, {}),
        ("text/event-stream", LONG, {}),
        ("application/json", LONG, {"content-encoding": "x-own"}),
        # What has no pattern does not get shorter.
        ("text/plain", Random(1).randbytes(2_000), {}),
    ],
    ids=["short", "image", "events", "encoded", "no pattern"],
)
async def test_what_is_not_worth_it_is_kept_as_it_is(
    service: Service, media_type: str, body: str | bytes, headers: dict[str, str]
) -> None:
    add_long(service, media_type, body, **headers)
    first = await service.get("/long", headers=GZIP)
    second = await service.get("/long", headers=GZIP)
    assert second.headers["x-cache"] == "hit"
    assert raw(first) == raw(second)
    assert first.content == second.content


async def test_an_endpoints_own_tag(service: Service) -> None:
    @service.app.get("/own/{weak:path}")
    @cached
    async def own(weak: str) -> Response:
        return PlainTextResponse(LONG, headers={"ETag": weak + '"mine"'})

    for path, tag, packed in (("/own/W%2F", 'W/"mine"', 'W/"mine"'), ("/own/", '"mine"', '"mine-gzip"')):
        await service.get(path, headers=GZIP)
        hit = await service.get(path, headers=GZIP)
        assert (hit.headers["content-encoding"], hit.headers["etag"]) == ("gzip", packed)
        assert (await service.get(path, headers={**GZIP, "If-None-Match": tag})).status_code == 304


async def test_long_ones_are_made_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []
    compress = coding._packed

    def packed(body: bytes) -> bytes:
        threads.append(threading.current_thread() is threading.main_thread())
        return compress(body)

    monkeypatch.setattr(coding, "_packed", packed)
    for size in (65_536, 65_537):
        form = await gzipped([(b"etag", b'"a"')], b"x" * size)
        assert form is not None
        assert gzip.decompress(form.body) == b"x" * size
        # RFC 1952, section 2.3.1: a time would make other bytes of the same text.
        assert form.body[4:8] == bytes(4)
    assert threads == [True, False]


async def test_switched_off(sqlite_url: str) -> None:
    app = FastAPI()
    settings = Settings(database_url=sqlite_url, cache=CacheSettings(gzip=False, enabled=True))
    overdrive = Overdrive(app, settings=settings)

    @app.get("/long")
    @cached
    async def long() -> str:
        return LONG

    async with client(app) as http:
        for mark in ("miss", "hit"):
            answer = await http.get("/long", headers=GZIP)
            assert answer.headers["x-cache"] == mark
            assert not {"vary", "content-encoding"} & answer.headers.keys()
    await overdrive.aclose()


async def test_the_store_counts_it(sqlite_url: str) -> None:
    async with serve(sqlite_url) as service:
        add_long(service, body=NOISE)
        entries = service.overdrive.cache.store._entries  # type: ignore[attr-defined]
        sizes = []
        for headers in (PLAIN, GZIP):
            await service.overdrive.cache.clear()
            await service.get("/long", headers=headers)
            sizes.append(entries.bytes)
        assert sizes[1] > sizes[0] + len(gzip.compress(NOISE.encode()))


@pytest.mark.parametrize("outside", [False, True])
def test_over_a_socket(sqlite_url: str, outside: bool) -> None:
    app = FastAPI()
    Overdrive(app, database_url=sqlite_url, cache=True)
    if outside:
        app.add_middleware(GZipMiddleware, minimum_size=500)

    @app.get("/long")
    @cached
    async def long() -> list[str]:
        return [LONG]

    with on_uvicorn(app) as (host, port), httpx2.Client(base_url=f"http://{host}:{port}") as http:
        miss = http.get("/long", headers=GZIP)
        hits = [http.get("/long", headers=GZIP) for _ in range(3)]
        plain = http.get("/long", headers=PLAIN)
        assert [each.headers["x-cache"] for each in (miss, *hits, plain)] == ["miss", *["hit"] * 4]
        # Once, by whomever.
        assert all(each.json() == [LONG] for each in (miss, *hits, plain))
        assert (miss.headers.get("content-encoding"), plain.headers.get("content-encoding")) == (
            "gzip" if outside else None,
            None,
        )
        for hit in hits:
            assert hit.headers["content-encoding"] == "gzip"
            assert hit.headers["etag"] == plain.headers["etag"][:-1] + '-gzip"'
            assert len(list(hit.headers.get_list("vary"))) == 1
            assert hit.headers["vary"] == "Accept-Encoding"
        for tag in (hits[0].headers["etag"], plain.headers["etag"]):
            answer = http.get("/long", headers={**GZIP, "If-None-Match": tag})
            assert (answer.status_code, answer.content) == (304, b"")


# What a request takes


@pytest.mark.parametrize(
    ("value", "takes"),
    [
        (b"gzip", True),
        (b"GZip", True),
        (b"x-gzip", True),
        (b"br, gzip;q=0.5", True),
        (b"gzip ; Q=0.001", True),
        (b"deflate,gzip;q=1.000, *;q=0", True),
        (b"*", True),
        (b"br;q=1, *;q=0.1", True),
        (b"gzip, identity", True),
        (b"", False),
        (b"br", False),
        (b"identity", False),
        (b"gzip;q=0", False),
        (b"gzip;q=0.000", False),
        (b"gzip;q=0, *", False),
        (b"*;q=0", False),
        (b"gzip;q=0.5, identity;q=0.8", False),
        (b"identity, *;q=0.5", False),
        (b"gzip;q=2", False),
        (b"gzip;q=-1", False),
        (b"gzip;q=nan", False),
        (b"gzip;q=0.1234", False),
        (b"gzip;level=9", False),
        (b"notgzip", False),
        (b"gzip\xff", False),
    ],
    ids=str,
)
def test_accept_encoding(value: bytes, takes: bool) -> None:
    assert accepts_gzip(value) is takes


@given(st.text(alphabet="gzipx-,;q=01.* ", max_size=30).map(str.encode) | st.binary(max_size=30))
def test_no_accept_encoding_raises(value: bytes) -> None:
    accepts_gzip(value)


@pytest.mark.parametrize(
    ("media_type", "worth"),
    [
        (b"application/json", True),
        (b"Application/JSON; charset=utf-8", True),
        (b"application/problem+json", True),
        (b"image/svg+xml", False),
        (b"text/html; charset=utf-8", True),
        (b"application/octet-stream", False),
        (b"application/zip", False),
        (b"", False),
    ],
)
def test_media_types(media_type: bytes, worth: bool) -> None:
    assert is_worth_it([(b"Content-Type", media_type)], b"x" * 1_024) is worth
    assert not is_worth_it([(b"Content-Type", media_type)], b"x" * 1_023)
