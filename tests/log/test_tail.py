"""What a request logs below WARNING is written if it failed or was slow, and is counted in any case."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx2
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from overdrive import Overdrive
from overdrive.context import Outcome, RequestContext, bind, serving
from overdrive.errors import ConfigurationError
from overdrive.log import tail as tail_module
from overdrive.log.event import plain_size
from overdrive.log.handler import LogHandler
from overdrive.log.logger import DirectLogger
from overdrive.log.tail import Tail, end_tails

pytestmark = pytest.mark.anyio

LOGGERS = pytest.mark.parametrize("kind", [logging.Logger, DirectLogger])


class Log:
    """A logger of some kind, its handler, and what came out."""

    def __init__(self, kind: type[logging.Logger], **options: Any) -> None:
        self.stream = io.StringIO()
        self.handler = LogHandler(stream=self.stream, tail="errors", **options)
        self.logger = kind("app")
        self.logger.addHandler(self.handler)

    @property
    def lines(self) -> list[dict[str, Any]]:
        self.handler.flush()
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    @property
    def messages(self) -> list[str]:
        return [line["message"] for line in self.lines]


def request() -> RequestContext:
    return RequestContext(request_id="r1", method="GET", path="/")


def end(context: RequestContext, outcome: Outcome = "ok", duration: float = 0.1) -> None:
    context.outcome, context.duration = outcome, duration
    end_tails(context)


@pytest.fixture
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    made = Log(DirectLogger, slow=1.0)
    yield made
    made.handler.close()


@LOGGERS
@pytest.mark.parametrize(
    ("outcome", "duration", "kept"),
    [
        ("ok", 0.1, False),
        ("ok", 1.0, True),
        ("error", 0.1, True),
        ("cancelled", 0.1, True),
        ("disconnected", 0.1, False),
        ("disconnected", 2.0, True),
    ],
)
def test_what_failed_or_was_slow_is_written_in_order(
    kind: type[logging.Logger], outcome: Outcome, duration: float, kept: bool
) -> None:
    log = Log(kind, slow=1.0)
    with serving(request()) as context:
        log.logger.debug("one %d", 1)
        log.logger.info("two %s", [2])
        log.logger.warning("three")
        log.logger.info("four é")
        log.logger.info("five %d", "x")
        assert log.messages == ["three"]
        end(context, outcome, duration)
        log.logger.info("after the end")
    expected = ["one 1", "two [2]", "four é", "five %d"] if kept else []
    assert log.messages == ["three", *expected, "after the end"]
    stats = log.handler.stats
    assert stats.sampled == ({} if kept else {"DEBUG": 1, "INFO": 3})
    assert stats.emitted == stats.written + sum(stats.sampled.values()) == 6
    log.handler.close()


def test_a_line_held_is_as_it_was_when_it_was_logged(log: Log) -> None:
    items = [1]
    with serving(request()) as context:
        bind(step="first")
        log.logger.debug("plain")
        log.logger.debug("%s", items)
        items.append(2)
        bind(step="second")
        log.logger.debug("\ud800")
        end(context, "error")
    shown = [(line["message"], line["step"], line["request_id"]) for line in log.lines]
    assert shown == [("plain", "first", "r1"), ("[1]", "first", "r1"), ("\\ud800", "second", "r1")]


def test_nothing_is_encoded_for_a_request_that_went_well(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> bytes:
        raise AssertionError("encoded")

    monkeypatch.setattr("overdrive.log.handler.encode", refuse)
    monkeypatch.setattr("overdrive.log.handler.encode_plain", refuse)
    with serving(request()) as context:
        log.logger.debug("user %s signed in", 4711)
        end(context)
    assert log.handler.stats.sampled == {"DEBUG": 1}


def test_outside_a_request_lines_are_written_at_once(log: Log) -> None:
    log.logger.debug("hello")
    assert log.messages == ["hello"]


def test_tasks_and_threads_of_a_request_are_held_with_it(log: Log) -> None:
    async def serve() -> None:
        with serving(request()) as context:
            log.logger.debug("endpoint")
            await asyncio.create_task(task())
            await asyncio.to_thread(log.logger.debug, "thread")
            assert log.messages == []
            end(context, "error")

    async def task() -> None:
        log.logger.debug("task")

    asyncio.run(serve())
    assert log.messages == ["endpoint", "task", "thread"]


def test_the_oldest_lines_make_room_and_are_told_of(log: Log) -> None:
    for outcome in ("ok", "error"):
        with serving(request()) as context:
            for number in range(1000):
                log.logger.debug("%d %s", number, "x" * 1000)
            end(context, outcome)  # type: ignore[arg-type]
    stats = log.handler.stats
    assert stats.sampled == {"DEBUG": 1000}
    numbers = [int(line["message"].split()[0]) for line in log.lines if "dropped" not in line]
    assert numbers == list(range(numbers[0], 1000))
    assert 20 < len(numbers) < 60
    assert stats.dropped == {"DEBUG": 1000 - len(numbers)}
    log.handler.close()
    assert [line["reasons"] for line in log.lines if "dropped" in line] == [{"tail": 1000 - len(numbers)}]


def test_messages_count_as_much_as_their_arguments(log: Log) -> None:
    with serving(request()) as context:
        for number in range(100):
            log.logger.debug(f"{number} " + "x" * 10_000)
        end(context, "error")
    assert [int(message.split()[0]) for message in log.messages if message[0].isdigit()] == list(range(94, 100))


@pytest.mark.parametrize("size", [63, 64 * 1024, 2**20])
@pytest.mark.parametrize(
    "make",
    [lambda size: "x" * size, bytes, lambda size: 2 ** (8 * size), lambda size: Decimal((0, (1,) * 3 * size, 0))],
)
def test_an_argument_counts_as_much_as_it_takes(make: Callable[[int], object], size: int) -> None:
    counted = plain_size("%.10s", (make(size),))
    assert counted is not None
    assert counted >= size


def test_what_cannot_change_is_held_as_it_is(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    values = (UUID(int=7), Decimal("1.50"), datetime(2026, 1, 2, tzinfo=UTC), date(2026, 1, 2), b"x", 1.5, None)
    with monkeypatch.context() as patch:
        patch.setattr(UUID, "__str__", lambda _: pytest.fail("formatted"))
        with serving(request()) as context:
            log.logger.debug("%s %s %s %s %s %s %s", *values)
    end(context, "error")
    [message] = log.messages
    assert message == " ".join(map(str, values))


def test_with_a_formatter_text_is_held(log: Log) -> None:
    log.handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    with serving(request()) as context:
        log.logger.debug("hello")
        end(context, "error")
    log.handler.flush()
    assert log.stream.getvalue() == "DEBUG hello\n"


def test_what_threads_log_while_a_request_ends_is_counted_once() -> None:
    for _ in range(50):
        log = Log(DirectLogger)
        context = request()
        begun = threading.Barrier(5)

        def produce(log: Log = log, context: RequestContext = context, begun: threading.Barrier = begun) -> None:
            with serving(context):
                begun.wait(10)
                for _ in range(20):
                    log.logger.debug("hello")

        with ThreadPoolExecutor(4) as pool:
            produced = [pool.submit(copy_context().run, produce) for _ in range(4)]
            begun.wait(10)
            end(context)
            for each in produced:
                each.result()
        log.handler.flush()
        stats = log.handler.stats
        assert (stats.emitted, stats.written + sum(stats.sampled.values())) == (80, 80)
        log.handler.close()


def test_a_line_that_comes_between_the_verdict_and_the_end_is_not_forgotten(log: Log) -> None:
    context = request()
    with serving(context):
        log.logger.debug("one")
        assert context.tails is not None
        [tail] = context.tails.values()
        end(context, "error")
        tail.hold(logging.DEBUG, b"late\n", 5)
        late = log.handler._tail_of(context)
        late.hold(logging.DEBUG, b"later\n", 6)
    assert log.handler.stats.emitted == 3


@given(st.lists(st.tuples(st.sampled_from([10, 20]), st.integers(0, 30_000))), st.booleans())
def test_every_line_is_kept_let_go_or_lost(lines: list[tuple[int, int]], failed: bool) -> None:
    kept: list[int] = []
    sampled, lost = Counter[int](), Counter[int]()
    keeper = SimpleNamespace(
        slow=None, keep=lambda level, _: kept.append(level), sample=sampled.update, lose=lost.update
    )
    tail = Tail(keeper)
    for level, size in lines:
        tail.hold(level, b"", size)
        assert tail._size <= tail_module._MAX_BYTES
    context = request()
    context.outcome = "error" if failed else "ok"
    tail.end(context)
    levels = [level for level, _ in lines]
    assert Counter(kept) + sampled + lost == Counter(levels)
    assert kept == levels[len(levels) - len(kept) :]
    assert not (sampled if failed else lost or kept)


@pytest.mark.parametrize("options", [{"tail": "warnings"}, {"slow": 1.0}])
def test_options_that_say_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="tail="):
        LogHandler(**options)


async def test_served_by_overdrive_a_request_that_fails_shows_what_led_to_it(tmp_path: Path) -> None:
    app = FastAPI()
    Overdrive(app, database_url=f"sqlite+aiosqlite:///{tmp_path / 'db'}")
    logger = logging.getLogger("test_tail")
    handler = LogHandler(tmp_path / "log", tail="errors")

    @app.get("/{number}")
    def endpoint(number: int) -> int:
        logger.debug("in a thread, asked for %d", number)
        return 100 // number

    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
            answers = [await http.get("/1"), await http.get("/0")]
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert [answer.status_code for answer in answers] == [200, 500]
    [line] = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert (line["message"], line["request_id"]) == ("in a thread, asked for 0", answers[1].headers["x-request-id"])
    assert handler.stats.sampled == {"DEBUG": 1}
