"""What stands beside what."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.results import Claim


class Rival(NamedTuple):
    """An app and what it is asked. `factory` is `module:function` in `benchmarks.rivals`.

    addresses: how many it is asked for in turn, where the path has a place `{}` for their numbers.
    """

    name: str
    factory: str
    path: str
    ours: bool = False
    addresses: int = 1

    @property
    def paths(self) -> list[str]:
        """What it is asked for in turn."""
        return [self.path.format(number) for number in range(1, self.addresses + 1)]


class Plan(NamedTuple):
    """Rivals that must answer the same, the baseline first, and what is claimed about them."""

    name: str
    title: str
    rivals: list[Rival]
    claims: list[Claim]
    database: bool = True
    connections: int = 8


class Storm(NamedTuple):
    """Services asked more than they can answer: loads are in multiples of `capacity`, in requests a second.

    ceiling: what cannot be done better: it keeps as many connections busy as the others have.
    """

    name: str
    title: str
    rivals: list[Rival]
    ceiling: Rival
    capacity: float
    #: (load, seconds), one after the other: calm, storm, and what comes after it.
    phases: list[tuple[float, float]]
    deadline: float


PLANS = [
    Plan(
        "constant",
        "A constant: what a framework costs",
        [
            Rival("bare ASGI", "bare_asgi:constant", "/constant"),
            Rival("FastAPI", "plain_fastapi:constant", "/constant"),
            Rival("FastAPI + Overdrive, unused", "with_overdrive:constant", "/constant", ours=True),
        ],
        [],
        database=False,
    ),
    Plan(
        "user",
        "A user by id, from PostgreSQL",
        [
            Rival("hand-written get_db", "plain_fastapi:service", "/users/4711"),
            Rival("Overdrive's SessionDep", "with_overdrive:service", "/users/4711", ours=True),
        ],
        [Claim("Overdrive's SessionDep", "hand-written get_db", 1.15)],
    ),
    Plan(
        "pool",
        "The same user, for 32 clients on 10 connections",
        [
            Rival("SQLAlchemy's pool, 10 + 20", "plain_fastapi:service_with_overflow", "/users/4711"),
            Rival("SQLAlchemy's pool, 10 + 0", "plain_fastapi:service", "/users/4711"),
            Rival("FairPool, 10 + 20", "plain_fastapi:service_on_fair_pool", "/users/4711", ours=True),
            Rival("Overdrive, 10 + 20", "with_overdrive:service_for_many_with_overflow", "/users/4711", ours=True),
            Rival("Overdrive, 10 + 0", "with_overdrive:service_for_many", "/users/4711", ours=True),
            Rival("asyncpg's pool, no SQLAlchemy", "fastapi_asyncpg:app", "/users/4711"),
            Rival("psycopg_pool, no SQLAlchemy", "fastapi_psycopg:app", "/users/4711"),
        ],
        [Claim("Overdrive, 10 + 0", "SQLAlchemy's pool, 10 + 20", 2.0)],
        connections=32,
    ),
    Plan(
        "hit",
        "The same user from a cache",
        [
            Rival("FastAPI, not cached", "plain_fastapi:service", "/users/4711"),
            Rival("bare ASGI, a constant", "bare_asgi:constant", "/constant"),
            Rival("fastapi-cache2, memory", "fastapi_cache2:memory", "/cached/4711"),
            Rival("cashews, memory", "cashews_cache:memory", "/cached/4711"),
            Rival("Litestar, memory", "litestar_cache:memory", "/cached/4711"),
            Rival("Overdrive, memory", "with_overdrive:service", "/cached/4711", ours=True),
            Rival("Overdrive, memory, and its event", "with_overdrive:service_with_events", "/cached/4711", ours=True),
            Rival("CacheMiddleware, bare ASGI", "bare_asgi:behind_cache_middleware", "/", ours=True),
            Rival("fastapi-cache2, Redis", "fastapi_cache2:redis", "/cached/4711"),
            Rival("cashews, Redis", "cashews_cache:redis", "/cached/4711"),
            Rival("Litestar, Redis", "litestar_cache:redis", "/cached/4711"),
            Rival("Overdrive, Redis", "with_overdrive:service_on_redis", "/cached/4711", ours=True),
            Rival("Overdrive, Redis asked each time", "with_overdrive:service_asking_redis", "/cached/4711", ours=True),
            Rival("bare ASGI, Redis asked each time", "bare_asgi:asking_redis", "/cached/4711"),
        ],
        [
            Claim("Overdrive, memory", "Litestar, memory", 1.0),
            Claim("Overdrive, memory", "cashews, memory", 4.0),
            Claim("Overdrive, Redis", "Litestar, Redis", 1.0),
            Claim("Overdrive, Redis", "cashews, Redis", 4.0),
        ],
    ),
    Plan(
        "page",
        "50 of 2,000,000 users, newest first",
        [
            Rival("hand-written keyset", "plain_fastapi:service", "/feed?size=50"),
            Rival("fastapi-pagination, no total", "fastapi_pagination_pages:app", "/cursor-without-total?size=50"),
            Rival("Overdrive CursorPage", "with_overdrive:service", "/feed?size=50", ours=True),
            Rival("FastAPI on asyncpg", "fastapi_asyncpg:app", "/feed?size=50"),
            Rival("bare asyncpg + orjson", "bare_asyncpg:page", "/"),
        ],
        [
            Claim("Overdrive CursorPage", "hand-written keyset", 1.0),
            Claim("Overdrive CursorPage", "fastapi-pagination, no total", 1.5),
        ],
    ),
    Plan(
        "total",
        "The same page with its total",
        [
            Rival("fastapi-pagination Page", "fastapi_pagination_pages:app", "/page?size=50"),
            Rival("fastapi-pagination CursorPage", "fastapi_pagination_pages:app", "/cursor?size=50"),
            Rival("Overdrive Page", "with_overdrive:service", "/page?size=50", ours=True),
        ],
        [Claim("Overdrive Page", "fastapi-pagination Page", 1.0)],
        # One at a time: eight counts at once are minutes of a database's time.
        connections=1,
    ),
    Plan(
        "log",
        "Five log lines a request",
        [
            Rival("logging off", "logging_stdlib:off", "/log"),
            Rival("logging FileHandler", "logging_stdlib:file_handler", "/log"),
            Rival("logging QueueHandler", "logging_stdlib:queue_handler", "/log"),
            Rival("loguru", "loguru_log:plain", "/log"),
            Rival("loguru enqueue", "loguru_log:enqueue", "/log"),
            Rival("structlog + orjson", "structlog_log:app", "/log"),
            Rival("Overdrive LogHandler", "with_overdrive:log", "/log", ours=True),
            Rival("Overdrive log_directly", "with_overdrive:direct_log", "/log", ours=True),
            Rival("Overdrive, logging off", "with_overdrive:log_off", "/log", ours=True),
            Rival("Overdrive log_directly + event", "with_overdrive:log_and_event", "/log", ours=True),
        ],
        [],
        database=False,
    ),
]

STORMS = [
    Storm(
        "overload",
        "Offered 0.3, 10 and 0.8 times what it can do",
        [
            Rival("stock FastAPI + SQLAlchemy", "plain_fastapi:overloaded", "/slow"),
            Rival("FastAPI + asyncpg's pool", "fastapi_asyncpg:overloaded", "/slow"),
            Rival("FastAPI + psycopg_pool", "fastapi_psycopg:overloaded", "/slow"),
            Rival("the same, max_waiting=50", "fastapi_psycopg:overloaded_with_bounds", "/slow"),
            Rival("Overdrive", "with_overdrive:overloaded", "/slow", ours=True),
            Rival("Overdrive, copies allowed", "with_overdrive:overloaded", "/copies/{}", ours=True, addresses=300),
        ],
        Rival("five connections, always busy", "bare_asyncpg:slow", "/"),
        capacity=100,
        phases=[(0.3, 6), (10, 10), (0.8, 6)],
        deadline=1.0,
    ),
]
