"""Values of one's own functions: kept, typed, outdated by what they read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from uuid import UUID

import msgspec
import pytest
from cache.service import Service
from fastapi import FastAPI
from pydantic import BaseModel, SecretStr
from sqlalchemy import func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from support import Item, client, eventually

from overdrive import ConfigurationError, Overdrive, SessionDep, cached
from overdrive.cache.values import key_of_memoized
from overdrive.testing import Clock

pytestmark = pytest.mark.anyio


class Names(msgspec.Struct):
    names: list[str]


@dataclass
class Point:
    x: int
    y: float


def reading(service: Service, ran: list[int]) -> Callable[[], Any]:
    async def load() -> Names:
        ran.append(1)
        async with service.overdrive.session() as db:
            return Names(list(await db.scalars(select(Item.name).order_by(Item.id))))

    return load


async def add_one(db: AsyncSession) -> None:
    await db.execute(insert(Item).values(name="new"))


async def test_what_the_session_has_read_before_counts(service: Service) -> None:
    """It is given again without a statement."""

    @service.app.get("/twice")
    async def twice(db: SessionDep) -> str:
        first = await db.get_one(Item, 1)

        async def load() -> str:
            return (await db.get_one(Item, 1)).name

        return first.name + " " + await service.overdrive.cache.get_or_set("name", load, type=str)

    async def rename(db: AsyncSession) -> None:
        (await db.get_one(Item, 1)).name = "renamed"

    # The first request finds no clock, where it is in Redis.
    for _ in range(3):
        assert (await service.get("/twice")).json() == "first first"
    await service.write(rename)
    assert (await service.get("/twice")).json() == "renamed renamed"


async def test_a_value_is_kept_until_what_it_read_is_written(service: Service) -> None:
    cache, ran = service.overdrive.cache, list[int]()
    load = reading(service, ran)
    for _ in range(2):
        assert await cache.get_or_set("names", load, type=Names) == Names(["first"])
    assert len(ran) == 1
    await service.write(add_one)
    assert await cache.get_or_set("names", load, type=Names) == Names(["first", "new"])
    assert len(ran) == 2


async def test_it_expires_and_is_dropped_by_tags_of_ones_own(service: Service) -> None:
    cache, ran = service.overdrive.cache, list[int]()
    clock = cache.clock = Clock()

    async def load() -> int:
        ran.append(1)
        return len(ran)

    async def value() -> int:
        return await cache.get_or_set("count", load, ttl=10, tags=["rates"])

    assert [await value(), await value()] == [1, 1]
    clock.tick(11)
    assert [await value(), await value()] == [2, 2]
    await cache.invalidate("others")
    assert await value() == 2
    await cache.invalidate("rates")
    assert await value() == 3
    assert await cache.get_or_set("another", load) == 4


async def test_what_a_response_took_from_it_outdates_the_response(service: Service) -> None:
    load = reading(service, [])

    @service.app.get("/through")
    @cached
    async def through() -> list[str]:
        value: Names = await service.overdrive.cache.get_or_set("names", load, type=Names)
        return value.names

    await service.overdrive.cache.get_or_set("names", load, type=Names)
    assert await service.marks("/through", "/through") == ["miss", "hit"]
    await service.write(add_one)
    assert (await service.get("/through")).json() == ["first", "new"]


async def test_its_tags_outdate_the_response_that_has_loaded_it(service: Service) -> None:
    async def load() -> int:
        return 1

    @service.app.get("/through")
    @cached
    async def through() -> int:
        return await service.overdrive.cache.get_or_set("rate", load, tags=["rates"])

    await service.get()
    for _ in range(2):
        assert await service.marks("/through", "/through") == ["miss", "hit"]
        await service.overdrive.cache.invalidate("rates")


async def test_another_releases_tags_have_values_of_their_own(service: Service) -> None:
    cache, ran = service.overdrive.cache, list[int]()

    async def load() -> int:
        ran.append(1)
        return len(ran)

    values = [await cache.get_or_set("rate", load, ttl=60, tags=tags) for tags in ([], ["rates"], ["rates"])]
    assert values == [1, 2, 2]


@pytest.mark.parametrize("wrong", ["rates", [5], [""]])
async def test_its_tags_are_names(service: Service, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="tag"):
        await service.overdrive.cache.get_or_set("rate", reading(service, []), tags=wrong)
    with pytest.raises(ConfigurationError, match="tag"):
        service.overdrive.cache.memoize(tags=wrong)


@pytest.mark.parametrize("value", [1, None, "x", [1, 2], {"a": [1.5]}])
async def test_plain_data_comes_back(service: Service, value: Any) -> None:
    async def load() -> Any:
        return value

    for _ in range(2):
        assert await service.overdrive.cache.get_or_set("plain", load) == value


async def test_types_do_not_share_values(service: Service) -> None:
    cache = service.overdrive.cache

    async def load() -> Point:
        return Point(1, 2)

    for _ in range(2):
        assert await cache.get_or_set("point", load, type=Point) == Point(1, 2.0)
        assert await cache.get_or_set("point", load) == {"x": 1, "y": 2}


async def test_what_msgspec_cannot_write_is_said(service: Service) -> None:
    async def load() -> Any:
        return object()

    with pytest.raises(ConfigurationError, match="cannot be kept"):
        await service.overdrive.cache.get_or_set("object", load)


async def test_reads_nobody_can_name_need_a_tag(service: Service) -> None:
    cache, ran = service.overdrive.cache, list[int]()

    async def load() -> int:
        ran.append(1)
        async with service.overdrive.session() as db:
            await db.execute(text("SELECT 1"))
        return len(ran)

    assert [await cache.get_or_set("a", load), await cache.get_or_set("a", load)] == [1, 2]
    assert [await cache.get_or_set("b", load, tags=["t"]), await cache.get_or_set("b", load, tags=["t"])] == [3, 3]


async def test_a_request_that_wrote_reads_its_own_writes(service: Service) -> None:
    load = reading(service, [])

    @service.app.post("/both")
    async def both(db: SessionDep) -> int:
        await service.overdrive.cache.get_or_set("names", load, type=Names)
        await add_one(db)

        async def own() -> Names:
            return Names([str(await db.scalar(select(func.count(Item.id))))])

        value: Names = await service.overdrive.cache.get_or_set("names", own, type=Names)
        return int(value.names[0])

    assert (await service.http.post("/both")).json() == 2
    kept: Names = await service.overdrive.cache.get_or_set("names", load, type=Names)
    assert kept.names == ["first", "new"]


async def test_switched_off_it_loads_each_time(service: Service) -> None:
    service.overdrive.cache.enabled = False
    ran: list[int] = []
    load = reading(service, ran)
    for _ in range(2):
        await service.overdrive.cache.get_or_set("names", load, type=Names)
    assert len(ran) == 2


# All who ask at once


async def test_one_execution_for_all(service: Service) -> None:
    opened, ran = asyncio.Event(), list[Any]()

    async def load() -> int:
        ran.append(asyncio.current_task())
        await opened.wait()
        return 7

    tasks = [asyncio.create_task(service.overdrive.cache.get_or_set("one", load)) for _ in range(10)]
    await eventually(lambda: len(ran) == 1)
    ran[0].cancel()
    await eventually(lambda: len(ran) == 2)
    opened.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in results].count(asyncio.CancelledError) == 1
    assert results.count(7) == 9
    assert len(ran) == 2


async def test_an_error_is_everybodys_and_is_not_kept(service: Service) -> None:
    opened, ran = asyncio.Event(), list[int]()

    async def load() -> int:
        ran.append(1)
        await opened.wait()
        raise LookupError("gone")

    tasks = [asyncio.create_task(service.overdrive.cache.get_or_set("bad", load)) for _ in range(5)]
    await asyncio.sleep(0.1)
    opened.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in results] == [LookupError] * 5
    assert len(ran) == 1
    with pytest.raises(LookupError):
        await service.overdrive.cache.get_or_set("bad", load)


# Functions, and exactly what was kept of a call


async def nothing_done() -> None:
    pass


async def test_a_function_is_answered_by_its_arguments(service: Service) -> None:
    ran: list[tuple[int, str]] = []

    @service.overdrive.cache.memoize(ttl=60)
    async def price(number: int, currency: str = "EUR") -> Point:
        ran.append((number, currency))
        return Point(number, 1.5)

    assert await price(1) == await price(1, "EUR") == await price(number=1) == Point(1, 1.5)
    assert await price(2) == Point(2, 1.5)
    with pytest.raises(ConfigurationError):
        await price("1")  # type: ignore[arg-type]
    ran.pop()
    assert await price(1, currency="USD") == Point(1, 1.5)
    assert ran == [(1, "EUR"), (2, "EUR"), (1, "USD")]
    await service.overdrive.cache.invalidate(price, 1)
    await price(1)
    await price(2)
    assert ran[3:] == [(1, "EUR")]


@pytest.mark.parametrize("nameless", [object(), [object()], {"a": (object(),)}, nothing_done, lambda: 1])
async def test_an_argument_that_is_named_by_its_address_is_refused(service: Service, nameless: Any) -> None:
    @service.overdrive.cache.memoize()
    async def of(value: Any) -> int:
        return 1

    with pytest.raises(ConfigurationError, match="tells calls apart by arguments of plain data"):
        await of(nameless)
    assert await of(f"<object at {id(nameless):#x}>") == 1


async def test_a_function_with_reads_nobody_can_name_needs_a_tag(service: Service) -> None:
    ran: list[int] = []

    async def count() -> int:
        ran.append(1)
        async with service.overdrive.session() as db:
            await db.execute(text("SELECT 1"))
        return len(ran)

    alone, tagged = service.overdrive.cache.memoize()(count), service.overdrive.cache.memoize(tags=["rates"])(count)
    assert [await alone(), await alone(), await tagged(), await tagged()] == [1, 2, 3, 3]


def test_only_coroutine_functions_are_memoized() -> None:
    from overdrive.cache.cache import Cache
    from overdrive.cache.store import MemoryStore

    with pytest.raises(ConfigurationError, match="coroutine function"):
        Cache(MemoryStore()).memoize()(len)  # type: ignore[arg-type]


async def test_one_endpoints_response_is_dropped(service: Service) -> None:
    @service.app.get("/numbers/{number}")
    @cached
    async def get_number(number: int, q: str = "") -> int:
        return number

    paths = "/numbers/1", "/numbers/2", "/numbers/1?q=x"
    assert await service.marks(*paths, *paths) == ["miss"] * 3 + ["hit"] * 3
    for _ in range(2):
        await service.overdrive.cache.invalidate(get_number, number=1)
        assert await service.marks(*paths) == ["miss", "hit", "miss"]


# Whose they are


async def of(_argument: Any) -> None: ...


class Plain:
    """Its representation says where it is, and another may be there later."""


class Short(BaseModel):
    name: str
    token: SecretStr = SecretStr("")


class Hidden(BaseModel):
    name: str

    def __repr__(self) -> str:
        return "<Hidden>"


@dataclass
class Noted:
    name: str
    owner: str = field(repr=False)


class Struct(msgspec.Struct):
    name: str
    owner: str

    def __repr__(self) -> str:
        return "<Struct>"


class Colour(Enum):
    RED = "red"


def test_values_of_arguments_that_look_alike_are_apart() -> None:
    for one, other in [
        (Hidden(name="alice"), Hidden(name="bob")),
        ([Noted("a", "alice")], [Noted("a", "bob")]),
        ([Noted("a", "alice")], [Struct("a", "alice")]),
        ({"a": Struct("a", "alice")}, {"a": Struct("a", "bob")}),
        ([Colour.RED], ["red"]),
        ({1}, {"1"}),
        ({1: 2}, {1: "2"}),
        (UUID(int=1), str(UUID(int=1))),
        (1, "1"),
        (None, "None"),
        (True, 1),
        (("a", "b"), ("a, b",)),
        (b"a", "a"),
    ]:
        assert key_of_memoized(of, one) != key_of_memoized(of, other)
        assert key_of_memoized(of, one) == key_of_memoized(of, _argument=deepcopy(one))
    assert key_of_memoized(of, {"a", "b", "c"}) == key_of_memoized(of, {"c", "b", "a"})


@pytest.mark.parametrize("argument", [Plain(), SecretStr("a"), Short(name="a"), [Plain()], of])
def test_an_argument_that_is_no_plain_data_is_refused(argument: Any) -> None:
    with pytest.raises(ConfigurationError, match="of plain data"):
        key_of_memoized(of, argument)


async def test_no_tenant_gets_anothers_value(sqlite_url: str) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url, cache=True, tenant=lambda request: request.headers["x-tenant"])
    asked: list[str] = []

    @overdrive.cache.memoize()
    async def plan() -> str:
        return asked[-1]

    @app.get("/plan")
    async def get_plan() -> str:
        return await plan()

    async with client(app) as http:
        for tenant in ("a", "b", "a", "b"):
            asked.append(tenant)
            assert (await http.get("/plan", headers={"x-tenant": tenant})).json() == tenant
        asked.append("c")
        assert (await http.get("/plan", headers={"x-tenant": "a"})).json() == "a"
        await overdrive.cache.invalidate(plan)
        assert (await http.get("/plan", headers={"x-tenant": "a"})).json() == "c"
    await overdrive.aclose()
