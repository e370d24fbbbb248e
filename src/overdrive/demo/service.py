"""The API of the reference service: a shop's users, products and orders.

It shows every part of Overdrive the way a team would use it, and imports nothing but public names.
Annotations here are read by FastAPI at run time, so this module does not postpone them.
"""

import logging
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, BackgroundTasks, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Select, func, select, update

from overdrive import (
    CursorPage,
    Overdrive,
    Page,
    SessionDep,
    SessionFactoryDep,
    Settings,
    SyncSessionDep,
    bind,
    cached,
    health_router,
    paginate,
)

from .models import Base, Order, Product, User, now

logger = logging.getLogger("overdrive.demo")
router = APIRouter()

Row = TypeVar("Row", bound=Base)

# What PostgreSQL takes: its integers have 32 bits, and its texts no NUL.
Id = Annotated[int, Field(ge=1, le=2**31 - 1)]
Text = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00]*$")]


# What comes in and goes out


class Out(BaseModel):
    """A body that is read from the attributes of a row."""

    model_config = ConfigDict(from_attributes=True)


class UserOut(Out):
    """A user."""

    id: int
    email: str
    name: str
    country: str | None
    created_at: datetime
    last_seen_at: datetime | None
    active: bool


class UserChanges(BaseModel):
    """What to change of a user; what is left out or null stays as it is."""

    name: Text | None = None
    country: Annotated[str, Field(pattern="^[A-Z]{2}$")] | None = None
    active: bool | None = None


class OrderOut(Out):
    """An order."""

    id: int
    user_id: int
    product_id: int
    quantity: int
    status: str
    created_at: datetime


class NewOrder(BaseModel):
    """An order to be placed."""

    user_id: Id
    product_id: Id
    quantity: int = Field(ge=1, le=1_000)


class TopProduct(Out):
    """A product, and how many of it were ever ordered; the price is in cents."""

    id: int
    name: str
    category: str
    price_cents: int
    sold: int


class PriceChange(BaseModel):
    """A change, in percent, of all prices of a category."""

    category: Text
    percent: int = Field(ge=-50, le=50)


class Changed(BaseModel):
    """How many rows a bulk update has changed."""

    changed: int


class CountryOut(Out):
    """A country and its users; those who name no country are one of their own."""

    country: str | None
    users: int
    active: int


class Logged(BaseModel):
    """What `/log` has logged: the fields that every line carries, and the lines."""

    fields: dict[str, str]
    lines: list[str]


# Users


@router.get("/users", response_model=Page[UserOut])
async def list_users(
    db: SessionDep, country: Text | None = None, active: bool | None = None, q: Text | None = None
) -> Any:
    """Page through the users, by number: of one country, active or not, or whose name starts with `q`."""
    statement: Select[User] = select(User).order_by(User.id)
    if country is not None:
        statement = statement.where(User.country == country)
    if active is not None:
        statement = statement.where(User.active == active)
    if q is not None:
        statement = statement.where(User.name.istartswith(q, autoescape=True))
    return await paginate(db, statement)


@router.get("/feed", response_model=CursorPage[UserOut])
async def feed(db: SessionDep) -> Any:
    """Walk through the users, newest first, equally fast at any depth."""
    return await paginate(db, select(User).order_by(User.created_at.desc()))


@router.get("/users/{user_id}", response_model=UserOut)
@cached(ttl=60)
async def get_user(user_id: Id, db: SessionDep) -> Any:
    """Return one user, from the cache until users are written."""
    return await existing(db, User, user_id)


@router.patch("/users/{user_id}", response_model=UserOut)
async def change_user(user_id: Id, changes: UserChanges, db: SessionDep) -> Any:
    """Change a user; the change is committed before the response is sent."""
    user = await existing(db, User, user_id)
    for name, value in changes.model_dump(exclude_none=True).items():
        setattr(user, name, value)
    return user


@router.get("/users/{user_id}/orders", response_model=Page[OrderOut])
async def list_orders(user_id: Id, db: SessionDep) -> Any:
    """Page through a user's orders, newest first."""
    await existing(db, User, user_id)
    return await paginate(
        db, select(Order).where(Order.user_id == user_id).order_by(Order.created_at.desc(), Order.id.desc())
    )


