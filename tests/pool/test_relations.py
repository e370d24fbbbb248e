"""What names stand for, by what a database has said of its relations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Column, Integer, MetaData, Table, select, text

from overdrive.pool.relations import Meaning, Relation, Relations, View, translated
from overdrive.pool.statement import facts_of

ITEMS = Relation(1, "public", "items")


def view(
    name: str, *bases: int, oid: int = 9, functions: tuple[str, ...] = (), nodes: tuple[str, ...] = ()
) -> Relation:
    query = View(frozenset(bases), frozenset(functions), frozenset(nodes))
    return Relation(oid, "public", name, "v", view=query)


def test_a_table_is_what_it_is_called() -> None:
    known = Relations([ITEMS, Relation(2, "shop", "items", visible=False)])
    assert known.meaning("items") == Meaning()
    assert known.meaning("shop.items") == Meaning()


def test_a_table_with_and_without_its_schema_is_one() -> None:
    assert Relations([ITEMS]).meaning("public.items").also == {"items"}


def test_what_is_not_there_is_unknown() -> None:
    meaning = Relations([ITEMS]).meaning("others")
    assert (meaning.unknown, meaning.writes, meaning.lacking) == (
        "the database has not said what others is",
        {"*"},
        True,
    )


def test_what_no_search_path_finds_may_be_any_of_its_name() -> None:
    hidden = Relation(1, "a", "items", visible=False), Relation(2, "b", "items", "m", visible=False)
    assert "materialized view" in (Relations(hidden).meaning("items").unknown or "")


def test_a_view_is_what_it_reads() -> None:
    known = Relations([ITEMS, view("over", 1), view("above", 9, oid=10)])
    assert known.meaning("over").reads == {"items", "public.items"}
    meaning = known.meaning("above")
    assert (meaning.reads >= {"items", "over"}, meaning.unknown, meaning.writes) == (True, None, {"*"})


@pytest.mark.parametrize(
    ("relation", "why"),
    [
        (view("x", 1, functions=("now()",)), "x is a view, and it calls now()"),
        (view("x", 1, nodes=("OPEXPR", "TABLESAMPLECLAUSE")), "has a TABLESAMPLECLAUSE in it"),
        (view("x", 1, 77), "a view of what is not a table"),
        (view("x", 2), "a view of secret, which has row-level security"),
        (Relation(9, "public", "x", "v"), "what it reads is not known"),
        (Relation(9, "public", "x", "m"), "a materialized view"),
        (Relation(9, "public", "x", "f"), "a foreign table"),
        (Relation(9, "public", "x", "virtual"), "a virtual table"),
        (Relation(9, "public", "x", secured=True), "row-level security"),
    ],
)
def test_what_cannot_be_known_says_why(relation: Relation, why: str) -> None:
    known = Relations([ITEMS, Relation(2, "public", "secret", secured=True), relation])
    assert why in (known.meaning("x").unknown or "")


def test_capitals_differ_unless_the_database_has_it_otherwise() -> None:
    assert Relations([Relation(1, "main", "Items")], folds=True).meaning("iTEMS").unknown is None
    assert Relations([Relation(1, "public", "Items")]).meaning("items").unknown
    # Written without quotes.
    assert Relations([ITEMS]).meaning("ITEMS").unknown is None


@given(st.lists(st.sets(st.integers(0, 9), max_size=2), min_size=1, max_size=10))
def test_relatives_read_what_the_others_write(parents: list[set[int]]) -> None:
    family = {
        oid: Relation(oid, "public", f"t{oid}", parents=[each for each in above if each < oid])
        for oid, above in enumerate(parents)
    }
    known = Relations(family.values())

    def above(oid: int) -> set[int]:
        return {oid}.union(*(above(parent) for parent in family[oid].parents))

    for child in family:
        for ancestor in above(child):
            for writer, reader in ((child, ancestor), (ancestor, child)):
                written = {f"t{writer}", *known.meaning(f"t{writer}").writes}
                assert written & {f"t{reader}", *known.meaning(f"t{reader}").reads}
            # And what reads rows of it.
            if ancestor != child and not family[ancestor].parents:
                assert f"t{ancestor}#" in known.meaning(f"t{child}").writes


def test_names_are_translated_as_they_are_sent() -> None:
    assert [translated(name, {None: "a", "b": "c", "d": None}) for name in ("x", "b.x", "d.x", "e.x")] == [
        "a.x",
        "c.x",
        "x",
        "e.x",
    ]


@pytest.mark.parametrize(
    ("sql", "names"),
    [
        ("CREATE TEMP TABLE items (id int)", {"items"}),
        ("create local temporary table if not exists Items as select 1", {"items"}),
        ('CREATE TEMPORARY VIEW "Odd ""name" AS SELECT 1', {'Odd "name'}),
        ("SELECT * INTO TEMP items FROM others", {"items"}),
        ("SELECT * INTO TEMPORARY TABLE items FROM others", {"items"}),
        ("CREATE TABLE pg_temp.items (id int)", {"items"}),
        ("CREATE TABLE temp.items (id int)", {"items"}),
        ("CREATE TEMP TABLE a (); CREATE TEMP RECURSIVE VIEW b (n) AS SELECT 1", {"a", "b"}),
        ("CREATE TABLE items (id int)", set()),
    ],
)
def test_textual_sql_tells_of_temporary_tables(sql: str, names: set[str]) -> None:
    assert facts_of(text(sql).compile(), sql).temporary == names


@pytest.mark.parametrize(
    ("sql", "reshapes"),
    [
        ("ALTER TABLE a RENAME TO b; CREATE VIEW a AS SELECT * FROM b", True),
        ("/* why */ drop table a", True),
        ("UPDATE created SET dropped = 1", False),
        ("SELECT 'create'", False),
    ],
)
def test_textual_sql_tells_whether_names_may_mean_something_else(sql: str, reshapes: bool) -> None:
    assert facts_of(None, sql).reshapes == reshapes


def test_a_temporary_table_is_each_connections_own() -> None:
    table = Table("scratch", MetaData(), Column("id", Integer), prefixes=["GLOBAL TEMPORARY"])
    compiled = select(table).compile()
    assert facts_of(compiled, str(compiled)).unknown == (
        "scratch is a temporary table, of which each connection has its own"
    )
