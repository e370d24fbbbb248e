"""The key of a cached response: every input its endpoint declares, in one canonical form."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from hashlib import blake2b
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qsl

import msgspec

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """What, besides host and path, tells one response of a route from another.

    fingerprint: of the response's schema and the route's policy, so that two releases never share entries.
    headers: names of the request headers the endpoint reads, in lower case.
    cookies: names of the cookies it reads.
    private: whether one of them says who is asking.
    parameters: names of the query parameters it reads; None where it may read all of them.
    body: whether it reads a body of JSON.
    """

    fingerprint: str
    headers: tuple[str, ...] = ()
    cookies: tuple[str, ...] = ()
    private: bool = False
    parameters: frozenset[str] | None = None
    body: bool = False


def key_of(
    plan: KeyPlan,
    *,
    host: str,
    root_path: str = "",
    path: str,
    query: str,
    headers: Sequence[Sequence[str]],
    cookies: Sequence[str | None],
    principals: Sequence[str | int | None] = (),
    tenant: str | None = None,
    body: tuple[str, str] | None = None,
) -> str:
    """Return the key as 32 hexadecimal digits.

    root_path: what of the path's front is not the route's (ASGI's root path).
    query: the raw query string; the order of different parameters does not matter, that of equal ones does.
    headers, cookies: the values of the plan's names, None where the request has none.
    principals: who is asking, by each of the route's dependencies that says so.
    tenant: whose data the request is about, where an app has several.
    body: its content type, and its canonical form.
    """
    parameters = parse_qsl(query, keep_blank_values=True)
    if plan.parameters is not None:
        parameters = [pair for pair in parameters if pair[0] in plan.parameters]
    parameters.sort(key=lambda pair: pair[0])
    parts = (plan.fingerprint, host.lower(), root_path, path, parameters, headers, cookies, principals, tenant, body)
    return digest(parts)


def digest(parts: Any) -> str:
    """Return what stands for plain data, as 32 hexadecimal digits."""
    return blake2b(msgspec.msgpack.encode(parts), digest_size=16).hexdigest()


def canonical_json(content_type: str, body: bytes) -> str | None:
    """Return one text for all JSON bodies that differ in nothing but white space, escapes and the order of members.

    None for what is no JSON, or is read in more than one way: a name that comes twice, or what is no number
    (RFC 8259, sections 4 and 6). Numbers are told apart by how they are written, since an endpoint may do so.
    """
    main, _, sub = content_type.partition(";")[0].strip().lower().partition("/")
    if main != "application" or not (sub == "json" or sub.endswith("+json")):
        return None
    try:
        value = json.loads(body, object_pairs_hook=_ordered, parse_float=Decimal, parse_constant=_refused)
        return ascii(value)
    except (ValueError, ArithmeticError, RecursionError):
        return None


def _ordered(members: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(members)) < len(members):
        raise ValueError("a name comes twice")
    return dict(sorted(members, key=lambda member: member[0]))


def _refused(constant: str) -> None:
    raise ValueError(constant)


class Shortcuts(Generic[V]):
    """What was found out about requests, for others that say the same in the same bytes.

    It is forgotten when there is too much of it: what a request says is up to the client.
    """

    _MOST = 10_000
    #: Characters of what tells one request from others.
    _LONGEST = 4_000

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[frozenset[bytes], dict[tuple[Any, ...], V]]] = {}
        self._count = 0

    def find(self, scope: Mapping[str, Any], tenant: str | None) -> V | None:
        """Return what is known of a request."""
        if not self._known:
            return None
        known = self._known.get(_address(scope, tenant))
        if known is None:
            return None
        names, values = known
        return values.get(_pairs(scope, names))

    def add(self, scope: Mapping[str, Any], tenant: str | None, headers: Collection[str], value: V) -> None:
        """Remember what was found out by a request's address and these of its headers, by their names."""
        address = _address(scope, tenant)
        names, _ = self._known.get(address, (frozenset(name.encode("latin-1") for name in headers), None))
        pairs = _pairs(scope, names)
        if sum(map(len, (*address[1:], *(text for _, text in pairs)))) > self._LONGEST:
            return
        if self._count >= self._MOST:
            self._known.clear()
            self._count = 0
        self._known.setdefault(address, (names, {}))[1][pairs] = value
        self._count += 1


def _address(scope: Mapping[str, Any], tenant: str | None) -> tuple[Any, ...]:
    host = b""
    for name, value in scope["headers"]:
        if name == b"host":
            host = value
            break
    # A mount changes the root path, and keeps the app's.
    root_path = scope.get("app_root_path", scope.get("root_path", ""))
    return tenant, host, root_path, scope["path"], scope["query_string"]


def _pairs(scope: Mapping[str, Any], names: frozenset[bytes]) -> tuple[Any, ...]:
    return tuple((name, value) for name, value in scope["headers"] if name in names) if names else ()
