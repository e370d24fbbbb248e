"""What PostgreSQL is to run so that it tells of writes no engine here sees, and what it tells.

Each table has a trigger a kind of statement, which runs once a statement whatever that changes: psql's, COPY's, a
foreign key's. All of a schema's call one function. It announces the names of the table and, where they are few, the
primary keys of the rows that were changed, before and after; `rows` makes tags of them, as it does of our own.

Everything here is text: nothing is asked of a database.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args
from uuid import UUID

import msgspec

from overdrive.context import OF_ROWS

from .rows import MOST, tag_of_row
from .statement import EVERYTHING

Via = Literal["notify", "outbox"]

#: Where announcements are heard. One that is not understood means everything: `NOTIFY overdrive`.
CHANNEL = "overdrive"
#: What is announced when triggers have come or gone: whoever listens looks again for how they tell.
CHANGED = "changed"
FUNCTION = "overdrive_announce"
OUTBOX = "overdrive_outbox"
#: The triggers of a table, by the statements that they follow.
TRIGGERS = {each.upper(): f"overdrive_{each}" for each in ("insert", "update", "delete", "truncate")}

#: Changes with the text of the function or the arguments it is given.
VERSION = 1

#: Bytes; a payload has less than 8,000 (https://www.postgresql.org/docs/current/sql-notify.html).
_LONGEST = 7_900

_TRANSITION = {
    "INSERT": " REFERENCING NEW TABLE AS overdrive_new",
    "UPDATE": " REFERENCING OLD TABLE AS overdrive_old NEW TABLE AS overdrive_new",
    "DELETE": " REFERENCING OLD TABLE AS overdrive_old",
    "TRUNCATE": "",
}

# What a statement has written is known by its transition tables, which are found before anything on the search path.
# Nothing in it may fail the statement: a key that is not what it was, and names too many for a notification, announce
# more than was written. What is made of a key is built in, and names are quoted, so that whoever owns a table, or could
# make a trigger of this, has no say in what is executed.
_FUNCTION = f"""\
CREATE OR REPLACE FUNCTION {{function}}() RETURNS trigger LANGUAGE plpgsql
{{rights}}SET search_path = pg_catalog, pg_temp AS $overdrive$
-- Its arguments: whether the table is found without its schema; then, as JSON, tables with the same rows by the same
-- key, those by another, and the columns of the key.
DECLARE
    source text := 'overdrive_old';
    keyed jsonb := jsonb_build_array(TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME) || TG_ARGV[1]::jsonb;
    key text;
    keys jsonb;
    payload text;
    written bigint;
BEGIN
    IF TG_ARGV[0] = 'visible' THEN
        keyed := jsonb_build_array(TG_TABLE_NAME) || keyed;
    END IF;
    IF TG_OP <> 'TRUNCATE' THEN
        IF TG_OP = 'DELETE' THEN
            SELECT count(*) INTO written FROM (SELECT FROM overdrive_old LIMIT {MOST + 1}) AS changed;
        ELSE
            SELECT count(*) INTO written FROM (SELECT FROM overdrive_new LIMIT {MOST + 1}) AS changed;
        END IF;
        IF written = 0 THEN
            RETURN NULL;
        ELSIF TG_OP = 'INSERT' THEN
            keys := '[]';
        ELSIF written <= {MOST} THEN
            SELECT string_agg(quote_ident(name), ', ' ORDER BY number) INTO key
            FROM jsonb_array_elements_text(TG_ARGV[3]::jsonb) WITH ORDINALITY AS columns (name, number)
            HAVING bool_and(EXISTS (
                SELECT FROM pg_attribute WHERE attrelid = TG_RELID AND attname = name
                AND atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'uuid'::regtype)
            ));
            IF key IS NOT NULL THEN
                IF TG_OP = 'UPDATE' THEN
                    source := '(SELECT ' || key || ' FROM overdrive_old UNION SELECT ' || key
                        || ' FROM overdrive_new) AS changed';
                END IF;
                EXECUTE 'SELECT jsonb_agg(jsonb_build_array(' || key || ')) FROM ' || source INTO keys;
            END IF;
        END IF;
    END IF;
    payload := jsonb_build_object('keyed', keyed, 'others', TG_ARGV[2]::jsonb, 'keys', keys);
    IF octet_length(payload) > {_LONGEST} THEN
        payload := jsonb_build_object('keyed', keyed, 'others', TG_ARGV[2]::jsonb, 'keys', NULL);
    END IF;
    IF octet_length(payload) > {_LONGEST} THEN
        payload := 'everything';
    END IF;
    {{tell}}
    RETURN NULL;
