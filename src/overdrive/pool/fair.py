"""Who gets which connection, and when: the state of a pool, without I/O, clock, locks or randomness.

A *place* is the right to one backend of the server. It is taken from the moment somebody may connect until what was
connected is closed for certain, so that the server never sees more connections than there are places. Whatever comes
free goes to the oldest in the queue, never to a newcomer (as in HikariCP and PgBouncer; SQLAlchemy's own queue lets
newcomers pass).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

#: Seconds before a connection is tried again after so many failures in a row, the last for all that follow. The first
#: time at once: it may have been that connection alone.
_BACK_OFF = (0.0, 0.05, 0.1, 0.2, 0.4)
#: Seconds for which a database that is away is waited for; then whoever has nothing to wait for is told at once.
_PATIENCE = 1.0


class Place:
    """The right to open a connection."""


PLACE: Final = Place()


class Pooled:
    """A connection as the pool sees it.

    home: where it has its place.
    resource: whatever the shell needs.
    expires: when it is replaced.
    """

    __slots__ = ("alive_at", "expires", "home", "idle_since", "resource", "taken_at")

    def __init__(self, home: Fair, resource: Any, expires: float) -> None:
        self.home = home
        self.resource = resource
        self.expires = expires
        #: When it was last taken, when it came back, and when it last gave a sign of life.
        self.taken_at = self.idle_since = self.alive_at = 0.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why somebody gets no connection, and in how many seconds it may be worth asking again."""

    reason: str
    retry_after: float


Answer = Pooled | Place | Refusal


class Waiter:
    """Somebody in the queue.

    deadline: when it gives up.
    """

    __slots__ = ("answer", "deadline")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.answer: Answer | None = None

    def wake(self) -> None:
        """Be told, once, that there is an answer."""


