"""Settings: one frozen model a part, from arguments or from `OVERDRIVE_*` variables.

A nested setting is named with two underscores: `OVERDRIVE_POOL__SIZE=5`. Arguments win over variables. A variable
that begins with `OVERDRIVE_` and names no setting is an error, not a setting that silently does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import from_json
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .errors import ConfigurationError

_PREFIX = "OVERDRIVE_"
_NESTED = "__"
_SHORTEST_SECRET = 16


class PoolSettings(BaseModel):
    """How many connections an engine may hold, and for how long.

    size: connections kept open.
    max_overflow: connections opened beyond `size` under load.
    timeout: seconds a checkout waits for a connection before it fails.
    recycle: seconds after which a connection is replaced, less up to a tenth; -1 never.
    max_waiting: checkouts that may wait at once; left out, ten for each connection, and a hundred at least.
    linger: seconds a connection beyond `size` stays open after its last use.
    validate_after: seconds of idleness after which a connection is asked for an answer, behind the scenes where the
        pool is asynchronous, and else before it is used.
    min_idle: connections that are to be idle, opened before anybody asks, as long as there are no more than `size`.
    leak_after: seconds after which whoever still has a connection is named in a WARNING; left out, nobody is.
    pgbouncer: whether the database's URL is that of a PgBouncer in transaction mode.
    processes: how many processes of the service there are, on all machines, to compare what their pools may open with
        the server's `max_connections`; left out, WEB_CONCURRENCY, or else 1.
    strict: refuse to connect where that does not fit; otherwise it is a WARNING.
    deadline: seconds a request has until its response begins; then it is cancelled, with what it has the database do,
        and answered with 503. Left out, there is no end.
    deadline_header: a request header in which a trusted proxy says how many milliseconds a request has, where that is
        less; what is no whole number is not heeded.
    stop_abandoned: whether GET and HEAD requests are cancelled when their client has left.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(10, ge=1)
    max_overflow: int = Field(20, ge=0)
    timeout: float = Field(30, gt=0)
    recycle: int = Field(1800, ge=-1)
    max_waiting: int | None = Field(None, ge=0)
    linger: float = Field(10, ge=0)
    validate_after: float = Field(30, ge=0)
    leak_after: float | None = Field(None, gt=0)
    min_idle: int = Field(0, ge=0)
    pgbouncer: bool = False
    processes: int | None = Field(None, ge=1)
    strict: bool = False
    deadline: float | None = Field(None, gt=0)
    deadline_header: str | None = Field(None, pattern=r"^[A-Za-z0-9-]+$")
    stop_abandoned: bool = False

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.min_idle > self.size:
            raise ValueError(f"min_idle ({self.min_idle}) is larger than size ({self.size})")
        return self


