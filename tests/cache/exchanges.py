"""Requests to a cache without an app around it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from overdrive.cache.cache import Cache
from overdrive.cache.exchange import Exchange
from overdrive.cache.key import KeyPlan
from overdrive.cache.policy import Policy
from overdrive.context import RequestContext

ITEMS = "default/items"


async def nothing() -> None:
    pass


async def ask(
    cache: Cache,
    key: str = "key",
    *,
    tags: tuple[str, ...] = (ITEMS,),
    body: bytes = b"body",
    meanwhile: Callable[[], Awaitable[Any]] = nothing,
    taken: Callable[[], Awaitable[Any]] = nothing,
) -> str:
    """Answer one request as the middleware does, with `meanwhile` between its first read and its response.

    `taken` is what its client does before it has the response.

    Returned is the mark: hit, miss or bypass.
    """
    context = RequestContext(request_id="r", method="GET", path="/")
    context.instant = cache.seen()
    exchange = Exchange(cache, Policy(60, KeyPlan("fingerprint")), key, context)
    await exchange.look_up()
    if exchange.entry is None:
        context.reads.tags.update(tags)
        try:
            await meanwhile()
        except BaseException:
            exchange.leave()
            raise
    else:
        body = exchange.entry.body
    sent: list[Any] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await taken()
        sent.append(message)

    headers = [(b"content-length", b"%d" % len(body))]
    await exchange.send({"type": "http.response.start", "status": 200, "headers": headers}, send)
    await exchange.send({"type": "http.response.body", "body": body}, send)
    exchange.leave()
    return dict(sent[0]["headers"])[b"x-cache"].decode()
