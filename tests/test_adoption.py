"""Next to what a service already has: its engine, session maker, `get_db`, SQLModel, other engines, other pools."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from cache.conftest import patient as patient
from fastapi import Depends, FastAPI, Request
from fastapi.testclient import TestClient
from pydantic import BaseModel
from sqlalchemy import Engine, event, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool
from sqlmodel import Session as SQLModelSession
from sqlmodel import SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession
from support import Item, Other, call, client, names, outside, tables

from overdrive import (
    ConfigurationError,
    NotInstalledError,
    Overdrive,
    Page,
    RequestSession,
    SessionDep,
    Settings,
    add_pagination,
    cached,
    create_engine,
    get_session,
    get_sync_session,
    paginate,
)

pytestmark = pytest.mark.anyio


class ItemOut(BaseModel):
    id: int
    name: str


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    with tables(url) as engine:
        yield engine


async def added(app: FastAPI, name: str = "x") -> int:
    return (await call(app, f"/?name={name}", "POST")).status


def adding(app: FastAPI, dependency: Any) -> None:
    async def add(name: str, db: AsyncSession = Depends(dependency)) -> None:  # noqa: B008
        db.add(Item(name=name))

    app.post("/")(add)


# The team's own get_db

get_db = get_session


async def teams_own_get_db() -> AsyncIterator[AsyncSession]:
    raise AssertionError("overridden")
    yield


async def test_get_db_is_get_session(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)
    adding(app, get_db)
    assert await added(app) == 200
    assert names(database) == ["x"]
    await overdrive.aclose()


async def test_get_db_is_overridden_with_get_session(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url, cache=True)
    app.dependency_overrides[teams_own_get_db] = get_session
    adding(app, teams_own_get_db)

    @app.get("/count")
    @cached(ttl=60)
    async def count(db: Annotated[AsyncSession, Depends(teams_own_get_db)]) -> int | None:
        return await db.scalar(select(func.count()).select_from(Item))

    seen: list[Any] = []
    answer = await call(app, "/?name=x", "POST", at_start=lambda: seen.append(names(database)))
    assert (answer.status, seen) == (200, [["x"]])
    async with client(app) as http:
        assert [(await http.get("/count")).headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
    await overdrive.aclose()


async def test_get_session_is_overridden_by_a_test(sqlite_url: str, tmp_path: Path) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url)
    adding(app, get_session)
    other = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'other.sqlite'}")

    async def session_of_the_test() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(other) as session:
            yield session
            await session.commit()

    app.dependency_overrides[get_session] = session_of_the_test
    with tables(sqlite_url) as unused, tables(str(other.url)) as used:
        assert await added(app) == 200
        assert (names(unused), names(used)) == ([], ["x"])
    await other.dispose()
    await overdrive.aclose()


async def test_teams_own_yielding_get_db_works_beside(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)
    own = create_async_engine(url, poolclass=NullPool)

    async def own_get_db() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(own) as session:
            yield session
            await session.commit()

    adding(app, own_get_db)
    assert await added(app) == 200
    assert names(database) == ["x"]
    await overdrive.aclose()


def test_recipe_of_a_plain_function_with_the_teams_own_session(sqlite_url: str) -> None:
    with tables(sqlite_url) as engine:
        factory = sessionmaker(engine)

        def own_get_db() -> Iterator[Session]:
            with factory() as session:
                yield session

        app = FastAPI()

        @app.get("/items", response_model=Page[ItemOut])
        def items(db: Session = Depends(own_get_db)) -> Any:  # noqa: B008
            return paginate(db, select(Item))

        add_pagination(app)
        with factory() as session:
            session.add_all([Item(name=str(n)) for n in range(5)])
            session.commit()
        answer = TestClient(app).get("/items?page=2&size=2").json()
        assert answer == {
            "items": [{"id": 3, "name": "2"}, {"id": 4, "name": "3"}],
            "total": 5,
            "page": 2,
            "size": 2,
            "pages": 3,
        }


def test_recipe_of_a_plain_function_with_our_session(sqlite_url: str) -> None:
    app = FastAPI()
    add_pagination(app)
    Overdrive(app, database_url=sqlite_url)

    @app.get("/items", response_model=Page[ItemOut])
    def items(db: Session = Depends(get_sync_session)) -> Any:  # noqa: B008
        return paginate(db, select(Item))

    with tables(sqlite_url) as engine, TestClient(app) as http:
        with engine.begin() as connection:
            connection.execute(insert(Item), [{"name": str(n)} for n in range(3)])
        assert http.get("/items?size=2").json()["total"] == 3


# The team's own engine and session maker


@pytest.mark.parametrize("pool", [None, NullPool])
async def test_own_engine(url: str, database: Engine, pool: Any) -> None:
    engine = create_async_engine(url, poolclass=pool)
    app = FastAPI()
    overdrive = Overdrive(app, engine=engine)
    adding(app, get_session)

    @app.post("/sync")
    def add(name: str, db: Annotated[Session, Depends(get_sync_session)]) -> None:
        db.add(Item(name=name))

    assert await added(app) == 200
    assert (await call(app, "/sync?name=y", "POST")).status == 200
    assert (await call(app, "/?name=orphan", "POST")).status == 200
    assert names(database) == ["x", "y", "orphan"]
    assert overdrive.engine is engine
    # It is the team's to dispose of.
    await overdrive.aclose()
    async with engine.connect() as connection:
        assert await connection.scalar(select(1)) == 1
    await engine.dispose()


class OwnSession(AsyncSession):
    pass


class OwnSyncSession(Session):
    flushed: list[str] = []  # noqa: RUF012


@event.listens_for(OwnSyncSession, "before_flush")
def note(session: Session, *_: Any) -> None:
    OwnSyncSession.flushed.extend(item.name for item in session.new)


async def test_own_session_maker_with_its_class_options_and_listeners(url: str, database: Engine) -> None:
    OwnSyncSession.flushed.clear()
    engine = create_async_engine(url)
    maker = async_sessionmaker(
        engine, class_=OwnSession, sync_session_class=OwnSyncSession, autoflush=False, info={"team": "own"}
    )
    app = FastAPI()
    overdrive = Overdrive(app, sessionmaker=maker)

    @app.post("/")
    async def add(name: str, db: SessionDep) -> None:
        assert isinstance(db, OwnSession)
        assert isinstance(db.sync_session, OwnSyncSession)
        assert (db.sync_session.autoflush, db.info["team"]) == (False, "own")
        db.add(Item(name=name))

    assert await added(app) == 200
    assert OwnSyncSession.flushed == ["x"]
    assert names(database) == ["x"]
    assert overdrive.engine is engine
    await overdrive.aclose()
    await engine.dispose()


async def test_sqlmodel(sqlite_url: str) -> None:
    from sqlmodel import Field
    from sqlmodel import select as sqlmodel_select

    class Hero(SQLModel, table=True):
        id: int | None = Field(default=None, primary_key=True)
        name: str

    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url, session_class=SQLModelAsyncSession, cache=True)

    async def add(name: str, db: SQLModelAsyncSession = Depends(get_session)) -> int | None:  # noqa: B008
        hero = Hero(name=name)
        db.add(hero)
        await db.flush()
        return hero.id

    async def heroes(db: SQLModelAsyncSession = Depends(get_session)) -> Any:  # noqa: B008
        return await paginate(db, sqlmodel_select(Hero))

    def sync_names(db: SQLModelSession = Depends(get_sync_session)) -> list[str]:  # noqa: B008
        return list(db.exec(sqlmodel_select(Hero.name)))

    async def named(name: str, db: SQLModelAsyncSession = Depends(get_session)) -> int:  # noqa: B008
        return len((await db.exec(sqlmodel_select(Hero).where(Hero.name == name))).all())

    app.post("/")(add)
    app.get("/", response_model=Page[Hero])(heroes)
    app.get("/sync")(sync_names)
    app.get("/named")(cached(named))
    async with overdrive.engine.begin() as connection:
        await connection.run_sync(SQLModel.metadata.create_all)
    async with client(app) as http:
        assert (await http.post("/?name=Ada")).json() == 1
        assert (await http.get("/")).json()["items"] == [{"id": 1, "name": "Ada"}]
        assert (await http.get("/sync")).json() == ["Ada"]
        assert [(await http.get("/named?name=Ada")).headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
        await http.post("/?name=Ada")
        assert (await http.get("/named?name=Ada")).json() == 2
    await overdrive.aclose()


# Several engines


async def test_several_engines_have_sessions_and_tags_of_their_own(sqlite_url: str, tmp_path: Path) -> None:
    reports = create_engine(f"sqlite:///{tmp_path / 'reports.sqlite'}")
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url, engines={"reports": reports}, cache=True)

    @app.post("/")
    async def add(name: str, db: SessionDep) -> None:
        db.add(Item(name=name))

    @app.post("/report")
    async def add_report(db: Annotated[AsyncSession, Depends(RequestSession("reports"))]) -> None:
        db.add(Item(name="report"))

    @app.get("/report")
    @cached
    async def count(db: Annotated[AsyncSession, Depends(RequestSession("reports"))]) -> int | None:
        return await db.scalar(select(func.count()).select_from(Item))

    with tables(sqlite_url) as main, tables(str(reports.url)) as other:
        async with client(app) as http:
            await http.post("/?name=x")
            await http.post("/report")
            assert (names(main), names(other)) == (["x"], ["report"])
            assert [(await http.get("/report")).headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
            await http.post("/?name=y")
            assert (await http.get("/report")).headers["x-cache"] == "hit"
            await http.post("/report")
            assert (await http.get("/report")).json() == 2
    async with overdrive.session("reports") as db:
        assert await db.scalar(select(func.count()).select_from(Other)) == 0
    with pytest.raises(ConfigurationError, match=r"no engine 'archive'.*default, reports"):
        overdrive.session("archive")
    await overdrive.aclose()
    await reports.dispose()


async def test_what_one_engine_reads_another_of_the_same_database_outdates(url: str, database: Engine) -> None:
    reports = create_engine(url)
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url, engines={"reports": reports}, cache=True)

    @app.get("/names")
    @cached
    async def read(db: Annotated[AsyncSession, Depends(RequestSession("reports"))]) -> list[str]:
        return list(await db.scalars(select(Item.name).order_by(Item.id)))

    adding(app, get_session)

    @app.post("/sync")
    def add(name: str, db: Annotated[Session, Depends(get_sync_session)]) -> None:
        db.add(Item(name=name))

    async with client(app) as http:
        assert [(await http.get("/names")).headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
        for path, expected in [("/", ["x"]), ("/sync", ["x", "x"])]:
            await http.post(path + "?name=x")
            assert (await http.get("/names")).json() == expected
    await overdrive.aclose()
    await reports.dispose()


# Where something is missing or wrong

OUTSIDE = outside("sqlite:///x.sqlite")


async def awaited_tenant(request: Request) -> str:
    return "acme"


async def test_session_without_overdrive_names_the_fix() -> None:
    app = FastAPI()
    adding(app, get_session)
    answer = await call(app, "/?name=x", "POST")
    assert isinstance(answer.error, NotInstalledError)
    assert "Overdrive(app)" in str(answer.error)


def test_memory_database_has_no_synchronous_twin() -> None:
    overdrive = Overdrive(FastAPI(), database_url="sqlite://")
    with pytest.raises(ConfigurationError, match="use a file"):
        overdrive.sync_sessions()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"database_url": "nonsense"}, "database URL cannot be read"),
        ({"database_url": "oracle+nothing://x"}, "oracle"),
        ({"database_url": "mysql+pymysql://x/y"}, "pip install pymysql"),
        ({"sessionmaker": async_sessionmaker()}, "bound to no engine: give the one it uses as engine="),
        ({"sessionmaker": sessionmaker()}, "takes async_sessionmaker, not sessionmaker"),
        ({"engine": OUTSIDE}, "engine= takes AsyncEngine, not Engine: an Engine is sync_engine="),
        ({"engines": {"reports": OUTSIDE}}, r"engines\['reports'\]= takes AsyncEngine"),
        ({"engines": [OUTSIDE]}, "engines by their names"),
        ({"sync_engine": create_engine("sqlite:///x.sqlite")}, "an AsyncEngine is engine="),
        ({"session_class": Session}, "derived from AsyncSession"),
        ({"settings": {"pool": {"size": 5}}}, r"Settings.load\(...\) makes one"),
        ({"tenant": "acme"}, "tenant= takes a plain function"),
        ({"tenant": awaited_tenant}, "tenant= takes a plain function"),
        ({"redis_url": "http://x"}, "Redis URL cannot be read"),
        ({"settings": Settings(), "database_url": "sqlite://"}, "either in settings= or as an argument"),
    ],
)
def test_bad_arguments_are_one_clear_sentence(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        Overdrive(FastAPI(), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [{"pool_size": 0}, {"pool_size": "3"}, {"max_overflow": -1}, {"pool_timeout": 0}, {"pool_recycle": -2}],
)
def test_bad_pool_numbers(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="a pool needs"):
        create_engine("sqlite:///x.sqlite", **bad)


def test_pool_numbers_reach_the_pool() -> None:
    engine = create_engine("postgresql://h/d", pool_size=3, max_overflow=4, pool_timeout=5, pool_recycle=6)
    pool: Any = engine.sync_engine.pool
    assert (pool.size(), pool.capacity, pool.timeout(), pool._recycle) == (3, 7, 5, 6)


def test_outside_engine_is_not_overdrives(sqlite_url: str) -> None:
    assert outside(sqlite_url).dialect.driver == "pysqlite"
