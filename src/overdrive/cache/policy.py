"""What a route asks of the cache, and which responses may be stored (RFC 9111, section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .conditional import Header
from .key import KeyPlan
from .trust import Trust

_FORBIDDING_DIRECTIVES = frozenset((b"no-store", b"private"))


@dataclass(frozen=True, slots=True)
class Policy:
    """One cached route.

    ttl: seconds its responses are fresh.
    plan: what makes up their key.
    route: its template.
    early: whether nothing but its parameters has a say in who gets them, so that a hit may be served before the
        route's dependencies are resolved.
    trust: how its hits are treated, and how it has done.
    """

    ttl: float
    plan: KeyPlan
    route: str | None = None
    early: bool = False
    trust: Trust = field(default_factory=Trust, compare=False)


def reason_not_to_store(status: int, headers: Iterable[Header], policy: Policy, max_body: int) -> str | None:
    """Say why this response must not be stored, in a word fit for `Cache-Status`; None where it may.

    max_body: bytes.
    """
    if status != 200:
        return "status"
    length: int | None = None
    for name, value in headers:
        name = name.lower()
        if name == b"set-cookie":
            return "set-cookie"
        if name == b"cache-control" and _FORBIDDING_DIRECTIVES & _names(value):
            return "cache-control"
        if name == b"vary" and not _names(value) <= {header.encode() for header in policy.plan.headers}:
            return "vary"
        if name == b"content-length" and value.isdigit():
            length = int(value)
    if length is None:
        return "stream"
    return "size" if length > max_body else None


def _names(value: bytes) -> set[bytes]:
    return {part.split(b"=")[0].strip().lower() for part in value.split(b",")}
