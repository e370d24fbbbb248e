"""`RedisBackend`, where fastapi-cache2 has it."""

from __future__ import annotations

from typing import Any


class RedisBackend:
    """Asks for entries in Redis.

    redis: the client, which is not used: `Overdrive(app, redis_url=...)` has connections of its own.
    """

    def __init__(self, redis: Any) -> None:
        self.redis = redis
