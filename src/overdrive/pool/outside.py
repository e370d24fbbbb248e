"""What a PostgreSQL database has of the triggers that tell of writes, and what it is to be made to have.

Everything takes a synchronous `Connection`, in whose transaction it happens: `AsyncConnection.run_sync` has one, and
so has a migration.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from sqlalchemy import Connection, CursorResult, MetaData
from sqlalchemy.exc import DBAPIError

from overdrive.errors import ConfigurationError

from .rows import key_of
from .triggers import (
    CHANGED,
    CHANNEL,
    FUNCTION,
    OUTBOX,
    TRIGGERS,
    Announced,
    Via,
    comment,
    creation,
    outbox_creation,
    quoted,
    triggers,
    via_of,
)

#: How long a statement waits for a table that is in use: everybody else waits behind it.
LOCK_TIMEOUT = "SET LOCAL lock_timeout = '5s'"

#: The columns of the key by which rows are told apart, for each table by the name that models give it.
Keys = Mapping[str, tuple[str, ...]]

#: What has rows of its own that a statement may write. A foreign table has no transition tables, and a view no rows.
_WRITTEN = ("r", "p")

_CATALOGUES = ("pg_catalog", "information_schema", "pg_toast")

_RELATIONS = f"""
SELECT c.oid::bigint, n.nspname::text, c.relname::text, c.relkind::text, pg_table_is_visible(c.oid),
    ARRAY(SELECT inhparent::bigint FROM pg_inherits WHERE inhrelid = c.oid),
    ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
        AND atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'uuid'::regtype)),
    ARRAY(SELECT attname::text FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)
        WHERE indrelid = c.oid AND indisprimary)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relpersistence <> 't' AND c.relname <> '{OUTBOX}'
    AND n.nspname NOT IN {_CATALOGUES}
"""

_TRIGGERS = f"""
SELECT tgrelid::bigint, tgname::text, tgenabled::text, tgargs FROM pg_trigger JOIN pg_proc p ON p.oid = tgfoid
WHERE proname = '{FUNCTION}'
"""

_FUNCTIONS = f"""
SELECT nspname::text, obj_description(p.oid, 'pg_proc')
FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace WHERE proname = '{FUNCTION}'
"""

_OUTBOXES = f"""
SELECT nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
WHERE relname = '{OUTBOX}' AND relkind = 'r'
"""


# What there is


@dataclass(slots=True)
class Relation:
    """A table, or what looks like one.

    kind: as `pg_class` has it.
    parents: whose partition or heir it is.
    comparable: the columns by which rows may be told apart.
    primary_key: the columns of the database's own.
    triggers: ours, by their names: whether each is enabled, and its arguments.
    """

    oid: int
    schema: str
    name: str
    kind: str
    visible: bool
    parents: list[int]
    comparable: list[str]
    primary_key: list[str]
    triggers: dict[str, tuple[bool, tuple[str, ...]]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Return what models may call it."""
        return Announced(self.schema, self.name, visible=self.visible).names


