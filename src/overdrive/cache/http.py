"""HTTP caching without I/O and without a clock, as a shared cache of our own origin.

RFC 9111 (what may be stored, and what a stored response is worth), RFC 9110 (conditional requests), RFC 5861 (stale
while revalidating and on errors) and RFC 9211 (Cache-Status). Moments are seconds since the epoch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeAlias
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

from .conditional import Header, names_tag, not_modified, opaque, strong_tag
from .fields import FOREVER, Directives, Fields, combine, delta_seconds, directives, elements, http_date, names

#: RFC 9110, section 9.2.1, and QUERY of its registry; what is unknown may have changed something.
SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "QUERY"))
#: Preconditions that are the origin's to judge (RFC 9111, section 4.3.2); and content, which an app may read though a
#: GET's has no meaning (RFC 9110, section 9.3.1).
PASSED_ON = frozenset((b"if-match", b"if-unmodified-since", b"content-length", b"transfer-encoding"))
#: Preconditions a cache may judge, and replaces by its own when it validates (RFC 9111, section 4.3.1), and parts.
JUDGED = frozenset((b"if-none-match", b"if-modified-since", b"if-range", b"range"))

#: RFC 9110, section 15.1, without 206, which is never stored.
_HEURISTIC = frozenset((200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501))
#: What `must-understand` may ask for (RFC 9111, section 5.2.2.3): statuses without rules of their own for caches.
_UNDERSTOOD = _HEURISTIC | {302, 303, 307, 400, 401, 403, 406, 409, 415, 421, 422, 429, 500, 502, 503, 504}
_ERRORS = frozenset((500, 502, 503, 504))
#: RFC 9111, section 3.1, and RFC 9110, section 7.6.1.
_NOT_STORED = frozenset(
    b"age connection keep-alive proxy-authenticate proxy-authentication-info proxy-authorization proxy-connection "
    b"set-cookie te transfer-encoding upgrade".split()
)
#: Selecting headers whose values are case-insensitive (RFC 9110, section 12.5).
_CASELESS = frozenset((b"accept", b"accept-charset", b"accept-encoding", b"accept-language"))

#: One range of bytes (RFC 9110, section 14.1.2).
_RANGE = re.compile(rb"bytes=(?:(?P<first>\d{1,18})-(?P<last>\d{1,18})?|-(?P<length>\d{1,18}))", re.IGNORECASE)


# What a response is worth


@dataclass(slots=True)
class Stored:
    """A response to a GET, ready to be sent.

    headers: as they are sent, without Age.
    body: empty until it is there (`with_body`).
    etag, last_modified: as the origin gave them, or none; `tag` is the one clients see.
    born: the moment its age was zero.
    lifetime: seconds it is fresh.
    revalidate_for, error_for: seconds it may be served stale, while it is revalidated and when that fails (RFC 5861).
    may_be_stale: whether anything else lets it be served stale (RFC 9111, section 4.2.4).
    authorized: whether it may answer requests with Authorization (section 3.5).
    vary: the header fields it was selected by, and their values in the request, normalised (section 4.1).
    expires: the moment it stops being fresh.
    dated: the moment it was made, as its Date says, or came.
    """

    status: int
    headers: list[Header]
    body: bytes
    etag: bytes | None
    last_modified: bytes | None
    tag: bytes | None
    born: float
    lifetime: float
    revalidate_for: float
    error_for: float
    may_be_stale: bool
    authorized: bool
    vary: tuple[tuple[bytes, bytes | None], ...]
    expires: float
    dated: float
    #: The age of the last hit, and its headers.
    _age: int = field(default=-1, init=False)
    _hit: list[Header] = field(default_factory=list, init=False)

    def with_body(self, body: bytes) -> Stored:
        """Return it with its whole body, its length, and a strong entity tag where it is a 200 without any."""
        tag = strong_tag(body) if self.tag is None and self.status == 200 else self.tag
        response = replace(self, body=body, tag=tag)
        response.headers = response.completed(self.headers)
        return response

    def completed(self, headers: Iterable[Header]) -> list[Header]:
        """Return headers of it with what its body adds to them, once it is whole."""
        # It is no longer sent in chunks, and the length of these is not both.
        completed = [(name, value) for name, value in headers if name.lower() != b"transfer-encoding"]
        names = {name.lower() for name, _ in completed}
        if b"etag" not in names and self.tag is not None:
            completed.append((b"etag", self.tag))
        if b"content-length" not in names and self.status not in (204, 205):
            completed.append((b"content-length", b"%d" % len(self.body)))
        return completed

    def hit(self, now: float) -> list[Header]:
        """Return the headers it is sent with, Cache-Status the last of them; they change once a second."""
        # A clock may be set back.
        age = int(now - self.born) if now > self.born else 0
        if age != self._age:
            self._age = age
            self._hit = [*self.headers, (b"age", b"%d" % age), (b"cache-status", status_of_hit(self, age))]
        return self._hit.copy()

    @property
    def size(self) -> int:
        """About what it takes, in bytes."""
        return 1024 + len(self.body) + sum(150 + len(name) + len(value) for name, value in self.headers)

    def answers(self, request: Fields) -> bool:
        """Say whether the request selects it (RFC 9111, sections 4.1 and 3.5)."""
        if not self.authorized and b"authorization" in request:
            return False
        # Most have no Vary, and a generator would take as long as all the rest.
        return not self.vary or all(normalised(name, request) == value for name, value in self.vary)


def normalised(name: bytes, request: Fields) -> bytes | None:
    """Return a selecting header's value so that those of one meaning are equal (RFC 9111, section 4.1)."""
    value = request.get(name)
    if value is None:
        return None
    said = elements(value)
    if name in _CASELESS:
        said = [element.lower().replace(b" ", b"") for element in said]
    if name == b"accept-encoding":
        said.sort()
    return b",".join(said)


