"""Which columns a response model reads of an entity, where nothing but columns can make a difference.

pydantic fills a model from an entity by looking for attributes. Where each attribute that it could look for is either
a plain mapped column or not there at all, an object that has just those columns makes the same model.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from keyword import iskeyword
from typing import Any, NamedTuple

from pydantic import AliasChoices, AliasPath, BaseModel
from pydantic.fields import FieldInfo
from sqlalchemy.inspection import inspect
from sqlalchemy.orm import ColumnProperty, InstrumentedAttribute, Mapper
from sqlalchemy.sql.elements import ColumnElement

from .select import Statement, entity_of


class Projection(NamedTuple):
    """Columns of an entity.

    class_: the entity's.
    columns: by the names of the attributes they are mapped to.
    """

    class_: type
    columns: dict[str, ColumnElement[Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the attributes."""
        return tuple(self.columns)


def never(_class: type) -> bool:
    """Allow no projection."""
    return False


def projected(stmt: Statement, model: type[BaseModel]) -> Projection | None:
    """Return the columns that `model` reads of each row of `stmt`.

    None wherever something else than the values of columns could reach the model: another attribute of the entity,
    code that runs when an entity is loaded or read, an option of the statement, a validator that is given all of it.
    """
    entity = entity_of(stmt)
    if entity is None or stmt._with_options or stmt.get_execution_options() or not _reads_fields_alone(model):
        return None
    mapper: Mapper[Any] = inspect(entity).mapper
    names = [name for name in dict.fromkeys(_names(model)) if hasattr(mapper.class_, name)]
    if not names or _is_customized(mapper) or not all(_is_column(mapper, name) for name in names):
        return None
    return Projection(mapper.class_, {name: getattr(entity, name) for name in names})


def row_maker(names: Iterable[str]) -> Callable[[Iterable[Any]], Any]:
    """Return what makes rows with these attributes, as a response model reads them."""
    # What a namedtuple's own _make() does, without a call of Python for each row.
    return partial(tuple.__new__, namedtuple("Row", names))


def _reads_fields_alone(model: type[BaseModel]) -> bool:
    validators = model.__pydantic_decorators__.model_validators.values()
    return not (
        model.__pydantic_root_model__
        or model.__pydantic_custom_init__
        or model.model_config.get("extra") == "allow"
        # Only `after` is given the model that was made, not what it was made of.
        or any(validator.info.mode != "after" for validator in validators)
        or "__get_pydantic_core_schema__" in {name for base in _bases(model) for name in vars(base)}
    )


def _bases(model: type[BaseModel]) -> list[type]:
    return [base for base in model.__mro__ if base not in BaseModel.__mro__]


def _names(model: type[BaseModel]) -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield from (name, *_aliases(info))


def _aliases(info: FieldInfo) -> Iterator[str]:
    alias = info.validation_alias
    for choice in alias.choices if isinstance(alias, AliasChoices) else [alias]:
        first = choice.path[0] if isinstance(choice, AliasPath) else choice
        if isinstance(first, str):
            yield first


def _is_customized(mapper: Mapper[Any]) -> bool:
    """Say whether loading an instance, or reading its attributes, runs code that a row of columns would not."""
    class_, events = mapper.class_, mapper.class_manager.dispatch
    return (
        mapper.polymorphic_on is not None
        or mapper.inherits is not None
        or hasattr(class_, "__getattr__")
        or "__getattribute__" in {name for base in class_.__mro__[:-1] for name in vars(base)}
        or bool(events.load or events.refresh)
    )


def _is_column(mapper: Mapper[Any], name: str) -> bool:
    found = mapper.attrs.get(name)
    # A tuple's fields cannot have these names.
    if name.startswith("_") or iskeyword(name):
        return False
    return (
        isinstance(found, ColumnProperty)
        and len(found.columns) == 1
        and not found.deferred
        and type(vars(mapper.class_).get(name)) is InstrumentedAttribute
    )
