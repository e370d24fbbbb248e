"""What `Session.get` gives is the same, whether the ORM has loaded it or a row was fetched."""

from __future__ import annotations

import datetime
import decimal
import enum
import uuid
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
from sqlalchemy import (
    Engine,
    ForeignKey,
    Numeric,
    String,
    TypeDecorator,
    event,
    exc,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    column_property,
    composite,
    deferred,
    joinedload,
    mapped_column,
    relationship,
    synonym,
)
from support import outside, recorded

from overdrive import create_engine
from overdrive.context import collecting
from overdrive.errors import SessionEndedError
from overdrive.instrumentation.events import StatementEvent
from overdrive.pool import direct
from overdrive.pool.observe import observe
from overdrive.pool.session import AsyncWork, Sessions, send

pytestmark = pytest.mark.anyio


class Kind(enum.Enum):
    ROUND = "round"
    SQUARE = "square"


class Loud(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, _dialect: Any) -> Any:
        return value.lower()

    def process_result_value(self, value: Any, _dialect: Any) -> Any:
        return value.upper()


class Base(DeclarativeBase):
    pass


class Owner(Base):
    __tablename__ = "owners"

    code: Mapped[str] = mapped_column(Loud, primary_key=True)
    things: Mapped[list[Thing]] = relationship(back_populates="owner")


class Thing(Base):
    __tablename__ = "things"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column("label")
    kind: Mapped[Kind]
    price: Mapped[decimal.Decimal] = mapped_column(Numeric(10, 2))
    day: Mapped[datetime.date]
    at: Mapped[datetime.datetime]
    took: Mapped[datetime.timedelta]
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)
    raw: Mapped[bytes]
    key: Mapped[uuid.UUID]
    tags: Mapped[list[str]] = mapped_column(ARRAY(String))
    nothing: Mapped[str | None]
    owner_code: Mapped[str] = mapped_column(ForeignKey(Owner.code))
    owner: Mapped[Owner] = relationship(back_populates="things")
    title: Mapped[str] = synonym("name")


class Point:
    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y


class Pair(Base):
    __tablename__ = "pairs"

    left: Mapped[int] = mapped_column(primary_key=True)
    right: Mapped[int] = mapped_column(primary_key=True)


class Parent(Base):
    __tablename__ = "parents"

    id: Mapped[int] = mapped_column(primary_key=True)
    type: Mapped[str]
    __mapper_args__: ClassVar[dict[str, str]] = {"polymorphic_on": "type", "polymorphic_identity": "parent"}


class Child(Parent):
    __mapper_args__: ClassVar[dict[str, str]] = {"polymorphic_identity": "child"}


def variant(name: str, **attributes: Any) -> type:
    """Another entity of the things' table."""
    return type(name, (Base,), {"__table__": Thing.__table__, **attributes})


TABLE = Thing.__table__

WITHOUT_MORE = variant("Plain")
WITH_MORE: dict[str, type] = {
    "deferred": variant("Deferred", price=deferred(TABLE.c.price)),
    "expression": variant("Expression", length=column_property(func.length(TABLE.c.label))),
    "composite": variant("Composite", point=composite(Point, TABLE.c.id, TABLE.c.id)),
    "joined": variant("Joined", owner=relationship(Owner, lazy="joined", viewonly=True)),
    "selectin": variant("Selectin", owner=relationship(Owner, lazy="selectin", viewonly=True)),
}

ROW = {
    "id": 1,
    "label": "one",
    "kind": Kind.SQUARE,
    "price": decimal.Decimal("12.50"),
    "day": datetime.date(2026, 2, 28),
    "at": datetime.datetime(2026, 2, 28, 12, 30),
    "took": datetime.timedelta(days=1, seconds=2),
    "data": {"a": [1, None]},
    "raw": b"\x00\xff",
    "key": uuid.UUID(int=7),
    "tags": ["x", "y"],
    "owner_code": "ann",
}


@pytest.fixture(scope="module")
def database(postgres_url: str) -> Any:
    database = outside(postgres_url)
    Base.metadata.create_all(database)
    yield database
    Base.metadata.drop_all(database)
    database.dispose()


