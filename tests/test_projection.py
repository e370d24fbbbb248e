"""A page of columns is sent as the page of entities would be: byte by byte, over generated response models."""

from __future__ import annotations

import enum
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import pytest
from fastapi import Depends, FastAPI, Response
from fastapi.responses import JSONResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    computed_field,
    create_model,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)
from sqlalchemy import JSON, DateTime, Enum, ForeignKey, Numeric, String, event, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    aliased,
    column_property,
    load_only,
    mapped_column,
    relationship,
    selectinload,
    with_loader_criteria,
)
from support import call

import overdrive
import overdrive.pages
from overdrive import CursorPage, Overdrive, SessionDep, create_engine, paginate
from overdrive.pagination.body import Writer
from overdrive.pagination.projection import projected

pytestmark = pytest.mark.anyio


class Base(DeclarativeBase):
    pass


class OwnResponse(JSONResponse):
    def init_headers(self, headers: Any = None) -> None:
        super().init_headers({**(headers or {}), "x-class": "own"})


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Thing(Base):
    __tablename__ = "things"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    note: Mapped[str | None]
    price: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    weight: Mapped[float]
    made_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    day: Mapped[date | None]
    hour: Mapped[time | None]
    active: Mapped[bool]
    colour: Mapped[Colour | None] = mapped_column(Enum(Colour, name="projection_colour"))
    key: Mapped[uuid.UUID]
    data: Mapped[Any] = mapped_column(JSON)
    # A column by another name than its attribute's.
    title: Mapped[str] = mapped_column("heading")
    owner_id: Mapped[int] = mapped_column(ForeignKey("owners.id"))
    secret: Mapped[str | None] = mapped_column(deferred=True)

    owner: Mapped[Owner] = relationship(lazy="selectin")

    @property
    def shout(self) -> str:
        return self.name.upper()

    @hybrid_property
    def double(self) -> int:
        return self.id * 2


class Owner(Base):
    __tablename__ = "owners"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


Thing.length = column_property(func.length(Thing.name))  # type: ignore[attr-defined]

COLUMNS: dict[str, Any] = {
    "id": int,
    "name": str,
    "note": str | None,
    "price": Decimal,
    "weight": float,
    "made_at": datetime,
    "day": date | None,
    "hour": time | None,
    "active": bool,
    "colour": Colour | None,
    "key": uuid.UUID,
    "data": Any,
    "title": str,
    "owner_id": int,
}


def row(number: int) -> dict[str, Any]:
    return {
        "name": ["ä", "'\"\\", "a\r\nb", "", "x" * 30][number % 5],
        "note": [None, "note"][number % 2],
        "price": Decimal(number) / 4,
        "weight": number / 3,
        "made_at": datetime(2026, 1, 1, tzinfo=UTC).replace(microsecond=number * 1000),
        "day": [None, date(2026, 2, 3)][number % 2],
        "hour": [time(1, 2, 3), None][number % 2],
        "active": number % 3 == 0,
        "colour": [None, Colour.RED, Colour.BLUE][number % 3],
        "key": uuid.UUID(int=number),
        "data": [None, {"a": [1, 2]}, [], "text"][number % 4],
        "heading": f"title {number}",
        "owner_id": 1,
        "secret": "secret",
    }


@pytest.fixture(scope="module")
async def engine(postgres_url: str) -> AsyncIterator[Any]:
    engine = create_engine(postgres_url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Owner), [{"id": 1, "name": "owner"}])
        await connection.execute(insert(Thing), [row(number) for number in range(23)])
    yield engine
    await engine.dispose()


def statement() -> Any:
    return select(Thing).order_by(Thing.made_at.desc())


def served(engine: Any, model: Any, **options: Any) -> FastAPI:
    """The same page twice: returned as it was made, and looked at by the endpoint, which thus needs entities."""
    app = FastAPI()
    Overdrive(app, engine=engine)

    @app.get("/made", response_model=CursorPage[model], **options)
    async def made(db: SessionDep) -> Any:
        return await paginate(db, statement())

    @app.get("/seen", response_model=CursorPage[model], **options)
    async def seen(db: SessionDep) -> Any:
        page = await paginate(db, statement())
        assert all(isinstance(item, Thing) for item in page.items)
        return page

    return app


# Response models


ALIASES: list[Any] = [
    lambda name: {},
    lambda name: {"alias": f"{name}Alias", "validation_alias": name},
    lambda name: {"serialization_alias": f"{name}Out"},
    lambda name: {"validation_alias": AliasChoices("absent", name)},
    lambda name: {"validation_alias": AliasChoices(AliasPath("absent", 0), name)},
]


