"""The rules of a pool, driven through every order of events by hypothesis."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from overdrive.pool.fair import Fair, Place, Pooled, Refusal, Waiter

LIFETIME = 50.0
TIMEOUT = 5.0
PICK = st.integers(0, 30)


class Caller(Waiter):
    woken = 0

    def wake(self) -> None:
        self.woken += 1


class Pools(RuleBasedStateMachine):
    """Callers that ask, wait, give up, connect and fail, in any order; a second is the unit of all times."""

    @initialize(
        size=st.integers(1, 3), overflow=st.integers(0, 2), max_waiting=st.integers(0, 4), min_idle=st.integers(0, 3)
    )
    def make(self, size: int, overflow: int, max_waiting: int, min_idle: int) -> None:
        self.fair = Fair(size, overflow, linger=2, max_waiting=max_waiting, min_idle=min(min_idle, size))
        self.now = 0.0
        #: In the order in which they came.
        self.queue: list[Caller] = []
        self.held: list[Pooled] = []
        self.connecting = 0
        self.closing = 0

    def take(self, something: Any) -> None:
        if isinstance(something, Pooled):
            assert something not in self.held
            self.held.append(something)
        elif isinstance(something, Place):
            self.connecting += 1
        else:
            assert isinstance(something, Refusal)

    def wait(self, *, first: bool, patience: float = TIMEOUT) -> None:
        waiter = Caller(self.now + patience)
        self.queue.insert(0 if first else len(self.queue), waiter)
        refusal = self.fair.wait(waiter, self.now, first=first)
        if refusal is not None:
            assert waiter.answer is None
            assert refusal.retry_after > 0
            self.queue.remove(waiter)

    @rule(patience=st.sampled_from((0.5, TIMEOUT)))
    def ask(self, patience: float) -> None:
        waited = any(waiter.answer is None for waiter in self.queue)
        got = self.fair.ask(self.now)
        if got is None:
            self.wait(first=False, patience=patience)
        else:
            assert not waited, "a newcomer went before somebody who waits"
            self.take(got)

    @rule()
    def refill(self) -> None:
        idle = len(self.fair.idle)
        if self.fair.refill(self.now) is not None:
            self.connecting += 1
            assert idle + self.fair.connecting <= self.fair.min_idle
            assert self.fair.taken <= self.fair.size

    @rule(good=st.booleans(), meanwhile=st.booleans())
    def ask_one_for_an_answer(self, good: bool, meanwhile: bool) -> None:
        oldest = min((each.alive_at for each in self.fair.idle), default=self.now)
        silent = self.fair.silent(self.now, 1)
        if silent is None:
            assert oldest + 1 > self.now
            return
        assert silent.alive_at == oldest
        if meanwhile and not self.fair.idle:
            self.ask(TIMEOUT)
        if good:
            since = silent.idle_since
            self.fair.give_back_unused(silent, self.now)
            assert (silent.idle_since, silent.alive_at) == (since, self.now)
        else:
            self.fair.free(self.now)

    @precondition(lambda self: self.connecting)
    @rule()
    def connected(self) -> None:
        self.connecting -= 1
        self.held.append(Pooled(self.fair, None, self.now + LIFETIME))
        self.fair.opened(self.now)

    @precondition(lambda self: self.connecting)
    @rule(luck=st.floats(0, 1), again=st.booleans())
    def failed(self, luck: float, again: bool) -> None:
        self.connecting -= 1
        self.fair.failed(self.now, luck)
        if again:
            self.wait(first=True)

    @precondition(lambda self: self.connecting)
    @rule()
    def cancelled_while_connecting(self) -> None:
        self.connecting -= 1
        self.fair.forgo(self.now)

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def give(self, pick: int) -> None:
        self.fair.give(self.held.pop(pick % len(self.held)), self.now)

    @precondition(lambda self: self.held)
    @rule(pick=PICK, behind=st.booleans())
    def give_broken(self, pick: int, behind: bool) -> None:
        self.held.pop(pick % len(self.held))
        if behind:
            self.closing += 1
            self.fair.closes()
        self.fair.free(self.now)

    @precondition(lambda self: self.closing)
    @rule()
    def closed(self) -> None:
        self.closing -= 1
        self.fair.closed(self.now)

    @precondition(lambda self: self.queue)
    @rule(pick=PICK)
    def leave(self, pick: int) -> None:
        waiter = self.queue.pop(pick % len(self.queue))
        answered = waiter.answer is not None
        self.fair.leave(waiter, self.now)
        assert waiter.woken == answered

    @rule(seconds=st.sampled_from((0.01, 0.1, 1.0, 3.0)))
    def pass_time_unnoticed(self, seconds: float) -> None:
        self.now += seconds

    @rule(seconds=st.sampled_from((0.01, 0.1, 1.0, 3.0)))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for unneeded in self.fair.tick(self.now):
            assert unneeded.idle_since + 2 <= self.now or unneeded.expires <= self.now
            self.fair.free(self.now)
        assert all(each.expires > self.now for each in self.fair.idle)
        assert all(waiter.deadline > self.now for waiter in self.fair.waiters)

    # What was answered is taken, in any order with everything else, by whoever waited for it.

    @precondition(lambda self: any(waiter.answer is not None for waiter in self.queue))
    @rule()
    def return_from_waiting(self) -> None:
        waiter = next(waiter for waiter in self.queue if waiter.answer is not None)
        assert waiter.woken == 1
        self.queue.remove(waiter)
        self.take(waiter.answer)

    @invariant()
    def never_more_than_there_are_places(self) -> None:
        assert 0 <= self.fair.taken <= self.fair.cap

    @invariant()
    def everything_is_somewhere(self) -> None:
        given = [waiter.answer for waiter in self.queue]
        assert self.fair.used == len(self.held) + sum(isinstance(each, Pooled) for each in given)
        assert self.fair.connecting == self.connecting + sum(isinstance(each, Place) for each in given)
        assert self.fair.closing == self.closing

    @invariant()
    def nobody_waits_while_something_is_free(self) -> None:
        if self.fair.waiters:
            assert not self.fair.idle
            # A place may be kept free only while a database that refuses is left alone or is being tried.
            assert self.fair.taken == self.fair.cap or self.fair.failures

    @invariant()
    def the_oldest_goes_first(self) -> None:
        waiting = [waiter for waiter in self.queue if waiter.answer is None]
        assert waiting == list(self.fair.waiters)
        assert len(waiting) <= self.fair.max_waiting + self.fair.cap

    @invariant()
    def a_try_is_due_for_whoever_waits(self) -> None:
        if not self.fair.waiters:
            assert self.fair.due() is None
        elif self.fair.backs_off:
            due = self.fair.due()
            assert due is not None
            assert due <= self.fair.retry_at
            assert due <= self.now + 0.4


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def pool(size: int = 1, overflow: int = 0) -> Fair:
    return Fair(size, overflow, linger=2, max_waiting=10)


def waiting(fair: Fair, deadline: float = 100.0) -> Waiter:
    assert fair.ask(0) is None
    waiter = Waiter(deadline)
    assert fair.wait(waiter, 0) is None
    return waiter


def opened(fair: Fair) -> Pooled:
    assert isinstance(fair.ask(0), Place)
    fair.opened(0)
    return Pooled(fair, None, LIFETIME)


def test_the_last_one_used_is_the_next_one_used() -> None:
    fair = pool(2)
    first, second = opened(fair), opened(fair)
    fair.give(first, 1)
    fair.give(second, 2)
    assert fair.ask(3) is second
    assert fair.ask(3) is first


def test_a_failed_attempt_wakes_the_next_who_tries_at_once() -> None:
    fair = pool()
    assert isinstance(fair.ask(0), Place)
    first, second = waiting(fair), waiting(fair)
    fair.failed(0, 1)
    assert isinstance(first.answer, Place)
    assert second.answer is None


def test_attempts_grow_rarer_and_one_that_succeeds_lets_everybody_try() -> None:
    fair = pool(3)
    keeps_it_hopeful = opened(fair)
    delays = []
    now = 0.0
    assert isinstance(fair.ask(now), Place)
    for _ in range(7):
        fair.failed(now, 1)
        delays.append(round(fair.retry_at - now, 3))
        assert fair.retry_at == now or fair.ask(now) is None
        now = fair.retry_at
        assert isinstance(fair.ask(now), Place)
        assert fair.ask(now) is None, "two tried at once"
    assert delays == [0, 0.05, 0.1, 0.2, 0.4, 0.4, 0.4]
    fair.opened(now)
    assert isinstance(fair.ask(now), Place)
    fair.give(keeps_it_hopeful, now)


def test_a_database_that_stays_away_is_not_waited_for() -> None:
    fair = pool(3)
    assert isinstance(fair.ask(0), Place)
    fair.failed(0, 1)
    assert isinstance(fair.ask(0), Place)
    queued = waiting(fair)
    fair.failed(1.5, 1)
    assert isinstance(queued.answer, Refusal)
    assert "refused 2 connections" in queued.answer.reason
    assert fair.ask(1.5) is None
    assert isinstance(fair.wait(Waiter(9), 1.5), Refusal)
    # Whoever comes when the next attempt is due makes it.
    assert isinstance(fair.ask(2), Place)


def test_with_a_connection_in_use_it_is_waited_for_whatever_the_database_says() -> None:
    fair = pool(3)
    used = opened(fair)
    assert isinstance(fair.ask(0), Place)
    fair.failed(0, 1)
    assert isinstance(fair.ask(0), Place)
    queued = waiting(fair)
    fair.failed(5, 1)
    assert queued.answer is None
    fair.give(used, 5)
    assert queued.answer is used


def test_a_full_queue_refuses_the_next_but_not_who_was_there_before() -> None:
    fair = Fair(1, 0, linger=2, max_waiting=1)
    opened(fair)
    waiting(fair)
    refusal = fair.wait(Waiter(9), 0)
    assert refusal is not None
    assert "all 1 connections of the pool are taken (1 in use" in refusal.reason
    assert fair.wait(again := Waiter(9), 0, first=True) is None
    assert next(iter(fair.waiters)) is again


@pytest.mark.parametrize(("after", "left"), [(1.9, 3), (2.0, 2), (60, 0)])
def test_what_is_beyond_the_size_lingers_and_all_ends_with_its_lifetime(after: float, left: int) -> None:
    fair = pool(2, 3)
    for connection in [opened(fair) for _ in range(3)]:
        fair.give(connection, 0)
    for _ in fair.tick(after):
        fair.free(after)
    assert len(fair.idle) == fair.taken == left


def test_one_that_was_asked_for_an_answer_is_neither_younger_nor_the_next_to_be_used() -> None:
    fair = pool(2)
    first, second = opened(fair), opened(fair)
    fair.give(first, 1)
    fair.give(second, 2)
    assert fair.silent(30, 30) is None
    assert fair.silent(31, 30) is first
    assert fair.silent(31, 30) is None
    fair.give_back_unused(first, 31)
    assert fair.idle == [first, second]
    assert first.idle_since == 1
    assert fair.silent(32, 30) is second


def test_as_many_are_opened_ahead_as_are_to_be_idle_one_at_a_time_while_the_database_refuses() -> None:
    fair = Fair(3, 2, linger=2, max_waiting=9, min_idle=2)
    assert isinstance(fair.refill(0), Place)
    assert isinstance(fair.refill(0), Place)
    assert fair.refill(0) is None
    fair.failed(0, 1)
    fair.failed(0, 1)
    assert fair.refill(0) is None
    assert isinstance(fair.refill(1), Place)
    assert fair.refill(1) is None
    fair.opened(1)
    held = [Pooled(fair, None, LIFETIME), opened(fair), opened(fair)]
    assert fair.refill(2) is None, "it is not among those kept open"
    fair.give(held[0], 2)
    assert fair.refill(2) is None


def test_who_has_less_time_is_told_so_before_those_who_came_earlier() -> None:
    fair = pool()
    held = opened(fair)
    patient, hurried = waiting(fair, 100), waiting(fair, 5)
    assert fair.due() == 5
    fair.tick(5)
    assert isinstance(hurried.answer, Refusal)
    assert patient.answer is None
    fair.give(held, 6)
    assert patient.answer is held


def test_a_newcomer_does_not_try_before_who_waits_for_the_next_attempt() -> None:
    fair = pool(3)
    opened(fair)
    assert isinstance(fair.ask(0), Place)
    fair.failed(0, 1)
    assert isinstance(fair.ask(0), Place)
    queued = waiting(fair)
    fair.failed(0, 1)
    assert fair.ask(1) is None
    fair.tick(1)
    assert isinstance(queued.answer, Place)
