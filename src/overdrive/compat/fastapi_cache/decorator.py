"""`cache`, where fastapi-cache2 has it."""

from . import cache

__all__ = ["cache"]