END
$overdrive$"""


@dataclass(frozen=True, slots=True)
class Announced:
    """A table whose writes are announced.

    key: its primary key's columns in the order of their names; none where rows are not told apart.
    visible: whether it is found on the search path, so that models need not name its schema.
    keyed, others: tables that a write to this one may write as well, or be a part of (partitions, inheritance), by
        the names of models: those with the same key, and those with another.
    """

    schema: str
    name: str
    key: tuple[str, ...] = ()
    visible: bool = True
    keyed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Return what models may call it."""
        qualified = f"{self.schema}.{self.name}"
        return (self.name, qualified) if self.visible else (qualified,)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return what its triggers hand to the function."""
        lists = (msgspec.json.encode(names).decode() for names in (self.keyed, self.others, self.key))
        return ("visible" if self.visible else "", *lists)


# To the database


def quoted(*names: str) -> str:
    """Return a name as SQL takes it, whatever is in it."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def creation(schema: str, outbox: str | None) -> Iterator[str]:
    """Yield what makes the function of a schema.

    outbox: the schema of the table that it writes to; None where it notifies.
    """
    function = quoted(schema, FUNCTION)
    via: Via = "notify" if outbox is None else "outbox"
    # Whoever writes need not have a right to the outbox.
    rights = "" if outbox is None else "SECURITY DEFINER "
    tell = f"PERFORM pg_notify('{CHANNEL}', payload);"
    if outbox is not None:
        tell = f"INSERT INTO {quoted(outbox, OUTBOX)} (payload) VALUES (payload);"
    parts = {"{function}": function, "{rights}": rights, "{tell}": tell}
    yield re.sub("|".join(map(re.escape, parts)), lambda part: parts[part[0]], _FUNCTION)
    # To be fired it need not be permitted, only to make a trigger of it.
    yield f"REVOKE EXECUTE ON FUNCTION {function}() FROM PUBLIC"
    yield f"COMMENT ON FUNCTION {function}() IS '{comment(via)}'"


def comment(via: Via) -> str:
    """Return what is said of a function of this version."""
    return f"overdrive triggers {VERSION}, via {via}"


def via_of(text: str | None) -> Via | None:
    """Return how a function tells by what is said of it, whatever its version."""
    return next((via for via in get_args(Via) if (text or "").endswith(f", via {via}")), None)


def triggers(table: Announced) -> Iterator[str]:
    """Yield what makes the triggers of a table, or what they should be."""
    arguments = ", ".join("'" + each.replace("'", "''") + "'" for each in table.arguments)
    call = f"EXECUTE FUNCTION {quoted(table.schema, FUNCTION)}({arguments})"
    for operation, name in TRIGGERS.items():
        yield (
            f"CREATE OR REPLACE TRIGGER {name} AFTER {operation} ON {quoted(table.schema, table.name)}"
            f"{_TRANSITION[operation]} FOR EACH STATEMENT {call}"
        )


def outbox_creation(schema: str) -> Iterator[str]:
    """Yield what makes the outbox.

    It is read by the transactions that wrote it and not by its numbers, of which a lower one may be committed later.
    These have no type of PostgreSQL's own, which tools that reflect tables would not know.
    """
    table = quoted(schema, OUTBOX)
    yield (
        f"CREATE TABLE {table} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
        "transaction bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint, payload text NOT NULL, "
        "written_at timestamptz NOT NULL DEFAULT clock_timestamp())"
    )
    yield f"CREATE INDEX {OUTBOX}_transaction ON {table} (transaction)"
    yield f"COMMENT ON TABLE {table} IS 'overdrive: writes to be announced, for a minute'"


# From the database


class _Payload(msgspec.Struct):
    keyed: list[str]
    others: list[str]
    keys: list[list[int | str]] | None


def tags_of(payload: str, engine: str) -> set[str]:
    """Return the tags that a payload announces; everything of the engine where it cannot be read.

    engine: what its tags start with here.
    """
    try:
        told = msgspec.json.decode(payload, type=_Payload)
        tags = set(_tags(told.keyed, told.keys)) | set(_tags(told.others, None if told.keys != [] else []))
    except (msgspec.MsgspecError, ValueError):
        tags = {EVERYTHING}
    return {f"{engine}/{tag}" for tag in tags}


def _tags(names: Collection[str], keys: Sequence[Sequence[int | str]] | None) -> Iterable[str]:
    yield from names
    if keys is None:
        yield from (name + OF_ROWS for name in names)
        return
    # What is a number in SQL is one in JSON, and all other keys are UUIDs.
    rows = [[value if isinstance(value, int) else UUID(value) for value in key] for key in keys]
    yield from (tag_of_row(name, row) for name in names for row in rows)
