"""Asks a database what its relations are, on a connection of its driver that has no transaction open."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from .relations import Reference, Relation, Relations, View
from .statement import PURE_FUNCTIONS

# A schema for each tenant makes many: without being asked for by name, only those on the search path come.
_RELATIONS = """
SELECT c.oid::bigint, n.nspname::text, c.relname::text, c.relkind::text, pg_table_is_visible(c.oid), c.relrowsecurity,
    coalesce(parents, '{{}}')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN (SELECT inhrelid, array_agg(inhparent::bigint) AS parents FROM pg_inherits GROUP BY inhrelid) AS heirs
    ON inhrelid = c.oid
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relpersistence <> 't'
    AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
    AND (n.nspname = ANY (current_schemas(false)) OR c.relname IN ({names}) OR c.oid IN ({bases})
        OR c.oid IN (SELECT inhparent FROM pg_inherits)
        OR c.oid IN (SELECT conrelid FROM pg_constraint
            WHERE contype = 'f' AND (confdeltype IN ('c', 'n', 'd') OR confupdtype IN ('c', 'n', 'd'))))
"""

# Of views by their names, and of the views in these. What is called is in the query's tree, where `pg_depend` leaves
# out what came with the server: that is trusted where it is immutable, or goes by settings alone; nothing else is, as
# many a function that reads tables is said to be immutable. A cast of text may be one of 'now'.
_VIEWS = """
WITH RECURSIVE wanted AS (
    SELECT r.oid, r.ev_class FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class AND c.relkind = 'v'
    WHERE r.rulename = '_RETURN' AND c.relname IN ({names})
    UNION
    SELECT r.oid, r.ev_class FROM wanted JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = wanted.oid
        AND d.refclassid = 'pg_class'::regclass
    JOIN pg_rewrite r ON r.ev_class = d.refobjid AND r.rulename = '_RETURN'
), defined AS (SELECT r.ev_class, r.ev_action::text AS tree FROM pg_rewrite r JOIN wanted USING (oid))
SELECT ev_class::bigint,
    ARRAY(SELECT DISTINCT found[1]::bigint FROM regexp_matches(tree, ' :relid ([1-9]\\d*)', 'g') AS found),
    ARRAY(SELECT coalesce(p.proname || '()', 'a function')::text
        FROM (SELECT DISTINCT found[1]::oid AS oid
            FROM regexp_matches(tree, ' :(?:funcid|opfuncid|aggfnoid|winfnoid) (\\d+)', 'g') AS found) AS called
        LEFT JOIN pg_proc p ON p.oid = called.oid
        WHERE p.oid IS NULL OR p.oid >= 16384 OR (p.provolatile <> 'i' AND p.proname::text NOT IN ({pure}))
    ),
    ARRAY(SELECT DISTINCT found[1] FROM regexp_matches(tree, '[( ][{{]([A-Z_]+)', 'g') AS found)
        || ARRAY(SELECT DISTINCT 'cast' FROM regexp_matches(tree, ' :resulttype (?!25 |1043 )\\d+ :resultcollid', 'g'))
FROM defined
"""

# What a cascade reaches may be in any schema. A partition's key is its topmost parent's.
_REFERENCES = """
SELECT conrelid::bigint, confrelid::bigint,
    ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = conrelid AND attnum = ANY (conkey)),
    ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = confrelid AND attnum = ANY (confkey)),
    confdeltype::text, confupdtype::text
