"""From rounds to a ratio with its interval. No clock, no randomness."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median
from typing import NamedTuple

from benchmarks.results import Claim, Entry

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A median and the interval that holds it with at least `CONFIDENCE`."""

    value: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate a median by order statistics, which presume nothing about how the values are distributed.

    The interval runs from the k-th smallest to the k-th largest value; it misses the median with the
    probability that fewer than k of n fair coins show heads, on either side (Conover, Practical Nonparametric
    Statistics, 3.2). With fewer than six values no interval has a confidence of 95 %: then it is unbounded.
    """
    ordered, count = sorted(values), len(values)
    missed, rank = 0.0, 0
    while rank < count and 2 * (missed + comb(count, rank) / 2**count) <= 1 - CONFIDENCE:
        missed += comb(count, rank) / 2**count
        rank += 1
    if rank == 0:
        return Estimate(median(ordered), 0.0, float("inf"))
    return Estimate(median(ordered), ordered[rank - 1], ordered[-rank])


def speed(entry: Entry, against: Entry) -> Estimate:
    """How many times as fast as `against` an entry is: CPU time per request against its own, round by round.

    Both took their turn within the same seconds, so what slows the machine down for a while slows down both.
    """
    pairs = zip(entry.rounds, against.rounds, strict=True)
    return estimate([theirs.cpu_per_request / own.cpu_per_request for own, theirs in pairs])


def verdict(claim: Claim, measured: Estimate) -> str:
    """Say `holds` if all of the interval is on the claim's side, `fails` if none of it is, else `undecided`."""
    if measured.low >= claim.factor:
        return "holds"
    return "fails" if measured.high < claim.factor else "undecided"