class Computed(BaseModel):
    @computed_field  # type: ignore[prop-decorator]
    @property
    def fields(self) -> list[str]:
        return sorted(self.model_fields_set)


class Serialized(BaseModel):
    @field_serializer("*", check_fields=False)
    def serialize(self, value: Any) -> Any:
        return {"value": value}


class Validated(BaseModel):
    @field_validator("*", mode="before", check_fields=False)
    @classmethod
    def validate_before(cls, value: Any) -> Any:
        return value.strip() if isinstance(value, str) else value

    @model_validator(mode="after")
    def validate_after(self) -> Any:
        self.__dict__["seen"] = True
        return self


class Whole(BaseModel):
    @model_serializer(mode="wrap")
    def serialize(self, handler: Any) -> Any:
        return {"whole": handler(self)}


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, use_enum_values=True)


class Lax(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True, populate_by_name=True)


MIXINS = [Computed, Serialized, Validated, Whole, Frozen, Lax]


@st.composite
def models(draw: st.DrawFn) -> Any:
    names = draw(st.lists(st.sampled_from(sorted(COLUMNS)), min_size=1, unique=True))
    fields: dict[str, Any] = {}
    for name in names:
        alias = draw(st.sampled_from(ALIASES))(name)
        if draw(st.integers(0, 5)) == 0:
            fields[f"my_{name}"] = (COLUMNS[name], Field(validation_alias=name))
        else:
            fields[name] = (COLUMNS[name], Field(**alias))
    if draw(st.booleans()):
        fields["absent_number"] = (int, Field(default=7))
    bases = tuple(draw(st.lists(st.sampled_from(MIXINS), max_size=2, unique=True))) or (BaseModel,)
    return create_model("Out", __base__=bases, **fields)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "response_model_exclude_none": st.just(True),
        "response_model_exclude_unset": st.just(True),
        "response_model_exclude_defaults": st.just(True),
        "response_model_by_alias": st.just(False),
        "response_model_exclude": st.just({"items": {"__all__": {"name", "price"}}}),
        "status_code": st.just(203),
    },
)


@settings(max_examples=60, deadline=None)
@given(model=models(), options=OPTIONS, size=st.integers(1, 30))
async def test_bodies_are_the_same(engine: Any, model: Any, options: dict[str, Any], size: int) -> None:
    assert projected(statement(), model) is not None
    app = served(engine, model, **options)
    made, seen = [await call(app, f"{path}?size={size}") for path in ("/made", "/seen")]
    assert (made.status, repr(made.error)) == (seen.status, repr(seen.error))
    # Cursors are bound to their path.
    assert made.body.split(b'"next_cursor"')[0] == seen.body.split(b'"next_cursor"')[0]


async def test_headers_and_status_of_dependencies_are_kept(engine: Any) -> None:
    app = FastAPI()
    Overdrive(app, engine=engine)

    def sets(response: Response) -> None:
        response.headers["x-set"] = "yes"
        response.status_code = 206

    @app.get("/", response_model=CursorPage[create_model("Out", id=(int, ...))], dependencies=[Depends(sets)])
    async def made(db: SessionDep) -> Any:
        return await paginate(db, statement())

    answer = await call(app, "/?size=2")
    assert (answer.status, answer.headers["x-set"]) == (206, "yes")


Plain = create_model("Plain", id=(int, ...), name=(str, ...), note=(str | None, ...), weight=(float, ...))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes | None]:
    """What was written without a look of the response model's at the rows."""
    bodies: list[bytes | None] = []
    write = Writer.write

    def note(self: Writer, found: Any) -> bytes | None:
        bodies.append(write(self, found))
        return bodies[-1]

    monkeypatch.setattr(Writer, "write", note)
    return bodies


async def test_plain_values_are_written_at_once_and_the_same(engine: Any, written: list[bytes | None]) -> None:
    app = served(engine, Plain)
    made, seen = [await call(app, f"{path}?size=9") for path in ("/made", "/seen")]
    assert made.body.split(b'"next_cursor"')[0] == seen.body.split(b'"next_cursor"')[0]
    assert made.headers.keys() == seen.headers.keys()
    assert made.headers["content-type"] == seen.headers["content-type"]
    assert written == [made.body]


