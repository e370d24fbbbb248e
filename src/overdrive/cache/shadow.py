"""What a hit would have sent, compared with what the endpoint has just made."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .compare import differences
from .entry import Entry
from .store import StoreUnavailable

if TYPE_CHECKING:
    from .cache import Cache
    from .exchange import Exchange

logger = logging.getLogger("overdrive")


async def differs(cache: Cache, exchange: Exchange, entry: Entry, body: bytes | None) -> bool:
    """Say whether the response to a request is another than the one that is kept; count it, and tell how.

    body: all of it; None where it may not be kept, and then only the status is compared.

    A failure of the server says nothing about what is kept. A difference counts only if what is kept is still valid:
    otherwise something it had read was written while the endpoint ran.
    """
    trust, status = exchange.policy.trust, exchange.status
    if status is None or status >= 500 or (body is None and status == entry.status):
        return False
    trust.checked += 1
    found = differences(
        (entry.status, status), (entry.headers, exchange.headers), (entry.body, body or b""), trust.declared
    )
    if not found:
        return False
    try:
        epoch, versions = await cache.store.versions(entry.versions)
    except StoreUnavailable:
        return False
    if entry.is_outdated(epoch, versions):
        return False
    trust.mismatches += 1
    trust.untold += 1
    if trust.may_warn():
        logger.warning(
            "%s: what is kept of it is not what its endpoint gives, though nothing it reads was written "
            "(%d since the last warning): %s",
            exchange.policy.route,
            trust.untold,
            "; ".join(found),
        )
        trust.untold = 0
    return True
