"""Durations counted by buckets: what is counted where it happens is added to plain integers."""

from __future__ import annotations

from bisect import bisect_left

#: Seconds, the upper ends of the buckets: those OpenTelemetry advises for `db.client.operation.duration`.
BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


class Histogram:
    """Durations.

    counts: for each of `BOUNDS` those up to it and beyond the one before, and those beyond the last.
    sum: seconds.
    """

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def note(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds
