"""Entity tags and conditional requests (RFC 9110, sections 8.8.3, 13.1.2 and 15.4.5)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from .policy import Header

_OPAQUE_TAG = re.compile(rb'"[^"]*"')

#: What a 304 leaves out: it describes a body that is not sent.
_OF_THE_BODY = frozenset((b"content-length", b"content-type", b"content-encoding", b"content-language"))


def with_etag(headers: Sequence[Header], body: bytes) -> list[Header]:
    """Return the headers with a strong entity tag, the same in every process, unless they have one."""
    if any(name.lower() == b"etag" for name, _ in headers):
        return list(headers)
    return [*headers, (b"etag", b'"%s"' % blake2b(body, digest_size=16).hexdigest().encode())]


def if_none_match(headers: Iterable[Header]) -> bytes:
    """Return what a request says of entity tags it has."""
    return b", ".join([value for name, value in headers if name == b"if-none-match"])


def is_current(known: bytes, headers: Sequence[Header]) -> bool:
    """Say whether a client has what these headers describe already, by its `If-None-Match`."""
    if not known:
        return False
    if known.strip() == b"*":
        return True
    etag = next((value for name, value in headers if name.lower() == b"etag"), b"")
    # Compared weakly (section 8.8.3.2): by the opaque tags alone.
    return bool(_OPAQUE_TAG.findall(etag)) and _OPAQUE_TAG.findall(etag)[0] in _OPAQUE_TAG.findall(known)


def not_modified(headers: Sequence[Header]) -> list[Header]:
    """Return the headers of a 304 in place of a response with these."""
    return [header for header in headers if header[0].lower() not in _OF_THE_BODY]
