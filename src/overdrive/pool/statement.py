"""What a compiled statement reads and writes, and whether it needs a transaction. Decided once per compiled form.

Everything is read from the compiled Core statement: the mapper's view misses association tables, joined eager
loads and bulk statements. What cannot be read there is said to be unknown, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import (
    ColumnClause,
    ColumnElement,
    CompoundSelect,
    FromClause,
    Insert,
    Select,
    Table,
    TableClause,
    TextClause,
    TextualSelect,
    UpdateBase,
)
from sqlalchemy.engine.interfaces import Compiled
from sqlalchemy.sql import visitors
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import ForUpdateArg

from . import rows
from .rows import Rows

#: Stands for every table of an engine.
EVERYTHING = "*"

#: Functions that depend on nothing but their arguments and change nothing.
PURE_FUNCTIONS = frozenset((
    "abs",
    "array_agg",
    "avg",
    "bit_length",
    "bool_and",
    "bool_or",
    "cast",
    "ceil",
    "ceiling",
    "char_length",
    "character_length",
    "coalesce",
    "concat",
    "concat_ws",
    "count",
    "cume_dist",
    "date_part",
    "date_trunc",
    "dense_rank",
    "extract",
    "first_value",
    "floor",
    "generate_series",
    "greatest",
    "group_concat",
    "ifnull",
    "iif",
    "initcap",
    "instr",
    "json_agg",
    "json_array_length",
    "json_build_object",
    "json_extract",
    "jsonb_agg",
    "jsonb_build_object",
    "lag",
    "last_value",
    "lead",
    "least",
    "left",
    "length",
    "lower",
    "lpad",
    "ltrim",
    "max",
    "min",
    "mod",
    "nth_value",
    "ntile",
    "nullif",
    "octet_length",
    "percent_rank",
    "position",
    "power",
    "rank",
    "regexp_replace",
    "replace",
    "right",
    "round",
    "row_number",
    "rpad",
    "rtrim",
    "sign",
    "split_part",
    "sqrt",
    "string_agg",
    "strpos",
    "substr",
    "substring",
    "sum",
    "total",
    "translate",
    "trim",
    "trunc",
    "unnest",
    "upper",
))  # fmt: skip

#: Characters of an outline, and of the statement that it is made of.
_OUTLINE, _OUTLINED = 200, 1000

#: What may hold values: comments, strings of each kind, numbers; and names in quotes, which stay. What is cut off in
#: the middle ends with the text.
_VALUES = re.compile(
    r"""--[^\n]*|/\*.*?(?:\*/|\Z)|[eE]'(?:[^'\\]|\\.|'')*(?:'|\Z)|'[^']*(?:'|\Z)"""
    r"""|(\$(?:[^\W\d]\w*)?\$).*?(?:\1|\Z)|(?<![\w$:])\d[\w.]*|("[^"]*(?:"|\Z))""",
    re.DOTALL,
)

_READING_WORDS = frozenset(("select", "values", "table", "show", "explain", "set", "reset", "pragma"))
_SAVEPOINT_WORDS = frozenset(("savepoint", "release", "rollback"))
#: What may give a name another meaning, in textual SQL.
_RESHAPING = re.compile(r"\b(?:create|alter|drop|import|attach|detach)\b", re.IGNORECASE)
#: A temporary table that textual SQL makes, or has to do with.
_TEMPORARY = re.compile(
    r"""\b(?:temp|temporary)\b(?:\s*\.|(?:\s+(?:recursive|unlogged|table|view)\b)*(?:\s+if\s+not\s+exists\b)?)\s*"""
    r"""(?:pg_temp\s*\.\s*)?(?:"((?:[^"]|"")+)"|(\w+))|\bpg_temp\s*\.\s*(?:"((?:[^"]|"")+)"|(\w+))""",
    re.IGNORECASE,
)
_FIRST_WORD = re.compile(r"\s*([a-z]+)", re.IGNORECASE)
_WORD = re.compile(r"\w+")
#: What makes a text that begins by reading do more: another statement after it, or that it is explained by doing it.
_AND_MORE = re.compile(r";\s*\S|^\s*explain\b.*\banaly[sz]e\b", re.IGNORECASE | re.DOTALL)
#: Names and strings, but none of the names by which SQL calls functions.
_PLAIN_LITERAL = re.compile(
    r"(?!(?:current_\w+|localtime|localtimestamp|session_user|system_user|user)$)[\w.*\"]+|'[^']*'", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a statement without running it.

    reads, writes: names of tables, or `EVERYTHING`.
    unknown: why `reads` may be incomplete or the result may change by itself; None where neither.
    plain: a SELECT that means the same outside a transaction.
    rows_read: of tables of which nothing else is read, and which are not among `reads`.
    rows_written: the only rows written of their table.
    scattered: tables of which other rows are written, or nobody knows which, than new ones.
    reshapes: whether names may mean something else after it.
    temporary: names that stand for temporary tables after it, on its connection.
    words: what is in its text, in lower case, where it may call functions that write.
    changes: of each table written, the columns that are set in rows there are; None where rows go.
    """

    reads: frozenset[str]
    writes: frozenset[str]
    unknown: str | None
    plain: bool
    rows_read: tuple[Rows, ...] = ()
    rows_written: Rows | None = None
    scattered: frozenset[str] = frozenset()
    reshapes: bool = False
    temporary: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()
    changes: tuple[tuple[str, frozenset[str] | None], ...] = ()

    @property
    def names_read(self) -> frozenset[str]:
        """Return the tables of which anything is read."""
        return self.reads.union(each.table for each in self.rows_read)


_known: WeakKeyDictionary[Compiled, Facts] = WeakKeyDictionary()


def facts_of(compiled: Compiled | None, sql: str) -> Facts:
    """Return the facts of a statement in its compiled form, if it has one; `sql` is its text."""
    if compiled is None:
        return _facts_of_text(sql)
    facts = _known.get(compiled)
    if facts is None:
        facts = _known[compiled] = _facts_of_compiled(compiled, sql)
    return facts


def first_word(sql: str) -> str:
    """Return the word a statement's text begins with, in lower case."""
    match = _FIRST_WORD.match(sql)
    return match[1].lower() if match else ""


def _facts_of_text(sql: str) -> Facts:
    word = first_word(sql)
    if word in _SAVEPOINT_WORDS and not _AND_MORE.search(sql):
        return Facts(frozenset(), frozenset(), None, plain=False)
    everything = frozenset((EVERYTHING,))
    writes = everything if _may_write(sql) else frozenset[str]()
    temporary = frozenset(_name_of(found) for found in _TEMPORARY.finditer(sql))
    reshapes = bool(writes) and _RESHAPING.search(sql) is not None
    words = frozenset[str]() if writes else _words(sql)
    unknown = "textual SQL names no tables"
    return Facts(everything, writes, unknown, plain=False, reshapes=reshapes, temporary=temporary, words=words)


def _words(sql: str) -> frozenset[str]:
    return frozenset(_WORD.findall(sql.lower()))


def _name_of(found: re.Match[str]) -> str:
    quoted, plain = found[1] or found[3], found[2] or found[4]
    return quoted.replace('""', '"') if quoted else plain.lower()


def _may_write(sql: str) -> bool:
    return first_word(sql) not in _READING_WORDS or _AND_MORE.search(sql) is not None


def _facts_of_compiled(compiled: Any, sql: str) -> Facts:
    statement = compiled.statement
    if statement is None or not isinstance(statement, Select | CompoundSelect | UpdateBase):
        return _facts_of_text(sql)
    # An ORM statement gets its eager joins and loader criteria only when it is compiled.
    state = compiled.compile_state
    final = statement if state is None else state.statement
    sent = list(visitors.iterate(final))
    if any(element is not final and _is_of_orm(element) for element in sent):
        sent += _within(compiled)
    elements = sent if final is statement else [*visitors.iterate(statement), *sent]

    unknown = next(filter(None, map(_mystery, elements)), None)
    locking = any(isinstance(element, ForUpdateArg) for element in elements)
    reads = frozenset(_table_names(elements))
    names, keys = compiled.bind_names, compiled.column_keys or ()
    # SQL by hand may write, and what refers to a table of which only the name is known may be changed along.
    if any(map(_may_write_anything, elements)):
        return Facts(reads, frozenset((EVERYTHING,)), unknown, plain=False)
    if not any(isinstance(element, UpdateBase) for element in elements):
        rows_read = rows.rows_read(final, sent, names)
        reads -= {each.table for each in rows_read}
        words = _words(sql) if unknown else frozenset[str]()
        return Facts(reads, frozenset(), unknown, plain=not (unknown or locking), rows_read=rows_read, words=words)

    written = [element for element in sent if isinstance(element, UpdateBase)]
    writes = frozenset(name for element in written for name in _table_names(visitors.iterate(element.table)))
    along = frozenset(name for element in written for name in rows.changed_along(element, keys))
    rows_written = rows.rows_written(final, names, keys) if len(written) == 1 else None
    scattered = along if rows_written is not None or all(map(_only_adds, written)) else writes | along
    return Facts(
        reads,
        writes | along,
        unknown,
        plain=False,
        rows_written=rows_written,
        scattered=scattered,
        # What columns have for defaults is not among the elements.
        words=_words(sql),
        changes=tuple(change for element in written for change in rows.changes(element, keys)),
    )


def _may_write_anything(element: Any) -> bool:
    if isinstance(element, TextualSelect):
        return _may_write(getattr(element.element, "text", ""))
    if isinstance(element, UpdateBase) and not isinstance(element, Insert):
        return not isinstance(rows.table_of(element), Table)
    return False


def _is_of_orm(element: Any) -> bool:
    return isinstance(element, Select) and element._propagate_attrs.get("compile_state_plugin") == "orm"


def _within(compiled: Any) -> Iterator[Any]:
    """Yield all that there is in the SELECTs inside of an ORM statement, with what is added to them by mappings.

    That is done while they are compiled, and nobody keeps it.
    """
    found: list[Any] = []

    class Recording(type(compiled)):  # type: ignore[misc]
        def _compose_select_body(self, text: str, select: Any, *others: Any) -> Any:
            found.append(select)
            return super()._compose_select_body(text, select, *others)

    Recording(compiled.dialect, compiled.statement)
    return (element for select in found for element in visitors.iterate(select))


def _only_adds(element: UpdateBase) -> bool:
    # A prefix may be SQLite's OR REPLACE.
    return isinstance(element, Insert) and element._post_values_clause is None and not element._prefixes


def _table_names(elements: Any) -> Iterator[str]:
    return (element.fullname for element in elements if isinstance(element, TableClause))


def _mystery(element: Any) -> str | None:
    """Say why a statement with this element cannot be described by the tables in it."""
    if isinstance(element, FunctionElement):
        name = str(getattr(element, "name", type(element).__name__)).lower()
        if name not in PURE_FUNCTIONS or getattr(element, "packagenames", None):
            return f"the function {name}() is not known to be pure"
    elif isinstance(element, TextClause):
        return "text() names no tables"
    elif isinstance(element, ColumnClause):
        if element.is_literal and not _PLAIN_LITERAL.fullmatch(element.name):
            return "literal_column() names no tables"
    elif isinstance(element, Table) and any("TEMP" in prefix.upper() for prefix in element._prefixes):
        return f"{element.name} is a temporary table, of which each connection has its own"
    elif isinstance(element, ColumnElement | FromClause) and not type(element).__module__.startswith("sqlalchemy."):
        return f"the element {type(element).__name__} is not SQLAlchemy's own"
    return None


@lru_cache(512)
def outline(sql: str) -> str:
    """Return the beginning of a statement on one line, without comments and with `?` for values that stand in it."""
    return " ".join(_VALUES.sub(_hidden, sql[:_OUTLINED]).split())[:_OUTLINE]


def _hidden(found: re.Match[str]) -> str:
    name: str | None = found[2]
    if name is not None:
        return name
    return " " if found[0].startswith(("--", "/*")) else "?"
