"""A JSON line as people read it in a terminal. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from .event import escaped

#: Select Graphic Rendition (ECMA-48, 8.3.117), by severity.
_COLOURS = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}
_INDENT = "    "


class Console:
    """What shows lines.

    names: what fields are called, by their name here.
    colours: whether to use them.

    Control characters of what was logged are escaped as in JSON; a line break is one only within a traceback, which
    is indented, so that nothing logged looks like another line.
    """

    def __init__(self, names: Mapping[str, str], *, colours: bool) -> None:
        self._names = names
        self._colours = colours

    def show(self, line: bytes) -> bytes:
        """Return what stands for `line`; what is no JSON of a `LogHandler`, as it is."""
        try:
            fields = msgspec.json.decode(line, type=dict[str, Any])
            head = [fields.pop(self._name(each)) for each in ("timestamp", "severity", "logger", "message")]
        except (msgspec.MsgspecError, KeyError, UnicodeDecodeError):
            return line
        time, severity, logger, message = map(_text, head)
        exception, stack = (fields.pop(self._name(each), None) for each in ("exception", "stack"))
        shown = [time[11:23], self._coloured(severity, f"{severity:<8}"), f"{logger}:", message]
        shown += [f"{_text(name)}={_text(value)}" for name, value in fields.items() if value is not None]
        trace = exception.get("stacktrace") if isinstance(exception, dict) else exception
        below = [_INDENT + escaped(each) for text in (trace, stack) if text for each in str(text).splitlines()]
        return "\n".join((" ".join(shown), *below, "")).encode()

    def _name(self, field: str) -> str:
        return self._names.get(field, field)

    def _coloured(self, severity: str, text: str) -> str:
        return f"\x1b[{_COLOURS[severity]}m{text}\x1b[0m" if self._colours and severity in _COLOURS else text


def _text(value: object) -> str:
    return escaped(value if isinstance(value, str) else msgspec.json.encode(value).decode())
