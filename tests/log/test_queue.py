"""The ledger is exact and the memory bounded, whatever the order of events."""

from __future__ import annotations

import logging
import threading
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from overdrive.log.queue import Buffer, Line

LEVELS = st.sampled_from([logging.DEBUG, logging.INFO, logging.ERROR, logging.CRITICAL, 15])


def balanced(buffer: Buffer) -> bool:
    stats = buffer.stats
    return stats.emitted == stats.written + sum(stats.sampled.values()) + sum(stats.dropped.values()) + stats.pending


def test_lines_come_out_in_order() -> None:
    buffer = Buffer(10_000)
    for number in range(5):
        buffer.put(logging.INFO, b"%d\n" % number)
    assert [line for _, line in buffer.take(4)] == [b"0\n", b"1\n"]
    assert [line for _, line in buffer.take(100)] == [b"2\n", b"3\n", b"4\n"]


def test_below_error_the_last_eighth_is_not_available() -> None:
    buffer = Buffer(8 * 1024)
    while not buffer.stats.dropped:
        buffer.put(logging.INFO, b"x" * 100)
    accepted = buffer.accepted
    buffer.put(logging.ERROR, b"x" * 100)
    assert buffer.accepted == accepted + 1
    while "ERROR" not in buffer.stats.dropped:
        buffer.put(logging.ERROR, b"x" * 100)
    assert buffer.stats.dropped == {"INFO": 1, "ERROR": 1}


def test_room_comes_back_when_lines_are_settled_not_when_they_are_taken() -> None:
    buffer = Buffer(1024)
    while not buffer.stats.dropped:
        buffer.put(logging.INFO, b"x")
    batch = buffer.take(1024)
    accepted = buffer.accepted
    buffer.put(logging.INFO, b"x")
    assert buffer.accepted == accepted
    buffer.settle(batch, len(batch))
    buffer.put(logging.INFO, b"x")
    assert buffer.accepted == accepted + 1


def test_short_lines_are_bounded_too() -> None:
    buffer = Buffer(64 * 1024)
    for _ in range(10_000):
        buffer.put(logging.INFO, b"\n")
    assert buffer.stats.pending < 1000


def test_who_wakes_the_writer() -> None:
    buffer = Buffer(1024 * 1024)
    assert buffer.put(logging.INFO, b"first")
    assert not buffer.put(logging.INFO, b"second")
    assert buffer.put(logging.ERROR, b"urgent")
    assert buffer.urgent
    assert not buffer.put(logging.ERROR, b"woken already")
    buffer.take(1024)
    assert not buffer.urgent
    assert not buffer.put(logging.INFO, b"the writer is awake")
    assert not buffer.rest()
    buffer.take(1024)
    assert buffer.rest()
    assert buffer.put(logging.INFO, b"first again")
    woken = [buffer.put(logging.INFO, b"x" * 1024) for _ in range(128)]
    assert sum(woken) == 1


def test_a_line_that_never_fits_wakes_the_writer_to_announce_it() -> None:
    buffer = Buffer(1024)
    assert buffer.put(logging.INFO, b"x" * 2048)


def test_what_the_sink_refuses_is_dropped_at_the_end_of_the_batch() -> None:
    buffer = Buffer(10_000)
    for level in (logging.INFO, logging.INFO, logging.ERROR):
        buffer.put(level, b"x")
    buffer.settle(buffer.take(1000), written=1)
    assert buffer.stats.written == 1
    assert buffer.dropped == {("sink", logging.INFO): 1, ("sink", logging.ERROR): 1}
    assert balanced(buffer)


def test_reset_forgets_everything_even_with_the_lock_held() -> None:
    buffer = Buffer(1024)
    buffer.put(logging.INFO, b"x")
    held = threading.Event()
    release = threading.Event()

    def hold() -> None:
        with buffer._lock:
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    buffer.reset()
    buffer.put(logging.INFO, b"y")
    release.set()
    thread.join()
    assert buffer.stats.emitted == 1
    assert buffer.take(1024) == [(logging.INFO, b"y")]


def test_a_producer_may_interrupt_itself() -> None:
    buffer = Buffer(1024)
    with buffer._lock:
        buffer.put(logging.INFO, b"from a signal handler")
    assert buffer.stats.emitted == 1


def test_the_ledger_is_exact_with_many_threads() -> None:
    buffer = Buffer(16 * 1024)
    stop = threading.Event()

    def produce() -> None:
        for number in range(2000):
            buffer.put(logging.ERROR if number % 10 == 0 else logging.INFO, b"x" * (number % 50))
            if number % 100 == 0:
                buffer.drop(logging.DEBUG, "recursion")

    def consume() -> None:
        while not stop.is_set():
            batch = buffer.take(1024)
            buffer.settle(batch, len(batch) // 2)

    consumer = threading.Thread(target=consume)
    producers = [threading.Thread(target=produce) for _ in range(8)]
    for thread in (consumer, *producers):
        thread.start()
    for thread in producers:
        thread.join()
    stop.set()
    consumer.join()
    assert buffer.stats.emitted == 8 * 2020
    assert buffer.stats.dropped["DEBUG"] == 8 * 20
    assert balanced(buffer)
    while batch := buffer.take(1024):
        buffer.settle(batch, len(batch))
    assert buffer.stats.pending == 0
    assert balanced(buffer)
    assert buffer._size == 0


class Ledger(RuleBasedStateMachine):
    """Every order of put, drop, take and settle, beside a count kept by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = Buffer(4096)
        self.emitted: Counter[int] = Counter()
        self.taken: list[list[Line]] = []
        self.waiting: list[int] = []
        self.written = 0

    @rule(level=LEVELS, size=st.integers(0, 2000))
    def put(self, level: int, size: int) -> None:
        accepted = self.buffer.accepted
        self.buffer.put(level, b"x" * size)
        self.emitted[level] += 1
        if self.buffer.accepted > accepted:
            self.waiting.append(level)

    @rule(level=LEVELS)
    def drop(self, level: int) -> None:
        self.buffer.drop(level, "recursion")
        self.emitted[level] += 1

    @rule(size=st.integers(1, 4096))
    def take(self, size: int) -> None:
        if not self.taken:
            self.taken.append(self.buffer.take(size))

    @rule(share=st.floats(0, 1))
    def settle(self, share: float) -> None:
        if self.taken:
            batch = self.taken.pop()
            self.buffer.settle(batch, int(len(batch) * share))
            self.written += int(len(batch) * share)
            assert [level for level, _ in batch] == self.waiting[: len(batch)]
            del self.waiting[: len(batch)]

    @invariant()
    def exact(self) -> None:
        stats = self.buffer.stats
        assert stats.emitted == sum(self.emitted.values())
        assert stats.written == self.written
        assert stats.pending == len(self.waiting)
        assert sum(stats.dropped.values()) == stats.emitted - stats.written - stats.pending

    @invariant()
    def bounded(self) -> None:
        assert self.buffer._size <= 4096


TestLedger = Ledger.TestCase


@given(st.lists(st.integers(0, 500)))
def test_nothing_is_kept_beyond_the_limit(sizes: list[int]) -> None:
    buffer = Buffer(4096)
    for size in sizes:
        buffer.put(logging.INFO, b"x" * size)
    assert sum(len(line) for _, line in buffer.take(10_000)) <= 4096 * 7 // 8