def may_be_stored(request: Fields, status: int, response: Fields) -> bool:
    """Say whether a GET's response may be stored and used for others (RFC 9111, section 3).

    Never: parts, 304, what sets a cookie, what varies by everything, and a status that is not cacheable by itself where
    nothing says how long. That it is worth it is another matter.
    """
    control = directives(response.get(b"cache-control"))
    understood = b"must-understand" in control and status in _UNDERSTOOD
    is_explicit = b"expires" in response or not control.keys().isdisjoint((b"max-age", b"public", b"s-maxage"))
    return not (
        status < 200
        or (status not in _HEURISTIC and not is_explicit)
        or status in (206, 304)
        or b"content-range" in response
        or b"set-cookie" in response
        or b"*" in names(response.get(b"vary"))
        or b"private" in control
        or (b"no-store" in control and not understood)
        or (b"must-understand" in control and not understood)
        or b"no-store" in directives(request.get(b"cache-control"))
        or (b"authorization" in request and not _is_for_the_authorized(control))
    )


def _is_for_the_authorized(control: Directives) -> bool:
    return not control.keys().isdisjoint((b"must-revalidate", b"public", b"s-maxage"))


def freshness_lifetime(status: int, response: Fields, received: float, *, heuristics: bool) -> float:
    """Return how many seconds a response is fresh in a shared cache (RFC 9111, section 4.2.1).

    What cannot be understood makes it stale.

    received: when the response came, which is its date where it has none.
    heuristics: whether a tenth of the time since it was modified, a day at most, stands in for what it does not say
        (section 4.2.2).
    """
    control = directives(response.get(b"cache-control"))
    if b"no-cache" in control:
        return 0
    for name in (b"s-maxage", b"max-age"):
        if name in control:
            return delta_seconds(control[name]) or 0
    dated = _dated(response, received)
    if b"expires" in response:
        expires = http_date(response[b"expires"], received)
        return 0 if expires is None else max(expires - dated, 0)
    modified = http_date(response.get(b"last-modified"), received)
    if heuristics and modified is not None and (status in _HEURISTIC or b"public" in control):
        return min(max(dated - modified, 0) / 10, 86_400)
    return 0


