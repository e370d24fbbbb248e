"""The `Link` header of a page (RFC 8288): where its neighbours are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import parse_qsl, quote, urlencode

from .page import CursorParams, Found, PageParams


def link_header(path: str, query: str, found: Found, max_offset: int) -> str:
    """Return the header's value.

    path, query: of the request's own address, as the client sees it. The links differ from it in the one
        parameter that says which page; they name no host, so that any proxy is right (RFC 3986, section 4.2).
    max_offset: rows; pages by number that lie deeper are not served, and not named.
    """
    if isinstance(found.params, CursorParams):
        moved, places = "cursor", _by_cursor(found)
    elif isinstance(found.params, PageParams):
        moved = "page"
        places = ((rel, str(offset // found.size + 1)) for rel, offset in _by_offset(found, max_offset))
    else:
        moved = "offset"
        places = ((rel, str(offset)) for rel, offset in _by_offset(found, max_offset))
    kept = _without(query, moved)
    path, begin = quote(path), "&" if kept else ""
    links = []
    for rel, place in places:
        # Neither numbers nor cursors have a character that needs an escape.
        parameters = f"{kept}{begin}{moved}={place}" if place else kept
        links.append(f'<{path}{"?" if parameters else ""}{parameters}>; rel="{rel}"')
    return ", ".join(links)


@lru_cache
def _without(query: str, name: str) -> str:
    """Return the query string without one parameter."""
    # Latin-1 gives every byte back as it was.
    pairs = parse_qsl(query, keep_blank_values=True, encoding="latin-1")
    return urlencode([pair for pair in pairs if pair[0] != name], encoding="latin-1")


def _by_cursor(found: Found) -> Iterator[tuple[str, str]]:
    yield "first", ""
    if found.prev_cursor is not None:
        yield "prev", found.prev_cursor
    if found.next_cursor is not None:
        yield "next", found.next_cursor
    yield "last", "last"


def _by_offset(found: Found, max_offset: int) -> Iterator[tuple[str, int]]:
    """Yield each neighbour, and how many rows lie before it."""
    offset = found.offset or 0
    last = None
    if found.total is not None and found.total_kind == "exact":
        last = max(found.total - 1, 0) // found.size * found.size
    yield "first", 0
    if offset > 0:
        yield "prev", max(min(offset - found.size, offset if last is None else last), 0)
    if found.has_more and offset + found.size <= max_offset:
        yield "next", offset + found.size
    if last is not None and last <= max_offset:
        yield "last", last