@pytest.fixture
async def engine(postgres_url: str, database: Engine) -> AsyncIterator[AsyncEngine]:
    with database.begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())
        connection.execute(insert(Owner.__table__), {"code": "ANN"})
        connection.execute(insert(TABLE), ROW)
        connection.execute(insert(Pair), {"left": 1, "right": 2})
        connection.execute(insert(Parent.__table__), {"id": 1, "type": "child"})
    engine = create_engine(postgres_url, pool_size=1, max_overflow=0, pool_timeout=1)
    observe(engine.sync_engine, "default")
    async with engine.connect():  # what is asked of a server once
        pass
    yield engine
    await engine.dispose()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements that were handed to the driver."""
    statements: list[str] = []
    send = direct.send

    async def noted(engine: Engine, statement: Any, parameters: Any) -> Any:
        statements.append(statement.sql)
        return await send(engine, statement, parameters)

    monkeypatch.setattr(direct, "send", noted)
    return statements


def seen_of(entity: Any) -> Any:
    """All that the ORM knows of an entity."""
    state = inspect(entity)
    values = {name: (type(value), value) for name, value in state.dict.items() if name != "_sa_instance_state"}
    status = state.persistent, state.modified, state.expired, state.expired_attributes, state.load_options
    return values, state.identity_key, state.unloaded, status


@pytest.mark.parametrize(("class_", "key"), [(Thing, 1), (Owner, "Ann")])
async def test_it_is_what_the_orm_would_have_made(
    engine: AsyncEngine, sent: list[str], class_: type, key: int | str
) -> None:
    async with Sessions.of(engine)() as ours, AsyncSession(engine) as theirs:
        made = await ours.get_one(class_, key)
        assert len(sent) == 1
        assert not engine.sync_engine.pool.checkedout()  # type: ignore[attr-defined]
        loaded = await theirs.get_one(class_, key)
        assert seen_of(made) == seen_of(loaded)
        assert made in ours
        assert (ours.in_transaction(), list(ours.dirty), list(ours.new)) == (True, [], [])
        assert await ours.get(class_, *inspect(made).identity) is made
    assert len(sent) == 1


async def test_it_lives_on_as_any_other(engine: AsyncEngine, sent: list[str]) -> None:
    sessions = Sessions.of(engine)
    async with sessions() as session:
        thing = await session.get_one(Thing, 1)
        assert thing.title == "one"
        assert await session.run_sync(lambda _: thing.owner.code) == "ANN"
        thing.name = "two"
        thing.data = {}
        assert thing in session.dirty
        assert await session.scalar(select(Thing.name)) == "two"
        await session.refresh(thing, ["price"])
        session.expire(thing)
        await session.refresh(thing)
        assert (thing.name, thing.data) == ("two", {})
    async with sessions() as session:
        thing = await session.get_one(Thing, 1)
        assert thing.name == "two"
        await session.delete(thing)
    async with sessions() as session:
        assert await session.get(Thing, 1) is None
        with pytest.raises(exc.NoResultFound):
            await session.get_one(Thing, 1)
    assert len(sent) == 4


async def test_one_follows_another_until_the_session_has_a_connection(engine: AsyncEngine, sent: list[str]) -> None:
    async with Sessions.of(engine)() as session:
        thing = await session.get_one(Thing, 1)
        owner = await session.get_one(Owner, thing.owner_code)
        assert (len(sent), owner.code) == (2, "ANN")
        async with session.begin_nested():
            await session.get(Parent, 1)
        assert await session.get(WITHOUT_MORE, 1) is not None
    assert len(sent) == 2


async def test_a_session_of_somebody_elses_that_has_begun_is_left_alone(engine: AsyncEngine, sent: list[str]) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await session.execute(update(Thing).values(name="mine"))
        [(name,)] = await send(session, select(Thing.name), {}, columns=True)
        assert name == "mine"
        await session.rollback()
    assert not sent


async def test_it_is_observed_as_a_reading_of_its_row(engine: AsyncEngine, sent: list[str]) -> None:
    async def reads(session: AsyncSession, key: int) -> Any:
        with recorded() as events, collecting() as reads:
            await session.get(Thing, key)
        [seen] = [each for each in events if isinstance(each, StatementEvent)]
        return seen.rows, seen.transactional, seen.sql.count("things"), reads.tags, reads.unknown

    for key in (1, 2):
        async with Sessions.of(engine)() as ours:
            made = await reads(ours, key)
        async with AsyncSession(engine) as theirs:
            assert made == await reads(theirs, key)
    assert len(sent) == 2


async def test_keys_of_no_row_are_refused_as_ever(engine: AsyncEngine, sent: list[str]) -> None:
    for session in (Sessions.of(engine).open(), AsyncSession(engine)):
        with pytest.raises(exc.DBAPIError, match="invalid input for query argument"):
            await session.get(Thing, "no number")
        await session.close()
    assert len(sent) == 1


async def gotten(session: AsyncSession, class_: Any = Thing, key: Any = 1, **options: Any) -> Any:
    made = await session.get_one(class_, key, **options)
    await session.close()
    return made


@pytest.mark.parametrize("key", [(1,), {"id": 1}, True])
async def test_keys_in_other_shapes_are_the_orms_business(engine: AsyncEngine, sent: list[str], key: Any) -> None:
    assert seen_of(await gotten(Sessions.of(engine).open(), key=key)) == seen_of(
        await gotten(AsyncSession(engine), key=key)
    )
    assert not sent


@pytest.mark.parametrize("kind", WITH_MORE)
async def test_entities_that_are_more_than_a_row_are_loaded(engine: AsyncEngine, sent: list[str], kind: str) -> None:
    loaded = await gotten(AsyncSession(engine), WITH_MORE[kind])
    assert inspect(await gotten(Sessions.of(engine).open(), WITH_MORE[kind])).unloaded == inspect(loaded).unloaded
    assert not sent


async def test_so_is_what_is_a_key_to_the_mapper_alone(engine: AsyncEngine, database: Engine, sent: list[str]) -> None:
    class_ = variant("Loose", __mapper_args__={"primary_key": [TABLE.c.owner_code]})
    with database.begin() as connection:
        connection.execute(insert(TABLE), {**ROW, "id": 2})
    made = await gotten(Sessions.of(engine).open(), class_, "ann")
    assert seen_of(made) == seen_of(await gotten(AsyncSession(engine), class_, "ann"))
    assert len(sent) == 1


async def test_so_are_those_with_children_and_with_keys_of_two_columns(engine: AsyncEngine, sent: list[str]) -> None:
    assert type(await gotten(Sessions.of(engine).open(), Parent)) is Child
    assert (await gotten(Sessions.of(engine).open(), Pair, (1, 2))).right == 2
    with pytest.raises(exc.InvalidRequestError, match="Incorrect number of values"):
        await gotten(Sessions.of(engine).open(), Pair, 1)
    assert not sent


@pytest.mark.parametrize(
    "options",
    [
        {"with_for_update": {}},
        {"with_for_update": True},
        {"populate_existing": True},
        {"options": [joinedload(Thing.owner)]},
        {"execution_options": {"a": 1}},
    ],
)
async def test_whoever_asks_for_more_gets_it(engine: AsyncEngine, sent: list[str], options: dict[str, Any]) -> None:
    await gotten(Sessions.of(engine).open(), **options)
    assert not sent


@pytest.mark.parametrize(
    "name", ["loaded_as_persistent", "before_attach", "after_attach", "detached_to_persistent", "do_orm_execute"]
)
async def test_whoever_listens_hears_what_the_orm_says(engine: AsyncEngine, sent: list[str], name: str) -> None:
    heard: list[str] = []
    usual: list[str] = []
    session, other = Sessions.of(engine).open(), AsyncSession(engine)
    event.listen(session.sync_session, name, lambda *_: heard.append(name))
    event.listen(other.sync_session, name, lambda *_: usual.append(name))
    await gotten(session)
    await gotten(other)
    assert heard == usual
    assert not sent


async def test_whoever_listens_to_loading_hears_of_it(engine: AsyncEngine, sent: list[str]) -> None:
    heard: list[Any] = []

    def listen(thing: Thing, _context: Any) -> None:
        heard.append(thing.name)

    event.listen(Thing, "load", listen)
    try:
        await gotten(Sessions.of(engine).open())
    finally:
        event.remove(Thing, "load", listen)
    assert heard == ["one"]
    assert not sent


async def test_an_attribute_that_is_added_later_is_loaded(engine: AsyncEngine, sent: list[str]) -> None:
    class_: Any = variant("Growing")
    await gotten(Sessions.of(engine).open(), class_)
    assert len(sent) == 1
    class_.length = column_property(func.length(TABLE.c.label))
    assert (await gotten(Sessions.of(engine).open(), class_)).length == 3
    assert len(sent) == 1


async def test_within_a_transaction_it_sees_what_that_has_done(engine: AsyncEngine, sent: list[str]) -> None:
    async with Sessions.of(engine)() as session:
        await session.execute(update(Thing).values(name="mine"))
        assert (await session.get_one(Thing, 1)).name == "mine"
        await session.rollback()
    assert not sent


async def test_a_session_of_a_teams_own_get_is_asked(engine: AsyncEngine, sent: list[str]) -> None:
    class Own(Session):
        def get(self, entity: Any, ident: Any, **options: Any) -> Any:
            return super().get(entity, ident - 1, **options)

    session = Sessions(async_sessionmaker(engine, sync_session_class=Own)).open()
    assert (await gotten(session, key=2)).id == 1
    assert not sent


async def test_after_its_end_a_session_says_so(engine: AsyncEngine, sent: list[str]) -> None:
    work = AsyncWork(Sessions.of(engine).open())
    assert work.settle(200)
    with pytest.raises(SessionEndedError):
        await work.session.get(Thing, 1)
    assert not sent
