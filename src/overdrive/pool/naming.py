"""What the names in an engine's statements stand for, and so what these read and write, by tags.

The database is asked over new connections, and over others before a statement whose names it has not explained; and
behind the scenes while statements are sent, as other programs change tables, too.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import Engine, PoolProxiedConnection, QueuePool
from sqlalchemy.util import greenlet_spawn

from overdrive.context import OF_ROWS

from .catalogue import ASKED, relations_of
from .driver import driver_of, is_idle
from .housekeeping import housekeeper
from .pool import FairPool
from .relations import Meaning, Relations, translated
from .rows import Rows
from .statement import EVERYTHING, Facts
from .tasks import start

#: Where a `schema_translate_map` has tables sent to: by the schema of their models, another.
Schemas = Mapping[str | None, str | None]

#: Statements whose names are remembered.
_NAMED = 10_000

#: Seconds for which nobody asks again what the database has, unless a statement may have changed it.
_TOLD = 1.0
#: Seconds after a statement at which an idle connection is asked what other programs have made of tables meanwhile.
_LOOK = 5.0


class Named(NamedTuple):
    """A statement with what it reads and writes, by tags.

    reads, writes: tags; all but those of the rows that are named.
    rows_read, rows_written: rows, under each name that their table has.
    unknown: why `reads` may be incomplete.
    lacking: names of which the database might say more than it has.
    """

    facts: Facts
    reads: frozenset[str]
    writes: frozenset[str]
    rows_read: tuple[Rows, ...]
    rows_written: tuple[Rows, ...]
    unknown: str | None
    lacking: frozenset[str]


class _Told:
    """What the database has said of its relations, and what follows for each statement."""

    __slots__ = ("at", "named", "relations", "sought", "why")

    def __init__(self, relations: Relations | None, sought: frozenset[str], why: str | None = None) -> None:
        self.relations = relations
        #: Names, without their schemas, that were asked for.
        self.sought = sought
        #: Why nothing is known; None where `relations` has it, or names are taken as they are.
        self.why = why
        self.at = time.monotonic()
        self.named: dict[Facts, Named] = {}

    def meaning(self, table: str) -> Meaning:
        if self.relations is not None:
            return self.relations.meaning(table)
        if self.why is None:
            return Meaning()
        return Meaning(writes=frozenset((EVERYTHING,)), unknown=self.why, lacking=True)


class Naming:
    """What is known of the names in the statements of one engine.

    name: what its tags start with.
    tell: is told why everything may have changed that was read.
    """

    def __init__(self, engine: Engine, name: str, tell: Callable[[str], None]) -> None:
        self._engine = engine
        self._name = name
        self._tell = tell
        #: The tag of a write of which nothing is known.
        self.everything = f"{name}/{EVERYTHING}"
        #: Names of which the database had not said enough at first.
        self._sought: frozenset[str] = frozenset()
        self._told = self._untold("nobody has asked the database yet what its tables are")
        #: When that is looked at behind the scenes; and whether others have changed what somebody went by.
        self.look_at = 0.0
        self._overtaken = False

    def named(self, facts: Facts, schemas: Schemas | None = None) -> Named:
        """Return a statement with what its names stand for, as far as the database has said that.

        schemas: under which `schema_translate_map` it is sent.
        """
        told = self._told
        named = told.named.get(facts) if not schemas else None
        if named is None:
            named = self._find_out(facts, schemas or {}, told)
            if not schemas:
                # Texts with their values in them are without number.
                if len(told.named) >= _NAMED:
                    told.named.clear()
                told.named[facts] = named
        return named

    def _find_out(self, facts: Facts, schemas: Schemas, told: _Told) -> Named:
        """Find out what the tables of a statement are, and under which names else they are written."""
        also: dict[str, frozenset[str]] = {}
        meanings: dict[str, Meaning] = {}
        for table in (facts.names_read | facts.writes) - {EVERYTHING}:
            sent = translated(table, schemas) if schemas else table
            meanings[table] = meaning = told.meaning(sent)
            also[table] = frozenset((table, sent)) | meaning.also

        def under_all_names(tables: Iterable[str]) -> set[str]:
            return {name for table in tables for name in also.get(table, (table,))}

        def of_all_names(rows: Rows) -> Iterator[Rows]:
            return (replace(rows, table=name) for name in sorted(also[rows.table]))

        read = [meanings[table] for table in facts.names_read if table in meanings]
        reads = self.tagged(under_all_names(facts.reads).union(*(each.reads for each in read)))
        # A write that could not be read must outdate every reading of this engine.
        if facts.reads or facts.rows_read:
            reads |= {self.everything}
        writes = under_all_names(facts.writes) | {name + OF_ROWS for name in under_all_names(facts.scattered)}
        writes = writes.union(*(meanings[table].writes for table in facts.writes if table in meanings))
        lacking = {table.rpartition(".")[2] for table, each in meanings.items() if each.lacking}
        if told.relations is not None:
            for table, columns in facts.changes:
                along = told.relations.changed_along(translated(table, schemas), columns)
                writes = writes.union(along, (name + OF_ROWS for name in along))
            if facts.words & told.relations.writing:
                writes |= {EVERYTHING}
        elif facts.words and told.why is not None:
            writes |= {EVERYTHING}
            lacking.add("")
        return Named(
            facts,
            reads,
            self.tagged(writes),
            tuple(other for rows in facts.rows_read for other in of_all_names(rows)),
            () if facts.rows_written is None else tuple(of_all_names(facts.rows_written)),
            facts.unknown or next((each.unknown for each in read if each.unknown), None),
            frozenset(lacking),
        )

    def tags_of(self, named: Named, parameters: Sequence[Mapping[str, Any]]) -> tuple[frozenset[str], frozenset[str]]:
        """Return the tags of what a statement reads and writes, for each time it is executed."""
        reads, writes = named.reads, named.writes
        if named.rows_read:
            reads = reads.union(*(self._of_read(rows, parameters) for rows in named.rows_read))
        elif named.rows_written:
            written = (rows.tags(parameters) or (rows.table + OF_ROWS,) for rows in named.rows_written)
            writes = writes.union(*map(self.tagged, written))
        return reads, writes

    def reads_of(self, facts: Facts) -> frozenset[str] | None:
        """Return the tags of what a statement reads, but for the rows it reads by their keys; None where unknown."""
        named = self.named(facts)
        return None if named.unknown else named.reads

    def _of_read(self, rows: Rows, parameters: Sequence[Mapping[str, Any]]) -> frozenset[str]:
        own = rows.tags(parameters)
        return self.tagged((rows.table,) if own is None else (rows.table + OF_ROWS, *own))

    def tagged(self, tables: Iterable[str]) -> frozenset[str]:
        """Return the tags of tables, and of rows, by their names."""
        return frozenset(f"{self._name}/{table}" for table in tables)

    def _untold(self, why: str) -> _Told:
        # Of other databases nobody knows how to ask, and a name is taken for a table's.
        return _Told(None, frozenset(), why if self._engine.dialect.name in ASKED else None)

    def forget(self) -> None:
        """Have the database asked again: until then nobody knows what a name stands for."""
        self._told = self._untold("a statement has changed tables, or made some")

    def lacks(self, named: Named) -> bool:
        """Say whether the database is to be asked what a statement's names stand for."""
        told = self._told
        return bool(named.lacking) and (not named.lacking <= told.sought or time.monotonic() - told.at > _TOLD)

    def ask(self, connection: PoolProxiedConnection, named: Named) -> None:
        """Ask the database what a statement's names stand for, where that harms no transaction.

        What is not committed is nobody else's yet, and an error would end it.
        """
        driver = driver_of(connection)
        if is_idle(self._engine, connection) or getattr(driver, "in_transaction", True) is False:
            self._sought |= named.lacking
            self._ask(connection.dbapi_connection)

    def connected(self, dbapi_connection: Any) -> None:
        """Ask over a new connection, unless somebody has asked just now."""
        if self._told.relations is None or time.monotonic() - self._told.at > _TOLD:
            self._ask(dbapi_connection)

    def _ask(self, dbapi_connection: Any) -> None:
        asked, sought = self._told, self._sought
        if asked.relations is None and asked.why is None:
            return
        try:
            told = _Told(relations_of(dbapi_connection, self._engine.dialect.name, sought), sought)
        except self._engine.dialect.loaded_dbapi.Error as error:
            told = _Told(None, sought, f"the database did not say what its tables are ({error})")
        # Otherwise a statement has changed something meanwhile, or somebody else has asked.
        if self._told is asked:
            self._told = told
            if asked.relations is not None and told.relations is not None:
                self._overtaken |= not asked.relations.holds(told.relations)

    def look_later(self, now: float) -> None:
        """Have a connection that is idle by then asked again, behind the scenes.

        So whatever another program makes of a table is known soon after a statement that was taken for something else.
        """
        if self._engine.dialect.name not in ASKED:
            self.look_at = math.inf
            return
        self.look_at = now + _LOOK
        look = weakref.WeakMethod(self._look)
        if self._engine.dialect.is_async:
            # Not in the context of the request that happens to be the first.
            asyncio.get_running_loop().call_later(_LOOK, _in_a_task, look, context=Context())
        else:
            housekeeper.call_at(time.monotonic() + _LOOK, self._look_in_a_thread)

    def _look_in_a_thread(self) -> None:
        threading.Thread(target=self._look, name="overdrive-look", daemon=True).start()

    def _look(self) -> None:
        pool: Any = self._engine.pool
        if not isinstance(pool, FairPool | QueuePool) or not pool.checkedin():
            return
        try:
            pooled = pool.connect()
        except Exception:
            return  # whoever needs one learns why
        try:
            if time.monotonic() - self._told.at > _TOLD:
                self._ask(pooled.dbapi_connection)
        finally:
            pooled.close()
        if self._overtaken:
            self._overtaken = False
            self._tell("DDL of another program")


def _in_a_task(look: weakref.WeakMethod[Callable[[], None]]) -> None:
    if (method := look()) is not None:
        start(greenlet_spawn(method))
