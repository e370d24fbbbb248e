"""What a client sends to ask for a page, and the envelopes it gets.

An envelope is built with `model_construct`, without its type parameter: the route's response model validates
the items, once, from the attributes of whatever object they are.
"""

from __future__ import annotations

from typing import ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

from .cursor import MAX_LENGTH

T = TypeVar("T")

Style = Literal["page", "cursor"]

#: The largest size and page number, whatever the settings say. Their product is far below 2**63, so that no
#: offset a client can ask for overflows a database's integer.
MAX_SIZE = 10_000
MAX_PAGE = 2**31 - 1


class BasePage(BaseModel, Generic[T]):
    """What every envelope has.

    items: the rows of this page, in the order of the statement.
    """

    style: ClassVar[Style]

    items: list[T] = Field(description="The rows of this page.")


class Page(BasePage[T], Generic[T]):
    """One page by its number.

    total: rows on all pages.
    page: this page's number, from 1; one beyond the last has no items.
    size: rows asked for.
    pages: pages in all, 0 where there are no rows.
    """

    style: ClassVar[Style] = "page"

    total: int = Field(description="Rows on all pages.", examples=[120])
    page: int = Field(description="This page's number, from 1.", examples=[1])
    size: int = Field(description="The most rows a page has.", examples=[50])
    pages: int = Field(description="The number of pages.", examples=[3])


class CursorPage(BasePage[T], Generic[T]):
    """One page by the position it starts from, equally fast at any depth.

    next_cursor: what to send for the following page; None on the last.
    prev_cursor: what to send for the preceding page; None on the first.
    size: rows asked for.
    """

    style: ClassVar[Style] = "cursor"

    next_cursor: str | None = Field(
        None,
        description="Send it as `cursor` for the following page; null on the last.",
        examples=["q83vASNFZ4k"],
    )
    prev_cursor: str | None = Field(
        None, description="Send it as `cursor` for the preceding page; null on the first.", examples=[None]
    )
    size: int = Field(description="The most rows a page has.", examples=[50])


class PageParams(BaseModel):
    """Which page, by number.

    page: from 1 to 2**31 - 1.
    size: rows, from 1 to 10,000.
    """

    page: int = Field(1, ge=1, le=MAX_PAGE, description="The page's number, from 1.", examples=[1])
    size: int = Field(50, ge=1, le=MAX_SIZE, description="The most rows to return.", examples=[50])


class CursorParams(BaseModel):
    """Which page, by cursor.

    cursor: `next_cursor` or `prev_cursor` of another page, at most 4,096 characters; None for the first page.
    size: rows, from 1 to 10,000; it may differ from page to page.
    """

    cursor: str | None = Field(
        None,
        max_length=MAX_LENGTH,
        description="The `next_cursor` or `prev_cursor` of another page; leave it out for the first page.",
        examples=["q83vASNFZ4k"],
    )
    size: int = Field(50, ge=1, le=MAX_SIZE, description="The most rows to return.", examples=[50])
