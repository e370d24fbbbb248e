"""What the tests of walks and the soak share: generated walks beside the plain list, and damaged cursors."""

from __future__ import annotations

import enum
import random
import string
import uuid
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import (
    REAL,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Date,
    DateTime,
    Double,
    Engine,
    Enum,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    Select,
    String,
    Table,
    Time,
    Uuid,
    delete,
    func,
    insert,
    select,
)

from overdrive.pagination.keeper import Kept
from overdrive.pagination.number import page
from overdrive.pagination.page import CursorPage, CursorParams, LimitOffsetParams
from overdrive.pagination.recipe import Recipes
from overdrive.pagination.select import run
from overdrive.pagination.walk import cursor_page

BINDING, KEY = b"route", b"k" * 32


class Mood(enum.Enum):
    SAD = "s"
    GLAD = "g"


_NOON = datetime(2026, 3, 29, 12, tzinfo=UTC)

#: Of each type a few values, so that many are equal.
KINDS: list[tuple[Any, list[Any]]] = [
    (Integer(), [-1, 0, 1, 2**31 - 1]),
    (BigInteger(), [-(2**63), 0, 2**63 - 1]),
    (Boolean(), [False, True]),
    (String(), ["", "a", "A", "é", "b\r\n", "a b"]),
    (Double(), [float("-inf"), -0.0, 0.0, 0.1, 1 / 3, float("inf")]),
    (REAL(), [-1.5, 0.1, 1 / 3, 16777217.0]),
    (Numeric(30, 10), [Decimal("-0.1"), Decimal("0"), Decimal("12345678901234567890.0123456789")]),
    (Date(), [date(1, 1, 1), date(2026, 2, 28), date(9999, 12, 31)]),
    (DateTime(timezone=True), [_NOON, _NOON.astimezone(timezone(timedelta(hours=-7))), _NOON.replace(microsecond=1)]),
    (DateTime(), [datetime(2026, 1, 1), datetime(2026, 1, 1, 0, 0, 0, 1)]),
    (Time(), [time(0), time(12, 0, 0, 1), time(23, 59, 59, 999999)]),
    (Interval(), [timedelta(-1), timedelta(0), timedelta(30), timedelta(microseconds=1)]),
    (Uuid(), [uuid.UUID(int=0), uuid.UUID(int=2**127), uuid.UUID(int=2**128 - 1)]),
    (LargeBinary(), [b"", b"\0", b"\xff\0"]),
    (Enum(Mood, native_enum=False), list(Mood)),
]


@dataclass(frozen=True)
class Schema:
    """A table of three columns, and the values they may have."""

    table: Table
    values: list[list[Any]]


def schema(number: int, temporary: bool) -> Schema:
    """Return the schema of this number: whichever, it is always the same."""
    generator = random.Random(number)
    columns, values = [], []
    for name in "abc":
        type_, known = generator.choice(KINDS)
        nullable = generator.random() < 0.6
        columns.append(Column(name, type_, nullable=nullable))
        values.append([*known, None, None] if nullable else known)
    identity = [Column("id", Integer, primary_key=True, autoincrement=False)]
    if generator.random() < 0.3:
        identity.insert(0, Column("part", String, primary_key=True))
    prefixes = ["TEMPORARY"] if temporary else []
    return Schema(Table(f"walk_{number}", MetaData(), *identity, *columns, prefixes=prefixes), values)


@dataclass(frozen=True)
class Walk:
    """One walk: of which schema's rows, in which order, with which turns.

    rows: the number of a value, for each column of each row.
    order: the number of what is ordered by, its direction, and where NULLs go.
    steps: the size of each page, and whether the walk turns after it; the last one is for all that follow.
    """

    number: int
    rows: list[tuple[int, int, int]]
    order: list[tuple[int, bool, bool | None]]
    from_the_end: bool
    steps: list[tuple[int, bool]]


