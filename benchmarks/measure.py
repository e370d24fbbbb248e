"""Rounds of a comparison and phases of a storm, with real processes and real load."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import count
from operator import sub
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
#: Clients that keep five connections busy, and what they ask for to find out what these can do.
_CEILING_CONNECTIONS, _CEILING_REQUESTS = 10, 200
#: How much of its capacity a service is asked before a storm, and by how many requests; seconds these may take.
_WARM_LOAD, _WARM_REQUESTS, _PATIENCE = 0.8, 50, 10


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
    entries = []
    for rival in storm.rivals:
        attainable = _attainable(storm.ceiling, environment)
        entries.append(_weather(rival, storm, schedule, environment, attainable))
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


def _attainable(ceiling: Rival, environment: dict[str, str]) -> float:
    """Return how many requests a second are answered where connections never wait for one."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        server = Server(ceiling.factory, Path(directory), environment)
        stack.callback(server.stop)
        load = ClosedLoop(server.port, ceiling.path, _CEILING_CONNECTIONS)
        stack.callback(load.close)
        load.run(_CEILING_CONNECTIONS)
        started = time.perf_counter()
        return len(load.run(_CEILING_REQUESTS)) / (time.perf_counter() - started)


def _weather(
    rival: Rival, storm: Storm, schedule: list[list[float]], environment: dict[str, str], attainable: float
) -> OverloadEntry:
    cpu: list[float] = []
    try:
        with tempfile.TemporaryDirectory() as directory:
            server = Server(rival.factory, Path(directory), environment)
            try:
                _warm_up(server, rival, storm.capacity)
                begins = partial(_note, cpu, server)
                answers = run_open(server.port, rival.paths, schedule, storm.deadline, begins)
                begins()
            finally:
                server.stop()
    except RivalError as error:
        return OverloadEntry(rival.name, rival.ours, [], str(error))
    phases = [
        _phase(load, seconds, phase, storm.deadline, used)
        for (load, seconds), phase, used in zip(storm.phases, answers, map(sub, cpu[1:], cpu), strict=True)
    ]
    normal = _normal(schedule[2], answers[2], sum(seconds for _, seconds in storm.phases[:2]), storm.deadline)
    return OverloadEntry(rival.name, rival.ours, phases, attainable=attainable, normal_after=normal)


def _warm_up(server: Server, rival: Rival, capacity: float) -> None:
    """Have connections opened, and copies made where there are to be any."""
    server.get(rival.paths[0])
    every = 1 / (_WARM_LOAD * capacity)
    due = [number * every for number in range(max(_WARM_REQUESTS, rival.addresses))]
    run_open(server.port, rival.paths, [due], deadline=_PATIENCE)


def _note(cpu: list[float], server: Server) -> None:
    cpu.append(server.cpu_unasked())


def _phase(load: float, seconds: float, answers: list[Answer], deadline: float, cpu: float) -> Phase:
    good = [answer.latency for answer in answers if _is_good(answer, deadline)]
    refused = [answer.latency for answer in answers if answer.status not in (200, None)]
    p50, p99 = _percentiles(good) if len(good) > 1 else (None, None)
    _, lag = _percentiles([answer.lag for answer in answers])
    _, refused_p99 = _percentiles(refused) if len(refused) > 1 else (None, None)
    late = len(answers) - len(good) - len(refused)
    return Phase(load, seconds, len(answers), len(good), len(refused), late, p50, p99, lag, refused_p99, cpu)


def _is_good(answer: Answer, deadline: float) -> bool:
    return answer.status == 200 and answer.latency <= deadline


def _normal(schedule: list[float], answers: list[Answer], end: float, deadline: float) -> float | None:
    """Return how many seconds after the storm's end a second began in which each request was answered in time."""
    since = end
    for due, answer in zip(schedule, answers, strict=True):
        if due - since >= 1:
            return since - end
        if not _is_good(answer, deadline):
            since = due
    return None


def _percentiles(values: list[float]) -> tuple[float, float]:
    cuts = quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]
