"""The key of a cached response: every input its endpoint declares, in one canonical form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from urllib.parse import parse_qsl

import msgspec


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """What, besides host, path and query, tells one response of a route from another.

    fingerprint: of the response's schema and the route's policy, so that two releases never share entries.
    headers: names of the request headers the endpoint reads, in lower case.
    cookies: names of the cookies it reads.
    private: whether one of them says who is asking.
    """

    fingerprint: str
    headers: tuple[str, ...] = ()
    cookies: tuple[str, ...] = ()
    private: bool = False


def key_of(
    plan: KeyPlan,
    *,
    host: str,
    path: str,
    query: str,
    headers: Sequence[Sequence[str]],
    cookies: Sequence[str | None],
) -> str:
    """Return the key as 32 hexadecimal digits.

    query: the raw query string; the order of different parameters does not matter, that of equal ones does.
    headers, cookies: the values of the plan's names, None where the request has none.
    """
    parameters = sorted(parse_qsl(query, keep_blank_values=True), key=lambda pair: pair[0])
    parts = (plan.fingerprint, host.lower(), path, parameters, headers, cookies)
    return blake2b(msgspec.msgpack.encode(parts), digest_size=16).hexdigest()
