"""Responses of several shops, dropped by what they read, by a tag, or all of one shop's.

`uvicorn examples.caching:app`, then

    curl -si -H 'X-Shop: north' http://127.0.0.1:8000/products | grep -i x-cache        # miss, then hit
    curl -s -X POST -H 'X-Shop: north' 'http://127.0.0.1:8000/products?name=Chair'      # the table is written: miss
    curl -s -X POST http://127.0.0.1:8000/imported                                      # the tag is dropped: miss
    curl -s -X DELETE http://127.0.0.1:8000/shops/north                                 # one shop's: miss, others hit
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, Request
from sqlalchemy import insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from overdrive import Overdrive, SessionDep, cached


class Base(DeclarativeBase):
    """The metadata of all tables."""


class Product(Base):
    """What a shop sells."""

    __tablename__ = "products"

    id: Mapped[int] = mapped_column(primary_key=True)
    shop: Mapped[str]
    name: Mapped[str]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make the table anew."""
    async with overdrive.engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Product), [{"shop": shop, "name": "Table"} for shop in ("north", "south")])
    yield


def shop_of(request: Request) -> str | None:
    """Say whose data a request is about; without a shop, nothing is cached."""
    return request.headers.get("x-shop")


Shop = Annotated[str, Header(alias="x-shop")]

app = FastAPI(lifespan=lifespan)
overdrive = Overdrive(app, database_url="sqlite:///caching.sqlite", tenant=shop_of)


@app.get("/products")
@cached(ttl=300, tags=["catalogue"])
async def list_products(shop: Shop, db: SessionDep) -> list[str]:
    """List what the shop sells."""
    return list(await db.scalars(select(Product.name).where(Product.shop == shop).order_by(Product.id)))


@app.post("/products", status_code=201)
async def add_product(name: str, shop: Shop, db: SessionDep) -> None:
    """Add a product: the commit drops the lists."""
    db.add(Product(shop=shop, name=name))


@app.post("/imported", status_code=204)
async def imported() -> None:
    """Take note that another program has written: no session here has seen it."""
    await overdrive.cache.invalidate("catalogue")


@app.delete("/shops/{shop}", status_code=204)
async def forget_shop(shop: str) -> None:
    """Drop what is cached for one shop."""
    await overdrive.cache.clear(tenant=shop)