def walks(schemas: int) -> st.SearchStrategy[Walk]:
    """Generate walks of that many schemas."""
    index = st.integers(0, 7)
    return st.builds(
        Walk,
        st.integers(0, schemas - 1),
        st.lists(st.tuples(index, index, index), max_size=14),
        st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.none() | st.booleans()), max_size=4),
        st.booleans(),
        st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=5),
    )


class Walker:
    """Walks on one connection of an engine, which ends with it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.connection: Connection = engine.connect()
        self.dialect_name = engine.dialect.name
        self._schemas: dict[int, Schema] = {}
        self._recipes = Recipes()

    def close(self) -> None:
        self.connection.close()
        self._engine.dispose()

    def prepare(self, walk: Walk) -> tuple[Table, Select[Any], list[Any]]:
        """Fill the walk's table; return it, the statement to walk, and what makes its order unique."""
        self.connection.rollback()
        if walk.number not in self._schemas:
            self._schemas[walk.number] = schema(walk.number, temporary=self.dialect_name == "postgresql")
            self._schemas[walk.number].table.create(self.connection)
            self.connection.commit()
        made = self._schemas[walk.number]
        if walk.rows:
            rows = [self.row(made, number, numbers) for number, numbers in enumerate(walk.rows)]
            self.connection.execute(insert(made.table), rows)
        order = [_directed(_expressions(made.table)[key], *rest) for key, *rest in walk.order]
        descending = bool(walk.order) and walk.order[-1][1]
        tie_break = [key.desc() if descending else key.asc() for key in made.table.primary_key]
        return made.table, select(made.table.c.id).order_by(*order), tie_break

    def row(self, made: Schema, id_: int, numbers: tuple[int, int, int]) -> dict[str, Any]:
        picked = (known[number % len(known)] for number, known in zip(numbers, made.values, strict=True))
        row = dict(zip("abc", picked, strict=True))
        return {"id": id_, **({"part": str(id_ % 2)} if "part" in made.table.c else {}), **row}

    def page(
        self, stmt: Any, cursor: str | None, size: int, before_each: Callable[[], None] = lambda: None
    ) -> CursorPage[Any]:
        def send(statement: Any, parameters: Any, _projected: bool) -> Any:
            before_each()
            return self.connection.execute(statement, parameters)

        steps = cursor_page(
            stmt,
            CursorParams(cursor=cursor, size=size),
            recipes=self._recipes,
            dialect_name=self.dialect_name,
            binding=BINDING,
            keys=[KEY],
        )
        return run(steps, send)

    def check(self, walk: Walk) -> None:
        """Every page is the next or the previous piece of the plain list, and the cursors end where the list does."""
        _, stmt, tie_break = self.prepare(walk)
        rows = list(self.connection.scalars(stmt.order_by(*tie_break)))
        steps = list(walk.steps)
        backward = walk.from_the_end
        start = end = len(rows) if backward else 0
        cursor = "last" if backward else None
        while True:
            size, turns = steps.pop(0) if len(steps) > 1 else (steps[0][0], False)
            page = self.page(stmt, cursor, size)
            start, end = (max(0, start - size), start) if backward else (end, min(len(rows), end + size))
            assert page.items == rows[start:end]
            assert (page.prev_cursor is None) == (start == 0)
            assert (page.next_cursor is None) == (end == len(rows))
            backward ^= turns
            cursor = page.prev_cursor if backward else page.next_cursor
            if cursor is None:
                return

    def numbered(self, stmt: Any, offset: int, limit: int, keeper: Any) -> list[Any]:
        """Read a page by number, as somebody reads it who keeps what was found."""

        def send(statement: Any, parameters: Any, _projected: bool) -> Any:
            return self.connection.execute(statement, parameters)

        params = LimitOffsetParams(limit=limit, offset=offset)
        steps = page(stmt, params, recipes=self._recipes, total="none", dialect_name=self.dialect_name, keeper=keeper)
        return run(steps, send, at_once).items

    def check_under_writes(self, walk: Walk, generator: random.Random) -> None:
        """Rows with even numbers, which nobody touches, appear exactly once, in order; whatever becomes of the odd."""
        table, stmt, tie_break = self.prepare(walk)
        untouched = [id_ for id_ in self.connection.scalars(stmt.order_by(*tie_break)) if id_ % 2 == 0]
        made = self._schemas[walk.number]

        def write() -> None:
            for _ in range(generator.randint(0, 2)):
                id_ = generator.randrange(1, 40, 2)
                self.connection.execute(delete(table).where(table.c.id == id_))
                if generator.random() < 0.7:
                    numbers = generator.choice(walk.rows or [(0, 0, 0)])
                    self.connection.execute(insert(table), [self.row(made, id_, numbers)])

        walked: list[int] = []
        backward = walk.from_the_end
        cursor = "last" if backward else None
        # Rows may be moved ahead of the walk again and again, so it is the number of pages that ends it, too.
        for number in range(200):
            size = walk.steps[number % len(walk.steps)][0]
            page = self.page(stmt, cursor, size, write)
            walked += reversed(page.items) if backward else page.items
            cursor = page.prev_cursor if backward else page.next_cursor
            if cursor is None:
                break
        assert cursor is None
        seen = [id_ for id_ in walked if id_ % 2 == 0]
        assert (seen[::-1] if backward else seen) == untouched


