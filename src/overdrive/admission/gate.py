"""The gates in front of the databases: a request asks there once, before its first connection."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from math import inf

from overdrive.context import RequestContext
from overdrive.errors import OverloadedError
from overdrive.waking import wake

from .limit import Limit, Priority, Queue, Refusal, Waiter

Leave = Callable[[], None]

#: The attribute by which an endpoint is marked with its priority.
PRIORITY = "__overdrive_priority__"

#: How fast it is learned which endpoints need a database, and which share of their requests must have asked for one
#: before they are refused unbegun.
_LEARNING, _NEEDED = 0.1, 0.9
#: How many times `max_wait` clients are told to stay away, at random, so that they do not all come back at once.
_SOONEST, _LATEST = 2, 8


class Visit:
    """A request, as the gates see it."""

    __slots__ = ("_is_over", "context", "gate", "holds", "is_admitted", "measured", "since")

    def __init__(self, context: RequestContext) -> None:
        self.context = context
        #: The first gate it came to, which counts it for as long as it holds connections.
        self.gate: Gate | None = None
        self.is_admitted = False
        self.holds = 0
        #: Since when it does, and how long its statements had taken until then.
        self.since = self.measured = 0.0
        self._is_over = False

    @classmethod
    def of(cls, context: RequestContext) -> Visit | None:
        """Return a request that asks for a database; None for what cannot be refused: a websocket, or what is over."""
        if context.visit is None and context.incoming is not None:
            context.visit = cls(context)
        visit: Visit | None = context.visit
        return visit

    @property
    def is_answered(self) -> bool:
        """Say whether there is nothing left to refuse: streams and background tasks go on behind the first byte."""
        return self._is_over or self.context.status is not None

    @property
    def endpoint(self) -> object:
        """Return what the router has led it to."""
        return self.context.scope.get("endpoint")

    @property
    def priority(self) -> Priority:
        """Return what its endpoint was marked with."""
        return _priority_of(self.endpoint, self.context)

    def let_go(self) -> None:
        """Note that a connection is back."""
        if self.holds:
            self.holds -= 1
            if not self.holds and self.gate is not None:
                self.gate.done(self)

    def end(self) -> None:
        """Note that the request is over, whatever it holds yet."""
        self._is_over = True
        if self.holds:
            self.holds = 1
            self.let_go()

    def listen(self, waiting: _Waiting) -> None:
        """Tell `waiting` when the client hangs up."""

        def hang_up() -> None:
            if waiting.answer is None:
                waiting.hung_up = True
                waiting.wake()

        self.context.incoming.watch(hang_up)


class _Waiting(Waiter):
    """A request in the queue."""

    __slots__ = ("hung_up", "woken")

    def __init__(self, priority: Priority, since: float, until: float) -> None:
        super().__init__(priority, since, until)
        self.hung_up = False
        self.woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self) -> None:
        wake(self.woken)


def _priority_of(endpoint: object, context: RequestContext | None) -> Priority:
    marked: Priority = getattr(endpoint, PRIORITY, "normal")
    if context is None or marked != "normal":
        return marked
    # Somebody has an answer already, or there is one to be had.
    spared = context.refreshing or (context.exchange is not None and context.exchange.may_stand_in)
    return "low" if spared else marked


def _until(context: RequestContext) -> float:
    return inf if context.deadline is None else context.deadline


def _nothing() -> None:
    """Note that a connection is back that nobody counts."""


class Gate:
    """The gate in front of one pool.

    size, capacity: connections it keeps open, and the most it opens.
    max_wait: seconds until a request would be answered beyond which it is refused.
    """

    def __init__(self, size: int, capacity: int, max_wait: float) -> None:
        # What a team keeps open is no burst, and is not taken away: what is learned is how many more are of use.
        self._bounds = max(1, min(size, capacity)), capacity
        self._max_wait = max_wait
        self.reset()

    def reset(self) -> None:
        """Begin anew, on another event loop say."""
        self.queue = Queue(Limit(*self._bounds), self._max_wait)
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, context: RequestContext) -> Leave | None:
        """Admit a request at once, and return what says that its connection is back; None where it must `wait`."""
        visit = Visit.of(context)
        if visit is None or visit.is_answered or visit.gate not in (None, self):
            return _nothing
        visit.gate = self
        if visit.holds:
            return self._hold(visit)
        now = time.monotonic()
        if visit.is_admitted:
            self.queue.join(now)
        elif not self.queue.ask(now):
            return None
        return self._admitted(visit, now)

    async def wait(self, context: RequestContext) -> Leave:
        """Have a request wait until it is admitted.

        Raises `OverloadedError` where that would take too long, has taken too long, or is of no use any more.
        """
        visit: Visit = context.visit
        asked = time.monotonic()
        waiting = _Waiting(visit.priority, asked, _until(visit.context))
        refusal = self.queue.wait(waiting, asked)
        if refusal is None:
            self._wake_in_time()
            visit.listen(waiting)
            try:
                await waiting.woken
            except BaseException:
                self.queue.leave(waiting, time.monotonic())
                raise
            finally:
                context.admission_wait += time.monotonic() - asked
            if waiting.hung_up:
                refusal = self.queue.leave(waiting, time.monotonic())
            elif isinstance(waiting.answer, Refusal):
                refusal = waiting.answer
        if refusal is not None:
            context.refused = refusal.reason
            raise self._refused(refusal)
        if visit.holds:
            # Another task of the same request was admitted meanwhile.
            self.queue.forgo(time.monotonic())
            return self._hold(visit)
        # Its turn began when it was given, and not when this task has heard of it.
        return self._admitted(visit, waiting.admitted)

    def refuse(self, priority: Priority, until: float) -> OverloadedError | None:
        """Refuse a request that is not begun, if it would be refused.

        until: when an answer is of no use to it any more.
        """
        refusal = self.queue.refuse(priority, time.monotonic(), until)
        return None if refusal is None else self._refused(refusal)

    def done(self, visit: Visit) -> None:
        """Note that a request has given back what it held."""
        now, queue = time.monotonic(), self.queue
        if taken := visit.context.database_time - visit.measured:
            queue.limit.learn(id(visit.endpoint), taken, queue.at_work, now)
        queue.done(now - visit.since, now)

    def statistics(self) -> dict[str, int]:
        """Return the gate at this moment, and what it has counted."""
        queue = self.queue
        return {
            "limit": queue.limit.current,
            "inflight": queue.at_work,
            "queued": len(queue),
            "admitted": queue.admitted,
            **{f"refused_{reason}": count for reason, count in queue.refused.items()},
        }

    def _admitted(self, visit: Visit, now: float) -> Leave:
        visit.is_admitted = True
        visit.since, visit.measured = now, visit.context.database_time
        return self._hold(visit)

    def _hold(self, visit: Visit) -> Leave:
        visit.holds += 1
        return visit.let_go

    def _refused(self, refusal: Refusal) -> OverloadedError:
        error = OverloadedError(f"the database has too much to do ({refusal.reason})")
        error.reason = refusal.reason
        error.retry_after = self.queue.max_wait * random.uniform(_SOONEST, _LATEST)
        return error

    def _wake_in_time(self) -> None:
        due = self.queue.due()
        if self._timer is None and due is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, due - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.queue.tick(time.monotonic())
        self._wake_in_time()


class Admission:
    """All gates of an app, and what was learned of its endpoints.

    max_wait: see `Gate`.
    """

    def __init__(self, max_wait: float) -> None:
        self._max_wait = max_wait
        self._gates: dict[str, list[Gate]] = {}
        #: By the id of an endpoint, which the app keeps: its gate, and the share of its requests that came to it.
        self._needs: dict[int, tuple[Gate, float]] = {}

    def gate(self, engine: str, size: int, capacity: int) -> Gate:
        """Return a new gate in front of a pool of an engine."""
        gate = Gate(size, capacity, self._max_wait)
        self._gates.setdefault(engine, []).append(gate)
        return gate

    def over(self, context: RequestContext) -> None:
        """Note that a request was run to its end, and whether it has needed a database."""
        visit, context.visit, context.incoming = context.visit, None, None
        key = id(context.scope.get("endpoint"))
        known = self._needs.get(key)
        if visit is not None:
            visit.end()
            if visit.gate is not None:
                share = 0.0 if known is None else known[1]
                self._needs[key] = visit.gate, share + (1 - share) * _LEARNING
                return
        if known is not None:
            self._needs[key] = known[0], known[1] * (1 - _LEARNING)

    @property
    def refuses(self) -> bool:
        """Say whether it is worth asking `refuse`."""
        for gates in self._gates.values():
            for gate in gates:
                if gate.queue:
                    return True
        return False

    def refuse(self, endpoint: object, context: RequestContext | None) -> OverloadedError | None:
        """Refuse a request that is not begun, where its endpoint always needs a database that cannot take it.

        context: the request's, where there is one by now.
        """
        gate, share = self._needs.get(id(endpoint), (None, 0.0))
        if gate is None or share < _NEEDED:
            return None
        return gate.refuse(_priority_of(endpoint, context), inf if context is None else _until(context))

    def reset(self) -> None:
        """Begin anew, on another event loop."""
        for gate in self._every():
            gate.reset()

    def statistics(self) -> dict[str, dict[str, int]]:
        """Return, for each engine by its name, the numbers of `Gate.statistics`, those of its pools together."""
        return {
            engine: {name: sum(gate.statistics()[name] for gate in gates) for name in gates[0].statistics()}
            for engine, gates in self._gates.items()
        }

    def _every(self) -> Iterable[Gate]:
        return (gate for gates in self._gates.values() for gate in gates)
