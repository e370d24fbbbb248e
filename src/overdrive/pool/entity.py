"""Entities that are a row of columns and nothing else, and what makes one of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Select, Table, bindparam, inspect, select
from sqlalchemy.orm import (
    ColumnProperty,
    Mapper,
    MapperProperty,
    RelationshipProperty,
    Session,
    SynonymProperty,
    make_transient_to_detached,
)
from sqlalchemy.orm.attributes import instance_dict, manager_of_class

#: The parameter of an entity's statement.
KEY = "pk_1"
#: How relationships are loaded with which an entity has nothing to do until they are asked for.
_LATER = ("select", True, "raise", "raise_on_sql")


@dataclass(frozen=True, slots=True)
class Entity:
    """An entity that is a row and nothing else.

    statement: selects its columns by its key, `KEY`.
    attributes: where they go, in their order.
    """

    statement: Select[Any]
    attributes: tuple[str, ...]


#: With the number of attributes each had, as there may be more later; None where it is no such entity.
_known: WeakKeyDictionary[Mapper[Any], tuple[int, Entity | None]] = WeakKeyDictionary()


def entity_of(class_: Any) -> Entity | None:
    """Return what is known of a mapped class; None where the ORM does more for one than to fetch a row."""
    mapper = inspect(class_, raiseerr=False)
    if not isinstance(mapper, Mapper):
        return None
    count, entity = _known.get(mapper, (0, None))
    if count != len(mapper.attrs):
        entity = _entity(mapper)
        _known[mapper] = len(mapper.attrs), entity
    return None if manager_of_class(mapper.class_).dispatch.load else entity


def make(entity: Entity, class_: type, row: Sequence[Any], session: Session) -> Any:
    """Return what the ORM would have made of a row, in the session."""
    made: Any = manager_of_class(class_).new_instance()
    instance_dict(made).update(zip(entity.attributes, row, strict=True))
    make_transient_to_detached(made)
    session.add(made)
    return made


def _entity(mapper: Mapper[Any]) -> Entity | None:
    table = mapper.local_table
    is_alone = mapper.inherits is None and mapper.polymorphic_on is None and mapper.persist_selectable is table
    if not is_alone or not isinstance(table, Table) or len(mapper.primary_key) != 1:
        return None
    if not all(_is_plain(each, table) for each in mapper.attrs):
        return None
    columns = [each.columns[0] for each in mapper.column_attrs]
    key = mapper.primary_key[0]
    statement = select(*columns).where(key == bindparam(KEY, type_=key.type))
    return Entity(statement, tuple(each.key for each in mapper.column_attrs))


def _is_plain(attribute: MapperProperty[Any], table: Table) -> bool:
    if isinstance(attribute, ColumnProperty):
        return not attribute.deferred and bool(table.c.contains_column(attribute.columns[0]))
    if isinstance(attribute, RelationshipProperty):
        return attribute.lazy in _LATER
    return isinstance(attribute, SynonymProperty)
