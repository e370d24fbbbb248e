"""Entity tags and conditional requests (RFC 9110, sections 8.8.3, 13.1.2 and 15.4.5)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b

Header = tuple[bytes, bytes]

_ENTITY_TAG = re.compile(rb'(?:W/)?"[^"]*"|[^\s,]+')
_OPAQUE_TAG = re.compile(rb'"[^"]*"')

#: What a 304 leaves out: it describes a body that is not sent.
_OF_THE_BODY = frozenset((b"content-length", b"content-type", b"content-encoding", b"content-language"))


def strong_tag(body: bytes) -> bytes:
    """Return a strong entity tag of a body, the same in every process."""
    return b'"%s"' % blake2b(body, digest_size=16).hexdigest().encode()


def names_tag(known: bytes, tag: bytes) -> bool:
    """Say whether an `If-None-Match` names an entity tag; they are compared weakly (section 8.8.3.2)."""
    return known.strip() == b"*" or opaque(tag) in map(opaque, _ENTITY_TAG.findall(known))


def opaque(tag: bytes) -> bytes:
    """Return a tag without the mark of a weak one."""
    return tag.strip().removeprefix(b"W/")


def with_etag(headers: Sequence[Header], body: bytes) -> list[Header]:
    """Return the headers with a strong entity tag, unless they have one."""
    if any(name.lower() == b"etag" for name, _ in headers):
        return list(headers)
    return [*headers, (b"etag", strong_tag(body))]


def if_none_match(headers: Iterable[Header]) -> bytes:
    """Return what a request says of entity tags it has."""
    return b", ".join([value for name, value in headers if name == b"if-none-match"])


def is_current(known: bytes, headers: Sequence[Header]) -> bool:
    """Say whether a client has what these headers describe already, by its `If-None-Match`."""
    if not known:
        return False
    etag = next((value for name, value in headers if name.lower() == b"etag"), b"")
    # What is no entity tag is none that a client could have.
    return names_tag(known, etag) and (known.strip() == b"*" or bool(_OPAQUE_TAG.fullmatch(opaque(etag))))


def not_modified(headers: Sequence[Header]) -> list[Header]:
    """Return the headers of a 304 in place of a response with these."""
    return [header for header in headers if header[0].lower() not in _OF_THE_BODY]
