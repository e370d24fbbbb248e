"""How long a soak lasts. Its files are not named like tests, so only `make soak`, which names them, runs them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest


@pytest.fixture
def rounds(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[Iterator[int]]:
    """Numbers from 0 for as long as this test's share of SOAK_SECONDS (600) lasts, but at least one."""
    share = float(os.environ.get("SOAK_SECONDS", "600")) / request.session.testscollected
    deadline = time.monotonic() + share
    done = 0

    def numbers() -> Iterator[int]:
        nonlocal done
        while done == 0 or time.monotonic() < deadline:
            yield done
            done += 1

    yield numbers()
    with capsys.disabled():
        print(f"\n{request.node.name}: {done} rounds")
