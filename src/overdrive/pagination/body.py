"""The bytes of a page, where its response model would make no difference but time.

A model whose fields are of plain types, with no constraint, validator or serializer anywhere, makes of a row of such
values the very same values. They are written by msgspec, which writes these types as pydantic does
(`tests/pagination/test_body.py` compares them); what it might write otherwise is left to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any
from uuid import UUID

import msgspec
from pydantic import BaseModel

from .page import BasePage, CountedCursorPage, CountedPage, CursorPage, Found, LimitOffsetPage, Page

_ENVELOPES = (Page, LimitOffsetPage, CursorPage, CountedPage, CountedCursorPage)

#: Core schemas of pydantic's, and the one type whose values pass each as they are.
_PLAIN: dict[str, type] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "datetime": datetime,
    "date": date,
    "time": time,
    "uuid": UUID,
}
#: What a core schema may say besides its type without making a difference to such values.
_HARMLESS = frozenset(("type", "schema", "metadata", "ref", "microseconds_precision", "default", "default_factory"))
_HARMLESS_OF_MODELS = frozenset(("title", "from_attributes", "validate_by_name", "validate_by_alias"))

#: Between these two, pydantic writes floats as Python does, and so does msgspec.
_SMALLEST, _LARGEST = 1e-9, 1e16


def _is_written_alike(value: float | datetime | time) -> bool:
    if isinstance(value, float):
        return _SMALLEST <= abs(value) < _LARGEST or value == 0
    # pydantic leaves out the seconds of an offset, which old dates have.
    return value.tzinfo is None or value.tzinfo is UTC


_SCRUTINIZED = frozenset((float, datetime, time))


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes pages of one envelope.

    names: of the columns that are read, in their order.
    types: of the values each column may have.
    row: makes what is written of a row.
    others: the fields of the envelope but its items.
    """

    names: tuple[str, ...]
    types: tuple[frozenset[type], ...]
    row: Callable[..., Any]
    others: tuple[str, ...]

    @classmethod
    def of(cls, envelope: type[BasePage[Any]], model: type[BaseModel]) -> Writer | None:
        """Return what writes pages of `model` in `envelope`; None where either has a say in it."""
        if envelope.__pydantic_generic_metadata__["origin"] not in _ENVELOPES:
            return None
        fields = _fields(model.__pydantic_core_schema__)
        types = [_types(field["schema"]) for field in fields.values()]
        if not fields or not all(types):
            return None
        written = [field.get("serialization_alias", name) for name, field in fields.items()]
        row = msgspec.defstruct(
            "Row",
            [(f"column_{number}", Any) for number in range(len(written))],
            rename={f"column_{number}": name for number, name in enumerate(written)},
            gc=False,
        )
        others = tuple(name for name in envelope.model_fields if name != "items")
        return cls(tuple(fields), tuple(types), row, others)

    def write(self, found: Found) -> bytes | None:
        """Return the page as JSON; None where its response model has to look at its rows."""
        if found.columns != self.names:
            return None
        # Keys of the order that the model does not read come last.
        for types, column in zip(self.types, zip(*found.items, strict=True), strict=False):
            kinds = set(map(type, column))
            if not kinds <= types:
                return None
            if kinds & _SCRUTINIZED and not all(map(_is_written_alike, filter(None, column))):
                return None
        make, width = self.row, len(self.names)
        page: dict[str, Any] = {"items": [make(*row[:width]) for row in found.items]}
        page |= {name: getattr(found, name) for name in self.others}
        return _encoder.encode(page)


_encoder = msgspec.json.Encoder()


def _fields(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a model by the attributes they are read from; none where there is more to the model."""
    inner = schema.get("schema", {})
    config: Mapping[str, Any] = schema.get("config", {})
    if (
        schema["type"] != "model"
        or not schema.keys() <= {"type", "cls", "schema", "custom_init", "root_model", "config", "ref", "metadata"}
        or not config.keys() <= _HARMLESS_OF_MODELS
        or inner["type"] != "model-fields"
        or inner.get("computed_fields")
        or not inner.keys() <= {"type", "fields", "model_name", "computed_fields"}
    ):
        return {}
    by_name = config.get("validate_by_name")
    fields: dict[str, Any] = inner["fields"]
    known = {"type", "schema", "metadata", "serialization_alias"} | ({"validation_alias"} if by_name else set())
    return fields if all(field.keys() <= known for field in fields.values()) else {}


def _types(schema: Mapping[str, Any]) -> frozenset[type]:
    """Return the types whose values a field keeps, and writes, as they are; none where that cannot be said."""
    if not schema.keys() <= _HARMLESS:
        return frozenset()
    match schema["type"]:
        case "default":
            return _types(schema["schema"])
        case "nullable":
            types = _types(schema["schema"])
            return types | {type(None)} if types else types
        case kind:
            return frozenset((_PLAIN[kind],)) if kind in _PLAIN else frozenset()