class Database:
    """What a database has at this moment.

    Raises `ConfigurationError` where it is not PostgreSQL.
    """

    def __init__(self, connection: Connection) -> None:
        if connection.dialect.name != "postgresql":
            raise ConfigurationError(
                f"triggers are for PostgreSQL, and this is {connection.dialect.name}: there each writer has to be "
                "observed, observe(engine)"
            )
        self._connection = connection
        self.relations = {row[0]: Relation(*row) for row in self._rows(_RELATIONS)}
        for oid, name, enabled, arguments in self._rows(_TRIGGERS):
            if oid in self.relations:
                given = tuple(bytes(arguments).decode(errors="replace").split("\0")[:-1])
                self.relations[oid].triggers[name] = enabled in ("O", "A"), given
        #: What is said of the function, by its schema.
        self.functions: dict[str, str | None] = dict(self._rows(_FUNCTIONS))
        self.outboxes = [schema for (schema,) in self._rows(_OUTBOXES)]

    def _rows(self, sql: str) -> list[Any]:
        return list(run(self._connection, sql))

    def setting(self, name: str) -> str:
        """Return what a setting is for this connection."""
        return str(self._rows(f"SHOW {name}")[0][0])

    @property
    def current_schema(self) -> str:
        """Return where new tables are made; raises `ConfigurationError` where there is no such place."""
        schema: str | None = self._rows("SELECT current_schema()::text")[0][0]
        if schema is None:
            raise ConfigurationError("no schema on the search_path exists, so that the outbox would be nowhere")
        return schema

    @cached_property
    def _heirs(self) -> dict[int, list[int]]:
        heirs: dict[int, list[int]] = {}
        for relation in self.relations.values():
            for parent in relation.parents:
                heirs.setdefault(parent, []).append(relation.oid)
        return heirs

    def _related(self, relation: Relation) -> list[Relation]:
        """Return what a write to a relation writes as well, or is a part of."""
        found: dict[int, Relation] = {}
        for upwards in (True, False):
            waiting = [relation.oid]
            while waiting:
                oid = waiting.pop()
                following = self.relations[oid].parents if upwards else self._heirs.get(oid, [])
                waiting += [each for each in following if each in self.relations and each not in found]
                found |= {each: self.relations[each] for each in following if each in self.relations}
        return sorted(found.values(), key=lambda each: (each.schema, each.name))

    def announced(self, keys: Keys | None, only: Collection[str] = ()) -> list[Announced]:
        """Return the tables whose writes are to be announced, with their partitions.

        keys: of the tables that models know; None for those on the search path, by the database's own keys.
        only: names of some of them.

        Raises `ConfigurationError` for a name that there is no such table of.
        """
        known = [each for each in self.relations.values() if each.kind in _WRITTEN]
        chosen = [each for each in known if (each.visible if keys is None else any(n in keys for n in each.names))]
        if only:
            for name in only:
                self._refuse_unknown(name, chosen if keys is not None else known)
            chosen = [each for each in known if any(name in only for name in each.names)]
        everyone = {each.oid: each for table in chosen for each in (table, *self._related(table))}
        tables = (self._announced(each, keys) for each in everyone.values() if each.kind in _WRITTEN)
        return sorted(tables, key=lambda table: (table.schema, table.name))

    def _refuse_unknown(self, name: str, tables: Collection[Relation]) -> None:
        if any(name in each.names for each in tables):
            return
        if any(name in each.names and each.kind not in _WRITTEN for each in self.relations.values()):
            raise ConfigurationError(f"{name!r} is a view or a foreign table, which has no rows here: name its tables")
        there = [each_name for each in tables for each_name in each.names[:1]]
        close = get_close_matches(name, there, 3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(there) or 'none'}"
        raise ConfigurationError(f"the database has no table {name!r} that could be announced; {hint}")

    def _announced(self, relation: Relation, keys: Keys | None) -> Announced:
        key = self._key(relation, keys)
        keyed: list[str] = []
        others: list[str] = []
        for each in self._related(relation):
            names = [name for name in each.names if keys is None or name in keys]
            (keyed if key and self._key(each, keys) == key else others).extend(names)
        return Announced(relation.schema, relation.name, key, relation.visible, tuple(keyed), tuple(others))

    def _key(self, relation: Relation, keys: Keys | None) -> tuple[str, ...]:
        modelled = (keys[name] for name in relation.names if keys is not None and name in keys)
        key = tuple(sorted(next(modelled, relation.primary_key)))
        return key if set(key) <= set(relation.comparable) else ()

    def state(self, table: Announced) -> str:
        """Say whether a table has its triggers: installed, missing, outdated or disabled."""
        there = self._triggers(table)
        if not there:
            return "missing"
        if self.lacks_triggers(table, enabled=False) or not self._is_current(table.schema):
            return "outdated"
        return "installed" if all(enabled for enabled, _ in there.values()) else "disabled"

    def _is_current(self, schema: str) -> bool:
        said = self.functions.get(schema)
        via = via_of(said)
        return via is not None and said == comment(via)

    def lacks_triggers(self, table: Announced, *, enabled: bool) -> bool:
        """Say whether one of a table's triggers is not there, is told another key or, if that counts, is disabled."""
        there = self._triggers(table)
        return any(
            name not in there or there[name][1] != table.arguments or (enabled and not there[name][0])
            for name in TRIGGERS.values()
        )

    def _triggers(self, table: Announced) -> dict[str, tuple[bool, tuple[str, ...]]]:
        same = (each for each in self.relations.values() if (each.schema, each.name) == (table.schema, table.name))
        return next((each.triggers for each in same), {})


