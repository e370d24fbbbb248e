"""What a route asks of the cache, and which responses may be stored (RFC 9111, section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .conditional import Header
from .fields import directives, names
from .key import KeyPlan
from .trust import Trust

_FORBIDDING = frozenset((b"no-store", b"private"))
_PROHIBITING = frozenset((b"must-revalidate", b"proxy-revalidate"))


@dataclass(frozen=True, slots=True)
class Policy:
    """One cached route.

    ttl: seconds its responses are fresh.
    plan: what makes up their key.
    route: its template.
    early: whether nothing but its parameters has a say in who gets them, so that a hit may be served before the
        route's dependencies are resolved.
    stale_while_revalidate: seconds after its end in which an entry is served while it is made anew (RFC 5861).
    stale_if_error: seconds after its end in which an entry stands in for an error (RFC 5861).
    outdated: whether both hold for what a write has outdated, too.
    cache_control: what is said of it to clients, where the endpoint says nothing.
    vary: names of the request headers that tell its responses apart.
    tells_age: whether hits say how old they are.
    gzip: whether bodies are kept as gzip, too.
    hide_status: whether responses keep silent about the cache.
    tags: what outdates its responses, besides what they read.
    knows_reads: whether these name all that is read in ways nobody can read off the statements.
    trust: how its hits are treated, and how it has done.
    """

    ttl: float
    plan: KeyPlan
    route: str | None = None
    early: bool = False
    stale_while_revalidate: float = 0
    stale_if_error: float = 0
    outdated: bool = False
    cache_control: bytes = b"no-cache"
    vary: tuple[bytes, ...] = ()
    tells_age: bool = True
    gzip: bool = False
    hide_status: bool = False
    tags: tuple[str, ...] = ()
    knows_reads: bool = False
    trust: Trust = field(default_factory=Trust, compare=False)

    @property
    def kept_for(self) -> float:
        """Return how many seconds an entry is of use."""
        return self.ttl + max(self.stale_while_revalidate, self.stale_if_error)


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
        if name == b"cache-control" and not _FORBIDDING.isdisjoint(directives(value)):
            return "cache-control"
        if name == b"vary" and not {header.encode() for header in policy.plan.headers}.issuperset(names(value)):
            return "vary"
        if name == b"content-length" and value.isdigit():
            length = int(value)
    if length is None:
        return "stream"
    return "size" if length > max_body else None


def supersedes(status: int) -> bool:
    """Say whether what is not kept is what there is by now, in place of what was.

    A part of it, a 304 and an error are not; but that there is nothing any more is.
    """
    return status in (404, 410) or (status < 400 and status not in (206, 304))


def is_whole(headers: Iterable[Header], body: bytes) -> bool:
    """Say whether a body is as long as its headers say, and did not break off (RFC 9110, section 8.6)."""
    said = [value for name, value in headers if name.lower() == b"content-length"]
    return said == [b"%d" % len(body)]


def may_be_stale(headers: Iterable[Header]) -> bool:
    """Say whether a response lets itself be served when it has ended (RFC 9111, section 4.2.4).

    What it says besides, `s-maxage` too, is for caches on the way: how long it is kept here is said by its route.
    """
    return all(
        _PROHIBITING.isdisjoint(directives(value)) for name, value in headers if name.lower() == b"cache-control"
    )


def with_vary(headers: list[Header], told_by: Iterable[bytes]) -> list[Header]:
    """Return the headers with the names in `told_by` in their one `Vary` (RFC 9110, section 12.5.5)."""
    said = [value for name, value in headers if name.lower() == b"vary"]
    known = set().union(*map(names, said))
    missing = [name for name in told_by if name.lower() not in known]
    if not missing or b"*" in known:
        return headers
    others = [header for header in headers if header[0].lower() != b"vary"]
    return [*others, (b"vary", b", ".join([*said, *missing]))]
