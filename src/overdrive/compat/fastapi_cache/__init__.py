"""What fastapi-cache2 0.2 has in `fastapi_cache`, `.decorator`, `.coder` and `.backends`, as Overdrive keeps it.

A service that has an `Overdrive(app)` changes the name of the package in its imports:

    from overdrive.compat.fastapi_cache import FastAPICache
    from overdrive.compat.fastapi_cache.decorator import cache

`@cache` on an endpoint is `@cached`, on any other function `Cache.memoize`, and a namespace is a tag. What differs is
in docs/migrating-from-fastapi-cache2.md; what cannot be had is a `ConfigurationError` that names what can.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, ParamSpec, get_type_hints
from weakref import WeakKeyDictionary

from fastapi import Depends
from starlette.concurrency import run_in_threadpool

from overdrive.app import Overdrive
from overdrive.cache.values import key_of_memoized
from overdrive.context import current
from overdrive.endpoint import CACHED, ServedBy, cached
from overdrive.errors import ConfigurationError

from .backends.inmemory import InMemoryBackend
from .backends.redis import RedisBackend
from .coder import Coder, JsonCoder

__all__ = ["Coder", "FastAPICache", "JsonCoder", "cache"]

P = ParamSpec("P")

#: The tag of all that `@cache` keeps. It begins like that of a call, as nobody has thought of it: a value whose reads
#: cannot be named is kept only if its author has said by what else it is dropped.
_ALL = "call/fastapi_cache"


@dataclass(frozen=True, slots=True)
class _Setup:
    """What `FastAPICache.init` was told."""

    backend: InMemoryBackend | RedisBackend | None = None
    prefix: str = ""
    expire: float | None = None
    enable: bool = True
    overdrive: Overdrive | None = None


class FastAPICache:
    """One setup of `@cache` for the whole process."""

    _setup: ClassVar[_Setup] = _Setup()

    @classmethod
    def init(
        cls,
        backend: InMemoryBackend | RedisBackend,
        prefix: str = "",
        expire: float | None = None,
        coder: type[Coder] | None = None,
        key_builder: None = None,
        cache_status_header: None = None,
        enable: bool = True,
        *,
        overdrive: Overdrive | None = None,
    ) -> None:
        """Set `@cache` up, before the app's first request; once it is, another call changes nothing.

        backend: one of this package's. With a `RedisBackend`, Overdrive must have its `redis_url`.
        prefix: begins the keys of functions' values.
        expire: seconds for each `@cache` that says nothing; left out, the setting `cache.ttl` decides.
        enable: whether anything is cached by `@cache`.
        overdrive: whose cache is used outside of requests; a request has that of its app.

        Raises `ConfigurationError` for what is not supported.
        """
        if not isinstance(backend, InMemoryBackend | RedisBackend):
            raise ConfigurationError(
                f"{type(backend).__module__}.{type(backend).__qualname__} is no backend here: entries are kept where "
                "Overdrive keeps them, in Redis with Overdrive(app, redis_url=...), else in the process; give "
                f"RedisBackend(redis) or InMemoryBackend() of {__name__}.backends"
            )
        _refuse(coder, key_builder)
        if cache_status_header is not None:
            raise ConfigurationError(
                "leave cache_status_header= out: each answer says by X-Cache and Cache-Status where it came from"
            )
        setup = _Setup(backend, prefix, _seconds(expire), enable, overdrive)
        if cls._setup.backend is None:
            cls._use(setup)
        elif overdrive is not cls._setup.overdrive:
            raise ConfigurationError("FastAPICache was set up with another overdrive=: call FastAPICache.reset() first")

    @classmethod
    def reset(cls) -> None:
        """Forget what `init` was told."""
        cls._use(_Setup())

    @classmethod
    def _use(cls, setup: _Setup) -> None:
        cls._setup = setup
        for call, mark in list(_decorated.items()):
            mark(call)

    @classmethod
    async def clear(cls, namespace: str | None = None, key: str | None = None) -> None:
        """Drop what `@cache` has kept under a namespace and those below it (`a` has `a:b`); left out, all of it.

        Raises `ConfigurationError` for a `key`, and where nothing says which cache is meant.
        """
        if key is not None:
            raise ConfigurationError(
                "keys are not known outside the cache: clear a namespace=, or one call with "
                "overdrive.cache.invalidate(get_user, user_id=3) on a route that is @cached"
            )
        await _overdrive().cache.invalidate(namespace or _ALL)


#: What `@cache` has made, and how each is marked for its routes.
_decorated: WeakKeyDictionary[Callable[..., Any], Callable[[Any], None]] = WeakKeyDictionary()


def cache(
    expire: float | None = None,
    coder: type[Coder] | None = None,
    key_builder: None = None,
    namespace: str = "",
    injected_dependency_namespace: str = "__fastapi_cache",
) -> Callable[[Callable[P, Any]], Callable[P, Coroutine[Any, Any, Any]]]:
    """Keep an endpoint's responses, as `cached` does, or a function's values, as `Cache.memoize` does.

    It stands below the route's decorator; a plain function runs in a thread, and is awaited.

    expire: seconds; left out, what `FastAPICache.init` was told, or else the setting `cache.ttl`.
    namespace: by what `FastAPICache.clear` drops it; `a:b` is dropped with `a`.
    injected_dependency_namespace: begins the name of the parameter by which an endpoint is told from a call.

    Raises `ConfigurationError` for an `expire` that is not positive, a coder or a key builder.
    """
    _refuse(coder, key_builder)
    seconds, tags = _seconds(expire), _tags_of(namespace)
    by_route = inspect.Parameter(
        f"{injected_dependency_namespace}_served_by",
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[Overdrive, Depends(ServedBy())],
    )

    def mark(call: Any) -> None:
        setup = FastAPICache._setup
        if setup.enable:
            cached(ttl=seconds or setup.expire, tags=tags)(call)
        elif hasattr(call, CACHED):
            delattr(call, CACHED)

    def decorate(function: Callable[P, Any]) -> Callable[P, Coroutine[Any, Any, Any]]:
        run = function if inspect.iscoroutinefunction(function) else functools.partial(run_in_threadpool, function)
        type_: Any = None

        @functools.wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            nonlocal type_
            setup = FastAPICache._setup
            overdrive: Any = kwargs.pop(by_route.name, None)
            if overdrive is not None:
                # It is the response that is kept.
                _refuse_lone_store(overdrive)
                return await run(*args, **kwargs)
            if not setup.enable:
                return await run(*args, **kwargs)
            if type_ is None:
                type_ = get_type_hints(function).get("return", Any)
            return await _overdrive().cache.get_or_set(
                f"{setup.prefix}:{key_of_memoized(function, *args, **kwargs)}",
                functools.partial(run, *args, **kwargs),
                ttl=seconds or setup.expire,
                tags=tags,
                type=type_,
            )

        call.__signature__ = _with(by_route, inspect.signature(function))  # type: ignore[attr-defined]
        _decorated[call] = mark
        mark(call)
        return call

    return decorate


def _with(parameter: inspect.Parameter, signature: inspect.Signature) -> inspect.Signature:
    own = list(signature.parameters.values())
    open_end = [each for each in own if each.kind is inspect.Parameter.VAR_KEYWORD]
    # FastAPI would take the return annotation for a response model; it has never seen it under this decorator.
    return signature.replace(
        parameters=[*own[: len(own) - len(open_end)], parameter, *open_end], return_annotation=inspect.Signature.empty
    )


def _tags_of(namespace: str) -> tuple[str, ...]:
    if not isinstance(namespace, str):
        raise ConfigurationError(f"namespace= takes text, not {namespace!r}")
    parts = namespace.split(":") if namespace else []
    return _ALL, *(":".join(parts[:number]) for number in range(1, len(parts) + 1))


def _seconds(expire: float | None) -> float | None:
    if expire is not None and not (isinstance(expire, int | float) and expire > 0):
        raise ConfigurationError(f"expire= takes a positive number of seconds, not {expire!r}")
    return expire


def _refuse(coder: type[Coder] | None, key_builder: Any) -> None:
    if coder is not None and coder is not JsonCoder:
        raise ConfigurationError(
            f"leave coder={getattr(coder, '__name__', coder)} out: of an endpoint the bytes it has sent are kept, of "
            "any other function what msgspec reads as its return annotation: a dataclass, a msgspec.Struct, plain data"
        )
    if key_builder is not None:
        raise ConfigurationError(
            "leave key_builder= out: the key of a response holds every input its endpoint declares, and @cached has "
            'scope="public" and declare() for what it reads besides; the key of a value is one\'s own with '
            "overdrive.cache.get_or_set(key, load)"
        )


def _overdrive() -> Overdrive:
    """Return what serves this request; outside of requests, what `init` was told."""
    context = current()
    overdrive: Overdrive | None = context.runtime if context is not None else None
    overdrive = overdrive or FastAPICache._setup.overdrive
    if overdrive is None:
        raise ConfigurationError(
            "nothing says which cache is meant outside of requests: FastAPICache.init(..., overdrive=overdrive), with "
            "what Overdrive(app) has returned"
        )
    _refuse_lone_store(overdrive)
    return overdrive


def _refuse_lone_store(overdrive: Overdrive) -> None:
    """Raise `ConfigurationError` where Redis is asked for, and the store of each worker would be its own."""
    asked = isinstance(FastAPICache._setup.backend, RedisBackend)
    if asked and overdrive.settings.redis_url is None and overdrive.cache.enabled:
        raise ConfigurationError(
            "FastAPICache has a RedisBackend, but Overdrive has no Redis: give Overdrive(app, redis_url=...) the "
            "address that the backend's client has"
        )