def _dated(response: Fields, received: float) -> float:
    dated = http_date(response.get(b"date"), received)
    return received if dated is None else dated


def initial_age(response: Fields, requested: float, received: float) -> float:
    """Return a response's age in seconds when it came (RFC 9111, sections 4.2.3 and 5.1).

    requested, received: when its request was sent, and when it came.
    """
    apparent = max(received - _dated(response, received), 0)
    # Age has one value; of a list, the first counts, and what is not a number does not.
    said = delta_seconds(response.get(b"age", b"").partition(b",")[0].strip()) or 0
    return max(apparent, said + received - requested)


def stored(
    request: Fields,
    status: int,
    headers: Iterable[Header],
    *,
    requested: float,
    received: float,
    heuristics: bool = False,
) -> Stored | None:
    """Return a response to a GET as it is kept, its body yet to come; None where it may not be, or could never be used.

    What belongs to the connection is left out (RFC 9111, section 3.1).

    requested, received: when its request was sent, and when it came.
    """
    response = combine(headers)
    if not may_be_stored(request, status, response):
        return None
    control = directives(response.get(b"cache-control"))
    lifetime = freshness_lifetime(status, response, received, heuristics=heuristics)
    may_be_stale = control.keys().isdisjoint((b"no-cache", b"must-revalidate", b"proxy-revalidate", b"s-maxage"))
    revalidate_for, error_for = (
        (delta_seconds(control.get(name)) or 0) if may_be_stale else 0
        for name in (b"stale-while-revalidate", b"stale-if-error")
    )
    etag, last_modified = response.get(b"etag"), response.get(b"last-modified")
    if not (lifetime or revalidate_for or error_for or etag or last_modified):
        return None
    born = received - initial_age(response, requested, received)
    vary = tuple((name, normalised(name, request)) for name in sorted(set(names(response.get(b"vary")))))
    return Stored(
        status=status,
        headers=kept(headers, response),
        body=b"",
        etag=etag,
        last_modified=last_modified,
        tag=etag,
        born=born,
        lifetime=lifetime,
        revalidate_for=revalidate_for,
        error_for=error_for,
        may_be_stale=may_be_stale,
        authorized=_is_for_the_authorized(control),
        vary=vary,
        expires=born + lifetime,
        dated=_dated(response, received),
    )


def kept(headers: Iterable[Header], response: Fields) -> list[Header]:
    """Return a response's headers without those that are not stored (RFC 9111, section 3.1)."""
    if _NOT_STORED.isdisjoint(response):
        return list(headers)
    left_out = _NOT_STORED.union(names(response.get(b"connection")))
    return [(name, value) for name, value in headers if name.lower() not in left_out]


# Whether a stored response answers a request


def asked(request: Fields) -> dict[bytes, bytes | None]:
    """Return the request's directives (RFC 9111, sections 5.2.1 and 5.4)."""
    if b"cache-control" in request:
        return directives(request[b"cache-control"])
    return {b"no-cache": None} if b"no-cache" in directives(request.get(b"pragma")) else {}


class Worth(Enum):
    """What a stored response is worth to one request."""

    SERVED = "served"
    #: To be served now, and revalidated meanwhile.
    REVALIDATED = "revalidated"
    #: Too old.
    STALE = "stale"
    #: Fresh, but not what the request asks for.
    REFUSED = "request"


def worth(response: Stored, wishes: Directives, now: float) -> Worth:
    """Judge a stored response (RFC 9111, sections 4.2.4 and 5.2.1; RFC 5861, section 3).

    A directive of the request that cannot be understood is taken for its strictest.
    """
    age = now - response.born
    left = response.lifetime - age
    if b"no-cache" in wishes:
        return Worth.REFUSED
    if b"max-age" in wishes and age > (delta_seconds(wishes[b"max-age"]) or 0):
        return Worth.REFUSED if left > 0 else Worth.STALE
    if b"min-fresh" in wishes and left < _strict(wishes[b"min-fresh"]):
        return Worth.REFUSED if left > 0 else Worth.STALE
    if left > 0:
        return Worth.SERVED
    if -left < response.revalidate_for:
        return Worth.REVALIDATED
    if b"max-stale" in wishes and response.may_be_stale:
        limit = FOREVER if wishes[b"max-stale"] is None else delta_seconds(wishes[b"max-stale"]) or 0
        return Worth.SERVED if -left <= limit else Worth.STALE
    return Worth.STALE


