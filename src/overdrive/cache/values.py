"""Values of one's own functions, kept under the same promises as responses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_type_hints
from uuid import UUID

import msgspec

from overdrive.context import Reads, collecting, collectors, current
from overdrive.errors import ConfigurationError

from .entry import Instant
from .flight import Flight, Landed, Landing
from .key import digest
from .store import StoreUnavailable
from .tags import CALL, TENANT, tag_of_tenant

if TYPE_CHECKING:
    from .cache import Cache

T = TypeVar("T")
P = ParamSpec("P")

Load = Callable[[], Awaitable[Any]]
Keep = Callable[[Reads, bytes], Awaitable[Landing]]


def key_of_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """Return what stands for a call of a function, or of an endpoint with these path parameters, as text."""
    # An object that can be called has its class's name; what it gives is dropped with what others of them give.
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return digest((function.__module__, name, sorted((name, str(value)) for name, value in arguments.items())))


def key_of_memoized(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return what stands for a call of a function with all of its arguments, of which 1 is not "1"."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return key_of_call(function, {name: told(value) for name, value in bound.arguments.items()})


#: Of these types, and no subclasses, the representation is the value.
_PLAIN = frozenset((type(None), bool, int, float, str, bytes, Decimal, UUID, date, datetime, time, timedelta))


def told(value: Any) -> str:
    """Return text that stands for an argument and for no other; raises `ConfigurationError` where there is none.

    An object's own representation does not do: it may be what others have too, or hide what tells them apart.
    """
    kind = type(value)
    if kind in _PLAIN:
        return repr(value)
    if isinstance(value, Enum):
        text = told(value.value)
    elif kind in (list, tuple):
        text = ",".join(map(told, value))
    elif kind in (set, frozenset):
        text = ",".join(sorted(map(told, value)))
    elif kind is dict:
        text = ",".join(sorted(f"{told(name)}:{told(each)}" for name, each in value.items()))
    elif is_dataclass(kind):
        text = told({each.name: getattr(value, each.name) for each in fields(kind)})
    elif isinstance(value, msgspec.Struct):
        text = told(msgspec.structs.asdict(value))
    elif hasattr(kind, "__pydantic_fields__"):
        text = told(dict(value))
    else:
        raise ConfigurationError(
            f"memoize() tells calls apart by arguments of plain data, and a {kind.__qualname__} is none: give what "
            "the function needs of it, an id say"
        )
    return f"{kind.__module__}.{kind.__qualname__}({text})"


def tag_of_call(key: str) -> str:
    """Return the tag of what a call gives.

    A store remembers every tag, so there is no more than one for each 65,536th part of all calls, and some are
    dropped with another.
    """
    return CALL + key[:4]


_MEMOIZED = "__overdrive_memoized__"


def is_memoized(function: Callable[..., Any]) -> bool:
    """Say whether `memoize` has wrapped a function."""
    return hasattr(function, _MEMOIZED)


class Values:
    """The values a cache keeps."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def get_or_set(
        self,
        key: str,
        load: Load,
        *,
        type_: Any,
        ttl: float | None,
        tags: Collection[str],
        shared: bool,
        anew: bool = False,
        ready: Callable[[], Awaitable[Any]] | None = None,
    ) -> Any:
        """Return the value that is kept under `key`, or what `load` gives.

        anew: whether that is read by statements alone, and nothing of it was read by the request before.
        ready: takes what `load` needs and others may hold, before anybody waits for it.
        """
        context = current()
        for reads in collectors():
            reads.tags |= set(tags)
        if not self._cache.enabled or (context is not None and context.wrote):
            return await load()
        tenant: str | None = None
        if context is not None and not shared:
            if context.lacks_tenant:
                return await load()
            tenant = context.tenant
        # Of another release with other tags nobody could drop what they drop.
        name, fingerprint = f"value:{digest((key, tenant))}", repr((type_, sorted(tags)))
        if tenant is not None:
            tags = [*tags, tag_of_tenant(tenant)]
        try:
            turn = await self._cache.find(name, fingerprint, alone=ready is not None)
            if turn.entry is None and ready is not None and not turn.is_off:
                await ready()
                turn = await self._cache.find(name, fingerprint)
        except StoreUnavailable:
            return await load()
        if turn.entry is not None:
            for reads in collectors():
                reads.tags |= turn.entry.versions.keys()
            return msgspec.msgpack.decode(turn.entry.body, type=type_)
        if turn.flight is None:
            return await load()
        instant: Instant | None = turn.instant
        known = Reads()
        if context is not None and context.statements and not anew:
            # What the request's session has read before, it gives again without a statement.
            known.tags, known.unknown, instant = {*context.reads.tags}, [*context.reads.unknown], context.instant
        keep = functools.partial(self._keep, name, fingerprint, instant, tags, ttl or self._cache.ttl, turn.flight)
        return await self._lead(turn.flight, load, type_, keep, known)

    async def _lead(self, flight: Flight, load: Load, type_: Any, keep: Keep, known: Reads) -> Any:
        landed: Landing = Landed.NOWHERE
        try:
            with collecting() as reads:
                value = await load()
            reads.tags |= known.tags
            reads.unknown += known.unknown
            try:
                body = msgspec.msgpack.encode(value)
                # What is returned is the same each time, whether it was kept or not.
                value = msgspec.msgpack.decode(body, type=type_)
            except (TypeError, msgspec.MsgspecError) as error:
                raise ConfigurationError(
                    f"a {type(value).__name__} cannot be kept as {type_!r}: msgspec has to write and read it ({error})"
                ) from error
            landed = await keep(reads, body)
        except Exception as error:
            landed = error
            raise
        finally:
            flight.end(landed)
        return value

    async def _keep(
        self,
        name: str,
        fingerprint: str,
        instant: Instant | None,
        tags: Collection[str],
        ttl: float,
        flight: Flight,
        reads: Reads,
        body: bytes,
    ) -> Landing:
        # Reads nobody can name make a value that nobody can outdate, unless it says by what else than its name.
        if instant is None or (reads.unknown and all(tag.startswith((CALL, TENANT)) for tag in tags)):
            return Landed.ALONE
        landing, _stored = await self._cache.keep(
            name, fingerprint, instant, reads.tags | set(tags), ttl, headers=[], body=body, flight=flight
        )
        return landing

    def memoize(
        self, function: Callable[P, Awaitable[T]], ttl: float | None, tags: Collection[str], *, shared: bool
    ) -> Callable[P, Awaitable[T]]:
        """Return the function, answered from the cache."""
        if not inspect.iscoroutinefunction(function):
            raise ConfigurationError(f"memoize() takes a coroutine function, and {function!r} is none")
        type_: Any = None

        @functools.wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            nonlocal type_
            if type_ is None:
                type_ = get_type_hints(function).get("return", Any)
            own = key_of_memoized(function, *args, **kwargs)
            load = functools.partial(function, *args, **kwargs)
            value: T = await self.get_or_set(
                own, load, type_=type_, ttl=ttl, tags=[*tags, tag_of_call(own)], shared=shared
            )
            return value

        setattr(call, _MEMOIZED, True)
        return call
