"""Lines in another vocabulary, and without what must not be in a log. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from overdrive.errors import ConfigurationError

from .event import json_line

REDACTED = "[redacted]"


class Shape:
    """What is changed in every line before it is buffered.

    names: what fields are called instead, by their name here: `{"severity": "level"}`. A name that is taken gets an
        underscore appended.
    redact: names of fields whose value is not shown, at any depth, in any case, with `-` or `_`.
    patterns: regular expressions; what they match in any text is not shown.

    Raises `ConfigurationError` for a pattern that is none, and for one name where several are expected.
    """

    def __init__(self, names: Mapping[str, str], redact: Collection[str], patterns: Collection[str]) -> None:
        if isinstance(redact, str) or isinstance(patterns, str):
            raise ConfigurationError("redact= and redact_patterns= take several: put the one into a list")
        self._names = names
        self._hidden = frozenset(map(_folded, redact))
        try:
            self._patterns = [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise ConfigurationError(f"redact_patterns: {error.pattern!r} is no pattern: {error}") from None

    def __bool__(self) -> bool:
        """Say whether there is anything to change."""
        return bool(self._names or self._hidden or self._patterns)

    def line(self, line: bytes) -> bytes:
        """Return a JSON line in this shape."""
        shaped: dict[str, Any] = {}
        for field, value in self._fields(msgspec.json.decode(line)).items():
            name = self._names.get(field, field)
            while name in shaped:
                name += "_"
            shaped[name] = value
        return json_line(shaped)

    def text(self, text: str) -> str:
        """Return `text` without what the patterns match."""
        for pattern in self._patterns:
            text = pattern.sub(REDACTED, text)
        return text

    def _fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: REDACTED if _folded(name) in self._hidden else self._value(value) for name, value in fields.items()
        }

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return self._fields(value)
        if isinstance(value, list):
            return [self._value(each) for each in value]
        return value


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")
