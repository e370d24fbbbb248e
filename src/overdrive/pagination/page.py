"""What a client sends to ask for a page, what was found, and the envelopes it is sent in.

An envelope is built with `model_construct`: the route's response model validates the items, once, from the
attributes of whatever object they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Generic, Literal, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")

Style = Literal["page", "limit_offset", "cursor"]

#: What a total is: all rows counted; all rows, or at least so many; what the planner expects; not known.
Total = Literal["exact", "capped", "estimated", "none"]

#: The largest size, page number and offset, whatever the settings say. They are so far below 2**63 that no offset
#: a client can ask for overflows a database's integer.
MAX_SIZE = 10_000
MAX_PAGE = 2**31 - 1
MAX_OFFSET = 2**53 - 1

_SIZE = "The most rows to return."
_PAGE = "The page's number, from 1."
_OFFSET = "Rows to skip."
_CURSOR = "The `next_cursor` or `prev_cursor` of another page; leave it out for the first page."


# What a client sends


class PageParams(BaseModel):
    """Which page, by number.

    page: from 1 to 2**31 - 1.
    size: rows, from 1 to 10,000.
    """

    style: ClassVar[Style] = "page"

    page: int = Field(1, ge=1, le=MAX_PAGE, description=_PAGE, examples=[1])
    size: int = Field(50, ge=1, le=MAX_SIZE, description=_SIZE, examples=[50])

    @property
    def offset(self) -> int:
        """Return the rows before this page."""
        return (self.page - 1) * self.size


class LimitOffsetParams(BaseModel):
    """Which rows, by how many come before them.

    limit: rows, from 1 to 10,000.
    offset: rows to skip, from 0 to 2**53 - 1.
    """

    style: ClassVar[Style] = "limit_offset"

    limit: int = Field(50, ge=1, le=MAX_SIZE, description=_SIZE, examples=[50])
    offset: int = Field(0, ge=0, le=MAX_OFFSET, description=_OFFSET, examples=[0])

    @property
    def size(self) -> int:
        """Return the rows asked for."""
        return self.limit


class CursorParams(BaseModel):
    """Which page, by cursor.

    cursor: `next_cursor` or `prev_cursor` of another page; None for the first page.
    size: rows, from 1 to 10,000; it may differ from page to page.
    """

    style: ClassVar[Style] = "cursor"

    cursor: str | None = Field(None, description=_CURSOR, examples=["q83vASNFZ4k"])
    size: int = Field(50, ge=1, le=MAX_SIZE, description=_SIZE, examples=[50])


Params: TypeAlias = PageParams | LimitOffsetParams | CursorParams


# What was found


@dataclass(frozen=True, slots=True)
class Found:
    """What a page was made of, for an envelope to arrange.

    items: the rows of this page.
    has_more: whether there are rows after it.
    total, total_kind: rows on all pages, and what kind of number that is; None where not known.
    next_cursor, prev_cursor: of a page by cursor.
    columns: the names of what the rows begin with, where they are columns of an entity in place of it.
    """

    items: list[Any]
    params: Params
    has_more: bool
    total: int | None = None
    total_kind: Total = "none"
    next_cursor: str | None = None
    prev_cursor: str | None = None
    columns: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Return the rows asked for."""
        return self.params.size

    @property
    def limit(self) -> int:
        """Return the rows asked for."""
        return self.params.size

    @property
    def page(self) -> int | None:
        """Return this page's number, from 1, where it was asked for by number."""
        return getattr(self.params, "page", None)

    @property
    def offset(self) -> int | None:
        """Return the rows before this page, unless it was asked for by cursor."""
        return getattr(self.params, "offset", None)

    @property
    def pages(self) -> int | None:
        """Return the number of pages, where the total says it."""
        return None if self.total is None or self.total_kind == "capped" else -(-self.total // self.size)


def slice_of(rows: Sequence[Any], params: PageParams | LimitOffsetParams) -> Found:
    """Return one page of rows that are in memory."""
    items = list(rows[params.offset : params.offset + params.size])
    return Found(items, params, params.offset + len(items) < len(rows), len(rows), "exact")


# Envelopes


class BasePage(BaseModel, Generic[T]):
    """What every envelope derives from; a team's own gives its fields the names it likes.

    style: how its pages are asked for.
    totals: the kinds of total it can say, the first where `paginate` is told none.

    A field named like an attribute of `Found` is filled with it. Others are filled by overriding `of`:

        class Meta(BaseModel):
            total: int
            page: int

        class Listing(BasePage[T], Generic[T]):
            data: list[T]
            meta: Meta

            @classmethod
            def of(cls, found: Found) -> Self:
                return cls.model_construct(data=found.items, meta=Meta(total=found.total, page=found.page))
    """

    # It holds rows as they came from the database until the response model has validated them.
    model_config = ConfigDict(revalidate_instances="always")

    style: ClassVar[Style] = "page"
    totals: ClassVar[tuple[Total, ...]] = ("exact",)

    @classmethod
    def of(cls, found: Found) -> Self:
        """Return the envelope of what was found, its items not yet validated."""
        return cls.model_construct(**{name: getattr(found, name) for name in _filled(cls)})  # type: ignore[return-value]


@lru_cache
def _filled(envelope: type[BasePage[Any]]) -> list[str]:
    return [name for name in envelope.model_fields if hasattr(Found, name)]


_ITEMS = "The rows of this page."
_TOTAL = "Rows on all pages."
_ANY_TOTAL = "Rows on all pages, as `total_kind` says; null where they are not counted."
_KIND = "`exact`; `capped`: more than `total`; `estimated`: what the database expects; `none`: not counted."
_MORE = "Whether there are rows after this page."
_MOST = "The most rows a page has."
_NEXT = "Send it as `cursor` for the following page; null on the last."
_PREV = "Send it as `cursor` for the preceding page; null on the first."


class Page(BasePage[T], Generic[T]):
    """One page by its number.

    items: the rows of this page, in the order of the statement.
    total: rows on all pages.
    page: this page's number, from 1; one beyond the last has no items.
    size: rows asked for.
    pages: pages in all, 0 where there are no rows.
    """

    items: list[T] = Field(description=_ITEMS)
    total: int = Field(description=_TOTAL, examples=[120])
    page: int = Field(description=_PAGE, examples=[1])
    size: int = Field(description=_MOST, examples=[50])
    pages: int = Field(description="The number of pages.", examples=[3])


class CountedPage(BasePage[T], Generic[T]):
    """One page by its number, with a total that says what kind of number it is.

    total: rows on all pages: all of them where `total_kind` is exact, and fewer than there are where it is capped.
    pages: pages in all; None where the total is capped or not known.
    has_more: whether there are rows after this page, whatever the total.
    """

    totals: ClassVar[tuple[Total, ...]] = ("exact", "capped", "estimated", "none")

    items: list[T] = Field(description=_ITEMS)
    total: int | None = Field(description=_ANY_TOTAL, examples=[120])
    total_kind: Total = Field(description=_KIND, examples=["exact"])
    page: int = Field(description=_PAGE, examples=[1])
    size: int = Field(description=_MOST, examples=[50])
    pages: int | None = Field(description="The number of pages, where it is known.", examples=[3])
    has_more: bool = Field(description=_MORE, examples=[True])


class LimitOffsetPage(BasePage[T], Generic[T]):
    """The rows after as many as were to be skipped.

    total: rows in all.
    limit, offset: rows asked for, and skipped.
    """

    style: ClassVar[Style] = "limit_offset"

    items: list[T] = Field(description=_ITEMS)
    total: int = Field(description="Rows in all.", examples=[120])
    limit: int = Field(description=_MOST, examples=[50])
    offset: int = Field(description="Rows before this page.", examples=[0])


class CursorPage(BasePage[T], Generic[T]):
    """One page by the position it starts from, equally fast at any depth.

    items: the rows of this page, in the order of the statement.
    next_cursor: what to send for the following page; None on the last.
    prev_cursor: what to send for the preceding page; None on the first.
    size: rows asked for.
    """

    style: ClassVar[Style] = "cursor"
    totals: ClassVar[tuple[Total, ...]] = ("none",)

    items: list[T] = Field(description=_ITEMS)
    next_cursor: str | None = Field(None, description=_NEXT, examples=["q83vASNFZ4k"])
    prev_cursor: str | None = Field(None, description=_PREV, examples=[None])
    size: int = Field(description=_MOST, examples=[50])


class CountedCursorPage(BasePage[T], Generic[T]):
    """One page by the position it starts from, with a total that says what kind of number it is."""

    style: ClassVar[Style] = "cursor"
    totals: ClassVar[tuple[Total, ...]] = ("exact", "capped", "estimated", "none")

    items: list[T] = Field(description=_ITEMS)
    total: int | None = Field(description=_ANY_TOTAL, examples=[120])
    total_kind: Total = Field(description=_KIND, examples=["exact"])
    next_cursor: str | None = Field(None, description=_NEXT, examples=["q83vASNFZ4k"])
    prev_cursor: str | None = Field(None, description=_PREV, examples=[None])
    size: int = Field(description=_MOST, examples=[50])
