"""Statements made once for all statements of the same shape, and sent again with other values.

SQLAlchemy's cache key tells shapes apart: it is all of a statement but the values of its parameters, which it lists.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

from sqlalchemy import bindparam
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import BindParameter
from sqlalchemy.sql.visitors import ExternallyTraversible, replacement_traverse

T = TypeVar("T")

_NAME = "overdrive_given_"
_MOST = 1_000


class Query(NamedTuple):
    """A statement, values for its parameters, and whether its rows are columns for a response model, no entities."""

    statement: Executable
    parameters: Mapping[str, Any] = {}
    projected: bool = False


class Recipes:
    """What was made of statements, for each shape and purpose; all is forgotten when there is too much of it."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def made(self, stmt: Any, purpose: Hashable, make: Callable[[Any], T]) -> tuple[T, dict[str, Any]]:
        """Return what `make` made of the first statement of this shape, and the values of this one's parameters.

        purpose: what else `make` depends on.
        make: is given a statement whose parameters have names instead of values; or as it is, with its values, where
            there is more to it than its shape, and nothing is remembered.
        """
        key = None if _is_peculiar(stmt) else stmt._generate_cache_key()
        if key is None:
            return make(stmt), {}
        made = self._made.get((key.key, purpose))
        if made is None:
            if len(self._made) >= _MOST:
                self._made.clear()
            made = self._made[key.key, purpose] = make(_named(stmt, key.bindparams))
        return made, {f"{_NAME}{number}": bind.effective_value for number, bind in enumerate(key.bindparams)}


def _is_peculiar(stmt: Any) -> bool:
    # Options have values of their own, a tenant's say, and execution options are not in the key.
    return bool(stmt._with_options or stmt.get_execution_options())


def _named(stmt: Executable, binds: Sequence[BindParameter[Any]]) -> Executable:
    names = {bind.key: f"{_NAME}{number}" for number, bind in enumerate(binds)}

    def name(element: Any, **_options: Any) -> Any:
        if not isinstance(element, BindParameter):
            return None
        return bindparam(
            names[element.key],
            type_=element.type,
            expanding=element.expanding,
            literal_execute=element.literal_execute,
        )

    return cast(Executable, replacement_traverse(cast(ExternallyTraversible, stmt), {}, name))
