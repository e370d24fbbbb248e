"""fastapi-pagination: by number, by cursor, and by cursor without the count."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi_pagination import Page, add_pagination
from fastapi_pagination.cursor import CursorPage
from fastapi_pagination.customization import CustomizedPage, UseIncludeTotal
from fastapi_pagination.ext.sqlalchemy import apaginate
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.rivals.shop import Sessions, User, UserOut

WithoutTotal = CustomizedPage[CursorPage[UserOut], UseIncludeTotal(False)]


def app() -> FastAPI:
    """Return an app with a route for each kind of page."""
    app = FastAPI()
    Session = Annotated[AsyncSession, Depends(Sessions().get_db)]  # noqa: N806 - an alias of a type

    def newest() -> Select[User]:
        return select(User).order_by(User.created_at.desc(), User.id.desc())

    @app.get("/page", response_model=Page[UserOut])
    async def page(db: Session) -> Any:
        return await apaginate(db, newest())

    @app.get("/cursor", response_model=CursorPage[UserOut])
    async def cursor(db: Session) -> Any:
        return await apaginate(db, newest())

    @app.get("/cursor-without-total", response_model=WithoutTotal)
    async def cursor_without_total(db: Session) -> Any:
        return await apaginate(db, newest())

    return add_pagination(app)