FROM pg_constraint WHERE contype = 'f' AND (confdeltype IN ('c', 'n', 'd') OR confupdtype IN ('c', 'n', 'd'))
"""

# PostgreSQL refuses to write in those that are not volatile. Its own have no tables to write to.
_WRITING = "SELECT DISTINCT lower(proname::text) FROM pg_proc WHERE oid >= 16384 AND provolatile = 'v'"

_DATABASES = "SELECT name FROM pragma_database_list WHERE name <> 'temp'"
_OF_DATABASE = """
SELECT name, CASE WHEN type = 'view' THEN 'v' WHEN sql LIKE 'CREATE VIRTUAL%' THEN 'virtual' ELSE 'r' END
FROM {}.sqlite_master WHERE type IN ('table', 'view')
"""

_KEYS = """
SELECT m.name, f."table", f."from", f."to", f.on_delete, f.on_update
FROM (SELECT name FROM {}.sqlite_master WHERE type = 'table') AS m JOIN pragma_foreign_key_list(m.name, {}) AS f
"""

#: What is done to a row that refers to one that goes, as each database has it.
_ACTIONS: dict[str, Literal["delete", "set"]] = {
    "c": "delete", "n": "set", "d": "set", "CASCADE": "delete", "SET NULL": "set", "SET DEFAULT": "set",
}  # fmt: skip

#: The databases that can be asked, by their dialects.
ASKED = ("postgresql", "sqlite")


def relations_of(dbapi_connection: Any, dialect: str, wanted: Collection[str]) -> Relations:
    """Return what a database has.

    wanted: names of relations that are to be found in any schema, and whose queries are asked for if they are views.

    Raises the driver's errors. Whatever transaction the driver has opened for it is ended.
    """
    try:
        return _of_postgres(dbapi_connection, wanted) if dialect == "postgresql" else _of_sqlite(dbapi_connection)
    finally:
        dbapi_connection.rollback()


def _of_postgres(dbapi_connection: Any, wanted: Collection[str]) -> Relations:
    names, views = _listed(wanted), dict[int, View]()
    if wanted:
        for oid, *parts in _rows(dbapi_connection, _VIEWS.format(names=names, pure=_listed(PURE_FUNCTIONS))):
            bases, functions, nodes = map(frozenset, parts)
            views[oid] = View(bases - {oid}, functions, nodes)
    based = {0}.union(*(view.bases for view in views.values()))
    rows = _rows(dbapi_connection, _RELATIONS.format(names=names, bases=", ".join(map(str, based))))
    relations = (
        Relation(oid, schema, name, kind, visible, secured, parents, views.get(oid))
        for oid, schema, name, kind, visible, secured, parents in rows
    )
    references = (
        Reference(child, parent, frozenset(columns), frozenset(remote), _ACTIONS.get(deleted), updated in _ACTIONS)
        for child, parent, columns, remote, deleted, updated in _rows(dbapi_connection, _REFERENCES)
    )
    return Relations(relations, references, (name for (name,) in _rows(dbapi_connection, _WRITING)))


def _of_sqlite(dbapi_connection: Any) -> Relations:
    relations: list[Relation] = []
    references: list[Reference] = []
    for (schema,) in _rows(dbapi_connection, _DATABASES):
        quoted = '"' + schema.replace('"', '""') + '"'
        oids: dict[str, int] = {}
        for name, kind in _rows(dbapi_connection, _OF_DATABASE.format(quoted)):
            oids[name.lower()] = len(relations)
            relations.append(Relation(len(relations), schema, name, kind))
        for child, parent, column, remote, deleted, updated in _rows(
            dbapi_connection, _KEYS.format(quoted, _quoted(schema))
        ):
            if parent.lower() in oids:
                of, to = oids[child.lower()], oids[parent.lower()]
                columns = frozenset((column,)), frozenset((remote,) if remote else ())
                references.append(Reference(of, to, *columns, _ACTIONS.get(deleted), updated in _ACTIONS))
    return Relations(relations, references, folds=True)


def _rows(dbapi_connection: Any, sql: str) -> list[Any]:
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(sql)
        return list(cursor.fetchall())
    finally:
        cursor.close()


def _listed(names: Any) -> str:
    # Not as parameters, as each driver has its own way with them.
    return ", ".join(map(_quoted, ("", *sorted(names))))


def _quoted(name: str) -> str:
    return "'" + name.replace("'", "''") + "'"
