"""The gzip form of a body: who takes it, and what is worth it (RFC 9110, sections 8.4.1.3 and 12.5.3)."""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import Sequence
from functools import lru_cache

from .conditional import Header, gzip_tag
from .entry import Form

#: Bytes below which a body would not become so much smaller that anybody noticed.
_LEAST = 1_024
#: Bytes above which compressing takes a millisecond and more, which no other request waits for.
_MOST_ON_LOOP = 65_536
_LEVEL = 6

_TEXT = re.compile(
    rb"text/(?!event-stream)[^;]*|application/(?:[^;]*\+)?(?:json|xml|yaml)|application/(?:javascript|x-ndjson|jsonl)"
)
#: RFC 9110, section 12.4.2.
_WEIGHT = re.compile(rb"q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)", re.IGNORECASE)


# A browser says the same in every request.
@lru_cache(64)
def accepts_gzip(accept_encoding: bytes) -> bool:
    """Say whether a request takes gzip, and would not rather have the body as it is (RFC 9110, section 12.5.3).

    One that says nothing takes anything, by the letter; what says nothing is mostly a program that cannot decode.
    """
    weights: dict[bytes, float] = {}
    for element in accept_encoding.split(b","):
        coding, _, parameter = element.partition(b";")
        weight = _WEIGHT.fullmatch(parameter.strip())
        # What cannot be understood is not wanted.
        value = float(weight[1]) if weight else 0.0 if parameter.strip() else 1.0
        weights[coding.strip().lower().replace(b"x-gzip", b"gzip")] = value
    wanted = weights.get(b"gzip", weights.get(b"*", 0.0))
    return wanted > 0 and wanted >= weights.get(b"identity", 0.0)


def is_worth_it(headers: Sequence[Header], body: bytes) -> bool:
    """Say whether a body is long, text, not encoded yet, and may be (RFC 9111, section 5.2.2.6)."""
    fields = {name.lower(): value for name, value in headers}
    media_type = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
    is_text = _TEXT.fullmatch(media_type) is not None
    may_be = b"content-encoding" not in fields and b"no-transform" not in fields.get(b"cache-control", b"").lower()
    return len(body) >= _LEAST and may_be and is_text


async def gzipped(headers: Sequence[Header], body: bytes) -> Form | None:
    """Return the gzip form of a body that is worth it, with its headers; None where it would not be shorter.

    headers: those of the body as it is, with its entity tag.
    """
    if len(body) > _MOST_ON_LOOP:
        packed = await asyncio.to_thread(_packed, body)
    else:
        packed = _packed(body)
    if len(packed) >= len(body):
        return None
    fields = [
        (name, gzip_tag(value) if name.lower() == b"etag" else value)
        for name, value in headers
        if name.lower() != b"content-length"
    ]
    return Form([*fields, (b"content-length", b"%d" % len(packed)), (b"content-encoding", b"gzip")], packed)


def _packed(body: bytes) -> bytes:
    # Without the time, so that every worker makes the same bytes.
    return gzip.compress(body, _LEVEL, mtime=0)
