"""`FairPool`: a pool for SQLAlchemy's engines that is fair, bounded and heals; the rules are in `fair`."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import PoolProxiedConnection, exc
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from overdrive.context import current
from overdrive.errors import ConfigurationError, OverloadedError
from overdrive.instrumentation.numbers import Histogram
from overdrive.waking import wake

from .closing import abandon, close, has_loop, watch
from .fair import Fair, Place, Pooled, Refusal, Waiter
from .holders import Holders
from .housekeeping import housekeeper
from .tasks import start

logger = logging.getLogger("overdrive")

#: Seconds between two looks at what has become too old, not needed or lost.
_TICK = 0.5
#: Seconds a connection has to answer before it is taken for dead.
_PING_TIMEOUT = 1
#: Of its lifetime, how much a connection may live less than another, so that not all are replaced at once.
_JITTER = 0.1

_KEY = "overdrive_pooled"


class PoolTimeoutError(OverloadedError, exc.TimeoutError):
    """No connection was to be had: in time, in the queue, or because the database is away.

    Whoever handles SQLAlchemy's `TimeoutError` handles this one.
    """

    code = "pool_timeout"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A pool at this moment, and what it has counted since it was made.

    The names follow OpenTelemetry's `db.client.connection.*` where it has one.

    idle, used, connecting, closing: connections, each in one of these states.
    max: how many there may be in all.
    pending_requests: how many wait.
    timeouts: how many were refused a connection, for whatever reason.
    waits, wait_time: how many have waited, and for how many seconds in all.
    created, failures: connections opened, and attempts to open one that failed.
    """

    idle: int
    used: int
    connecting: int
    closing: int
    max: int
    pending_requests: int
    timeouts: int
    waits: int
    wait_time: float
    created: int
    failures: int


class _InLoop(Waiter):
    """A greenlet that waits."""

    __slots__ = ("_woken",)

    def __init__(self, deadline: float) -> None:
        super().__init__(deadline)
        self._woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self) -> None:
        """Let it go on."""
        wake(self._woken)

    def block(self) -> None:
        """Wait for an answer."""
        if self.answer is None:
            await_only(self._woken)


class _InThread(Waiter):
    """A thread that waits."""

    __slots__ = ("_woken",)

    def __init__(self, deadline: float) -> None:
        super().__init__(deadline)
        self._woken = threading.Event()

    def wake(self) -> None:
        """Let it go on."""
        self._woken.set()

    def block(self) -> None:
        """Wait for an answer."""
        self._woken.wait()