def _strict(value: bytes | None) -> int:
    seconds = delta_seconds(value)
    return FOREVER if seconds is None else seconds


def serves_errors(response: Stored, request: Fields, now: float) -> bool:
    """Say whether a stale response stands in for an error, as it or the request allows (RFC 5861, section 4)."""
    wished = delta_seconds(asked(request).get(b"stale-if-error")) or 0
    return now - response.expires < max(response.error_for, wished if response.may_be_stale else 0)


def is_error(status: int) -> bool:
    """Say whether a status is one that `stale-if-error` is about (RFC 5861, section 4)."""
    return status in _ERRORS


# Validation


def is_not_modified(request: Fields, response: Stored) -> bool:
    """Say whether a 304 answers the request (RFC 9110, sections 13.1.2, 13.1.3 and 13.2.2; RFC 9111, section 4.3.2).

    Entity tags are compared weakly. A date counts only where there are no tags, and only for a 200.
    """
    if response.status != 200:
        return False
    if b"if-none-match" in request:
        tags = request[b"if-none-match"]
        return tags.strip() == b"*" or (response.tag is not None and names_tag(tags, response.tag))
    since = http_date(request.get(b"if-modified-since"), response.born)
    # Without a date of its change, it is of the date it was made, or came.
    changed = response.last_modified or combine(response.headers).get(b"date")
    modified = http_date(changed, response.born) if changed else response.born
    return since is not None and modified is not None and modified <= since


def has_part(method: str, request: Fields, response: Stored) -> bool:
    """Say whether a stored response has what a Range asks for, if there is one; the app may answer any other.

    It has one satisfiable range of a 200, of the version that is named (RFC 9110, sections 13.1.5, 14.1.2 and 14.2).
    """
    return b"range" not in request or (method == "GET" and response.status == 200 and bool(part(request, response)))


def part(request: Fields, response: Stored) -> range:
    """Return the bytes of a stored response that its request's Range asks for, none where that is not plain."""
    found = _RANGE.fullmatch(request[b"range"])
    version = request.get(b"if-range")
    is_version = version is None or (version == response.tag and not version.startswith(b"W/"))
    if found is None or not is_version:
        return range(0)
    size = len(response.body)
    if found["length"]:
        return range(max(size - int(found["length"]), 0), size)
    return range(int(found["first"]), min(int(found["last"] or size) + 1, size))


def selected(request: Fields, response: Stored, headers: list[Header]) -> tuple[int, list[Header], bytes]:
    """Return the status, headers and body that answer a request: a 304, a part, or all of a stored response.

    headers: the stored response's, as they are sent.
    """
    if is_not_modified(request, response):
        return 304, not_modified(headers, response.tag or b""), b""
    if b"range" not in request:
        return response.status, headers, response.body
    asked_for = part(request, response)
    body = response.body[asked_for.start : asked_for.stop]
    position = b"bytes %d-%d/%d" % (asked_for.start, asked_for.stop - 1, len(response.body))
    whole = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return 206, [*whole, (b"content-length", b"%d" % len(body)), (b"content-range", position)], body


def without_judged(headers: Iterable[Header]) -> list[Header]:
    """Return a request's headers without what a cache judges itself."""
    return [(name, value) for name, value in headers if name.lower() not in JUDGED]


def preconditions(response: Stored) -> list[Header]:
    """Return what makes a request a question whether `response` is still right (RFC 9111, section 4.3.1)."""
    asked_by = [(b"if-none-match", response.etag), (b"if-modified-since", response.last_modified)]
    return [(name, value) for name, value in asked_by if value is not None]


