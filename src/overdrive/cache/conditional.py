"""Entity tags and conditional requests (RFC 9110, sections 8.8.3, 13.1.2 and 15.4.5)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b

Header = tuple[bytes, bytes]

_ENTITY_TAG = re.compile(rb'(?:W/)?"[^"]*"|[^\s,]+')
_OPAQUE_TAG = re.compile(rb'"[^"]*"')
#: How the tag of a gzip form ends.
_GZIP = b'-gzip"'

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


def gzip_tag(tag: bytes) -> bytes:
    """Return the entity tag of a body's gzip form, whose bytes are others (RFC 9110, section 8.8.3.3).

    A weak tag, which does not speak of bytes, is that of both.
    """
    return tag[:-1] + _GZIP if tag.startswith(b'"') else tag


def with_etag(headers: Sequence[Header], body: bytes) -> list[Header]:
    """Return the headers with a strong entity tag, unless they have one."""
    if any(name.lower() == b"etag" for name, _ in headers):
        return list(headers)
    return [*headers, (b"etag", strong_tag(body))]


def held_tag(known: bytes, headers: Sequence[Header]) -> bytes | None:
    """Return the tag under which a client has what these headers describe, by its `If-None-Match`; None if it has not.

    known: the request's header of this name. It may name the body as it is or its gzip form, whichever is at hand here.
    """
    if not known:
        return None
    etag = next((value for name, value in headers if name.lower() == b"etag"), b"")
    for tag in (etag, etag.removesuffix(_GZIP) + b'"' if etag.endswith(_GZIP) else gzip_tag(etag)):
        # What is no entity tag is none that a client could have.
        if names_tag(known, tag) and (known.strip() == b"*" or _OPAQUE_TAG.fullmatch(opaque(tag))):
            return tag
    return None


def not_modified(headers: Sequence[Header], tag: bytes) -> list[Header]:
    """Return the headers of a 304 in place of a response with these, for a client that has it under `tag`."""
    return [
        (name, tag if name.lower() == b"etag" else value) for name, value in headers if name.lower() not in _OF_THE_BODY
    ]