async def existing(db: SessionDep, model: type[Row], row_id: int) -> Row:
    """Return a row by its id, or answer 404."""
    row = await db.get(model, row_id)
    if row is None:
        raise HTTPException(404, f"There is no {model.__name__.lower()} {row_id}.")
    return row


# Orders and products


@router.post("/orders", response_model=OrderOut, status_code=201)
async def place_order(new: NewOrder, db: SessionDep, sessions: SessionFactoryDep, background: BackgroundTasks) -> Any:
    """Place an order; that its user was seen is noted after the response."""
    await existing(db, User, new.user_id)
    await existing(db, Product, new.product_id)
    order = Order(**new.model_dump())
    db.add(order)
    await db.flush()
    background.add_task(note_seen, sessions, new.user_id)
    return order


async def note_seen(sessions: SessionFactoryDep, user_id: int) -> None:
    """Note when a user was last seen, in a session of its own: the request's has ended with the response."""
    async with sessions() as db:
        await db.execute(update(User).where(User.id == user_id).values(last_seen_at=now()))


@router.get("/products/top", response_model=list[TopProduct])
@cached(ttl=60)
async def top_products(db: SessionDep) -> Any:
    """Return the ten products ordered most, which without the cache takes a look at every order."""
    sold = func.sum(Order.quantity).label("sold")
    result = await db.execute(
        select(Product.id, Product.name, Product.category, Product.price_cents, sold)
        .join(Product.orders)
        .group_by(Product.id)
        .order_by(sold.desc(), Product.id)
        .limit(10)
    )
    return result.all()


@router.post("/products/prices", response_model=Changed)
async def change_prices(change: PriceChange, db: SessionDep) -> Any:
    """Change all prices of a category, in one statement."""
    changed = await db.scalars(
        update(Product)
        # What is dearer keeps its price: a higher one might not fit the column.
        .where(Product.category == change.category, Product.price_cents <= 10_000_000)
        .values(price_cents=Product.price_cents * (100 + change.percent) // 100)
        .returning(Product.id)
    )
    return {"changed": len(changed.all())}


# Everything else


@router.get("/reports/countries", response_model=list[CountryOut])
def count_countries(db: SyncSessionDep) -> Any:
    """Count the users of each country: a plain function, which FastAPI runs in a thread."""
    users = func.count().label("users")
    active = func.count().filter(User.active).label("active")
    return db.execute(select(User.country, users, active).group_by(User.country).order_by(users.desc())).all()


@router.get("/fail")
async def fail(db: SessionDep) -> None:
    """Write, then fail: the answer is a 500, and nothing is kept."""
    user = await existing(db, User, 1)
    user.name = "This name is never kept"
    await db.flush()
    raise RuntimeError("this endpoint always fails, after it has written")


@router.get("/log", response_model=Logged)
async def log(till: Text = "north") -> Any:
    """Log three lines; they and the request's event carry what was bound and the request's id."""
    bind(till=till)
    logger.info("the till is open")
    logger.warning("the till is low on %s", "change")
    logger.error("the till is stuck")
    return {"fields": {"till": till}, "lines": ["the till is open", "the till is low on change", "the till is stuck"]}


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
def home(request: Request) -> str:
    """Say what this is, with commands for the very address it was asked at."""
    html = files(__package__).joinpath("index.html").read_text("utf-8")
    return html.replace("{{base}}", escape(str(request.base_url).rstrip("/")))


def create_app(settings: Settings) -> FastAPI:
    """Return the service, on a database that `overdrive.demo.data.seed` has filled.

    Raises `ConfigurationError` for a setting that cannot work.
    """
    app = FastAPI(title="Overdrive's reference service", description="A small shop: users, products and orders.")
    overdrive = Overdrive(app, settings=settings)
    app.include_router(router)
    app.include_router(health_router)
    app.include_router(overdrive.metrics_router())
    return app
