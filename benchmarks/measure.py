"""Rounds of a comparison and phases of a storm, with real processes and real load."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from random import Random
from statistics import quantiles

from benchmarks.comparisons import Plan, Rival, Storm
from benchmarks.load import Answer, ClosedLoop, LoadError, run_open
from benchmarks.process import RivalError, Server, database_cpu
from benchmarks.results import Comparison, Entry, Overload, OverloadEntry, Phase, Round

#: Seconds of load after which a rival is warm, and it is known how many requests make a turn.
_WARM_UP = 0.5
#: Seconds of a turn. What slows a machine down comes and goes within tenths of a second: with turns of 0.4 s
#: the A/A pair of a shared machine differed by 12 %, with as many seconds in turns of 0.03 s by 1 %.
_TURN = 0.03
FEWEST_ROUNDS = 5
#: How often all rivals are started anew: two processes of the same app differ by some percent for as long as they
#: live, by where things happen to lie in memory.
CASTS = 3


def compare(plan: Plan, seconds: float, random: Random, environment: dict[str, str]) -> Comparison:
    """Let rivals take turns under the same load, in another order each round.

    Parameters:
        seconds: how long to go on, in all, once the rivals are warm; there are `FEWEST_ROUNDS` a cast at least.
        random: decides the order.
        environment: tells the rivals where the databases are.

    Raises `RivalError` if the baseline fails, as there is nothing to compare with then.
    """
    baseline, *others = plan.rivals
    twin = baseline._replace(name=f"{baseline.name} (A/A)")
    contestants = [_Contestant(rival, plan.connections) for rival in (baseline, twin, *others)]
    for _ in range(CASTS):
        with ExitStack() as stack:
            _each(contestants, lambda contestant: contestant.start(stack, environment))
            _each(contestants, lambda contestant: contestant.agree(contestants[0]))
            _each(contestants, lambda contestant: contestant.warm_up())
            end = time.perf_counter() + seconds / CASTS
            for number in count():
                if number >= FEWEST_ROUNDS and time.perf_counter() > end:
                    break
                _each(random.sample(contestants, len(contestants)), lambda contestant: contestant.take_turn())
    for contestant in contestants[:2]:
        if contestant.failure is not None:
            raise RivalError(f"{contestant.rival.name}: {contestant.failure}")
    entries = [contestant.entry() for contestant in contestants]
    return Comparison(plan.name, plan.title, plan.connections, entries, plan.claims)


class _Contestant:
    """A rival in the course of a comparison. Once it has failed, it is left out."""

    def __init__(self, rival: Rival, connections: int) -> None:
        self.rival = rival
        self.failure: str | None = None
        self._connections = connections
        self._rounds: list[Round] = []

    def start(self, stack: ExitStack, environment: dict[str, str]) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._server = Server(self.rival.factory, directory, environment)
        stack.callback(self._server.stop)
        self._load = ClosedLoop(self._server.port, self.rival.path, self._connections)
        stack.callback(self._load.close)

    def agree(self, baseline: _Contestant) -> None:
        """Raise `RivalError` if this answers anything else, envelopes aside, than the baseline does."""
        answer = self._answer()
        # Twice, as the second answer may come from a cache.
        if not answer == self._answer() == baseline._answer():
            raise RivalError(f"answers something else: {answer}")

    def _answer(self) -> object:
        body = json.loads(self._server.get(self.rival.path))
        return body.get("items", body)

    def warm_up(self) -> None:
        requests, seconds = self._connections, 0.0
        while seconds < _WARM_UP:
            requests *= 2
            database, started = database_cpu(), time.perf_counter()
            self._load.run(requests)
            seconds, database = time.perf_counter() - started, database_cpu() - database
        self._database_cpu = database / requests
        # Two, or there is no percentile.
        self._requests = max(self._connections, 2, round(requests * _TURN / seconds))

    def take_turn(self) -> None:
        server, started = self._server.cpu(), time.perf_counter()
        latencies = self._load.run(self._requests)
        seconds = time.perf_counter() - started
        server = self._server.cpu() - server
        self._rounds.append(Round(self._requests, seconds, server, *_percentiles(latencies)))

    def entry(self) -> Entry:
        if self.failure is not None:
            return Entry(self.rival.name, self.rival.ours, [], failure=self.failure)
        return Entry(self.rival.name, self.rival.ours, self._rounds, self._database_cpu)


def _each(contestants: Iterable[_Contestant], step: Callable[[_Contestant], None]) -> None:
    for contestant in contestants:
        if contestant.failure is None:
            try:
                step(contestant)
            except (RivalError, LoadError) as error:
                contestant.failure = str(error)


def overload(storm: Storm, random: Random, environment: dict[str, str]) -> Overload:
    """Offer each service loads below and beyond its capacity, at instants that do not wait for its answers."""
    schedule = list(_schedule(storm, random))
    entries = [_weather(rival, storm, schedule, environment) for rival in storm.rivals]
    return Overload(storm.name, storm.title, storm.capacity, storm.deadline, entries)


def _schedule(storm: Storm, random: Random) -> Iterable[list[float]]:
    """Instants of a Poisson process for each phase, the same for every service."""
    now = end = 0.0
    for load, seconds in storm.phases:
        end += seconds
        phase = []
        while (now := now + random.expovariate(load * storm.capacity)) < end:
            phase.append(now)
        yield phase
        now = end


def _weather(rival: Rival, storm: Storm, schedule: list[list[float]], environment: dict[str, str]) -> OverloadEntry:
    try:
        with tempfile.TemporaryDirectory() as directory:
            server = Server(rival.factory, Path(directory), environment)
            try:
                server.get(rival.path)
                answers = run_open(server.port, rival.path, schedule, storm.deadline)
            finally:
                server.stop()
    except RivalError as error:
        return OverloadEntry(rival.name, rival.ours, [], str(error))
    phases = [
        _phase(load, seconds, phase, storm.deadline)
        for (load, seconds), phase in zip(storm.phases, answers, strict=True)
    ]
    return OverloadEntry(rival.name, rival.ours, phases)


def _phase(load: float, seconds: float, answers: list[Answer], deadline: float) -> Phase:
    good = [answer.latency for answer in answers if answer.status == 200 and answer.latency <= deadline]
    refused = sum(answer.status not in (200, None) for answer in answers)
    p50, p99 = _percentiles(good) if len(good) > 1 else (None, None)
    _, lag = _percentiles([answer.lag for answer in answers])
    return Phase(load, seconds, len(answers), len(good), refused, len(answers) - len(good) - refused, p50, p99, lag)


def _percentiles(values: list[float]) -> tuple[float, float]:
    cuts = quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]