class FairPool(Pool):
    """A pool that gives what comes free to whoever has waited longest, and never has more connections than it may.

    For async engines and for threads: `create_engine(url, poolclass=FairPool, pool_size=10, max_waiting=100)`. The
    arguments of SQLAlchemy's `QueuePool` mean what they mean there; `use_lifo` is always so.

    pool_size: connections kept open.
    max_overflow: connections opened beyond `pool_size` under load.
    timeout: seconds a checkout waits, for a connection or for one to be opened (`pool_timeout` of an engine).
    max_waiting: how many checkouts may wait at once; left out, ten for each connection, and a hundred at least.
    linger: seconds a connection beyond `pool_size` stays open after its last use.
    validate_after: seconds of idleness after which a connection is asked for an answer: behind the scenes, so that no
        firewall forgets it, and else before it is used.
    min_idle: connections that are to be idle, opened before anybody asks, as long as there are no more than
        `pool_size`.
    leak_after: seconds after which whoever still has a connection is named in a WARNING, with the route and the place
        in the code where it was taken; None for never.
    recycle: seconds a connection lives, less up to a tenth, so that not all are replaced at once; -1 for ever
        (`pool_recycle` of an engine).

    A checkout that fails raises `PoolTimeoutError`.
    """

    def __init__(
        self,
        creator: Any,
        pool_size: int = 10,
        max_overflow: int = 20,
        timeout: float = 30.0,
        max_waiting: int | None = None,
        linger: float = 10.0,
        validate_after: float = 30.0,
        leak_after: float | None = None,
        min_idle: int = 0,
        **options: Any,
    ) -> None:
        if max_waiting is not None and max_waiting < 0:
            raise ConfigurationError(f"a FairPool needs max_waiting >= 0, or None; got {max_waiting}")
        if pool_size < 1 or max_overflow < 0 or timeout <= 0 or linger < 0 or validate_after < 0:
            raise ConfigurationError(
                "a FairPool needs pool_size >= 1, max_overflow >= 0, timeout > 0, linger >= 0 and validate_after >= 0; "
                f"got {pool_size}, {max_overflow}, {timeout}, {linger} and {validate_after}"
            )
        if not 0 <= min_idle <= pool_size:
            raise ConfigurationError(f"a FairPool needs min_idle from 0 to pool_size, {pool_size}; got {min_idle}")
        super().__init__(creator, **options)
        self._options: dict[str, Any] = {
            "pool_size": pool_size,
            "max_overflow": max_overflow,
            "timeout": timeout,
            "max_waiting": max_waiting,
            "linger": linger,
            "validate_after": validate_after,
            "leak_after": leak_after,
            "min_idle": min_idle,
        }
        self._timeout = timeout
        self._validate_after = validate_after
        self._holders = None if leak_after is None else Holders(leak_after)
        # Reentrant: what is collected as garbage gives its connection back from wherever that happens.
        self._lock = threading.RLock()
        self._fair = self._empty()
        self._disposed = False
        _pools.add(self)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tick_at = 0.0
        self._closing: set[asyncio.Task[None]] = set()
        self._last_failure: Exception | None = None
        self._timeouts = self._waits = self._created = self._failures = 0
        self._wait_time = 0.0
        #: How long it took to open connections, to get one and to give it back.
        self.create_time, self.wait_time, self.use_time = Histogram(), Histogram(), Histogram()

    def _empty(self) -> Fair:
        size, overflow = self._options["pool_size"], self._options["max_overflow"]
        max_waiting = self._options["max_waiting"]
        if max_waiting is None:
            max_waiting = max(100, 10 * (size + overflow))
        linger, min_idle = self._options["linger"], self._options["min_idle"]
        return Fair(size, overflow, linger=linger, max_waiting=max_waiting, min_idle=min_idle)

    # What SQLAlchemy's pools say of themselves

    def size(self) -> int:
        """Return how many connections are kept open."""
        return self._fair.size

    def timeout(self) -> float:
        """Return how many seconds a checkout waits."""
        return self._timeout

    def checkedin(self) -> int:
        """Return how many connections are idle."""
        return len(self._fair.idle)

    def checkedout(self) -> int:
        """Return how many connections are in use or being opened."""
        return self._fair.used + self._fair.connecting

    def overflow(self) -> int:
        """Return how many connections there are beyond `size`; below zero, how many fewer."""
        return self._fair.taken - self._fair.size

    def status(self) -> str:
        """Describe the pool in a line."""
        now = self.statistics
        return (
            f"FairPool of {self.size()}, at most {now.max}: {now.used} in use, {now.idle} idle, {now.connecting} being "
            f"opened, {now.closing} being closed, {now.pending_requests} waiting"
        )

    @property
    def capacity(self) -> int:
        """Return how many connections there may be at once."""
        return self._fair.cap

    @property
    def statistics(self) -> PoolStatistics:
        """Return the pool's numbers."""
        fair = self._fair
        return PoolStatistics(
            idle=len(fair.idle),
            used=fair.used,
            connecting=fair.connecting,
            closing=fair.closing,
            max=fair.cap,
            pending_requests=len(fair.waiters),
            timeouts=self._timeouts,
            waits=self._waits,
            wait_time=self._wait_time,
            created=self._created,
            failures=self._failures,
        )

    # Checking out

    def take_nowait(self) -> PoolProxiedConnection | None:
        """Check a connection out where that needs neither waiting nor a greenlet, nor is anybody's business.

        None where it would: with no idle connection, with one that is to be validated, or with a listener.
        """
        idle = self._fair.idle
        if not idle or self.dispatch.checkout or self._pre_ping or asyncio.get_running_loop() is not self._loop:
            return None
        latest, now = idle[-1], time.monotonic()
        if self._fair.waiters or self._is_over(latest, now) or self._is_doubtful(latest, now):
            return None
        return self.connect()

    def _do_get(self) -> ConnectionPoolEntry:
        if self._dialect.is_async and asyncio.get_running_loop() is not self._loop:
            self._move_in()
        now = time.monotonic()
        with self._lock:
            got = self._fair.ask(now)
        if not isinstance(got, Pooled) or self._is_over(got, now) or self._is_doubtful(got, now):
            got = self._get(got, now)
            got.taken_at = time.monotonic()
            self.wait_time.note(got.taken_at - now)
        else:
            got.taken_at = now
            self.wait_time.counts[0] += 1
        if self._holders is not None:
            self._holders.took(got, now)
        return got.resource  # type: ignore[no-any-return]

    def _get(self, got: Pooled | Place | None, now: float) -> Pooled:
        """Get a connection with whatever that needs: waiting, opening, validating, and all of it again."""
        deadline = now + self._timeout
        if (context := current()) is not None and context.deadline is not None:
            deadline = min(deadline, context.deadline)
        # What one was given was of no use: the next is one's own before everybody else's.
        first = False
        while True:
            if got is None:
                got = self._wait(deadline, first=first)
            if isinstance(got, Pooled):
                if not self._is_over(got, now) and (not self._is_doubtful(got, now) or self._answers(got)):
                    return got
                self._discard(got)
            else:
                try:
                    return self._open(deadline)
                except PoolTimeoutError:
                    raise
                except Exception:
                    # Another one may come back before the database takes more of us.
                    if not self._fair.used and not self._fair.idle:
                        raise
            got, first, now = None, True, time.monotonic()

    def _wait(self, deadline: float, *, first: bool) -> Pooled | Place:
        asked = time.monotonic()
        waiter = _InLoop(deadline) if self._dialect.is_async else _InThread(deadline)
        with self._lock:
            answer: Any = self._fair.wait(waiter, asked, first=first)
        if answer is None:
            try:
                if deadline < self._tick_at or not self._tick_at or self._fair.backs_off:
                    self._note_due()
                waiter.block()
            except BaseException:
                with self._lock:
                    self._fair.leave(waiter, time.monotonic())
                raise
            finally:
                # Whoever waits longest now may have to try next.
                if self._fair.backs_off:
                    self._note_due()
            self._waits += 1
            self._wait_time += time.monotonic() - asked
            answer = waiter.answer
        if isinstance(answer, Refusal):
            self._timeouts += 1
            raise PoolTimeoutError(self._explained(answer), answer.retry_after) from self._last_failure
        return answer  # type: ignore[no-any-return]

    def _explained(self, refusal: Refusal) -> str:
        failure = f"; the last connection failed: {self._last_failure}" if self._fair.failures else ""
        return f"no connection to the database: {refusal.reason} (pool_timeout {self._timeout:g} s){failure}"

    # Opening

    def _open(self, deadline: float) -> Pooled:
        if not self._dialect.is_async:
            return self._connect()
        # In a task of its own: what is half open when its caller is cancelled would be nobody's, and still a backend.
        task = start(greenlet_spawn(self._connect))
        try:
            done, _ = await_only(asyncio.wait([task], timeout=max(0.0, deadline - time.monotonic())))
        except BaseException:
            task.add_done_callback(self._opened_for_nobody)
            raise
        if not done:
            task.add_done_callback(self._opened_for_nobody)
            self._timeouts += 1
            raise PoolTimeoutError(
                f"no connection to the database: it could not be opened within pool_timeout ({self._timeout:g} s)", 1
            )
        return task.result()

    def _connect(self) -> Pooled:
        began = time.monotonic()
        record: Any
        try:
            if self._dialect.is_async:
                # Nobody waits for longer, and a server that says nothing must not have the place for good.
                record = await_only(asyncio.wait_for(greenlet_spawn(self._create_connection), self._timeout))
                watch(self._dialect, record.dbapi_connection)  # type: ignore[arg-type]
            else:
                record = self._create_connection()
        except BaseException as error:
            with self._lock:
                if isinstance(error, Exception):
                    self._failures += 1
                    self._last_failure = error
                    self._fair.failed(time.monotonic(), random.random())
                else:
                    self._fair.forgo(time.monotonic())
            self._note_due()
            raise
        now = time.monotonic()
        lifetime = self._recycle * (1 - _JITTER * random.random()) if self._recycle > -1 else float("inf")
        pooled = record.record_info[_KEY] = Pooled(self._fair, record, now + lifetime)
        with self._lock:
            self._created += 1
            self.create_time.note(now - began)
            self._last_failure = None
            self._fair.opened(now)
        self._note_due()
        return pooled

    def _opened_for_nobody(self, task: asyncio.Task[Pooled]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._do_return_conn(task.result().resource)

    # Validating

    def _is_over(self, pooled: Pooled, now: float) -> bool:
        return pooled.expires <= now or bool(pooled.resource._is_hard_or_soft_invalidated())

    def _is_doubtful(self, pooled: Pooled, now: float) -> bool:
        return now - pooled.alive_at > self._validate_after

    def _answers(self, pooled: Pooled) -> bool:
        record = pooled.resource
        try:
            if self._dialect.is_async:
                ping = greenlet_spawn(self._dialect._do_ping_w_event, record.dbapi_connection)
                alive = bool(await_only(asyncio.wait_for(ping, _PING_TIMEOUT)))
            else:
                alive = self._dialect._do_ping_w_event(record.dbapi_connection)
        except Exception:
            alive = False
        except BaseException as error:
            record.invalidate(error)
            self._discard(pooled)
            raise
        if not alive:
            record.invalidate()
            # As with SQLAlchemy's pre_ping: the others have been idle for longer still.
            self._invalidate_time = time.time()
        return alive

    # Giving back

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        entry: Any = record
        pooled: Pooled = entry.record_info[_KEY]
        now = time.monotonic()
        # Nobody has taken what was opened for one who has left.
        if pooled.taken_at:
            self.use_time.note(now - pooled.taken_at)
            pooled.taken_at = 0.0
        if self._holders is not None:
            self._holders.gave(pooled)
        if self._disposed or entry._is_hard_or_soft_invalidated():
            self._discard(pooled)
            return
        with self._lock:
            pooled.home.give(pooled, now)
        if now >= self._tick_at:
            self._note_due()

    def _discard(self, pooled: Pooled) -> None:
        try:
            pooled.resource.close()
        finally:
            with self._lock:
                pooled.home.free(time.monotonic())

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        if not self._dialect.is_async:
            super()._close_connection(connection, terminate=terminate)
        elif not has_loop():
            abandon(self._dialect, connection)  # type: ignore[arg-type]
        else:
            with self._lock:
                self._fair.closes()
            task = start(close(self._dialect, connection))  # type: ignore[arg-type]
            self._closing.add(task)
            task.add_done_callback(self._is_closed)

    def _is_closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.logger.error("a connection could not be closed", exc_info=error)
        with self._lock:
            self._fair.closed(time.monotonic())

    # Behind the scenes

    def _maintain(self, now: float) -> None:
        """Ask a connection for an answer and open one ahead of need, one of each at a time: others are to be had."""
        with self._lock:
            silent = self._fair.silent(now, self._validate_after)
            place = self._fair.refill(now)
        if silent is not None:
            self._run_behind(self._check, silent)
        if place is not None:
            self._run_behind(self._open_ahead)

    def _run_behind(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._dialect.is_async:
            start(greenlet_spawn(function, *arguments))
        else:
            # Not in the housekeeper's: a server may take its time to answer, and others have deadlines.
            threading.Thread(target=function, args=arguments, name="overdrive-pool", daemon=True).start()

    def _check(self, pooled: Pooled) -> None:
        if self._is_over(pooled, time.monotonic()) or not self._answers(pooled) or self._disposed:
            self._discard(pooled)
            return
        with self._lock:
            pooled.home.give_back_unused(pooled, time.monotonic())

    def _open_ahead(self) -> None:
        with suppress(Exception):  # it is noted, and tried again
            self._do_return_conn(self._connect().resource)

    # Time

    def _note_due(self) -> None:
        """See to it that what is due is done: by a timer of the loop, or for threads by the housekeeper."""
        now = time.monotonic()
        with self._lock:
            due = self._fair.due()
            at = now + _TICK if due is None else min(due, now + _TICK)
            if self._tick_at and self._tick_at <= at:
                return
            if not self._dialect.is_async:
                housekeeper.call_at(at, self._tick)
                self._tick_at = at
                return
        with suppress(RuntimeError):  # without a loop there is nobody to wait, and nothing to age
            loop = asyncio.get_running_loop()
            if self._timer is not None:
                self._timer.cancel()
            self._tick_at = at
            self._timer = loop.call_later(max(0.0, at - now), _tick, weakref.ref(self))

    def _tick(self) -> None:
        now = time.monotonic()
        with self._lock:
            self._timer, self._tick_at = None, 0.0
            unneeded = self._fair.tick(now)
        for pooled in unneeded:
            self._discard(pooled)
        if self._holders is not None:
            self._holders.name_leaks(now)
        if not self._disposed:
            self._maintain(now)
        if self._fair.taken or self._fair.waiters:
            self._note_due()

    # Life

    def _move_in(self) -> None:
        """Begin on this event loop; the connections of one that has closed, a test's say, went with it."""
        if self._loop is None or self._loop.is_closed():
            with self._lock:
                self._fair = self._empty()
                self._closing.clear()
                self._timer, self._tick_at = None, 0.0
            self._loop = asyncio.get_running_loop()

    def recreate(self) -> FairPool:
        """Return a new pool like this one."""
        self.logger.info("Pool recreating")
        return type(self)(
            self._creator,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            pre_ping=self._pre_ping,
            reset_on_return=self._reset_on_return,
            _dispatch=self.dispatch,
            dialect=self._dialect,
            **self._options,
        )

    def dispose(self) -> None:
        """Close what is idle, and from now on whatever comes back."""
        self._disposed = True
        with self._lock:
            idle, self._fair.idle = self._fair.idle, []
            self._fair.used += len(idle)
        for pooled in idle:
            self._discard(pooled)
        if self._closing and in_greenlet():
            await_only(asyncio.wait(self._closing))
        self.logger.info("Pool disposed. %s", self.status())


#: All of them, for a process that is forked: its connections stay its parent's.
_pools: weakref.WeakSet[FairPool] = weakref.WeakSet()
#: What a forked process must not close, as it would do with what it collects as garbage.
_inherited: list[Fair] = []


def _leave_connections_to_parent() -> None:
    for pool in _pools:
        _inherited.append(pool._fair)
        pool._lock = threading.RLock()
        pool._fair = pool._empty()
        pool._timer, pool._tick_at = None, 0.0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_connections_to_parent)


def _tick(pool: weakref.ref[FairPool]) -> None:
    if (alive := pool()) is not None:
        alive._tick()