def keys_of(metadata: Collection[MetaData]) -> dict[str, tuple[str, ...]]:
    """Return the keys of the tables that models know; one that they do not agree on is none."""
    keys: dict[str, tuple[str, ...]] = {}
    for each in metadata:
        for table in each.tables.values():
            # SQLAlchemy's own, and what a tool has reflected.
            if table.schema in _CATALOGUES or table.name == OUTBOX:
                continue
            key = tuple(str(column.name) for column in key_of(table) or ())
            keys[table.fullname] = key if keys.get(table.fullname, key) == key else ()
    return keys


# What is to be done


def installation(database: Database, tables: Collection[Announced], via: Via) -> Iterator[str]:
    """Yield what is missing, and what another way of telling, or another version, has left otherwise."""
    schemas = sorted({table.schema for table in tables} | set(database.functions))
    before = list(_preparation(database, schemas, via))
    lacking = [table for table in tables if database.lacks_triggers(table, enabled=True)]
    after = [f"DROP TABLE {quoted(each, OUTBOX)}" for each in database.outboxes if via == "notify"]
    if before or lacking or after:
        yield LOCK_TIMEOUT
        yield from before
        for table in lacking:
            yield from triggers(table)
        yield from after
        yield _changed()


def _preparation(database: Database, schemas: Collection[str], via: Via) -> Iterator[str]:
    outbox = None
    if via == "outbox":
        if not database.outboxes:
            yield from outbox_creation(database.current_schema)
        outbox = (database.outboxes or [database.current_schema])[0]
    for schema in schemas:
        if database.functions.get(schema) != comment(via):
            yield from creation(schema, outbox)


def removal(database: Database, only: Collection[str] = ()) -> Iterator[str]:
    """Yield what takes the triggers off all tables, or some, and what nobody needs then.

    Raises `ConfigurationError` for the name of a table that has none.
    """
    having = [each for each in database.relations.values() if each.triggers]
    for name in only:
        if not any(name in each.names for each in having):
            there = ", ".join(each.names[0] for each in having)
            raise ConfigurationError(f"{name!r} has no triggers of Overdrive; those that have are {there or 'none'}")
    leaving = [each for each in having if not only or any(name in only for name in each.names)]
    staying = {each.schema for each in having if each not in leaving}
    functions = [schema for schema in database.functions if schema not in staying]
    if not (leaving or functions or database.outboxes):
        return
    yield LOCK_TIMEOUT
    for relation in leaving:
        for name in sorted(relation.triggers):
            yield f"DROP TRIGGER {quoted(name)} ON {quoted(relation.schema, relation.name)}"
    for schema in functions:
        yield f"DROP FUNCTION {quoted(schema, FUNCTION)}()"
    if not staying:
        yield from (f"DROP TABLE {quoted(schema, OUTBOX)}" for schema in database.outboxes)
    yield _changed()


def _changed() -> str:
    return f"NOTIFY {CHANNEL}, '{CHANGED}'"


def run(connection: Connection, sql: str) -> CursorResult[Any]:
    """Execute a statement as it is, whatever is in it."""
    return connection.exec_driver_sql(sql, execution_options={"no_parameters": True})


#: What an error of PostgreSQL asks for, by its code.
_CURES = {
    "42501": "take a role that owns the tables, or GRANT TRIGGER ON TABLE and CREATE ON SCHEMA to this one",
    "55P03": "a table was in use for longer than 5 s: try again, or when less is going on",
    "40P01": "others were in the way: try again",
    "25006": "this is a standby, or a transaction that may not write: connect to the primary",
    "2BP01": "something else depends on it: drop that first",
}


@contextmanager
def explained() -> Iterator[None]:
    """Raise what the database refuses as `ConfigurationError`, with what is to be done about it."""
    try:
        yield
    except DBAPIError as error:
        original: Any = error.orig
        code = getattr(original, "sqlstate", None)
        if code not in _CURES:
            raise
        reason = str(original).splitlines()[0]
        raise ConfigurationError(f"{reason.partition('>: ')[2] or reason}: {_CURES[code]}") from None
