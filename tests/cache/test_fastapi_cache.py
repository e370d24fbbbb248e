"""The names of fastapi-cache2, over both stores and beside the original."""

from __future__ import annotations

import ast
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fastapi_cache
import fastapi_cache.backends.inmemory
import fastapi_cache.backends.redis
import fastapi_cache.decorator
import pytest
from cache.service import Service
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel
from redis.asyncio import Redis
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from support import Item

from overdrive import ConfigurationError, NotInstalledError, Overdrive, SessionDep, declare
from overdrive.compat import fastapi_cache as compat
from overdrive.compat.fastapi_cache import FastAPICache, cache
from overdrive.compat.fastapi_cache.backends.inmemory import InMemoryBackend
from overdrive.compat.fastapi_cache.backends.redis import RedisBackend
from overdrive.compat.fastapi_cache.coder import Coder, JsonCoder, PickleCoder
from overdrive.compat.fastapi_cache.decorator import cache as decorator
from overdrive.endpoint import ServedBy
from overdrive.testing import Clock

pytestmark = pytest.mark.anyio

MISS_AND_HIT = ["miss", "hit"]


@pytest.fixture(autouse=True)
def without_setup() -> Iterator[None]:
    yield
    FastAPICache.reset()
    fastapi_cache.FastAPICache.reset()
    fastapi_cache.backends.inmemory.InMemoryBackend._store.clear()


class Out(BaseModel):
    n: int


class Theirs:
    FastAPICache, cache = fastapi_cache.FastAPICache, staticmethod(fastapi_cache.decorator.cache)
    InMemoryBackend = fastapi_cache.backends.inmemory.InMemoryBackend
    RedisBackend = fastapi_cache.backends.redis.RedisBackend


class Ours:
    FastAPICache, cache = FastAPICache, staticmethod(cache)
    InMemoryBackend, RedisBackend = InMemoryBackend, RedisBackend


