"""What the names in statements stand for: tables, or what only looks like one.

It is decided from what a database says of its relations, which `catalogue` asks for. What cannot be known is said to
be unknown, never taken for a table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from overdrive.context import OF_ROWS

from .statement import EVERYTHING

_KINDS = {
    "m": "a materialized view, which changes when it is refreshed",
    "f": "a foreign table, whose writers nobody here sees",
    "virtual": "a virtual table, and what is behind it is not known",
}

#: What the query of a view may consist of and still give the same whenever its tables are the same, but for the
#: functions it calls: the nodes of `pg_node_tree`, by the names that PostgreSQL has before version 16 and since.
_PLAIN_NODES = frozenset((
    "AGGREF", "ALIAS", "ARRAY", "ARRAYCOERCEEXPR", "ARRAYEXPR", "BOOLEANTEST", "BOOLEXPR", "CASE", "CASEEXPR",
    "CASETESTEXPR", "CASEWHEN", "COALESCE", "COALESCEEXPR", "COERCEVIAIO", "COLLATE", "COLLATEEXPR",
    "COMMONTABLEEXPR", "CONST", "DISTINCTEXPR", "FIELDSELECT", "FROMEXPR", "FUNCEXPR", "GROUPINGFUNC",
    "GROUPINGSET", "JOINEXPR", "MINMAX", "MINMAXEXPR", "NAMEDARGEXPR", "NULLIFEXPR", "NULLTEST", "OPEXPR", "PARAM",
    "QUERY", "RANGETBLENTRY", "RANGETBLFUNCTION", "RANGETBLREF", "RELABELTYPE", "ROW", "ROWCOMPARE", "ROWCOMPAREEXPR",
    "ROWEXPR", "RTEPERMISSIONINFO", "SCALARARRAYOPEXPR", "SETOPERATIONSTMT", "SORTGROUPCLAUSE", "SUBLINK",
    "SUBSCRIPTINGREF", "TARGETENTRY", "VAR", "WHEN", "WINDOWCLAUSE", "WINDOWFUNC",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class View:
    """What the query of a view consists of.

    bases: the relations that it reads.
    functions: those it calls that are not known to be pure.
    nodes: the kinds of expressions and clauses in it.
    """

    bases: frozenset[int]
    functions: frozenset[str]
    nodes: frozenset[str]

    @property
    def doubt(self) -> str | None:
        """Say why it may give something else though its bases are the same."""
        if self.functions:
            return f"it calls {min(self.functions)}, which is not known to be pure"
        if strange := self.nodes - _PLAIN_NODES:
            return f"it has a {min(strange)} in it, which is not known to be pure"
        return None


@dataclass(frozen=True, slots=True)
class Relation:
    """A table, or what looks like one.

    kind: as `pg_class` has it (`r`, `p`, `v`, `m`, `f`), or `virtual`.
    visible: whether it is found without its schema.
    secured: whether there is row-level security on it, for some roles at least.
    parents: whose partition or heir it is.
    view: its query, where it is a view and that is known.
    """

    oid: int
    schema: str
    name: str
    kind: str = "r"
    visible: bool = True
    secured: bool = False
    parents: Sequence[int] = ()
    view: View | None = field(default=None, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Return what models may call it."""
        qualified = f"{self.schema}.{self.name}"
        return (self.name, qualified) if self.visible else (qualified,)


@dataclass(frozen=True, slots=True)
class Reference:
    """A foreign key that changes its rows along with those it refers to.

    child, parent: the relations that have it, and that it refers to.
    columns, remote: names of their columns; `remote` is empty where it is not said.
    on_delete: what becomes of its row: `delete`, `set` (its columns change) or None.
    on_update: whether its columns change along.
    """

    child: int
    parent: int
    columns: frozenset[str]
    remote: frozenset[str]
    on_delete: Literal["delete", "set"] | None
    on_update: bool

    def follows(self, changed: Collection[str] | None) -> bool:
        """Say whether its row is changed along; changed: columns of the other row, or None where that goes."""
        if changed is None:
            return self.on_delete is not None
        return self.on_update and (not self.remote or not self.remote.isdisjoint(changed))


class Meaning(NamedTuple):
    """What it means that a statement has a name.

    also: another name of the same table, whose rows are the same.
    reads: further names that a reading depends on.
    writes: further names, or `EVERYTHING`, that a write is a write to.
    unknown: why what is read cannot be described.
    lacking: whether the database might say more.
    """

    also: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()
    unknown: str | None = None
    lacking: bool = False


