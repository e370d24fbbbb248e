"""The contract of the stores, for each of them; and what is Redis's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from overdrive import ConfigurationError
from overdrive.cache.cache import Cache
from overdrive.cache.redis import RedisStore
from overdrive.cache.store import MemoryStore, Store, StoreUnavailable

from exchanges import ITEMS, ask

pytestmark = pytest.mark.anyio
