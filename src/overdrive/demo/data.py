"""Rows for the reference service: the same ones every time, and as uneven as real data.

A few users and products have most of the orders, there are more rows the closer to today, some share their
`created_at`, and what may be NULL often is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import islice
from math import sqrt
from random import Random
from typing import Any

from sqlalchemy import Connection, Table, func, insert, inspect, select
from sqlalchemy.schema import CreateTable

from overdrive.demo.models import Base, Order, User

_Row = tuple[Any, ...]

_BATCH = 10_000
_START = datetime(2023, 1, 1)
_END = datetime(2026, 1, 1)
_SECONDS = int((_END - _START).total_seconds())
_TIES = 0.2

_FIRST_NAMES = [
    "Ada",
    "Ben",
    "Chen",
    "Dina",
    "Emil",
    "Farah",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kenji",
    "Lena",
]
_LAST_NAMES = [
    "Ahmed",
    "Bauer",
    "Costa",
    "Diaz",
    "Evans",
    "Fischer",
    "Garcia",
    "Haddad",
    "Ivanov",
    "Jensen",
    "Kim",
    "Lopez",
]
_COUNTRIES = ["US", "IN", "DE", "BR", "GB", "FR", "JP", "NL", "PL", "SE", "NZ", "IS", None]
_COUNTRY_WEIGHTS = [300, 180, 90, 80, 70, 50, 40, 25, 20, 12, 4, 1, 128]
_CATEGORIES = ["books", "clothing", "electronics", "garden", "kitchen", "music", "sports", "toys"]
_STATUSES = ["delivered", "shipped", "pending", "cancelled", "refunded"]
_STATUS_WEIGHTS = [80, 8, 5, 5, 2]
_QUANTITIES = [1, 2, 3, 4, 5, 10, 50]
_QUANTITY_WEIGHTS = [700, 160, 60, 40, 20, 15, 5]
_NOTES = ["Please ring twice.", "A present: no invoice.", "Leave it with the neighbours.", None]
_NOTE_WEIGHTS = [3, 3, 2, 92]


def _silent(done: int, total: int) -> None:
    pass


def is_seeded(connection: Connection) -> bool:
    """Whether `seed` has filled the database: one look at the catalog and at one row."""
    if not inspect(connection).has_table(User.__tablename__):
        return False
    return connection.scalar(select(User.id).limit(1)) is not None


def seed(
    connection: Connection,
    users: int = 200_000,
    orders: int = 600_000,
    products: int = 1_000,
    progress: Callable[[int, int], None] = _silent,
) -> None:
    """Create the tables where they are missing and, if there are no users yet, fill them.

    All rows are written in the connection's transaction, which is the caller's to commit, so that an
    interrupted seeding leaves none behind: `async with engine.begin() as c: await c.run_sync(seed)`.

    Parameters:
        connection: a connection to SQLite or PostgreSQL that is not in autocommit.
        users: how many users to write, at least 1.
        orders: how many orders to write.
        products: how many products to write, at least 1.
        progress: called after every batch with the rows written so far and the rows in all.
    """
    if is_seeded(connection):
        return
    for table in Base.metadata.sorted_tables:
        connection.execute(CreateTable(table, if_not_exists=True))
    with _references_checked_at_the_end(connection):
        _fill(connection, users, orders, products, progress)
    # Building an index once is cheaper than keeping it up to date row by row.
    for table in Base.metadata.sorted_tables:
        for index in table.indexes:
            index.create(connection, checkfirst=True)
        connection.exec_driver_sql(f"ANALYZE {table.name}")
        _move_sequence_past_rows(connection, table)


@contextmanager
def _references_checked_at_the_end(connection: Connection) -> Iterator[None]:
    """Leave the orders' foreign keys out meanwhile on PostgreSQL, as checking row by row is slow."""
    if connection.dialect.name != "postgresql":
        yield
        return
    alter = f"ALTER TABLE {Order.__tablename__}"
    keys = inspect(connection).get_foreign_keys(Order.__tablename__)
    for key in keys:
        connection.exec_driver_sql(f"{alter} DROP CONSTRAINT {key['name']}")
    yield
    for key in keys:
        columns = ", ".join(key["constrained_columns"])
        reference = f"FOREIGN KEY ({columns}) REFERENCES {key['referred_table']}"
        connection.exec_driver_sql(f"{alter} ADD CONSTRAINT {key['name']} {reference}")


