"""The tables of the reference service: users, products and the orders between them.

Every datetime is naive and in UTC: SQLite keeps no time zone, so this is what reads back the same from SQLite
and from PostgreSQL.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


def now() -> datetime:
    """The current time as the tables keep it: naive, in UTC."""
    return datetime.now(UTC).replace(tzinfo=None)


class Base(DeclarativeBase):
    """The metadata all tables share."""


class User(Base):
    """Somebody who orders; `country` is an ISO 3166 code."""

    __tablename__ = "users"
    # An index is read in both directions, so ascending columns serve the feed by newest first as well.
    __table_args__ = (
        Index("users_by_time", "created_at", "id"),
        Index("users_by_country_and_time", "country", "created_at", "id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    country: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    last_seen_at: Mapped[datetime | None]
    active: Mapped[bool] = mapped_column(default=True)

    orders: Mapped[list[Order]] = relationship(back_populates="user")


class Product(Base):
    """Something that is sold, at a price in cents."""

    __tablename__ = "products"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    category: Mapped[str]
    price_cents: Mapped[int]
    discontinued_at: Mapped[datetime | None]

    orders: Mapped[list[Order]] = relationship(back_populates="product")


class Order(Base):
    """A quantity of one product for one user."""

    __tablename__ = "orders"
    __table_args__ = (
        Index("orders_by_time", "created_at", "id"),
        Index("orders_by_user_and_time", "user_id", "created_at", "id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey(User.id))
    product_id: Mapped[int] = mapped_column(ForeignKey(Product.id))
    quantity: Mapped[int]
    status: Mapped[str] = mapped_column(default="pending")
    created_at: Mapped[datetime] = mapped_column(default=now)
    note: Mapped[str | None]

    user: Mapped[User] = relationship(back_populates="orders")
    product: Mapped[Product] = relationship(back_populates="orders")