class CacheSettings(BaseModel):
    """What the response cache keeps.

    enabled: on or off; left out, the cache is on everywhere but under pytest.
    ttl: seconds an entry is fresh where `@cached()` names none.
    prefix: what every key in Redis starts with.
    max_bytes: what entries in the process may take in all; left out, a sixteenth of the memory the process may use.
        What is asked for often stays. With Redis they are there besides, for as long as the process hears of every
        write: other processes' are heard within milliseconds, and nothing is served more than a second after hearing
        has ended. With 0, each hit asks Redis.
    consistency: what a request may get after a write in another process has been answered. "bounded": what was true
        before it for as long as Redis takes to tell of the write, and no longer than a second whatever fails.
        "strict": nothing older, at the price of a round trip to Redis for each hit, and of another for each commit.
    max_body: bytes above which a body is sent but not stored.
    gzip: whether texts of 1 KiB and more are kept as gzip too, for clients that take it.
    hide_status: leave Cache-Status and X-Cache out of what clients are sent.
    mode: "on", "shadow" or "off" where `@cached()` names none.
    verify: the share of hits, from 0 to 1, that are made anew and compared where `@cached()` names none.
    off: templates of routes that are off whatever they say, `/users/{user_id}`; as text a list of JSON, or one of
        names between commas.
    listen: whether to hear what others write to PostgreSQL (psql, other services), where `overdrive triggers install`
        has been run. It takes a connection a process, outside the pool; while nobody listens for longer than a
        second, nothing is served from the cache.
    direct_url: the database of the default engine for that connection, where between it and `database_url` stands a
        pooler in transaction mode (PgBouncer), through which nothing can be heard.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool | None = None
    ttl: float = Field(60, gt=0, allow_inf_nan=False)
    prefix: str = Field("overdrive", min_length=1)
    max_bytes: int | None = Field(None, ge=0)
    consistency: Literal["bounded", "strict"] = "bounded"
    max_body: int = Field(1_048_576, ge=1)
    gzip: bool = True
    hide_status: bool = False
    mode: Literal["on", "shadow", "off"] = "on"
    verify: float = Field(0, ge=0, le=1)
    off: Annotated[tuple[str, ...], NoDecode] = ()
    listen: bool = False
    direct_url: str | None = None

    @field_validator("off", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, str):
            return from_json(value) if value.startswith("[") else [name.strip() for name in value.split(",")]
        return value

    @field_validator("off")
    @classmethod
    def _templates(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [name for name in names if not name.rpartition(" ")[2].startswith("/")]:
            raise ValueError(f"a route is called by its template, /users/{{user_id}}, not {wrong[0]!r}")
        return names


class LogSettings(BaseModel):
    """What is logged for each request.

    events: log one INFO record a request on the logger `overdrive.request`.
    request_id_header: response header that carries the request's id.
    trust_request_id: whether a request that brings that header keeps its id, where it is 1 to 128 letters, digits and
        `.`, `_`, `-`. For services behind a proxy that sets it: else anyone may choose what is logged.
    sample: by route (`/items/{id}`), the share of its events that is logged, from 0, none, to 1. What was answered
        with a status of 500 or above, raised, was cancelled or cut off is always logged. Events of one trace are
        kept or let go together.
    repeated_statements: how often a request may execute one statement; of one that was executed more often, a WARNING
        at the request's end names the place in the code. None, or `off` in a variable: as often as it likes.
    server_timing: whether responses say in a `Server-Timing` header where their time went (W3C Server Timing), to
        whoever reads them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    events: bool = True
    request_id_header: str = Field("x-request-id", pattern=r"^[A-Za-z0-9-]+$")
    trust_request_id: bool = False
    sample: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    repeated_statements: int | None = Field(20, ge=1)
    server_timing: bool = False

    @field_validator("repeated_statements", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value == "off" else value


class PaginationSettings(BaseModel):
    """Page sizes, and the keys that sign cursors.

    size: rows on a page where the client asks for none.
    max_size: the most a client may ask for.
    max_offset: rows that may come before a page by number, which the database reads to skip them.
    cache_totals: whether the cache keeps totals, and where in a list which row is, until what they depend on is
        written: all pages of one list are counted once, and those far behind are found from the nearest one visited.
        What is written by those whom this service does not see is learnt of when they expire (`cache.ttl`).
    link_header: whether pages carry a `Link` header with their neighbours (RFC 8288).
    secrets: what cursors are signed with, the same wherever the app runs: one text, or several, of which the first
        signs and each is accepted, so that a new one may take over before the old one goes. Each has at least 16
        characters, better 32 random bytes (RFC 2104, section 3). Left out, a server makes a key of its own for all
        its workers, and its cursors end with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(50, ge=1)
    max_size: int = Field(100, ge=1, le=10_000)
    max_offset: int = Field(1_000_000, ge=0)
    cache_totals: bool = False
    link_header: bool = True
    secrets: Annotated[tuple[SecretStr, ...], NoDecode] = ()

    @field_validator("secrets", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, str):
            return from_json(value) if value.startswith("[") else [value]
        return value

    @field_validator("secrets")
    @classmethod
    def _long_enough(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(secret) < _SHORTEST_SECRET for secret in secrets):
            raise ValueError(f"a secret has at least {_SHORTEST_SECRET} characters")
        return secrets

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.size > self.max_size:
            raise ValueError(f"size ({self.size}) is larger than max_size ({self.max_size})")
        return self


class AdmissionSettings(BaseModel):
    """What becomes of requests when more come than the database can answer.

    enabled: on or off.
    max_wait: seconds from when a request needs its first connection until it would be answered; one that would take
        longer, and whose turn would not come within half of that, is refused at once. Some less than clients wait. A
        burst of more than that is refused, too.
    drain: seconds in which requests are still answered after SIGTERM, while `/ready` answers 503 already: as long as
        whoever sends requests here takes to hear of it. For servers that, as uvicorn, handle the signal in Python.
    away_after: seconds for which the database must have refused before `/ready` answers 503.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    max_wait: float = Field(1, gt=0)
    drain: float = Field(0, ge=0)
    away_after: float = Field(5, ge=0)


class Settings(BaseSettings):
    """Everything Overdrive can be told.

    database_url: where the database is. `postgresql://` and `sqlite://` get their async driver.
    redis_url: where the cache is shared; left out, it lives in the process. `redis://host:6379/0`, `rediss://` with
        TLS, `unix://`; `redis+cluster://host:6379` or `rediss+cluster://` names any node of a Redis Cluster.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=_PREFIX, env_nested_delimiter=_NESTED)

    database_url: str = "sqlite+aiosqlite:///overdrive.sqlite"
    redis_url: str | None = None
    pool: PoolSettings = PoolSettings()
    cache: CacheSettings = CacheSettings()
    log: LogSettings = LogSettings()
    pagination: PaginationSettings = PaginationSettings()
    admission: AdmissionSettings = AdmissionSettings()

    @classmethod
    def load(cls, **values: Any) -> Settings:
        """Read arguments and environment; `ConfigurationError` names every setting that is wrong."""
        known = set(_variables(cls))
        # pydantic-settings takes variables in any case.
        if unknown := [name for name in os.environ if name.startswith(_PREFIX) and name.upper() not in known]:
            raise ConfigurationError("; ".join(_unknown(name, known) for name in unknown))
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigurationError("; ".join(map(_complaint, error.errors()))) from None


def _variables(model: type[BaseModel], prefix: str = _PREFIX) -> Iterator[str]:
    """Name every variable that is read; a part as a whole, `OVERDRIVE_POOL`, is none."""
    for name, field in model.model_fields.items():
        variable = prefix + name.upper()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation, variable + _NESTED)
        else:
            yield variable


def _unknown(name: str, known: set[str]) -> str:
    # Without the prefix, in which all of them are alike.
    close = get_close_matches(name.removeprefix(_PREFIX), [other.removeprefix(_PREFIX) for other in known], cutoff=0.5)
    if close:
        return f"{name} is no setting; did you mean {' or '.join(_PREFIX + each for each in close)}?"
    return f"{name} is no setting; there are {', '.join(sorted(known))}"


def _complaint(error: Any) -> str:
    name = _PREFIX + _NESTED.join(str(part).upper() for part in error["loc"])
    shown = not isinstance(error["input"], dict) and "secrets" not in error["loc"]
    given = f" (got {error['input']!r})" if shown else ""
    return f"{name}: {error['msg']}{given}"
