"""No framework: the limit of what any Python service under this server can do."""

from typing import Any

from benchmarks.rivals import shop
from overdrive import CacheMiddleware
from overdrive.cache.entry import FORMAT, Entry
from overdrive.cache.redis import RedisStore

_BODY = (
    b'{"id":4711,"email":"chen.lopez.4711@example.com","name":"Chen Lopez","country":"GB",'
    b'"created_at":"2023-02-23T04:29:22","active":false}'
)
#: As many, and as long, as a hit from Overdrive's cache carries.
_HEADERS = [
    (b"content-length", str(len(_BODY)).encode()),
    (b"content-type", b"application/json"),
    (b"cache-control", b"no-cache"),
    (b"cache-status", b"overdrive; hit; ttl=3599"),
    (b"x-cache", b"hit"),
    (b"age", b"1"),
    (b"x-request-id", b"0123456789abcdef"),
    (b"etag", b'"0123456789abcdef0123456789abcdef"'),
]


def constant() -> Any:
    """Return an app that answers bytes made beforehand."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": _BODY})

    return app


def behind_cache_middleware() -> Any:
    """Return an app that allows its bytes to be cached, with Overdrive's cache for any ASGI app in front."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = [*_HEADERS[:2], (b"cache-control", b"max-age=3600")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": _BODY})

    return CacheMiddleware(app)


def asking_redis() -> Any:
    """Return an app that does no more than to look its bytes up in Redis, by the client of Overdrive's cache."""
    store = RedisStore(shop.REDIS_URL, "bare")
    ready = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal ready
        if scope["type"] != "http":
            return
        if not ready:
            epoch, versions = await store.versions(["default/users#", "default/*"])
            await store.save("key", Entry(FORMAT, "f", epoch, versions, 0, 3600, 200, _HEADERS, _BODY), 3600)
            ready = True
        entry = (await store.load("key", "f")).entry
        assert entry is not None
        await send({"type": "http.response.start", "status": entry.status, "headers": entry.headers})
        await send({"type": "http.response.body", "body": entry.body})

    return app
