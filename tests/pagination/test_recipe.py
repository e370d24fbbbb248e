"""Statements of one shape are made once, and each is sent with its own values."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import (
    Engine,
    Select,
    case,
    create_engine,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
)
from sqlalchemy.orm import Session, aliased, selectinload, with_loader_criteria
from sqlalchemy.sql.functions import FunctionElement

from overdrive.demo.models import Base, Order, User
from overdrive.pagination import recipe
from overdrive.pagination.recipe import Recipes

COUNTRIES = ["DE", "US", None]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    users = [
        {"email": f"{n}@", "name": f"n{n % 5}", "country": COUNTRIES[n % 3], "created_at": datetime(2024, 1, 1 + n)}
        for n in range(20)
    ]
    with engine.begin() as connection:
        connection.execute(insert(User), users)
    yield engine
    engine.dispose()


def shapes(country: str, names: list[str], number: int) -> Iterator[Select[Any]]:
    """Statements whose values stand in every place where a statement has values."""
    limited = select(User.id).where(User.id > number).order_by(User.id).limit(number)
    inside = select(User.id, (User.id + number).label("x")).where(User.name.in_(names)).subquery()
    common = select(User.id).where(User.id > number).cte("common")
    alias = aliased(User)
    yield select(User).where(User.country == country, User.name.in_(names))
    yield select(User).where(or_(User.id > number, User.name.like(country))).join(User.orders, isouter=True)
    yield select(User).order_by(func.coalesce(User.country, country), User.id)
    yield select(User).where(exists().where(Order.user_id == User.id, Order.quantity > number) | (User.id > number))
    yield select(User).where(User.id.in_(limited))
    yield select(User).join(inside, inside.c.id == User.id).where(inside.c.x > number).order_by(inside.c.x + number)
    yield select(User).join(common, common.c.id == User.id)
    yield select(alias).where(alias.country == country)
    yield select(User).where(User.active.is_(True), User.created_at > datetime(2024, 1, number)).distinct()
    yield select(User).where(literal(number) > 4)
    yield select(User).where(case((User.id > number, literal(country)), else_=literal("x")) == country)
    yield select(User.country, func.count(User.id).filter(User.id > number)).group_by(User.country)


VALUES = [("DE", ["n1", "n2"], 3), ("US", ["n0"], 5), ("DE", [], 9), ("%", ["n1", "n3", "n4"], 15)]


def test_made_once_and_sent_with_the_values_of_each(engine: Engine) -> None:
    recipes, made = Recipes(), []

    def make(stmt: Select[Any]) -> Select[Any]:
        made.append(stmt)
        return stmt

    with Session(engine) as session:
        for values in VALUES:
            for stmt in shapes(*values):
                template, parameters = recipes.made(stmt, "", make)
                assert session.execute(template, parameters).all() == session.execute(stmt).all()
    assert len(made) == len(list(shapes(*VALUES[0])))


def test_what_is_made_holds_no_value_of_the_first() -> None:
    template, parameters = Recipes().made(select(User).where(User.name == "secret"), "", lambda stmt: stmt)
    assert "secret" not in str(template.compile().params)
    assert list(parameters.values()) == ["secret"]


def test_each_purpose_is_made_apart() -> None:
    recipes = Recipes()
    stmt = select(User)
    made = [recipes.made(stmt, purpose, lambda _stmt: object())[0] for purpose in (1, 2, 1)]
    assert made[0] is made[2] is not made[1]


def test_another_shape_is_made_anew() -> None:
    recipes = Recipes()
    shapes = [select(User).where(User.id == 1), select(User).where(User.id > 1), select(User).order_by(User.id)]
    assert len({id(recipes.made(stmt, "", lambda stmt: stmt)[0]) for stmt in shapes}) == 3


class Uncached(FunctionElement[str]):
    inherit_cache = False


def test_what_no_key_tells_apart_is_made_each_time() -> None:
    recipes = Recipes()
    for name in ("x", "y"):
        stmt = select(User).where(Uncached(), User.name == name)
        made, parameters = recipes.made(stmt, "", lambda stmt: stmt)
        assert made is stmt
        assert parameters == {}


@pytest.mark.parametrize(
    "stmt",
    [
        select(User).execution_options(populate_existing=True),
        select(User).options(with_loader_criteria(User, User.id > 3)),
        select(User).options(selectinload(User.orders.and_(Order.quantity > 3))),
    ],
)
def test_what_a_key_does_not_tell_all_about_is_made_each_time(stmt: Select[Any]) -> None:
    made, parameters = Recipes().made(stmt, "", lambda stmt: stmt)
    assert made is stmt
    assert parameters == {}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_MOST", 3)
    recipes = Recipes()
    for number in range(10):
        recipes.made(select(User), number, lambda stmt: stmt)
    assert len(recipes._made) <= 3