class Keeping:
    """Keeps in a dict what pages find out, of every statement alike; `body` is what is known of the list."""

    def __init__(self) -> None:
        self.body: bytes | None = None

    def name_of(self, query: Any) -> str | None:
        return str(query.statement)

    async def number(self, name: str, count: Any) -> int:
        raise AssertionError("nobody counts here")

    async def look(self, _name: str) -> Kept | None:
        return Kept(self.body, None)

    async def keep(self, _name: str, body: bytes, _kept: Kept) -> None:
        self.body = body


def at_once(call: Callable[[], Any]) -> Any:
    """What a coroutine function returns that waits for nothing."""
    try:
        call().send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def _expressions(table: Table) -> list[Any]:
    columns = [table.c[name] for name in "abc"]
    text = next((column for column in columns if isinstance(column.type, String)), None)
    number = next((column for column in columns if type(column.type) is Integer), None)
    return [
        *columns,
        table.c.id,
        next(iter(table.primary_key)),
        func.lower(text) if text is not None else table.c.a,
        func.coalesce(number, 0) if number is not None else table.c.b,
    ]


def _directed(expression: Any, descending: bool, nulls_first: bool | None) -> Any:
    directed = expression.desc() if descending else expression.asc()
    if nulls_first is None:
        return directed
    return directed.nulls_first() if nulls_first else directed.nulls_last()


def damaged(cursor: str, generator: random.Random) -> Iterator[str]:
    """Damage a cursor without end: its letters, its length, its bytes."""
    alphabet = string.ascii_letters + string.digits + "-_=+/ .\n\0\x7fé\U0001f600"
    raw = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    while True:
        place = generator.randrange(len(cursor))
        match generator.randrange(6):
            case 0:
                made = cursor[:place] + generator.choice(alphabet) + cursor[place + 1 :]
            case 1:
                made = cursor[:place] + generator.choice(alphabet) + cursor[place:]
            case 2:
                made = cursor[:place] + cursor[place + generator.randint(1, 4) :]
            case 3:
                made = "".join(generator.choices(alphabet, k=generator.randint(0, 80)))
            case 4:
                # The tag left, and another msgpack behind it.
                made = _text(raw[:16] + generator.randbytes(generator.randint(0, 40)))
            case _:
                flipped = bytearray(raw)
                for _ in range(generator.randint(1, 4)):
                    flipped[generator.randrange(len(raw))] ^= generator.randrange(1, 256)
                made = _text(bytes(flipped))
        if made not in (cursor, "last"):
            yield made


def _text(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()
