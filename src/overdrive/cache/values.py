"""Values of one's own functions, kept under the same promises as responses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_type_hints

import msgspec

from overdrive.context import Reads, collecting, collectors, current
from overdrive.errors import ConfigurationError

from .entry import Entry, Instant, State
from .flight import Flight, Landed, Landing
from .store import StoreUnavailable

if TYPE_CHECKING:
    from .cache import Cache

T = TypeVar("T")
P = ParamSpec("P")

Load = Callable[[], Awaitable[Any]]
Keep = Callable[[Reads, bytes], Awaitable[Entry | None]]


def key_of_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """Return what stands for a call of a function, or of an endpoint with these path parameters, as text."""
    # An object that can be called has its class's name; what it gives is dropped with what others of them give.
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return _digest((function.__module__, name, sorted((name, str(value)) for name, value in arguments.items())))


def key_of_memoized(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return what stands for a call of a function with all of its arguments, of which 1 is not "1"."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return key_of_call(function, {name: repr(value) for name, value in bound.arguments.items()})


def tag_of_call(key: str) -> str:
    """Return the tag of what a call gives.

    A store remembers every tag, so there is no more than one for each 65,536th part of all calls, and some are
    dropped with another.
    """
    return _CALL + key[:4]


def _digest(parts: Any) -> str:
    return blake2b(msgspec.msgpack.encode(parts), digest_size=16).hexdigest()


_MEMOIZED = "__overdrive_memoized__"
_CALL = "call/"


def is_memoized(function: Callable[..., Any]) -> bool:
    """Say whether `memoize` has wrapped a function."""
    return hasattr(function, _MEMOIZED)


class Values:
    """The values a cache keeps."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def get_or_set(self, key: str, load: Load, *, type_: Any, ttl: float | None, tags: Collection[str]) -> Any:
        """Return the value that is kept under `key`, or what `load` gives."""
        context = current()
        if not self._cache.enabled or (context is not None and context.wrote):
            return await load()
        name, fingerprint = f"value:{_digest(key)}", repr(type_)
        while True:
            try:
                entry, instant = await self._find(name, fingerprint)
            except StoreUnavailable:
                return await load()
            if self._cache.is_off(None):
                return await load()
            if entry is None:
                flight, leads = self._cache.flights.join((name, instant))
                if leads:
                    keep = functools.partial(self._keep, name, fingerprint, instant, tags, ttl or self._cache.ttl)
                    return await self._lead(flight, load, type_, keep)
                match await flight.landing():
                    case Entry() as landed:
                        entry = landed
                    case Exception() as error:
                        raise error
                    case Landed.ALONE:
                        return await load()
                    case Landed.NOWHERE:
                        continue
            for reads in collectors():
                reads.tags |= entry.versions.keys()
            return msgspec.msgpack.decode(entry.body, type=type_)

    async def _find(self, name: str, fingerprint: str) -> tuple[Entry | None, Instant]:
        await self._cache.invalidator.catch_up()
        entry, instant, versions = await self._cache.store.load(name, fingerprint)
        fresh = entry is not None and entry.state(self._cache.clock(), instant.epoch, versions) is State.FRESH
        return (entry if fresh else None), instant

    async def _lead(self, flight: Flight, load: Load, type_: Any, keep: Keep) -> Any:
        landed: Landing = Landed.NOWHERE
        try:
            with collecting() as reads:
                value = await load()
            try:
                body = msgspec.msgpack.encode(value)
                # What is returned is the same each time, whether it was kept or not.
                value = msgspec.msgpack.decode(body, type=type_)
            except (TypeError, msgspec.MsgspecError) as error:
                raise ConfigurationError(
                    f"a {type(value).__name__} cannot be kept as {type_!r}: msgspec has to write and read it ({error})"
                ) from error
            landed = await keep(reads, body) or Landed.ALONE
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
        instant: Instant,
        tags: Collection[str],
        ttl: float,
        reads: Reads,
        body: bytes,
    ) -> Entry | None:
        # Reads nobody can name make a value that nobody can outdate, unless it says by what else than its name.
        if reads.unknown and all(tag.startswith(_CALL) for tag in tags):
            return None
        return await self._cache.keep(name, fingerprint, instant, reads.tags | set(tags), ttl, headers=[], body=body)

    def memoize(
        self, function: Callable[P, Awaitable[T]], ttl: float | None, tags: Collection[str]
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
            value: T = await self.get_or_set(own, load, type_=type_, ttl=ttl, tags=[*tags, tag_of_call(own)])
            return value

        setattr(call, _MEMOIZED, True)
        return call
