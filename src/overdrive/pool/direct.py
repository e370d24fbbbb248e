"""Plain SELECTs handed to asyncpg itself, where SQLAlchemy's cursor and result would add nothing but their time.

The connection is one of the engine's pool, and back there before anybody looks at the rows. What observes the engine
is told of the statement as of any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import BindParameter, Connection, Dialect, Engine, PoolProxiedConnection, Select
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine
from sqlalchemy.util import greenlet_spawn

from overdrive.context import current

from .driver import driver_of
from .engine import begins_with_writes
from .observe import Observation, observation_of, returns_without_waiting
from .pool import FairPool
from .statement import Facts, facts_of

Processor = Callable[[Any], Any]
Rows = list[Sequence[Any]]


@dataclass(slots=True)
class Direct:
    """A statement as asyncpg takes it. It does not hold SQLAlchemy's, which may go.

    parameters: their names in their order, each with its own value and what its type makes of one.
    results: what the types of its columns make of a value, once the database has said what it calls those.
    """

    sql: str
    facts: Facts
    parameters: Sequence[tuple[str, BindParameter[Any], Processor | None]]
    columns: list[TypeEngine[Any]]
    results: list[Processor | None] | None = None


#: None for a statement that cannot be sent so.
_made: WeakKeyDictionary[Engine, WeakKeyDictionary[Select[Any], Direct | None]] = WeakKeyDictionary()


def of(engine: Engine, stmt: Select[Any]) -> Direct | None:
    """Return the statement as `send` takes it; None where SQLAlchemy has a part in sending it."""
    if engine.dialect.driver != "asyncpg" or not is_ours_alone(engine) or engine._should_log_info():
        return None
    if (made := _made.get(engine)) is None:
        made = _made[engine] = WeakKeyDictionary()
    if stmt not in made:
        made[stmt] = _direct(engine, stmt)
    return made[stmt]


def is_ours_alone(engine: Engine) -> bool:
    """Say whether nobody but its observation takes part in what the engine sends, and reads need no transaction."""
    observation = observation_of(engine)
    dispatch = engine.dispatch
    return (
        observation is not None
        and (engine.dialect.name == "sqlite" or observation.reads_need_no_transaction(engine.get_execution_options()))
        and not dispatch.engine_connect
        and not dispatch.begin
        and not dispatch.rollback
        and not dispatch.before_execute
        and not dispatch.after_execute
        # Ours.
        and len(dispatch.before_cursor_execute) == 1 + begins_with_writes(engine)
        and len(dispatch.after_cursor_execute) == 1
        and not engine.dialect.dispatch.do_execute
        and not engine.get_execution_options()
    )


def _direct(engine: Engine, stmt: Select[Any]) -> Direct | None:
    compiled = stmt.compile(engine)
    assert isinstance(compiled, SQLCompiler)
    facts = facts_of(compiled, sql := str(compiled))
    # IN () gets as many parameters as there are values, when it is sent.
    if compiled.post_compile_params or compiled.literal_execute_params or not facts.plain:
        return None
    binds = [(name, compiled.binds[name]) for name in compiled.positiontup or ()]
    processors = [bind.type.dialect_impl(engine.dialect).bind_processor(engine.dialect) for _, bind in binds]
    parameters = [(name, bind, process) for (name, bind), process in zip(binds, processors, strict=True)]
    return Direct(sql, facts, parameters, [column.type for column in stmt.selected_columns])


async def send(engine: Engine, statement: Direct, parameters: Mapping[str, Any]) -> Rows:
    """Return the statement's rows.

    Raises what SQLAlchemy raises where the statement fails or no connection is to be had.
    """
    observation = observation_of(engine)
    assert observation is not None
    given = {name: parameters.get(name, bind.effective_value) for name, bind, _ in statement.parameters}
    values = [given[name] if process is None else process(given[name]) for name, _, process in statement.parameters]
    leave = None
    if (admission := observation.admission) is not None and (context := current()) is not None:
        leave = admission.enter(context) or await admission.wait(context)
    try:
        rows = await _send(engine, observation, statement, given, values)
    finally:
        if leave is not None:
            leave()
    results = statement.results
    if not results or not any(results):
        return rows
    return [
        [value if process is None else process(value) for value, process in zip(row, results, strict=True)]
        for row in rows
    ]


async def _send(
    engine: Engine, observation: Observation, statement: Direct, given: Mapping[str, Any], values: list[Any]
) -> Rows:
    pool = engine.pool
    pooled = pool.take_nowait() if isinstance(pool, FairPool) else None
    if pooled is None:
        pooled = await greenlet_spawn(_take, engine)
    try:
        named = observation.naming.named(statement.facts)
        if observation.naming.lacks(named):
            await greenlet_spawn(observation.naming.ask, pooled, named)
            named = observation.naming.named(statement.facts)
        observation.started(pooled.info, named, statement.sql, (given,), autocommit=False)
        return await _fetch(pooled, engine, observation, statement, values)
    finally:
        if returns_without_waiting(engine, pooled):
            pooled.close()
        else:
            await greenlet_spawn(pooled.close)


def _take(engine: Engine) -> PoolProxiedConnection:
    try:
        return engine.raw_connection()
    except engine.dialect.loaded_dbapi.Error as error:
        Connection._handle_dbapi_exception_noconnection(error, engine.dialect, engine)


async def _fetch(
    pooled: PoolProxiedConnection, engine: Engine, observation: Observation, statement: Direct, values: list[Any]
) -> Rows:
    driver = driver_of(pooled)
    try:
        if statement.results is None:
            statement.results = await _results(driver, statement, engine.dialect)
        rows: Rows = await driver.fetch(statement.sql, *values)
    except BaseException as error:
        await greenlet_spawn(_raise, Connection(engine, pooled), statement.sql, values, error)
        raise
    observation.finished(pooled.info, statement.sql, len(rows), autocommit=False)
    return rows


async def _results(driver: Any, statement: Direct, dialect: Dialect) -> list[Processor | None]:
    attributes = (await driver.prepare(statement.sql)).get_attributes()
    impls = [type_.dialect_impl(dialect) for type_ in statement.columns]
    return [impl.result_processor(dialect, each.type.oid) for impl, each in zip(impls, attributes, strict=True)]


def _raise(connection: Connection, sql: str, values: list[Any], error: BaseException) -> None:
    """Raise what SQLAlchemy makes of an error, once it has discarded a connection that is of no use any more."""
    adapted: Any = connection.connection.dbapi_connection
    try:
        if isinstance(error, Exception):
            adapted._handle_exception(error)
        raise error
    except adapted.dbapi.Error as translated:
        connection._handle_dbapi_exception(translated, sql, tuple(values), None, None)
    except BaseException as other:
        connection._handle_dbapi_exception(other, None, None, None, None)