def freshened(response: Stored, headers: Iterable[Header]) -> list[Header] | None:
    """Return a stored response's headers, updated by those of a 304 (RFC 9111, sections 3.2 and 4.3.4).

    None where the 304 is of another representation: a strong tag is only its own, a weak one any of its kind, and
    without tags the date of change tells.
    """
    headers = list(headers)
    fields = combine(headers)
    if not _is_of(response, fields):
        return None
    updating = [(name, value) for name, value in kept(headers, fields) if name.lower() != b"content-length"]
    # A 304 without a date is of the time it came.
    replaced = {name.lower() for name, _ in updating} | {b"date"}
    if response.etag is None:
        # Made of the body, and made again.
        replaced.add(b"etag")
    age = [(b"age", fields[b"age"])] if b"age" in fields else []
    return [pair for pair in response.headers if pair[0].lower() not in replaced] + updating + age


def _is_of(response: Stored, fields: Fields) -> bool:
    tag, modified = fields.get(b"etag"), fields.get(b"last-modified")
    if tag is None or response.etag is None:
        return modified is None or response.last_modified in (None, modified)
    if tag.startswith(b"W/"):
        return opaque(tag) == opaque(response.etag)
    return tag == response.etag


def is_confirmed_by_head(response: Stored, status: int, headers: Iterable[Header]) -> bool:
    """Say whether a response to HEAD is of the same representation (RFC 9111, section 4.3.5)."""
    fields = combine(headers)
    length = fields.get(b"content-length", b"%d" % len(response.body))
    return (
        status == response.status == 200
        and delta_seconds(length) == len(response.body)
        and fields.get(b"etag", response.etag) == response.etag
        and fields.get(b"last-modified", response.last_modified) == response.last_modified
    )


# Invalidation


#: What a request is for: scheme, host, path, raw path and query. The path is there as the server decoded it, too: an
#: app may look at either.
Target: TypeAlias = tuple[str, bytes, str, bytes, bytes]


def invalidated(target: Target, method: str, status: int, headers: Iterable[Header]) -> list[Target]:
    """Return what a response has made wrong: the target and its kin of the same origin (RFC 9111, section 4.4)."""
    if method in SAFE_METHODS or not 200 <= status < 400:
        return []
    fields = combine(headers)
    named = [fields[name] for name in (b"location", b"content-location") if name in fields]
    return [target, *(other for each in named if (other := _of_the_same_origin(target, each)) is not None)]


def _of_the_same_origin(target: Target, reference: bytes) -> Target | None:
    scheme, host, _, base_path, _ = target
    base = f"{scheme}://{host.decode('latin-1')}{base_path.decode('latin-1')}"
    try:
        parts = urlsplit(urljoin(base, reference.decode("latin-1").strip()))
    except ValueError:
        return None
    if (parts.scheme, parts.netloc.lower().encode("latin-1")) != (scheme, host):
        return None
    raw_path = (parts.path or "/").encode("latin-1")
    path = unquote_to_bytes(raw_path).decode("utf-8", "replace")
    return scheme, host, path, raw_path, parts.query.encode("latin-1")


# Cache-Status (RFC 9211)


def status_of_hit(response: Stored, age: int) -> bytes:
    """Say that the response came from here, and for how many seconds it is fresh yet (RFC 9211, section 2.4)."""
    return b"overdrive; hit; ttl=%d" % (response.lifetime - age)


def status_of_forward(
    reason: bytes, *, status: int | None = None, stored: bool = False, collapsed: bool = False
) -> bytes:
    """Say why the request was forwarded, and what became of it (RFC 9211, sections 2.2, 2.3, 2.5 and 2.6).

    status: what came from the app, where it is not what the client is sent.
    """
    said = b"overdrive; fwd=" + reason
    if status is not None:
        said += b"; fwd-status=%d" % status
    return said + b"; stored" * stored + b"; collapsed" * collapsed
