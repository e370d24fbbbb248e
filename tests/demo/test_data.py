from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, Table, create_engine, func, inspect, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, selectinload

from overdrive.demo.data import is_seeded, seed
from overdrive.demo.models import Base, Order, Product, User

pytestmark = pytest.mark.anyio

small = partial(seed, users=400, orders=2_000, products=50)


@pytest.fixture(params=["sqlite_url", "postgres_database"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(request.getfixturevalue(request.param))
    yield engine
    await engine.dispose()


@pytest.fixture(scope="module")
def seeded() -> Iterator[Engine]:
    """20,000 orders of 5,000 users, in memory: for what is asked of the rows rather than of a database."""
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        seed(connection, users=5_000, orders=20_000, products=200)
    yield engine
    engine.dispose()


@asynccontextmanager
async def fresh(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url)
    try:
        yield engine
    finally:
        await engine.dispose()


async def run(engine: AsyncEngine, function: Callable[[Connection], Any]) -> Any:
    async with engine.begin() as connection:
        return await connection.run_sync(function)


def contents(connection: Connection) -> dict[str, list[tuple[Any, ...]]]:
    tables: list[Table] = Base.metadata.sorted_tables
    return {t.name: [tuple(r) for r in connection.execute(select(t).order_by(t.c.id))] for t in tables}


def counts(connection: Connection) -> tuple[int, ...]:
    return tuple(connection.scalar(select(func.count()).select_from(m)) or 0 for m in (User, Product, Order))


async def test_rows_are_the_same_on_every_database(sqlite_url: str, postgres_database: str, tmp_path: Any) -> None:
    urls = [sqlite_url, f"sqlite+aiosqlite:///{tmp_path}/second.sqlite", postgres_database]
    found = []
    for url in urls:
        async with fresh(url) as engine:
            await run(engine, small)
            found.append(await run(engine, contents))
    assert [len(rows) for rows in found[0].values()] == [50, 400, 2_000]
    assert found[0] == found[1]
    assert found[0] == found[2]


async def test_psycopg_takes_the_rows_too(postgres_database: str) -> None:
    async with fresh(postgres_database.replace("asyncpg", "psycopg")) as engine:
        await run(engine, small)
        assert await run(engine, counts) == (400, 50, 2_000)


async def test_an_empty_database_is_not_seeded(engine: AsyncEngine) -> None:
    assert await run(engine, is_seeded) is False
    await run(engine, Base.metadata.create_all)
    assert await run(engine, is_seeded) is False


async def test_seeding_creates_the_tables_as_the_metadata_does(engine: AsyncEngine) -> None:
    def schema(connection: Connection) -> str:
        look = inspect(connection)
        return repr(
            {
                name: (
                    look.get_columns(name),
                    sorted(index["name"] or "" for index in look.get_indexes(name)),
                    look.get_foreign_keys(name),
                )
                for name in sorted(look.get_table_names())
            }
        )

    await run(engine, small)
    seeded = await run(engine, schema)
    await run(engine, Base.metadata.drop_all)
    await run(engine, Base.metadata.create_all)
    assert await run(engine, schema) == seeded
    await run(engine, small)
    assert await run(engine, schema) == seeded


async def test_seeding_twice_changes_nothing(engine: AsyncEngine) -> None:
    await run(engine, small)
    assert await run(engine, is_seeded) is True
    before = await run(engine, contents)
    await run(engine, partial(seed, users=7, orders=7, products=7))
    assert await run(engine, contents) == before


async def test_the_least_seeding(engine: AsyncEngine) -> None:
    await run(engine, partial(seed, users=1, orders=0, products=1))
    assert await run(engine, counts) == (1, 1, 0)


async def test_an_interrupted_seeding_starts_over(engine: AsyncEngine) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 400 + 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await run(engine, partial(small, progress=interrupt))
    assert await run(engine, is_seeded) is False
    await run(engine, small)
    assert await run(engine, counts) == (400, 50, 2_000)


async def test_progress_ends_at_the_total(engine: AsyncEngine) -> None:
    reports: list[tuple[int, int]] = []
    report = partial(seed, users=10, orders=25_000, products=5, progress=lambda *r: reports.append(r))
    await run(engine, report)
    assert reports == [(n, 25_015) for n in (10, 15, 10_015, 20_015, 25_015)]


async def test_inserting_afterwards_works(engine: AsyncEngine) -> None:
    await run(engine, small)
    async with AsyncSession(engine) as session:
        user = User(email="new@example.com", name="New")
        product = Product(name="New", category="books", price_cents=100)
        session.add(Order(user=user, product=product, quantity=1))
        await session.commit()
        order = await session.scalar(
            select(Order)
            .order_by(Order.created_at.desc(), Order.id.desc())
            .limit(1)
            .options(selectinload(Order.user), selectinload(Order.product))
        )
        assert order is not None
        assert (order.id, order.user.id, order.product.id) == (2_001, 401, 51)
        assert (order.status, order.user.active, order.note) == ("pending", True, None)
        assert order.created_at.tzinfo is None
        assert abs((order.created_at - order.user.created_at).total_seconds()) < 5


@pytest.mark.parametrize("column", [Order.user_id, Order.product_id])
def test_few_have_most_of_the_orders(seeded: Engine, column: Any) -> None:
    with Session(seeded) as session:
        number = session.scalar(select(func.count(func.distinct(column.property.columns[0])))) or 0
        tally = Counter(session.scalars(select(column)))
    top = max(1, number // 100)
    share = sum(count for _, count in tally.most_common(top)) / tally.total()
    assert 0.1 < share < 0.5


@pytest.mark.parametrize(
    ("column", "least", "most"),
    [
        (User.country, 0.08, 0.2),
        (User.last_seen_at, 0.25, 0.45),
        (Product.discontinued_at, 0.7, 0.95),
        (Order.note, 0.85, 0.98),
    ],
)
def test_what_may_be_null_often_is(seeded: Engine, column: Any, least: float, most: float) -> None:
    with Session(seeded) as session:
        nulls, rows = session.execute(select(func.count().filter(column.is_(None)), func.count())).one()
    assert least < nulls / rows < most


@pytest.mark.parametrize("model", [User, Order])
def test_time_passes_with_ties_and_ever_more_rows(seeded: Engine, model: type[User | Order]) -> None:
    with Session(seeded) as session:
        moments = list(session.scalars(select(model.created_at).order_by(model.id)))
    assert moments == sorted(moments)
    assert 0.1 < 1 - len(set(moments)) / len(moments) < 0.3
    middle = moments[0] + (moments[-1] - moments[0]) / 2
    assert sum(moment > middle for moment in moments) > 0.6 * len(moments)


def test_nobody_orders_before_joining(seeded: Engine) -> None:
    with Session(seeded) as session:
        early = select(func.count()).select_from(Order).join(User).where(Order.created_at < User.created_at)
        unseen = select(func.count()).select_from(User).where(User.last_seen_at < User.created_at)
        assert (session.scalar(early), session.scalar(unseen)) == (0, 0)
        latest = session.scalar(select(func.max(User.last_seen_at)))
    assert latest is not None
    assert latest <= datetime(2026, 1, 1)
