"""What fastapi-pagination 0.16 has in `fastapi_pagination`, `.cursor` and `.ext.sqlalchemy`, as Overdrive serves it.

A service that changes its imports to this module keeps its responses' keys:

    from overdrive.compat.fastapi_pagination import Page, add_pagination, apaginate

What differs: a cursor that fastapi-pagination has made is a 400 with the code `invalid_cursor`; the first page's
`current_page` is null; and of a select of one column `paginate` gives the values, where fastapi-pagination gives
rows.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self

from pydantic import Field
from sqlalchemy import Executable
from sqlalchemy.ext.asyncio import AsyncSession

from overdrive import pages
from overdrive.app import add_pagination
from overdrive.pagination import page

__all__ = [
    "CursorPage",
    "CursorParams",
    "LimitOffsetPage",
    "LimitOffsetParams",
    "Page",
    "Params",
    "add_pagination",
    "apaginate",
    "paginate",
]

Page = page.Page
LimitOffsetPage = page.LimitOffsetPage


class CursorPage(page.BasePage[page.T], Generic[page.T]):
    """One page by cursor, with an exact total, or with `total="none"` without.

    current_page: the cursor this page was asked for with.
    current_page_backwards: always None, and here for the shape.
    previous_page, next_page: what to send as `cursor` for the neighbours; None at the ends.
    """

    style: ClassVar[page.Style] = "cursor"
    totals: ClassVar[tuple[page.Total, ...]] = ("exact", "none")

    items: list[page.T]
    total: int | None
    current_page: str | None = Field(None, description="Cursor to refetch the current page")
    current_page_backwards: str | None = Field(None, description="Always null")
    previous_page: str | None = Field(None, description="Cursor for the previous page")
    next_page: str | None = Field(None, description="Cursor for the next page")

    @classmethod
    def of(cls, found: page.Found) -> Self:
        """Return the envelope of what was found."""
        return cls.model_construct(  # type: ignore[return-value]
            items=found.items,
            total=found.total,
            current_page=getattr(found.params, "cursor", None),
            previous_page=found.prev_cursor,
            next_page=found.next_cursor,
        )


class Params(page.PageParams):
    """Which page, by number; a size has at most 100 rows."""

    size: int = Field(50, ge=1, le=100, description="Page size")


class LimitOffsetParams(page.LimitOffsetParams):
    """Which rows, by how many come before them; at most 100."""

    limit: int = Field(50, ge=1, le=100, description="Page size limit")


class CursorParams(page.CursorParams):
    """Which page, by cursor; a size has at most 100 rows."""

    size: int = Field(50, ge=1, le=100, description="Page size")


def paginate(
    conn: Any,
    query: Executable | Params | LimitOffsetParams | None = None,
    params: Params | LimitOffsetParams | CursorParams | None = None,
    *,
    count_query: Executable | None = None,
    transformer: pages.Transform | None = None,
) -> Any:
    """Return a page of a query's rows, or of a sequence: `paginate(session, query)`, `paginate(sequence)`.

    conn: a session, or a sequence; with an `AsyncSession` the page is awaited.
    params: where to be in the rows; left out, the route's declared type decides.
    count_query: a select of the total.
    transformer: a function from the list of rows to the page's items.

    Raises what `overdrive.paginate` raises.
    """
    if isinstance(query, Params | LimitOffsetParams):
        # paginate(sequence, params)
        query, params = None, query
    asked: dict[str, Any] = {} if params is None else {params.style: params}
    return pages.paginate(conn, query, count_query=count_query, transform=transformer, **asked)


async def apaginate(
    conn: AsyncSession,
    query: Executable,
    params: Params | LimitOffsetParams | CursorParams | None = None,
    *,
    count_query: Executable | None = None,
    transformer: pages.Transform | None = None,
) -> Any:
    """Return a page of a query's rows; see `paginate`."""
    return await paginate(conn, query, params, count_query=count_query, transformer=transformer)
