"""How far the cache is trusted with each route, and how it has done."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, TypeAlias

Mode: TypeAlias = Literal["on", "shadow", "off"]

#: What stands for all routes where one is named that is switched off.
EVERYTHING = "*"

#: Seconds between two warnings about one route.
_WARNING_INTERVAL = 60.0


class Trust:
    """One cached route: how its hits are treated, and what has become of its requests in this process.

    mode: "on" answers with what is kept; "shadow" never does, and compares it with what the endpoint gives; "off"
        leaves the cache out.
    verify: the share of hits that are treated as in shadow, from 0 to 1.
    declared: the names a response may have by its declaration, which may be told of a difference.

    What is counted are requests: `at_once` those answered by the Observer, `early` before routing and `late` behind
    the dependencies; `misses`, of which `stale` found something that was not valid any more; `bypassed` by their
    reasons, of which "shadow" and "verify" found something that was not sent. Then `checked` and `mismatches`:
    comparisons, and those that found a difference; `stores`, `refused` and `bytes`: responses that were kept, that
    were not as something they had read was written meanwhile or the store was away, and the bytes of bodies kept.
    """

    __slots__ = (
        "at_once",
        "bypassed",
        "bytes",
        "checked",
        "declared",
        "due",
        "early",
        "late",
        "mismatches",
        "misses",
        "mode",
        "refused",
        "stale",
        "stores",
        "untold",
        "verify",
        "warned",
    )

    def __init__(self, mode: Mode = "on", verify: float = 0.0, declared: Collection[str] = ()) -> None:
        self.mode = mode
        self.verify = verify
        self.declared = declared
        #: Whether the next hit is to be verified: decided after each, so that whoever asks first need not tell others.
        self.due = False
        self.at_once = self.early = self.late = self.misses = self.stale = 0
        self.stores = self.refused = self.bytes = self.checked = self.mismatches = 0
        self.bypassed: Counter[str] = Counter()
        #: Differences nobody was told of, since the last warning and when that was.
        self.untold = 0
        self.warned = float("-inf")
        self._decide()

    def _decide(self) -> None:
        """Decide whether the next hit is to be verified."""
        if self.verify:
            self.due = random.random() < self.verify

    def doubts(self) -> str | None:
        """Say why this hit is not to be answered with what is kept, in a word for Cache-Status; None where it is."""
        if self.mode == "shadow":
            return "shadow"
        due = self.due
        self._decide()
        return "verify" if due else None

    def answered_at_once(self) -> None:
        """Count a hit that was answered before the app's own call, and decide on the next."""
        self.at_once += 1
        self._decide()

    def count(self, mark: str, why: str) -> None:
        """Count a request that was not answered before routing: hit, miss or bypass, and why."""
        match mark:
            case "hit":
                self.late += 1
            case "miss":
                self.misses += 1
                self.stale += why == "stale"
            case _:
                self.bypassed[why] += 1

    def stored(self, size: int | None) -> None:
        """Count a response that was to be kept, by the bytes of its body, or None where it was not."""
        if size is None:
            self.refused += 1
        else:
            self.stores += 1
            self.bytes += size

    def may_warn(self) -> bool:
        """Say whether it is time for a warning again."""
        now = time.monotonic()
        if now - self.warned < _WARNING_INTERVAL:
            return False
        self.warned = now
        return True

    def counts(self) -> dict[str, int]:
        """Return what was counted, by name; a reason of `bypassed` as `bypassed.reason`."""
        # Another thread may read them while requests are counted.
        bypassed = list(self.bypassed.items())
        return {name: getattr(self, name) for name in _COUNTS} | {f"bypassed.{why}": count for why, count in bypassed}


_COUNTS = (
    "at_once",
    "early",
    "late",
    "misses",
    "stale",
    "stores",
    "refused",
    "bytes",
    "checked",
    "mismatches",
)


def requests(counts: Mapping[str, int]) -> int:
    """Return how many requests there were, by what was counted of a route."""
    return hits(counts) + counts.get("misses", 0) + sum(n for name, n in counts.items() if name.startswith("bypassed."))


def hits(counts: Mapping[str, int]) -> int:
    """Return how many of them were hits."""
    return counts.get("at_once", 0) + counts.get("early", 0) + counts.get("late", 0)


class Ledger:
    """The cached routes of a service, by name (`GET /users/{user_id}`), and what of their counts was reported."""

    def __init__(self) -> None:
        self.routes: dict[str, Trust] = {}
        self._reported: Counter[tuple[str, str]] = Counter()

    def statistics(self) -> dict[str, dict[str, int]]:
        """Return the counts of each route."""
        return {route: trust.counts() for route, trust in self.routes.items()}

    def unreported(self) -> dict[tuple[str, str], int]:
        """Return what was counted since the last report, by route and name."""
        counted = {(route, name): n for route, counts in self.statistics().items() for name, n in counts.items()}
        return {key: n - self._reported[key] for key, n in counted.items() if n != self._reported[key]}

    def reported(self, counts: dict[tuple[str, str], int]) -> None:
        """Note that these were reported."""
        self._reported.update(counts)


def is_off(off: Collection[str], route: str | None) -> bool:
    """Say whether a route is among those that are off."""
    return EVERYTHING in off or route in off


def template_of(name: str) -> str:
    """Return the template of a route that is named with its method, `GET /users/{user_id}`, or without."""
    return name.rpartition(" ")[2]


def is_known(name: str, routes: Iterable[str]) -> bool:
    """Say whether a name, with a method or without, is that of one of these routes, which have theirs."""
    methods, _, template = name.rpartition(" ")
    for route in routes:
        served, _, known = route.rpartition(" ")
        if template == known and (not methods or methods.upper() in (served, *served.split("/"))):
            return True
    return False
