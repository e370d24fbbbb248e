"""One event a request, whatever becomes of it, and nothing else; `make soak` asks for ten thousand."""

from __future__ import annotations

import pytest
from log.outcomes import play

pytestmark = pytest.mark.anyio


async def test_every_request_is_one_event() -> None:
    await play(2000, seed=1)