@pytest.mark.parametrize(
    "options",
    [
        {"status_code": 201},
        {"response_class": OwnResponse},
        {"response_model_exclude_none": True},
        {"response_model_include": {"items"}},
    ],
    ids=str,
)
async def test_a_route_that_is_told_how_to_answer_does_so(
    engine: Any, written: list[bytes | None], options: dict[str, Any]
) -> None:
    app = served(engine, Plain, **options)
    made, seen = [await call(app, f"{path}?size=9") for path in ("/made", "/seen")]
    assert (made.status, made.headers.get("x-class")) == (seen.status, seen.headers.get("x-class"))
    assert made.body.split(b'"next_cursor"')[0] == seen.body.split(b'"next_cursor"')[0]
    assert written == []


async def test_what_an_endpoint_does_after_its_return_is_kept(engine: Any, written: list[bytes | None]) -> None:
    app = FastAPI()
    Overdrive(app, engine=engine)

    @app.get("/", response_model=CursorPage[Plain])
    async def made(db: SessionDep, response: Response) -> Any:
        try:
            return await paginate(db, statement())
        finally:
            response.headers["x-late"] = "yes"

    answer = await call(app, "/?size=2")
    assert (answer.headers["x-late"], written) == ("yes", [])


async def test_a_page_without_a_body_has_none(engine: Any, written: list[bytes | None]) -> None:
    app = FastAPI()
    Overdrive(app, engine=engine)

    def sets(response: Response) -> None:
        response.status_code = 204

    @app.get("/", response_model=CursorPage[Plain], dependencies=[Depends(sets)])
    async def made(db: SessionDep) -> Any:
        return await paginate(db, statement())

    answer = await call(app, "/?size=2")
    assert (answer.status, answer.body, written) == (204, b"", [])


# What could make a difference


Id = create_model("Id", id=(int, ...))


class GivenAll(BaseModel):
    id: int

    @model_validator(mode="before")
    @classmethod
    def look(cls, value: Any) -> Any:
        return value


class Wrapped(BaseModel):
    id: int

    @model_validator(mode="wrap")
    @classmethod
    def look(cls, value: Any, handler: Any) -> Any:
        return handler(value)


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: int


class Made(BaseModel):
    id: int

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)


class Root(RootModel[int]):
    pass


class OwnerOut(BaseModel):
    name: str


def out(**fields: Any) -> Any:
    return create_model("Out", **{name: (type_, ...) for name, type_ in fields.items()})


@pytest.mark.parametrize(
    "model",
    [
        out(shout=str),
        out(double=int),
        out(owner=OwnerOut),
        out(secret=str),
        out(metadata=Any),
        create_model("Out", other=(int, Field(validation_alias="double"))),
        create_model("Out", absent=(int, 7)),
        GivenAll,
        Wrapped,
        Open,
        Made,
        Root,
    ],
)
def test_model_that_reads_more_than_columns_gets_entities(model: Any) -> None:
    assert projected(statement(), model) is None


@pytest.mark.parametrize(
    "model",
    [out(length=int), create_model("Out", other=(int, Field(validation_alias=AliasPath("data", "a", 0))))],
)
def test_whatever_is_read_of_a_column_is_a_columns(model: Any) -> None:
    assert projected(statement(), model) is not None


@pytest.mark.parametrize(
    "stmt",
    [
        select(Thing.id),
        select(Thing, Owner),
        select(Thing, Thing.id),
        select(Thing).distinct(),
        select(Thing).group_by(Thing.id),
        select(Thing).options(selectinload(Thing.owner)),
        select(Thing).options(load_only(Thing.id)),
        select(Thing).options(with_loader_criteria(Thing, Thing.id > 3)),
        select(Thing).execution_options(populate_existing=True),
    ],
)
def test_statement_that_is_more_than_an_entity_gives_what_it_selects(stmt: Any) -> None:
    assert projected(stmt, Id) is None


@pytest.mark.parametrize("entity", [Thing, aliased(Thing)])
def test_entity_in_any_plain_statement_is_projected(entity: Any) -> None:
    for stmt in (select(entity), select(entity).where(entity.id > 3), select(entity).join(Owner), select(entity)):
        projection = projected(stmt, Id)
        assert projection is not None
        assert list(projection.columns) == ["id"]


class Other(DeclarativeBase):
    pass


def mapped(**members: Any) -> Any:
    columns = {"id": mapped_column(primary_key=True), "__annotations__": {"id": Mapped[int]}}
    name = f"Some{len(Other.metadata.tables)}"
    return type(name, (Other,), {"__tablename__": name, **columns, **members})


