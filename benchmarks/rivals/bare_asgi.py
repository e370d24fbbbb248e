"""No framework: the limit of what any Python service under this server can do."""

from typing import Any

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
]


def constant() -> Any:
    """Return an app that answers bytes made beforehand."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": _BODY})

    return app
