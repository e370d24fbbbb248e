"""Operations for Alembic's migrations: what `overdrive triggers` does, in a migration's own transaction.

In `env.py` the import adds the operations, and autogenerate leaves the outbox alone:

    from overdrive.compat.alembic import include_object

    context.configure(connection=connection, target_metadata=Base.metadata, include_object=include_object)

In a migration, after the tables have been made:

    op.install_overdrive_triggers()  # all on the search path, or "users", "shop.orders"
    op.uninstall_overdrive_triggers()
"""

from __future__ import annotations

from typing import Any

from alembic.operations import MigrateOperation, Operations
from sqlalchemy import MetaData

from overdrive.errors import ConfigurationError
from overdrive.pool.outside import LOCK_TIMEOUT, Database, explained, installation, keys_of, removal, run
from overdrive.pool.triggers import OUTBOX, Via

__all__ = ["InstallOverdriveTriggers", "UninstallOverdriveTriggers", "include_object"]


def include_object(_object: Any, name: str | None, type_: str, _reflected: bool, _compare_to: Any) -> bool:
    """Say whether autogenerate is to compare something: everything but the outbox."""
    return not (type_ == "table" and name == OUTBOX)


@Operations.register_operation("install_overdrive_triggers")
class InstallOverdriveTriggers(MigrateOperation):
    """Add triggers to tables."""

    def __init__(self, tables: tuple[str, ...], via: Via, metadata: MetaData | None) -> None:
        self.tables = tables
        self.via = via
        self.metadata = metadata

    @classmethod
    def install_overdrive_triggers(
        cls, operations: Operations, *tables: str, via: Via = "notify", metadata: MetaData | None = None
    ) -> None:
        """Add triggers to the tables named, or to all on the search path.

        via: "notify", or "outbox" for many commits a second.
        metadata: of models whose primary keys are not the database's own; its tables are all, where none is named.

        Raises `ConfigurationError` for an unknown table, and in a migration that only prints SQL.
        """
        operations.invoke(cls(tables, via, metadata))


@Operations.register_operation("uninstall_overdrive_triggers")
class UninstallOverdriveTriggers(MigrateOperation):
    """Take triggers off tables."""

    def __init__(self, tables: tuple[str, ...]) -> None:
        self.tables = tables

    @classmethod
    def uninstall_overdrive_triggers(cls, operations: Operations, *tables: str) -> None:
        """Take the triggers off the tables named, or off all with whatever belongs to them."""
        operations.invoke(cls(tables))


@Operations.implementation_for(InstallOverdriveTriggers)
def _install(operations: Operations, operation: InstallOverdriveTriggers) -> None:
    database = _database(operations)
    keys = None if operation.metadata is None else keys_of([operation.metadata])
    tables = database.announced(keys, operation.tables)
    _execute(operations, list(installation(database, tables, operation.via)))


@Operations.implementation_for(UninstallOverdriveTriggers)
def _uninstall(operations: Operations, operation: UninstallOverdriveTriggers) -> None:
    _execute(operations, list(removal(_database(operations), operation.tables)))


def _database(operations: Operations) -> Database:
    if operations.migration_context.as_sql:
        raise ConfigurationError(
            "which triggers a database lacks is not known before it is asked: print them with "
            "overdrive triggers install --dry-run"
        )
    return Database(operations.get_bind())


def _execute(operations: Operations, statements: list[str]) -> None:
    with explained():
        for sql in statements:
            # How long this waits for locks is the migration's to say.
            if sql != LOCK_TIMEOUT:
                run(operations.get_bind(), sql)
