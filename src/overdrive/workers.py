"""How many processes a server has."""

from __future__ import annotations

import os


def workers() -> int:
    """Return how many workers uvicorn and gunicorn start where nobody tells them: WEB_CONCURRENCY, or 1."""
    said = os.environ.get("WEB_CONCURRENCY", "")
    return max(1, int(said)) if said.isdecimal() else 1