class Fair:
    """The places of a pool, its idle connections and its queue. Times are seconds of one clock.

    size: connections kept open.
    overflow: connections opened beyond `size` under load.
    linger: seconds one of these stays open after its last use.
    max_waiting: how many may wait at once.
    min_idle: connections that are to be idle, of `size` at most.
    """

    def __init__(self, size: int, overflow: int, *, linger: float, max_waiting: int, min_idle: int = 0) -> None:
        self.size = size
        self.cap = size + overflow
        self.linger = linger
        self.max_waiting = max_waiting
        self.min_idle = min_idle
        #: The one used last is the next to be used, so that what is not needed ages.
        self.idle: list[Pooled] = []
        self.used = 0
        self.connecting = 0
        self.closing = 0
        self.waiters: OrderedDict[Waiter, None] = OrderedDict()
        #: Attempts to connect that have failed since one succeeded, the first of them and when the next may be made.
        self.failures = 0
        self.failing_since = 0.0
        self.retry_at = 0.0

    @property
    def taken(self) -> int:
        """Return how many places are taken."""
        return self.used + self.connecting + self.closing + len(self.idle)

    # Getting

    def ask(self, now: float) -> Pooled | Place | None:
        """Return an idle connection, or `PLACE` to open one and say `opened` or `failed`; None where one must wait."""
        return None if self.waiters else self._take(now)

    def wait(self, waiter: Waiter, now: float, *, first: bool = False) -> Refusal | None:
        """Put somebody in the queue who was given nothing, or say why not.

        first: before all others, as one who had been given something of no use.
        """
        if (refusal := self._hopeless(now)) is not None:
            return refusal
        if len(self.waiters) >= self.max_waiting and not first:
            return Refusal(f"{self._all_in_use()}, and {len(self.waiters)} are waiting for one already", 1)
        self.waiters[waiter] = None
        if first:
            self.waiters.move_to_end(waiter, last=False)
        # Something may have come free since it asked.
        self._serve(now)
        return None

    def leave(self, waiter: Waiter, now: float) -> None:
        """Take somebody out of the queue who no longer waits, and give on what it was given in the meantime."""
        if waiter in self.waiters:
            del self.waiters[waiter]
            return
        answer, waiter.answer = waiter.answer, None
        if isinstance(answer, Place):
            self.forgo(now)
        elif isinstance(answer, Pooled):
            self.give(answer, now)

    # Opening

    def opened(self, now: float) -> None:
        """Note that a place was used to open a connection, which is in use now."""
        self.connecting -= 1
        self.used += 1
        self.failures = 0
        self._serve(now)

    def failed(self, now: float, luck: float) -> None:
        """Note that no connection could be opened; the next in the queue may try.

        luck: between 0 and 1, so that not all pools of a service try in the same instant.
        """
        self.connecting -= 1
        if not self.failures:
            self.failing_since = now
        delay = _BACK_OFF[min(self.failures, len(_BACK_OFF) - 1)]
        self.retry_at = now + delay * (0.5 + luck / 2)
        self.failures += 1
        if (refusal := self._hopeless(now)) is not None:
            while self.waiters:
                self._answer(refusal)
        self._serve(now)

    def forgo(self, now: float) -> None:
        """Give back a place in which nothing was opened, through nobody's fault."""
        self.connecting -= 1
        self._serve(now)

    # Giving back

    def give(self, connection: Pooled, now: float) -> None:
        """Take back a connection that is as good as before."""
        connection.idle_since = connection.alive_at = now
        if self.waiters:
            self._answer(connection)
        else:
            self.used -= 1
            self.idle.append(connection)

    def give_back_unused(self, connection: Pooled, now: float) -> None:
        """Take back a connection that `silent` gave, and that has answered; it is no younger for it."""
        connection.alive_at = now
        if self.waiters:
            self._answer(connection)
        else:
            self.used -= 1
            self.idle.insert(0, connection)

    def free(self, now: float) -> None:
        """Take back the place of a connection in use that is closed, or counted among those closing."""
        self.used -= 1
        self._serve(now)

    def closes(self) -> None:
        """Note that a connection is about to be closed, the place of which is given back by `free` as well."""
        self.closing += 1

    def closed(self, now: float) -> None:
        """Note that one of the closing connections is closed for certain."""
        self.closing -= 1
        self._serve(now)

    # Time

    def tick(self, now: float) -> list[Pooled]:
        """Do what is due; return idle connections to be closed, which count as in use until `free`."""
        for waiter in [each for each in self.waiters if each.deadline <= now]:
            self.waiters.move_to_end(waiter, last=False)
            self._answer(Refusal(f"{self._all_in_use()}, and none came back in time", 1))
        self._serve(now)
        surplus = max(0, self.taken - self.closing - self.size)
        unneeded: list[Pooled] = []
        kept: list[Pooled] = []
        for connection in self.idle:
            lingered = len(unneeded) < surplus and connection.idle_since + self.linger <= now
            (unneeded if lingered or connection.expires <= now else kept).append(connection)
        self.idle = kept
        self.used += len(unneeded)
        return unneeded

    def silent(self, now: float, seconds: float) -> Pooled | None:
        """Return the idle connection that has given no sign of life for longest, and for `seconds` at least.

        It counts as in use until `give_back_unused` or `free`. One at a time, so that there are others to be had.
        """
        if not self.idle or (silent := min(self.idle, key=_alive_at)).alive_at + seconds > now:
            return None
        self.idle.remove(silent)
        self.used += 1
        return silent

    def refill(self, now: float) -> Place | None:
        """Return a place to open a connection in that nobody waits for, where fewer than `min_idle` are idle."""
        enough = len(self.idle) + self.connecting >= self.min_idle or self.taken >= self.size
        if enough or not self._may_try(now):
            return None
        self.connecting += 1
        return PLACE

    def due(self) -> float | None:
        """Return when somebody in the queue is to be answered at the latest; None where nobody waits."""
        if not self.waiters:
            return None
        deadline = min(each.deadline for each in self.waiters)
        return min(deadline, self.retry_at) if self.backs_off else deadline

    @property
    def backs_off(self) -> bool:
        """Say whether places are kept free until `retry_at`, though somebody may be waiting."""
        return bool(self.failures) and not self.connecting and self.taken < self.cap

    # Rules

    def _take(self, now: float) -> Pooled | Place | None:
        if self.idle:
            self.used += 1
            return self.idle.pop()
        if self.taken < self.cap and self._may_try(now):
            self.connecting += 1
            return PLACE
        return None

    def _may_try(self, now: float) -> bool:
        """One at a time tries whether a database that refused the last one is back."""
        return not self.failures or (not self.connecting and now >= self.retry_at)

    def _serve(self, now: float) -> None:
        while self.waiters and (something := self._take(now)) is not None:
            self._answer(something)

    def _answer(self, answer: Answer) -> None:
        waiter, _ = self.waiters.popitem(last=False)
        waiter.answer = answer
        waiter.wake()

    def _hopeless(self, now: float) -> Refusal | None:
        """Refuse where the database has been away for a while, and no connection is left that might come back."""
        if not self.failures or now - self.failing_since < _PATIENCE or self.used or self.idle:
            return None
        away = f"the database refused {self.failures} connections in the last {now - self.failing_since:.1f} s"
        return Refusal(away, max(self.retry_at - now, 1))

    def _all_in_use(self) -> str:
        return (
            f"all {self.cap} connections of the pool are taken ({self.used} in use, {self.connecting} being opened, "
            f"{self.closing} being closed)"
        )


def _alive_at(connection: Pooled) -> float:
    return connection.alive_at
