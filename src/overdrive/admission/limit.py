"""How many requests may have a connection at once, and who is next; without I/O, clock, locks or randomness.

A request is admitted once, before its first connection, so that nothing is thrown away that was begun. The limit
follows what statements take in the database, without any waiting. The queue in front of it is served in order. Once
more come than can be answered for longer than a moment, it becomes short, and where even then somebody waits for longer
than was to be foreseen, the newest is next, as the oldest has the least patience left. This is what Maurer, "Fail at
Scale", ACM Queue 13(8), 2015, calls adaptive LIFO; that a queue is good while it empties, and a delay that stands is of
no use to anybody, is from Nichols and Jacobson, "Controlling Queue Delay", ACM Queue 10(5), 2012.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from math import inf, sqrt
from typing import Literal

Priority = Literal["high", "normal", "low"]
#: Why somebody was not admitted: `wait`, it would have been too long; `deadline`, its own time would have run out by
#: then; `full`, too many wait; `late`, it has been too long; `left`, the client has hung up.
Reason = Literal["wait", "deadline", "full", "late", "left"]

#: In this order they are served.
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")

#: Seconds, and requests, that are looked at together before the limit changes.
_WINDOW = 0.1
_SAMPLES = 20
#: How many times as long as alone statements may take: about twice as many are at work then as the database can
#: do at once, and none of its time is lost.
_TOLERANCE = 2.0
#: How much shorter the limit may become at a time.
_LARGEST_CUT = 0.5
#: Of the difference, how much what a statement takes alone is corrected: while few are at work, and by shorter times.
_RELEARN, _CORRECT = 0.5, 0.125
#: Of the difference, how much a request changes what requests take.
_SMOOTHING = 0.05
#: While a delay stands, how many turns may be before one's own: enough that whoever is done has a successor.
_TURNS = 2
#: Seconds of refusing after which a delay stands; what is over by then was a burst.
_INTERVAL = 0.1
#: How many may wait, whatever is predicted: each takes some ten KiB.
_MOST_WAITING = 2_000


class Limit:
    """How many may be at work at once, learned from the times they take: the AIMD of TCP, with a cut by the gradient.

    The gradient is that of Netflix's concurrency-limits (https://github.com/Netflix/concurrency-limits): what
    statements take alone over what they take now. Its baseline does not drift: it goes up only while no more than
    `least` are at work, when nobody of ours is in anybody's way.

    least, most: its bounds. It begins with the upper one, as nothing is known against that.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._now = float(most)
        #: For each kind of request the seconds it takes alone; and since the window began, how many there were and
        #: the seconds they took.
        self._alone: dict[Hashable, float] = {}
        self._window: dict[Hashable, tuple[int, float]] = {}
        self._samples = 0
        self._busiest = 0
        self._until = 0.0

    @property
    def current(self) -> int:
        """Return how many."""
        return int(self._now)

    def learn(self, kind: Hashable, seconds: float, at_work: int, now: float) -> None:
        """Note what a request has taken in the database.

        kind: those of one kind take about as long.
        at_work: how many were at work, itself included.
        """
        if not self._samples:
            self._until = now + _WINDOW
        count, total = self._window.get(kind, (0, 0.0))
        self._window[kind] = count + 1, total + seconds
        self._samples += 1
        self._busiest = max(self._busiest, at_work)
        if self._samples >= _SAMPLES and now >= self._until:
            self._conclude()

    def _conclude(self) -> None:
        alone = self._busiest <= self._least
        taken = expected = 0.0
        for kind, (count, total) in self._window.items():
            before, mean = self._alone.get(kind), total / count
            taken += total
            expected += count * (mean if before is None else before)
            if before is None:
                self._alone[kind] = mean
            elif alone or mean < before:
                self._alone[kind] = before + (mean - before) * (_RELEARN if alone else _CORRECT)
        # A limit that nobody has come up to has nothing to do with it.
        if self._busiest >= self.current:
            if taken > _TOLERANCE * expected and not alone:
                self._now = max(self._least, self._now * max(_LARGEST_CUT, _TOLERANCE * expected / taken))
            else:
                self._now = min(self._most, self._now + sqrt(self._now))
        self._window, self._samples, self._busiest = {}, 0, 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why somebody is not admitted."""

    reason: Reason


class Waiter:
    """Somebody in the queue.

    since, until: when it came, and when an answer is of no use to it any more.
    """

    __slots__ = ("admitted", "answer", "priority", "since", "until")

    def __init__(self, priority: Priority, since: float, until: float = inf) -> None:
        self.priority = priority
        self.since, self.until = since, until
        #: True once it is admitted, and since when.
        self.admitted = 0.0
        self.answer: Refusal | bool | None = None

    def wake(self) -> None:
        """Be told, once, that there is an answer."""


class Queue:
    """Who is admitted. Times are seconds of one clock.

    limit: how many are at work at once.
    max_wait: seconds from when a request comes until it would be answered, beyond which it is refused.

    Of high priority is what must be answered in a storm, too: it is next, whatever else waits. Of low priority is
    what others are rather answered than: it waits half as long, and not at all while a delay stands.
    """

    def __init__(self, limit: Limit, max_wait: float) -> None:
        self.limit = limit
        self.max_wait = max_wait
        self.at_work = 0
        self.admitted = 0
        self.refused: dict[Reason, int] = {"wait": 0, "deadline": 0, "full": 0, "late": 0, "left": 0}
        #: Whether more come than can be answered, for longer than a moment.
        self.stands = False
        self._waiting: dict[Priority, OrderedDict[Waiter, None]] = {each: OrderedDict() for each in PRIORITIES}
        #: Seconds a request has its connection.
        self._service = 0.0
        self._done = 0
        self._last_done = 0.0
        self._refusing_since: float | None = None

    def __len__(self) -> int:
        """Return how many wait."""
        return sum(map(len, self._waiting.values()))

    # Coming

    def ask(self, now: float) -> bool:
        """Admit somebody, if that needs no waiting."""
        if self.at_work >= self.limit.current:
            return False
        # Whoever waits is served as soon as there is room.
        self._begin(now)
        return True

    def join(self, now: float) -> None:
        """Admit somebody who was admitted before, and has more to do: refusing it would waste what it has done."""
        self._begin(now)

    def refusal(self, priority: Priority, now: float, until: float = inf) -> Refusal | None:
        """Say why somebody who comes now would be refused; None where it is not to be.

        until: when an answer is of no use to it any more.
        """
        if self.at_work < self.limit.current:
            return None
        if len(self) >= _MOST_WAITING:
            return Refusal("full")
        ahead = sum(len(self._waiting[each]) for each in PRIORITIES[: PRIORITIES.index(priority) + 1])
        takes = max(self._service, now - self._last_done)
        wait = (ahead + 1) * takes / self.limit.current
        if wait > self._patience(priority, takes):
            return Refusal("wait")
        return Refusal("deadline") if now + wait + takes > until else None

    def _patience(self, priority: Priority, takes: float) -> float:
        """Return how many seconds somebody may have to wait."""
        if priority == "high":
            return self.max_wait
        if self.stands:
            return 0 if priority == "low" else min(_TURNS * takes, self.max_wait)
        return max(self.max_wait / 2, self.max_wait - takes) / (2 if priority == "low" else 1)

    def wait(self, waiter: Waiter, now: float) -> Refusal | None:
        """Put somebody in the queue, or say why not."""
        refusal = self.refuse(waiter.priority, now, waiter.until)
        if refusal is None:
            self._waiting[waiter.priority][waiter] = None
        return refusal

    def refuse(self, priority: Priority, now: float, until: float = inf) -> Refusal | None:
        """Refuse somebody who comes, or has not come yet but will, if that is to be."""
        refusal = self.refusal(priority, now, until)
        if refusal is not None:
            self.refused[refusal.reason] += 1
            # Whoever has little time is no sign that more come than can be answered.
            if priority == "normal" and refusal.reason != "deadline":
                self._persevere(now)
        return refusal

    def _persevere(self, now: float) -> None:
        """Note that somebody is refused, or has waited in vain; find out if that goes on for too long to be a burst."""
        if self._refusing_since is None:
            self._refusing_since = now
        elif not self.stands and now - self._refusing_since >= _INTERVAL:
            self.stands = True
            # The oldest would be answered last.
            for priority in PRIORITIES[1:]:
                queue = self._waiting[priority]
                for waiter in list(queue)[: max(0, len(queue) - _TURNS * self.limit.current)]:
                    del queue[waiter]
                    self._answer(waiter, Refusal("late"))

    # Going

    def leave(self, waiter: Waiter, now: float) -> Refusal:
        """Take somebody out of the queue whose client does not wait, and give on what it was given meanwhile."""
        self.refused["left"] += 1
        if waiter in self._waiting[waiter.priority]:
            del self._waiting[waiter.priority][waiter]
            if now - waiter.since > self.max_wait / 2:
                self._persevere(now)
            self._look(now)
        elif waiter.answer is True:
            self.forgo(now)
        return Refusal("left")

    def forgo(self, now: float) -> None:
        """Note that somebody who was admitted has no need of it."""
        self.admitted -= 1
        self.at_work -= 1
        self._serve(now)

    def done(self, took: float, now: float) -> None:
        """Note that one of those at work is done.

        took: seconds for which it had a connection.
        """
        self.at_work -= 1
        self._last_done = now
        self._done += 1
        # The first ones, which open connections, are not to be remembered for long.
        self._service += (took - self._service) * max(_SMOOTHING, 1 / self._done)
        self._serve(now)

    def tick(self, now: float) -> None:
        """Refuse whoever has waited for too long."""
        for queue in self._waiting.values():
            while queue and (oldest := next(iter(queue))).since + self.max_wait <= now:
                del queue[oldest]
                self._answer(oldest, Refusal("late"))
                self._persevere(now)
        self._look(now)

    def due(self) -> float | None:
        """Return when somebody will have waited for too long; None where nobody waits."""
        oldest = [next(iter(queue)).since for queue in self._waiting.values() if queue]
        return min(oldest) + self.max_wait if oldest else None

    # Rules

    def _begin(self, now: float) -> None:
        if not self.at_work:
            self._last_done = now
        self.at_work += 1
        self.admitted += 1

    def _serve(self, now: float) -> None:
        while self.at_work < self.limit.current and (queue := self._next()):
            waiter, _ = queue.popitem(last=self._is_late(next(iter(queue)), now))
            self._begin(now)
            waiter.admitted = now
            self._answer(waiter, True)
        self._look(now)

    def _next(self) -> OrderedDict[Waiter, None] | None:
        return next((queue for queue in self._waiting.values() if queue), None)

    def _is_late(self, oldest: Waiter, now: float) -> bool:
        """Say whether those who came first have waited for longer than was to be foreseen: the newest go first."""
        return self.stands and now - oldest.since > 2 * _TURNS * self._service

    def _answer(self, waiter: Waiter, answer: Refusal | Literal[True]) -> None:
        if isinstance(answer, Refusal):
            self.refused[answer.reason] += 1
        waiter.answer = answer
        waiter.wake()

    def _look(self, now: float) -> None:
        """Find out whether it is over: the queue has emptied, or, before a delay stands, has gone down by half."""
        if self.stands:
            if not len(self):
                self.stands, self._refusing_since = False, None
        elif self._refusing_since is not None:
            takes = max(self._service, now - self._last_done)
            if len(self) * takes / self.limit.current < self.max_wait / 2:
                self._refusing_since = None
