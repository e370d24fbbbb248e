"""The learned limit and the queue: simulated services, and rules that hold whatever comes."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overdrive.admission.limit import PRIORITIES, Limit, Priority, Queue, Refusal, Waiter

MAX_WAIT = 1.0
#: Of a database that does four statements at once, each in 10 ms; more of them share its time.
SATURATES = 4


@dataclass
class Result:
    """What became of the requests of a simulation: when they came, how long they took and, if refused, why."""

    answered: list[tuple[float, float, Priority]] = field(default_factory=list)
    refused: list[tuple[float, float, str, Priority]] = field(default_factory=list)

    def good(self, since: float = 0, until: float = float("inf"), deadline: float = 1.0) -> int:
        return sum(since <= came < until and took <= deadline for came, took, _ in self.answered)

    def tail(self, since: float = 0) -> float:
        took = sorted(took for came, took, _ in self.answered if came >= since)
        return took[int(len(took) * 0.99)]


def simulate(
    phases: list[tuple[float, float]],
    service: Callable[[Random, int, float], float],
    limit: Limit,
    priority: Callable[[Random], Priority] = lambda _random: "normal",
) -> Result:
    """Offer so many requests a second for so many seconds, at instants of a Poisson process.

    service: how long one takes that begins now, with so many others at work.
    """
    random, queue, result = Random(1), Queue(limit, MAX_WAIT), Result()
    events: list[tuple[float, int, tuple[Waiter, float] | None]] = []
    numbers, now, end = count(), 0.0, 0.0
    for rate, seconds in phases:
        end += seconds
        while (now := now + random.expovariate(rate)) < end:
            heapq.heappush(events, (now, next(numbers), None))
        now = end

    def begin(waiter: Waiter) -> None:
        takes = service(random, queue.at_work, now)
        heapq.heappush(events, (now + takes, next(numbers), (waiter, now)))

    class Client(Waiter):
        def wake(self) -> None:
            if isinstance(self.answer, Refusal):
                result.refused.append((self.since, now - self.since, self.answer.reason, self.priority))
            else:
                begin(self)

    while events:
        now, _, done = heapq.heappop(events)
        queue.tick(now)
        if done is not None:
            waiter, since = done
            limit.learn("route", now - since, queue.at_work, now)
            result.answered.append((waiter.since, now - waiter.since, waiter.priority))
            queue.done(now - since, now)
            continue
        client = Client(priority(random), now)
        if queue.ask(now):
            begin(client)
        elif (refusal := queue.wait(client, now)) is not None:
            result.refused.append((now, 0.0, refusal.reason, client.priority))
        assert queue.at_work <= limit._most
    assert queue.at_work == len(queue) == 0
    return result


def fifty_ms(_random: Random, _at_work: int, _now: float) -> float:
    return 0.05


def saturating(random: Random, at_work: int, _now: float) -> float:
    return 0.01 * random.expovariate(1) * max(1, at_work / SATURATES)


def test_below_capacity_nobody_is_refused() -> None:
    result = simulate([(90, 60)], fifty_ms, Limit(5, 5))
    assert not result.refused
    assert result.tail() < 0.25


def test_at_ten_times_the_capacity_its_worth_is_answered_and_the_rest_refused_at_once() -> None:
    result = simulate([(60, 8), (1000, 10), (90, 12)], fifty_ms, Limit(5, 5))
    assert result.good(8, 18) > 0.95 * 1000
    # Twice as long as one takes for its turn, at most; some that came in the storm's first moment waited in a longer
    # queue.
    assert sorted(took for came, took, _ in result.answered if 8 <= came < 18)[-30] <= 0.16
    waited = sorted(waited for came, waited, *_ in result.refused if 8 <= came < 18)
    assert waited[int(len(waited) * 0.99)] <= 0.01
    # A second later nobody is refused.
    assert not [came for came, *_ in result.refused if came >= 19]


def test_burst_is_answered_though_it_has_to_wait() -> None:
    result = simulate([(1600, 0.05), (10, 2)], fifty_ms, Limit(5, 5))
    assert len(result.answered) > 80
    assert not result.refused


def test_limit_comes_down_to_what_the_database_can_do_at_once() -> None:
    limit = Limit(2, 30)
    result = simulate([(800, 20)], saturating, limit)
    assert limit.current < 20
    assert result.good() > 0.95 * 400 * 20


def test_limit_stays_where_statements_do_not_get_in_each_others_way() -> None:
    limit = Limit(2, 30)
    result = simulate([(2000, 5)], lambda random, _work, _now: random.uniform(0.005, 0.015), limit)
    assert limit.current == 30
    assert not result.refused


def test_limit_comes_back_where_the_database_became_slower_by_itself() -> None:
    limit = Limit(2, 30)
    result = simulate([(900, 20)], lambda _random, _work, now: 0.01 if now < 5 else 0.032, limit)
    # 30 at a time, 0.032 s each: what is offered needs nearly all of them.
    assert result.good(10, 19) > 0.9 * 900 * 9


def test_what_was_slow_for_a_while_is_answered_again() -> None:
    result = simulate([(80, 15)], lambda _random, _work, now: 0.5 if 5 < now < 7 else 0.05, Limit(5, 5))
    assert not [came for came, *_ in result.refused if came >= 9]


def test_low_priority_is_refused_first_and_high_priority_hardly_ever() -> None:
    def priority(random: Random) -> Priority:
        return random.choices(PRIORITIES, [1, 60, 60])[0]

    result = simulate([(60, 2), (400, 10)], fifty_ms, Limit(5, 5), priority)
    answered = {each: sum(got == each for came, _, got in result.answered if came > 3) for each in PRIORITIES}
    refused = {each: sum(got == each for came, *_, got in result.refused if came > 3) for each in PRIORITIES}
    assert refused["high"] == 0 < answered["high"]
    assert answered["low"] < 0.02 * refused["low"]
    assert answered["normal"] > 500


def test_who_has_less_time_than_its_turn_would_take_is_refused_at_once() -> None:
    queue = Queue(Limit(1, 1), MAX_WAIT)
    assert queue.ask(0.0)
    queue.done(0.1, 0.1)
    assert queue.ask(0.1)
    # One is at work: a turn is in a tenth of a second, and an answer in two.
    answers = [queue.wait(Waiter("normal", 0.1, until), 0.1) for until in (0.29, 0.31)]
    assert answers == [Refusal("deadline"), None]
    for number in range(50):
        now = 0.1 + number / 1000
        assert queue.wait(Waiter("normal", now, now + 0.1), now) == Refusal("deadline")
    assert queue.refuse("normal", 0.3, 0.4) == Refusal("deadline")
    # However many are in a hurry, that is no delay that stands.
    assert not queue.stands
    assert len(queue) == 1


def test_newest_are_next_where_more_was_promised_than_could_be_kept() -> None:
    """A database that stalls in a storm leaves those in the queue for whom it is too late."""
    queue, order = Queue(Limit(1, 1), MAX_WAIT), []

    class Client(Waiter):
        def wake(self) -> None:
            order.append((self.since, self.answer))

    def wait(now: float) -> Refusal | None:
        return queue.wait(Client("normal", now), now)

    assert queue.ask(0.0)
    queue.done(0.1, 0.1)
    assert queue.ask(0.1)
    for number in range(300):
        wait(0.1 + number / 1000)
    assert queue.stands
    assert len(queue) == 2
    newest = max(waiter.since for waiter in queue._waiting["normal"])
    order.clear()
    queue.done(0.1, 0.9)
    assert order == [(newest, True)]


@given(st.lists(st.tuples(st.sampled_from(["come", "go", "leave", "tick"]), st.integers(0, 200)), max_size=200))
@settings(max_examples=200, deadline=None)
def test_nobody_is_forgotten_and_no_more_are_at_work_than_may_be(steps: list[tuple[str, int]]) -> None:
    limit = Limit(1, 4)
    queue, waiting, now, at_work = Queue(limit, MAX_WAIT), list[Waiter](), 0.0, 0
    told = dict[Waiter, int]()

    class Client(Waiter):
        def wake(self) -> None:
            told[self] = told.get(self, 0) + 1

    for number, (step, millis) in enumerate(steps):
        now += millis / 1000
        if step == "come":
            priority = PRIORITIES[number % 3]
            if not queue.ask(now):
                client = Client(priority, now)
                if queue.wait(client, now) is None:
                    waiting.append(client)
                else:
                    assert client not in told
        elif step == "go" and queue.at_work:
            limit.learn(number % 2, millis / 1000, queue.at_work, now)
            queue.done(millis / 1000, now)
        elif step == "leave" and waiting:
            queue.leave(waiting.pop(number % len(waiting)), now)
        elif step == "tick":
            queue.tick(now)
            assert all(waiter.since + MAX_WAIT > now for waiter in waiting if waiter.answer is None)
        at_work = queue.at_work
        waiting = [waiter for waiter in waiting if waiter.answer is None]
        assert 0 <= at_work <= 4
        assert 1 <= limit.current <= 4
        assert len(queue) == len(waiting)
        # Nobody waits while there is room.
        assert not waiting or at_work >= limit.current
        assert not queue.stands or waiting
        due = queue.due()
        assert (due is None) == (not waiting)
    assert all(times == 1 for times in told.values())


@pytest.mark.parametrize("priority", PRIORITIES)
def test_queue_has_a_bound_whatever_is_predicted(priority: Priority) -> None:
    queue = Queue(Limit(1, 1), max_wait=3600)
    assert queue.ask(0.0)
    reasons = {refusal.reason for _ in range(3000) if (refusal := queue.wait(Waiter(priority, 0.0), 0.0))}
    assert reasons == {"full"}
    assert len(queue) == 2000