def _fill(connection: Connection, users: int, orders: int, products: int, progress: Callable[[int, int], None]) -> None:
    random, tables = Random(20260101), Base.metadata.tables
    joined = list(_instants(random, users))
    sources = [
        (tables["users"], _users(random, joined)),
        (tables["products"], _products(random, products)),
        (tables["orders"], _orders(random, joined, orders, products)),
    ]
    done, total = 0, users + products + orders
    for table, rows in sources:
        for batch in _batches(rows):
            _write(connection, table, batch)
            done += len(batch)
            progress(done, total)


def _batches(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _write(connection: Connection, table: Table, batch: list[_Row]) -> None:
    """Insert rows that have their values in the order of the table's columns.

    The values are converted column by column, as executing the insert itself would look every value of every
    row up by name: about a quarter of the time that seeding would take.
    """
    dialect = connection.dialect
    statement = insert(table).compile(dialect=dialect)
    converters = [column.type.dialect_impl(dialect).bind_processor(dialect) for column in table.c]
    columns = [
        map(convert, values) if convert else values
        for convert, values in zip(converters, zip(*batch, strict=True), strict=True)
    ]
    rows: list[Any] = list(zip(*columns, strict=True))
    if not statement.positional:
        rows = [dict(zip(table.c.keys(), row, strict=True)) for row in rows]
    connection.exec_driver_sql(str(statement), rows)


def _users(random: Random, joined: list[datetime]) -> Iterator[_Row]:
    countries = random.choices(_COUNTRIES, _COUNTRY_WEIGHTS, k=len(joined))
    for number, (created_at, country) in enumerate(zip(joined, countries, strict=True), start=1):
        first, last = random.choice(_FIRST_NAMES), random.choice(_LAST_NAMES)
        age = (_END - created_at) // timedelta(seconds=1)
        seen = random.random() < 0.65
        yield (
            number,
            f"{first}.{last}.{number}@example.com".lower(),
            f"{first} {last}",
            country,
            created_at,
            _END - timedelta(seconds=_skewed(random, age)) if seen else None,
            random.random() < 0.92,
        )


def _products(random: Random, count: int) -> Iterator[_Row]:
    for number in range(1, count + 1):
        category = random.choice(_CATEGORIES)
        discontinued = random.random() < 0.15
        yield (
            number,
            f"{category.capitalize()} {number:04}",
            category,
            99 + 100 * _skewed(random, 2_000),
            _END - timedelta(days=random.randrange(365)) if discontinued else None,
        )


def _orders(random: Random, joined: list[datetime], count: int, products: int) -> Iterator[_Row]:
    statuses = random.choices(_STATUSES, _STATUS_WEIGHTS, k=count)
    quantities = random.choices(_QUANTITIES, _QUANTITY_WEIGHTS, k=count)
    notes = random.choices(_NOTES, _NOTE_WEIGHTS, k=count)
    members = 0
    for number, created_at in enumerate(_instants(random, count), start=1):
        # Only who has joined can order.
        while members < len(joined) and joined[members] <= created_at:
            members += 1
        yield (
            number,
            1 + _skewed(random, members),
            1 + _skewed(random, products),
            quantities[number - 1],
            statuses[number - 1],
            created_at,
            notes[number - 1],
        )


def _instants(random: Random, count: int) -> Iterator[datetime]:
    """`count` ascending instants, denser towards the end, of which some repeat the one before."""
    instant = _START
    for index in range(count):
        if random.random() >= _TIES:
            instant = _START + timedelta(seconds=int(_SECONDS * sqrt(index / count)))
        yield instant


def _skewed(random: Random, count: int) -> int:
    """A number below `count` by Zipf's law with the exponent 2/3: the first 1% are drawn 21% of the time."""
    share = random.random()
    return int(count * share * share * share)


def _move_sequence_past_rows(connection: Connection, table: Table) -> None:
    if connection.dialect.name == "postgresql":
        sequence = func.pg_get_serial_sequence(table.name, "id")
        connection.execute(select(func.setval(sequence, func.max(table.c.id))))