class Relations:
    """What a database had when it was asked.

    references: the foreign keys among them.
    writing: functions that may write, in lower case.
    folds: whether names are the same in capitals.
    """

    def __init__(
        self,
        relations: Iterable[Relation],
        references: Iterable[Reference] = (),
        writing: Iterable[str] = (),
        *,
        folds: bool = False,
    ) -> None:
        self._folds = folds
        self._references = frozenset(references)
        self.writing = frozenset(writing)
        self._relations = {each.oid: each for each in relations}
        self._visible: dict[str, list[Relation]] = {}
        self._named: dict[str, list[Relation]] = {}
        for each in self._relations.values():
            for name in each.names:
                self._visible.setdefault(self._folded(name), []).append(each)
            self._named.setdefault(self._folded(each.name), []).append(each)

    def _folded(self, name: str) -> str:
        return name.lower() if self._folds else name

    def _found(self, name: str) -> list[Relation]:
        # Where it is on nobody's search path but this statement's, it may be any.
        places = ((where, as_) for as_ in (name, name.lower()) for where in (self._visible, self._named))
        return next(filter(None, (where.get(self._folded(as_)) for where, as_ in places)), [])

    def meaning(self, name: str) -> Meaning:
        """Return what a name means in a statement."""
        found = self._found(name)
        if not found:
            unknown = f"the database has not said what {name} is"
            return Meaning(writes=frozenset((EVERYTHING,)), unknown=unknown, lacking=True)
        unknowns = [(each, self._unknown(each)) for each in found]
        return Meaning(
            also=frozenset(each.name for each in found if each.visible and "." in name),
            reads=frozenset(other for each in found for other in self._bases(each)) - {name},
            writes=frozenset(other for each in found for other in self._written(each)) - {name},
            unknown=next((f"{name} {why}" for _, why in unknowns if why), None),
            lacking=any(each.kind == "v" and each.view is None for each in found),
        )

    def changed_along(self, name: str, columns: Collection[str] | None) -> frozenset[str]:
        """Return the names of what foreign keys change along with a table.

        columns: those that are set in it; None where rows go.
        """
        seen: set[tuple[Reference, bool]] = set()
        waiting = [(each.oid, columns) for each in self._found(name)]
        while waiting:
            parent, changed = waiting.pop()
            for each in self._references:
                step = each, changed is None
                if each.parent == parent and step not in seen and each.follows(changed):
                    seen.add(step)
                    is_gone = changed is None and each.on_delete == "delete"
                    waiting.append((each.child, None if is_gone else each.columns))
        children = [self._relations[each.child] for each, _ in seen if each.child in self._relations]
        related = [other for each in children for other in (each, *self._roots(each))]
        return frozenset(name for each in related for name in each.names)

    def holds(self, later: Relations) -> bool:
        """Say whether whoever went by this has done what he would have done by what the database has `later`."""
        return (
            later.writing <= self.writing
            and later._references <= self._references
            and all(map(_is_as_before, self._relations.values(), map(later._relations.get, self._relations)))
        )

    def _unknown(self, relation: Relation) -> str | None:
        """Say why what is read of a relation cannot be described."""
        if relation.secured:
            return "has row-level security, which goes by what no statement shows"
        if relation.kind in _KINDS:
            return f"is {_KINDS[relation.kind]}"
        if relation.kind != "v":
            return None
        if relation.view is None:
            return "is a view, and what it reads is not known"
        if doubt := relation.view.doubt:
            return f"is a view, and {doubt}"
        for oid in sorted(relation.view.bases):
            base = self._relations.get(oid)
            if base is None:
                return "is a view of what is not a table of this database's own"
            if why := self._unknown(base):
                return f"is a view of {base.name}, which {why}"
        return None

    def _bases(self, relation: Relation) -> Iterator[str]:
        """Yield what a reading of a relation depends on, besides what it is called."""
        for root in self._roots(relation):
            yield from root.names
        for oid in relation.view.bases if relation.view is not None else ():
            if (base := self._relations.get(oid)) is not None:
                yield from base.names
                yield from self._bases(base)

    def _written(self, relation: Relation) -> Iterator[str]:
        """Yield what is written by a write to a relation, besides what it is called.

        All that are related have one root at least in common: each reads its roots, and each writes them.
        """
        if relation.kind == "v":
            yield EVERYTHING
        for root in self._roots(relation):
            yield from (each for name in root.names for each in (name, name + OF_ROWS))

    def _roots(self, relation: Relation) -> Collection[Relation]:
        """Return whose partition or heir a relation is in the end."""
        roots: dict[int, Relation] = {}
        waiting = list(relation.parents)
        while waiting:
            parent = self._relations.get(waiting.pop())
            if parent is not None and parent.parents:
                waiting += parent.parents
            elif parent is not None:
                roots[parent.oid] = parent
        return roots.values()


def _is_as_before(relation: Relation, later: Relation | None) -> bool:
    # The query of a view is not asked for at first.
    return relation == later and (relation.view is None or relation.view == later.view)


def translated(name: str, schemas: Mapping[str | None, str | None]) -> str:
    """Return the full name of a table as it is sent under a `schema_translate_map`."""
    schema, _, table = name.rpartition(".")
    to = schemas.get(schema or None, schema or None)
    return f"{to}.{table}" if to else table
