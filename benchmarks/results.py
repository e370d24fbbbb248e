"""What a run has measured, as it is written to `results.json`."""

from __future__ import annotations

from msgspec import Struct


class Round(Struct, frozen=True):
    """One entry's turn in one round; all durations are in seconds."""

    requests: int
    seconds: float
    server_cpu: float
    p50: float
    p99: float

    @property
    def cpu_per_request(self) -> float:
        """The server's CPU time per request, in seconds: what the noise of a shared machine touches least."""
        return self.server_cpu / self.requests


class Entry(Struct, frozen=True):
    """What one rival did in a comparison: its rounds, or why it has none.

    The CPU time of PostgreSQL and Redis per request, in seconds, is that of the warm-up: they count in ticks of
    10 ms, too coarse for a round.
    """

    name: str
    ours: bool
    rounds: list[Round]
    database_cpu: float = 0.0
    failure: str | None = None


class Claim(Struct, frozen=True):
    """That `entry` is at least `factor` times as fast as `against`, in CPU time of the server per request."""

    entry: str
    against: str
    factor: float


class Comparison(Struct, frozen=True):
    """Entries that took turns over the same rounds. The first is the baseline, the second its twin, the A/A pair."""

    name: str
    title: str
    connections: int
    entries: list[Entry]
    claims: list[Claim]


class Phase(Struct, frozen=True):
    """A stretch of open-loop load: requests sent when they were due, whatever became of those before.

    Latencies run from the moment a request was due, in seconds, over the answers that came within the deadline.
    """

    load: float
    seconds: float
    offered: int
    good: int
    refused: int
    late: int
    p50: float | None
    p99: float | None
    #: How far behind its schedule the generator itself was, at the 99th percentile, in seconds.
    lag_p99: float
    #: What refusals took, at the 99th percentile, and the server's CPU time: both in seconds.
    refused_p99: float | None
    server_cpu: float


class Overload(Struct, frozen=True):
    """What a service with a known capacity made of loads below and beyond it."""

    name: str
    title: str
    capacity: float
    deadline: float
    entries: list[OverloadEntry]


class OverloadEntry(Struct, frozen=True):
    """One service's phases, in the order in which they followed each other: calm, storm, and what came after it.

    attainable: requests a second that its connections could answer just before, with nothing else to do.
    normal_after: seconds after the storm from which on each request of a whole second was answered in time; None where
        that never came.
    """

    name: str
    ours: bool
    phases: list[Phase]
    failure: str | None = None
    attainable: float = 0.0
    normal_after: float | None = None

    @property
    def cpu_good(self) -> float:
        """The server's CPU time for an answer, in seconds, while it is calm."""
        calm = self.phases[0]
        return calm.server_cpu / max(1, calm.good)

    @property
    def cpu_other(self) -> float:
        """The server's CPU time for a request that is not answered in time, in seconds, in the storm."""
        storm = self.phases[1]
        return max(0.0, storm.server_cpu - storm.good * self.cpu_good) / max(1, storm.offered - storm.good)

    @property
    def ceiling(self) -> float:
        """Good answers a second that are possible in the storm, as whatever is not answered takes CPU time, too."""
        storm, good, other = self.phases[1], self.cpu_good, self.cpu_other
        offered = storm.offered / storm.seconds
        by_cpu = (1 - offered * other) / (good - other) if good > other else offered
        return max(0.0, min(self.attainable, by_cpu))


class DiskEntry(Struct, frozen=True):
    """What one rival did while its log was read in some way; durations in seconds."""

    name: str
    ours: bool
    #: The share of requests that were answered in time, and the 99th percentile of their latencies.
    answered: float
    p99: float | None
    #: What a log call took its caller: the median, the 99.9th percentile, the longest.
    call: float
    call_p999: float
    longest_call: float


class DiskState(Struct, frozen=True):
    """One way in which logs are read, and for how many seconds."""

    name: str
    seconds: float
    entries: list[DiskEntry]


class Results(Struct, frozen=True):
    """A whole run."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    seed: int
    comparisons: list[Comparison]
    overloads: list[Overload]
    disks: list[DiskState] = []