def listened() -> Any:
    entity = mapped()
    event.listen(entity, "load", lambda *_: None)
    return entity


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (mapped, True),
        (listened, False),
        (lambda: mapped(__getattr__=lambda self, name: 7), False),
        (lambda: mapped(__getattribute__=lambda self, name: object.__getattribute__(self, name)), False),
        (lambda: mapped(kind=mapped_column(String), __mapper_args__={"polymorphic_on": "kind"}), False),
    ],
)
def test_entity_that_runs_code_of_the_teams_is_loaded(make: Any, plain: bool) -> None:
    if not plain:
        assert projected(select(make()), Id) is None
    else:
        assert projected(select(make()), Id) is not None


async def items_seen(engine: Any, session_class: Any = AsyncSession, before: Any = None) -> set[type]:
    """Serve one page that is returned as it was made, and say what its items were."""
    seen: set[type] = set()

    class Watched(CursorPage[Id]):  # type: ignore[valid-type]
        @field_validator("items", mode="before")
        @classmethod
        def watch(cls, items: list[Any]) -> Any:
            seen.update(Thing if isinstance(item, Thing) else tuple for item in items)
            return items

    app = FastAPI()
    Overdrive(app, sessionmaker=async_sessionmaker(engine, class_=session_class))

    @app.get("/", response_model=Watched)
    async def page(db: SessionDep) -> Any:
        if before is not None:
            await before(db)
        return await paginate(db, statement())

    assert (await call(app, "/")).status == 200
    return seen


async def test_columns_are_read_where_the_page_is_returned_as_it_was_made(engine: Any) -> None:
    assert await items_seen(engine) == {tuple}


async def test_criteria_of_a_session_are_never_lost(engine: Any) -> None:
    class Tenant(AsyncSession):
        sync_session_class = type("Session", (AsyncSession.sync_session_class,), {})

    @event.listens_for(Tenant.sync_session_class, "do_orm_execute")
    def only_some(state: Any) -> None:
        state.statement = state.statement.options(with_loader_criteria(Thing, lambda cls: cls.id <= 5))

    app = FastAPI()
    Overdrive(app, sessionmaker=async_sessionmaker(engine, class_=Tenant))

    @app.get("/", response_model=CursorPage[Id])
    async def page(db: SessionDep) -> Any:
        return await paginate(db, statement())

    answer = await call(app, "/?size=100")
    assert answer.body.count(b'"id"') == 5
    assert await items_seen(engine, Tenant) == {Thing}


async def test_what_the_session_holds_is_what_is_sent(engine: Any) -> None:
    kept: list[Any] = []

    async def change(db: AsyncSession) -> None:
        kept.append(await db.get_one(Thing, 3))

    assert await items_seen(engine, before=change) == {Thing}

    async def read_another(db: AsyncSession) -> None:
        kept.append(await db.get_one(Owner, 1))

    assert await items_seen(engine, before=read_another) == {tuple}


# What an endpoint does with its page


async def returns_after_a_name(db: Any) -> Any:
    page = await paginate(db, statement())
    page.items.reverse()
    return page


async def returns_items(db: Any) -> Any:
    return (await paginate(db, statement())).items


async def returns_another(db: Any) -> Any:
    other = paginate
    return await other(db, statement())


async def returns_from_inside(db: Any) -> Any:
    async def inside() -> Any:
        return await paginate(db, statement())

    return await inside()


async def returns_at_once(db: Any) -> Any:
    if db is None:
        return None
    return await paginate(db, statement())


def returns_at_once_without_waiting(db: Any) -> Any:
    return paginate(db, statement())


async def returns_both(db: Any) -> Any:
    if db is None:
        return await paginate(db, statement())
    page = await overdrive.paginate(db, statement())
    page.items.reverse()
    return page


async def returns_of_the_package(db: Any) -> Any:
    return await overdrive.paginate(db, statement())


@pytest.mark.parametrize(
    ("endpoint", "as_made"),
    [
        (returns_at_once, True),
        (returns_at_once_without_waiting, True),
        (returns_of_the_package, True),
        (returns_both, False),
        (returns_after_a_name, False),
        (returns_items, False),
        (returns_another, False),
        (returns_from_inside, False),
        (lambda db: paginate(db, statement()), False),
        (print, False),
        (object(), False),
    ],
)
def test_only_a_page_that_is_returned_at_once_is_nobody_elses(endpoint: Any, as_made: bool) -> None:
    assert overdrive.pages._returns_pages_as_made(endpoint) is as_made