def app_of(library: Any, redis_url: str | None) -> FastAPI:
    """A small service, with either library."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        client = Redis.from_url(redis_url) if redis_url is not None else None
        backend = library.InMemoryBackend() if client is None else library.RedisBackend(client)
        library.FastAPICache.init(backend, prefix="small", expire=60)
        yield
        if client is not None:
            await client.aclose()

    app = FastAPI(lifespan=lifespan)
    ran: list[str] = []

    def count(name: str) -> int:
        ran.append(name)
        return ran.count(name)

    @library.cache(namespace="numbers")
    async def number(of: int, *, times: int = 1, **_others: Any) -> list[int]:
        return [of * times, count("number")]

    @library.cache(expire=60)
    def plain_number() -> int:
        return count("plain_number")

    @app.get("/hello")
    @library.cache(expire=60)
    async def hello() -> dict[str, Any]:
        return {"hello": "world", "n": count("hello")}

    @app.get("/plain")
    @library.cache()
    def plain() -> int:
        return count("plain")

    @app.get("/items/{item}")
    @library.cache(namespace="items")
    async def one(item: int, q: str = "") -> list[Any]:
        return [item, q, count("one")]

    @app.get("/model", response_model=Out)
    @library.cache(namespace="items:models")
    async def model() -> Out:
        return Out(n=count("model"))

    @app.get("/annotated")
    @library.cache()
    async def annotated() -> Out:
        return {"n": count("annotated"), "more": 1}  # type: ignore[return-value]

    def start(start: int = 0) -> int:
        return start

    @app.get("/depends")
    @library.cache()
    async def depends(first: int = Depends(start)) -> int:
        return first + count("depends")

    @app.post("/posted")
    @library.cache()
    async def posted() -> int:
        return count("posted")

    @app.get("/missing")
    @library.cache()
    async def missing() -> int:
        raise HTTPException(404, f"missed {count('missing')} times")

    @app.get("/numbers/{of}")
    async def through(of: int, times: int = 1) -> Any:
        return [await number(of, times=times), await plain_number()]

    @app.post("/clear")
    async def clear(namespace: str | None = None) -> None:
        await library.FastAPICache.clear(namespace)

    return app


SERIES = [
    *[
        "GET /hello",
        "GET /plain",
        "GET /items/1",
        "GET /items/2",
        "GET /items/1?q=x",
        "GET /model",
        "GET /depends",
        "GET /annotated",
    ]
    * 2,
    "GET /depends?start=5",
    *["GET /items/x", "POST /posted", "POST /posted", "GET /missing", "GET /missing", "GET /hello"],
    *["GET /numbers/1", "GET /numbers/2", "GET /numbers/1?times=3", "GET /numbers/1"],
    *["POST /clear?namespace=numbers", "GET /numbers/1", "GET /items/1", "GET /model"],
    *["POST /clear?namespace=items:models", "GET /items/1", "GET /model", "GET /model"],
    *["POST /clear?namespace=items", "GET /items/1", "GET /model", "GET /hello", "GET /model"],
    *["POST /clear?namespace=nobodys", "GET /items/1", "GET /numbers/1"],
    *["POST /clear", "GET /hello", "GET /plain", "GET /items/1", "GET /numbers/1", "GET /hello", "GET /numbers/1"],
]


def test_the_answers_are_the_same(sqlite_url: str, store_url: str | None) -> None:
    theirs, ours = app_of(Theirs, store_url), app_of(Ours, store_url)
    Overdrive(ours, database_url=sqlite_url, redis_url=store_url, cache=True)
    with TestClient(theirs) as there, TestClient(ours) as here:
        for line in SERIES:
            method, path = line.split()
            expected, answer = there.request(method, path), here.request(method, path)
            assert (answer.status_code, answer.content) == (expected.status_code, expected.content), line
            assert answer.headers["content-type"] == expected.headers["content-type"]
        documents = [client.get("/openapi.json").json() for client in (there, here)]
        assert documents[0] == documents[1]


def test_fastapi_cache_is_not_needed() -> None:
    for file in Path(compat.__file__).parent.rglob("*.py"):
        imported = [node.module for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        assert "fastapi_cache" not in [str(module).partition(".")[0] for module in imported]
    assert decorator is cache


# Where things stand in a service


@pytest.mark.parametrize("early", [True, False], ids=["installed first", "installed last"])
@pytest.mark.parametrize("initialized", ["at import", "in the lifespan", "never"])
async def test_it_does_not_matter_what_comes_first(
    sqlite_url: str, store_url: str | None, early: bool, initialized: str
) -> None:
    def init() -> None:
        FastAPICache.init(InMemoryBackend() if store_url is None else RedisBackend(None), prefix="p", expire=10)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if initialized == "in the lifespan":
            init()
        yield

    def install() -> Overdrive:
        overdrive = Overdrive(app, database_url=sqlite_url, redis_url=store_url, cache=True)
        overdrive.cache.clock = clock
        return overdrive

    clock = Clock()
    app = FastAPI(lifespan=lifespan)
    if early:
        install()
    if initialized == "at import":
        init()

    @cache()
    async def get_cache() -> int:
        return int(clock.now)

    @app.get("/")
    @cache(expire=1000)
    async def index() -> dict[str, Any]:
        return {"hello": "world", "n": await get_cache()}

    @app.get("/default")
    @cache()
    async def default() -> int:
        return 1

    @app.get("/value")
    async def value() -> int:
        return await get_cache()

    if not early:
        install()

    with TestClient(app) as http:
        first = http.get("/value").json()
        for _ in range(2):
            answers = [http.get(path) for path in ("/", "/default")]
        assert [answer.headers["x-cache"] for answer in answers] == ["hit", "hit"]
        assert answers[0].json() == {"hello": "world", "n": first}
        clock.tick(11)
        kept = initialized == "never"
        assert http.get("/default").headers["x-cache"] == ("hit" if kept else "miss")
        assert http.get("/value").json() == (first if kept else first + 11)
        assert http.get("/").headers["x-cache"] == "hit"


async def test_a_hit_is_answered_before_the_route(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    async def served_by(self: ServedBy) -> Any:
        asked.append(1)
        return service.overdrive

    monkeypatch.setattr(ServedBy, "__call__", served_by)

    @service.app.get("/own")
    @cache()
    async def own() -> int:
        return 1

    assert await service.marks("/own", "/own", "/own") == ["miss", "hit", "hit"]
    assert len(asked) == 1


async def test_writes_outdate_responses_and_values(service: Service) -> None:
    ran: list[int] = []

    @cache()
    async def count() -> int:
        ran.append(1)
        async with service.overdrive.session() as db:
            return len((await db.scalars(select(Item.id))).all())

    @service.app.get("/read")
    @cache()
    async def read(db: SessionDep) -> list[str]:
        return list(await db.scalars(select(Item.name)))

    @service.app.get("/count")
    async def counted() -> int:
        return await count()

    async def write(db: AsyncSession) -> None:
        await db.execute(insert(Item).values(name="new"))

    await service.get("/names")
    for expected in (1, 2):
        assert await service.marks("/read", "/read") == MISS_AND_HIT
        assert [(await service.get("/count")).json() for _ in range(2)] == [expected, expected]
        assert len(ran) == expected
        await service.write(write)


async def test_a_value_with_reads_nobody_can_name_needs_a_namespace(service: Service) -> None:
    ran: list[int] = []

    async def load() -> int:
        ran.append(1)
        async with service.overdrive.session() as db:
            await db.execute(text("SELECT 1"))
        return len(ran)

    FastAPICache.init(InMemoryBackend(), overdrive=service.overdrive)
    alone, named = cache()(load), cache(namespace="rates")(load)
    assert [await alone(), await alone(), await named(), await named()] == [1, 2, 3, 3]


async def test_an_endpoint_that_is_called_as_a_function_has_a_value(service: Service) -> None:
    @service.app.get("/own/{number}")
    @cache(namespace="own")
    async def own(number: int) -> int:
        service.ran.append("own")
        return number

    @service.app.get("/called")
    async def called() -> list[int]:
        return [await own(1), await own(number=1), await own(2)]

    for _ in range(2):
        assert await service.marks("/own/1", "/own/1") == MISS_AND_HIT
        assert [(await service.get("/called")).json() for _ in range(2)] == [[1, 1, 2]] * 2
        await service.overdrive.cache.invalidate("own")
    assert service.ran == ["own"] * 6


async def test_one_call_of_an_endpoint_is_dropped(service: Service) -> None:
    @service.app.get("/own/{number}")
    @cache()
    async def own(number: int) -> int:
        return number

    await service.marks("/own/1", "/own/2")
    await service.overdrive.cache.invalidate(own, number=1)
    assert await service.marks("/own/1", "/own/2") == MISS_AND_HIT


async def test_plain_functions_run_in_a_thread(service: Service) -> None:
    FastAPICache.init(InMemoryBackend(), overdrive=service.overdrive)

    @cache()
    def thread() -> str:
        return threading.current_thread().name

    assert await thread() == await thread() != threading.current_thread().name


async def test_services_with_a_prefix_have_values_of_their_own(service: Service) -> None:
    ran: list[int] = []

    @cache()
    async def count() -> int:
        ran.append(1)
        return len(ran)

    found = []
    for prefix in ("a", "b", "a"):
        FastAPICache.reset()
        FastAPICache.init(InMemoryBackend(), prefix, overdrive=service.overdrive)
        found.append(await count())
    assert found == [1, 2, 1]


async def test_switched_off_nothing_is_cached(service: Service) -> None:
    ran: list[int] = []

    @service.app.get("/off")
    @cache()
    async def off() -> int:
        ran.append(1)
        return 1

    FastAPICache.init(InMemoryBackend(), enable=False, overdrive=service.overdrive)
    FastAPICache.init(InMemoryBackend(), enable=True, overdrive=service.overdrive)
    assert await service.marks("/off", "/off") == [None, None]
    assert [await off(), await off(), len(ran)] == [1, 1, 4]
    FastAPICache.reset()
    FastAPICache.init(InMemoryBackend(), overdrive=service.overdrive)
    assert [await off(), await off(), len(ran)] == [1, 1, 5]


async def test_a_route_that_cannot_be_cached_is_not_and_says_so(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    @service.app.get("/whole")
    @cache(injected_dependency_namespace="own")
    async def whole(request: Request) -> int:
        service.ran.append("whole")
        return 1

    @service.app.get("/declared")
    @cache()
    async def declared(request: Request) -> int:
        return 1

    declare(declared, ignore=True)
    with caplog.at_level(logging.WARNING, "overdrive"):
        assert await service.marks("/whole", "/whole") == [None, None]
        assert await service.marks("/declared", "/declared") == MISS_AND_HIT
    assert service.ran == ["whole", "whole"]
    assert "whole() takes the whole request" in caplog.text


# What cannot be had


class Own(Coder):
    pass


def built(*_args: Any, **_kwargs: Any) -> str:
    return "key"


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "pickle": (lambda: cache(coder=PickleCoder), "PickleCoder out.* msgspec"),
    "another coder": (lambda: FastAPICache.init(InMemoryBackend(), coder=Own), "leave coder=Own out"),
    "a key builder": (lambda: cache(key_builder=built), "get_or_set"),  # type: ignore[arg-type]
    "a key builder for all": (
        lambda: FastAPICache.init(InMemoryBackend(), key_builder=built),  # type: ignore[arg-type]
        "get_or_set",
    ),
    "another header": (
        lambda: FastAPICache.init(InMemoryBackend(), cache_status_header="X-Own"),  # type: ignore[arg-type]
        "X-Cache and Cache-Status",
    ),
    "their backend": (
        lambda: FastAPICache.init(fastapi_cache.backends.inmemory.InMemoryBackend()),  # type: ignore[arg-type]
        r"fastapi_cache.backends.inmemory.InMemoryBackend is no backend here.*redis_url",
    ),
    "no backend": (lambda: FastAPICache.init(None), "redis_url"),  # type: ignore[arg-type]
    "no time": (lambda: cache(expire=0), "positive number of seconds, not 0"),
    "no time for all": (lambda: FastAPICache.init(InMemoryBackend(), expire=-1), "positive number of seconds"),
    "a time that is no number": (lambda: cache(expire="60"), "positive number of seconds, not '60'"),  # type: ignore[arg-type]
    "a namespace that is no text": (lambda: cache(namespace=None), "namespace= takes text"),  # type: ignore[arg-type]
    "a namespace without a name": (lambda: cache(namespace=":a")(built), "a tag is a name"),
}


@pytest.mark.parametrize(("misuse", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_said(misuse: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        misuse()


def test_the_default_coder_may_be_named() -> None:
    FastAPICache.init(InMemoryBackend(), coder=JsonCoder)
    cache(coder=JsonCoder)


async def test_an_errors_status_is_not_lost(service: Service) -> None:
    @service.app.get("/gone")
    @cache()
    async def gone() -> JSONResponse:
        service.ran.append("gone")
        return JSONResponse({"code": "gone"}, 410)

    assert [(await service.get("/gone")).status_code for _ in range(2)] == [410, 410]
    assert service.ran == ["gone", "gone"]


async def test_keys_cannot_be_cleared(service: Service) -> None:
    FastAPICache.init(InMemoryBackend(), overdrive=service.overdrive)
    with pytest.raises(ConfigurationError, match=r"invalidate\(get_user, user_id=3\)"):
        await FastAPICache.clear(key="key")


async def test_outside_of_requests_somebody_must_say_which_cache(service: Service) -> None:
    @cache()
    async def value() -> int:
        return 1

    FastAPICache.init(InMemoryBackend())
    for outside in (value(), FastAPICache.clear()):
        with pytest.raises(ConfigurationError, match=r"FastAPICache.init\(..., overdrive=overdrive\)"):
            await outside
    with pytest.raises(ConfigurationError, match=r"FastAPICache.reset\(\) first"):
        FastAPICache.init(InMemoryBackend(), overdrive=service.overdrive)


async def test_a_redis_backend_needs_redis(sqlite_url: str) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url, cache=True)

    @app.get("/own")
    @cache()
    async def own() -> int:
        return 1

    FastAPICache.init(RedisBackend(None), overdrive=overdrive)
    with TestClient(app) as http, pytest.raises(ConfigurationError, match="redis_url"):
        http.get("/own")
    for outside in (own(), FastAPICache.clear()):
        with pytest.raises(ConfigurationError, match="redis_url"):
            await outside
    overdrive.cache.enabled = False
    with TestClient(app) as http:
        assert http.get("/own").json() == 1


def test_an_app_without_overdrive_is_told() -> None:
    app = FastAPI()

    @app.get("/own")
    @cache()
    async def own() -> int:
        return 1

    with TestClient(app) as http, pytest.raises(NotInstalledError, match=r"create Overdrive\(app\)"):
        http.get("/own")
