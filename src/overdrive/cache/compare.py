"""How two responses differ, told without what is in them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any

from .conditional import Header

#: What one comparison tells at most: differences, and characters of each path.
_MOST = 10
_LONGEST = 200

_NOTHING = object()


def differences(
    status: tuple[int, int],
    headers: tuple[Iterable[Header], Iterable[Header]],
    body: tuple[bytes, bytes],
    declared: Collection[str] = (),
) -> list[str]:
    """Name what is different in a response, each given as it was kept and as it is now.

    Status, content type and body are compared: two JSON texts by what they say, anything else by its bytes. At most
    ten differences are named, by their JSON paths, `$.items[3].name changed`, each `added`, `removed`, `type` or
    `changed`; never what is there. The key of a map may be somebody's name too, so that a path holds only the names
    in `declared`, and `*` for any other.
    """
    if status[0] != status[1]:
        return ["status"]
    if _content_type(headers[0]) != _content_type(headers[1]):
        return ["content-type"]
    if body[0] == body[1]:
        return []
    try:
        kept, now = json.loads(body[0]), json.loads(body[1])
    # A text may be nested more deeply than it can be read.
    except (ValueError, RecursionError):
        return ["body"]
    return list(islice(_differences(kept, now, declared), _MOST))


def _content_type(headers: Iterable[Header]) -> bytes:
    return next((value for name, value in headers if name.lower() == b"content-type"), b"")


def _differences(kept: Any, now: Any, declared: Collection[str]) -> Iterator[str]:
    # A list of what is still to be compared, as the texts may be nested more deeply than calls.
    pending = [("$", kept, now)]
    while pending:
        path, kept, now = pending.pop()
        if (kind := _kind(kept, now)) is not None:
            yield f"{_shortened(path)} {kind}"
        elif isinstance(kept, dict):
            names = [*kept, *(name for name in now if name not in kept)]
            pending += [
                (f"{path}.{name if name in declared else '*'}", kept.get(name, _NOTHING), now.get(name, _NOTHING))
                for name in reversed(names)
            ]
        elif isinstance(kept, list):
            pending += [
                (f"{path}[{index}]", _at(kept, index), _at(now, index))
                for index in reversed(range(max(len(kept), len(now))))
            ]


def _kind(kept: Any, now: Any) -> str | None:
    """Say how two values differ as such; None where they are equal, or it takes a look at what is in them."""
    if kept is _NOTHING:
        return "added"
    if now is _NOTHING:
        return "removed"
    if _json_type(kept) is not _json_type(now):
        return "type"
    if isinstance(kept, dict | list):
        return None
    # NaN is not equal to itself.
    return None if kept == now or (kept != kept and now != now) else "changed"


def _json_type(value: Any) -> type:
    """Return the JSON type of a value: there is one for numbers, and `true` is none of them."""
    return float if type(value) is int else type(value)


def _at(values: list[Any], index: int) -> Any:
    return values[index] if index < len(values) else _NOTHING


def _shortened(path: str) -> str:
    return path if len(path) <= _LONGEST else path[: _LONGEST - 1] + "…"
