"""The handler among logging's own machinery: configuration, threads, tasks, and how processes end."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import logging.config
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from overdrive.context import RequestContext, bind, serving
from overdrive.errors import ConfigurationError
from overdrive.log.handler import LogHandler

CLASS = "overdrive.log.handler.LogHandler"


@contextmanager
def logging_to(handler: LogHandler) -> Iterator[logging.Logger]:
    logger = logging.Logger("app")
    logger.addHandler(handler)
    yield logger
    handler.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def python(script: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, **options)


def request(request_id: str) -> RequestContext:
    return RequestContext(request_id=request_id, method="GET", path="/")


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def balanced(handler: LogHandler) -> bool:
    stats = handler.stats
    return stats.emitted == stats.written + sum(stats.sampled.values()) + sum(stats.dropped.values()) + stats.pending


def test_a_record_becomes_a_line(tmp_path: Path) -> None:
    with logging_to(LogHandler(tmp_path / "log")) as logger:
        logger.info("hello %s", "world", extra={"user": 7})
    (line,) = lines(tmp_path / "log")
    assert (line["message"], line["user"], line["severity"]) == ("hello world", 7, "INFO")


def test_a_path_and_a_stream_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="leave one of them out"):
        LogHandler(tmp_path / "log", sys.stdout)


@pytest.mark.parametrize("path", ["missing/log", "."])
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigurationError, match="make its directory first"):
        LogHandler(tmp_path / path)


def test_a_file_that_is_there_needs_no_directory_to_write_in() -> None:
    LogHandler("/dev/null").close()


def test_without_either_it_is_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with logging_to(LogHandler()) as logger:
        logger.info("hello")
    assert json.loads(capfd.readouterr().err)["message"] == "hello"


def test_a_stream_without_a_descriptor() -> None:
    stream = io.StringIO()
    with logging_to(LogHandler(stream=stream)) as logger:
        logger.info("hé")
    assert json.loads(stream.getvalue())["message"] == "hé"


def test_level_and_filters(tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log", level="WARNING")
    handler.addFilter(lambda record: record.getMessage() != "secret")
    with logging_to(handler) as logger:
        for message in ("hello", "secret"):
            logger.info(message)
            logger.warning(message)
    assert [line["message"] for line in lines(tmp_path / "log")] == ["hello"]
    assert handler.stats.emitted == 1


def test_handle_says_whether_the_record_was_kept(tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log")
    record = logging.makeLogRecord({"msg": "hello", "levelno": logging.INFO})
    assert handler.handle(record) is True
    handler.addFilter(lambda record: False)
    assert handler.handle(record) is False
    handler.close()


def test_arguments_are_shown_as_they_were(tmp_path: Path) -> None:
    with logging_to(LogHandler(tmp_path / "log")) as logger:
        items = [1]
        logger.info("%s", items, extra={"items": items})
        items.append(2)
    (line,) = lines(tmp_path / "log")
    assert (line["message"], line["items"]) == ("[1]", [1])


def test_it_has_no_lock(tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log")
    assert handler.lock is None
    handler.acquire()
    handler.release()
    handler.close()


def test_a_slow_sink_keeps_nobody_waiting() -> None:
    opened = threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            opened.wait(30)
            return super().write(text)

    stream = Slow()
    handler = LogHandler(stream=stream, max_bytes=64 * 1024)
    with logging_to(handler) as logger:
        for number in range(2000):
            logger.info("line %d", number)
        assert not stream.getvalue()
        assert balanced(handler)
        assert handler.stats.dropped["INFO"] > 0
        opened.set()
    stats = handler.stats
    assert stats.pending == 0
    assert balanced(handler)
    written = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert sum("dropped" not in line for line in written) == stats.written
    assert sum(line["dropped"]["INFO"] for line in written if "dropped" in line) == stats.dropped["INFO"]
    assert {reason for line in written for reason in line.get("reasons", ())} == {"full"}


def test_every_record_carries_the_id_of_its_own_request(tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log")
    with logging_to(handler) as logger:

        async def endpoint(name: str) -> None:
            with serving(request(name)):
                bind(who=name)
                logger.info(name)
                await asyncio.sleep(0)
                await asyncio.gather(task(name), asyncio.to_thread(logger.info, name))

        async def task(name: str) -> None:
            await asyncio.sleep(0)
            logger.info(name)

        def sync(name: str) -> None:
            with serving(request(name)):
                bind(who=name)
                for _ in range(3):
                    logger.info(name)

        async def serve() -> None:
            await asyncio.gather(*(endpoint(f"async-{number}") for number in range(20)))

        asyncio.run(serve())
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(sync, (f"sync-{number}" for number in range(20))))
        logger.info("outside")
    *served, outside = lines(tmp_path / "log")
    assert len(served) == 120
    assert all(line["message"] == line["request_id"] == line["who"] for line in served)
    assert "request_id" not in outside


def test_what_is_logged_while_a_record_is_encoded_is_dropped(tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log")
    with logging_to(handler) as logger:

        class Talkative:
            def __repr__(self) -> str:
                logger.warning("in repr of %r", self)
                return "talkative"

        logger.info("%r", Talkative())
        logger.info("after")
    assert handler.stats.dropped == {"WARNING": 1}
    assert lines(tmp_path / "log")[0]["message"] == "talkative"
    assert balanced(handler)


@pytest.mark.parametrize("closed", [False, True])
def test_what_the_sink_logs_is_dropped(closed: bool) -> None:
    class Talkative(io.StringIO):
        def write(self, text: str) -> int:
            logger.warning("writing")
            return super().write(text)

    stream = Talkative()
    handler = LogHandler(stream=stream)
    with logging_to(handler) as logger:
        if closed:
            handler.close()
        logger.info("hello")
        handler.flush()
        assert json.loads(stream.getvalue().splitlines()[0])["message"] == "hello"
        assert handler.stats.dropped.keys() == {"WARNING"}
        assert balanced(handler)


def test_a_record_that_is_none_is_counted(tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log")
    broken = logging.makeLogRecord({"msg": "hello", "levelno": logging.INFO})
    del broken.name
    handler.handle(broken)
    assert handler.stats.dropped == {"INFO": 1}
    handler.close()


def test_a_formatter_makes_lines_of_text(tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    with logging_to(handler) as logger:
        logger.info("a\nINFO forged\x1b[2J")
    assert (tmp_path / "log").read_text() == "INFO a\\nINFO forged\\u001b[2J\n"


def test_a_formatter_that_fails_leaves_a_json_line(tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log")
    handler.setFormatter(logging.Formatter("%(missing)s"))
    with logging_to(handler) as logger:
        logger.info("hello")
    (line,) = lines(tmp_path / "log")
    assert line["message"] == "hello"
    assert "missing" in line["formatter_error"]


def test_with_a_formatter_the_notice_is_text_too() -> None:
    stream = io.StringIO()
    handler = LogHandler(stream=stream, max_bytes=1024)
    handler.setFormatter(logging.Formatter("%(message)s"))
    with logging_to(handler) as logger:
        logger.info("x" * 2000)
    assert stream.getvalue() == "log lines were dropped: INFO 1\n"


@pytest.fixture
def configured() -> Iterator[None]:
    """Take out of the root logger what a test configures."""
    root = logging.getLogger()
    level, before = root.level, list(root.handlers)
    known = dict(logging.root.manager.loggerDict)
    yield
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()
    root.handlers[:] = before
    root.setLevel(level)
    for name, logger in logging.root.manager.loggerDict.items():
        if name in known and isinstance(logger, logging.Logger):
            logger.disabled = False


def dict_config(**handler: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"main": {"class": CLASS, **handler}},
        "root": {"level": "INFO", "handlers": ["main"]},
    }


@pytest.mark.usefixtures("configured")
def test_dict_config(tmp_path: Path) -> None:
    logging.config.dictConfig(dict_config(path=str(tmp_path / "log"), level="WARNING", max_bytes=1_000_000))
    logging.getLogger("app").warning("hello")
    logging.getLogger("app").info("not this")
    logging.getLogger().handlers[-1].flush()
    assert [line["message"] for line in lines(tmp_path / "log")] == ["hello"]


@pytest.mark.usefixtures("configured")
def test_dict_config_with_a_stream(capfd: pytest.CaptureFixture[str]) -> None:
    logging.config.dictConfig(dict_config(stream="ext://sys.stdout"))
    logging.getLogger("app").info("hello")
    logging.getLogger().handlers[-1].flush()
    assert json.loads(capfd.readouterr().out)["message"] == "hello"


@pytest.mark.usefixtures("configured")
def test_file_config(tmp_path: Path) -> None:
    config = tmp_path / "logging.ini"
    config.write_text(
        "[loggers]\nkeys=root\n[handlers]\nkeys=main\n[formatters]\nkeys=\n"
        "[logger_root]\nlevel=INFO\nhandlers=main\n"
        f"[handler_main]\nclass={CLASS}\nkwargs={{'path': {str(tmp_path / 'log')!r}}}\n"
    )
    logging.config.fileConfig(config, disable_existing_loggers=False)
    logging.getLogger("app").info("hello")
    logging.getLogger().handlers[-1].flush()
    assert [line["message"] for line in lines(tmp_path / "log")] == ["hello"]


@pytest.mark.usefixtures("configured")
def test_a_handler_that_a_reconfiguration_closed_still_writes(tmp_path: Path) -> None:
    with logging_to(LogHandler(tmp_path / "old")) as logger:
        logger.info("before")
        logging.config.dictConfig(dict_config(path=str(tmp_path / "new")))
        assert [line["message"] for line in lines(tmp_path / "old")] == ["before"]
        logger.info("after")
        assert [line["message"] for line in lines(tmp_path / "old")] == ["before", "after"]


def test_reopened_it_leaves_writing_to_its_thread_again(tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log")
    with logging_to(handler) as logger:
        logger.info("before")
        handler.close()
        handler.reopen()
        logger.info("behind")
        assert [thread for thread in threading.enumerate() if thread.name == "overdrive-log"]
        eventually(lambda: handler.stats.pending == 0)
        assert [line["message"] for line in lines(tmp_path / "log")] == ["before", "behind"]


def test_basic_config_leaves_the_lines_json(tmp_path: Path) -> None:
    script = (
        "import logging, sys; from overdrive.log.handler import LogHandler;"
        "logging.basicConfig(handlers=[LogHandler(sys.argv[1])], level='INFO'); logging.info('hello')"
    )
    assert python(script, tmp_path / "log").returncode == 0
    assert [line["message"] for line in lines(tmp_path / "log")] == ["hello"]


@pytest.mark.usefixtures("configured")
def test_a_reconfiguration_does_not_deadlock_with_a_sink_that_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.log.handler._TIMEOUT", 0.2)

    class Talkative(io.StringIO):
        def write(self, text: str) -> int:
            time.sleep(0.05)
            logging.getLogger().warning("writing")
            return super().write(text)

    stream = Talkative()
    logging.config.dictConfig(dict_config(stream=stream))
    logging.getLogger("app").error("hello")
    logging.config.dictConfig(dict_config(path=str(tmp_path / "log")))
    eventually(lambda: "hello" in stream.getvalue())


def test_close_is_bounded_when_the_sink_is_stalled() -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as stream:
        handler = LogHandler(stream=stream)
        logger = logging.Logger("app")
        logger.addHandler(handler)
        for _ in range(2000):
            logger.info("x" * 100)
        started = time.monotonic()
        handler.close()
        assert time.monotonic() - started < 8
        assert handler.stats.pending > 0
        received = b""
        while received.count(b"\n") < 2000:
            received += os.read(reading, 65536)
        eventually(lambda: handler.stats.written == 2000)
        assert balanced(handler)
    os.close(reading)


LOGGER = """
import logging, os, signal, sys
from overdrive.log.handler import LogHandler
handler = LogHandler(sys.argv[1])
logging.root.addHandler(handler)
logging.root.setLevel("INFO")
for number in range(1000):
    logging.info("line %d", number)
"""


def messages(path: Path) -> list[str]:
    return [line["message"] for line in lines(path)]


def test_everything_is_written_when_the_interpreter_ends(tmp_path: Path) -> None:
    done = python(LOGGER, tmp_path / "log")
    assert (done.returncode, done.stderr) == (0, "")
    assert messages(tmp_path / "log") == [f"line {number}" for number in range(1000)]


def test_what_is_logged_after_logging_has_shut_down_is_written(tmp_path: Path) -> None:
    late = "import atexit\natexit.register(lambda: logging.info('bye'))\n" + LOGGER
    done = python(late, tmp_path / "late")
    assert (done.returncode, done.stderr) == (0, "")
    assert messages(tmp_path / "late")[-2:] == ["line 999", "bye"]


def test_what_is_logged_between_close_and_a_deadly_signal_is_written(tmp_path: Path) -> None:
    ending = """
handler.close()
logging.info("Finished server process")
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.raise_signal(signal.SIGTERM)
"""
    done = python(LOGGER + ending, tmp_path / "log")
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
    assert messages(tmp_path / "log")[-2:] == ["line 999", "Finished server process"]
    assert len(messages(tmp_path / "log")) == 1001


def test_a_process_with_a_stalled_stream_ends(tmp_path: Path) -> None:
    script = """
import logging, sys
from overdrive.log.handler import LogHandler
logging.root.addHandler(LogHandler())
logging.root.setLevel("INFO")
for number in range(2000):
    logging.info("x" * 100)
"""
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", script], stderr=writing)
    os.close(writing)
    assert process.wait(20) == 0
    os.close(reading)


def test_a_handler_made_before_a_fork_works_after_it(tmp_path: Path) -> None:
    script = """
import logging, os, sys
from overdrive.log.handler import LogHandler
handler = LogHandler(sys.argv[1])
logging.root.addHandler(handler)
logging.root.setLevel("INFO")
if sys.argv[2] == "used":
    logging.info("parent")
child = os.fork()
if child == 0:
    logging.info("child")
    handler.flush()
    os._exit(handler.stats.written - 1)
logging.info("parent")
sys.exit(os.waitpid(child, 0)[1])
"""
    for use, parents in (("unused", 1), ("used", 2)):
        done = python(script, tmp_path / use, use)
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted(messages(tmp_path / use)) == ["child", *["parent"] * parents]


def test_a_signal_handler_may_log_at_any_moment(tmp_path: Path) -> None:
    script = """
import logging, signal, sys
from overdrive.log.handler import LogHandler
handler = LogHandler(sys.argv[1])
logging.root.addHandler(handler)
logging.root.setLevel("INFO")
signal.signal(signal.SIGALRM, lambda *_: logging.error("signal"))
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for number in range(10_000):
    logging.info("line")
signal.setitimer(signal.ITIMER_REAL, 0)
logging.shutdown()
stats = handler.stats
print(stats.pending, stats.emitted - stats.written - sum(stats.dropped.values()))
"""
    done = python(script, tmp_path / "log")
    assert (done.stdout, done.stderr) == ("0 0\n", "")
    assert messages(tmp_path / "log").count("line") == 10_000
    assert "signal" in messages(tmp_path / "log")


class Gated(io.StringIO):
    """A stream that takes nothing before it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def write(self, text: str) -> int:
        self.gate.wait(30)
        return super().write(text)


def test_who_chooses_so_waits_for_room_and_loses_nothing() -> None:
    reading, writing = os.pipe()
    received: list[bytes] = []

    def read() -> None:
        while data := os.read(reading, 4096):
            received.append(data)
            time.sleep(0.0005)

    reader = threading.Thread(target=read)
    reader.start()
    with open(writing, "w") as stream, logging_to(LogHandler(stream=stream, max_bytes=16 * 1024, block=20)) as logger:
        for number in range(2000):
            logger.info("line %d", number)
        handler = logger.handlers[0]
        assert isinstance(handler, LogHandler)
        handler.close()
    reader.join(20)
    os.close(reading)
    assert handler.stats.dropped == {}
    assert [json.loads(line)["message"] for line in b"".join(received).splitlines()] == [
        f"line {number}" for number in range(2000)
    ]


def test_a_stalled_sink_is_waited_for_once() -> None:
    stream = Gated()
    handler = LogHandler(stream=stream, max_bytes=16 * 1024, block=0.2)
    with logging_to(handler) as logger:
        started = time.monotonic()
        for number in range(1000):
            logger.info("line %d", number)
        # Else it would be minutes.
        assert time.monotonic() - started < 10
        assert handler.stats.dropped["INFO"] > 500
        assert balanced(handler)
        stream.gate.set()
        eventually(lambda: handler.stats.pending == 0)
        for number in range(1000):
            logger.warning("line %d", number)
    assert "WARNING" not in handler.stats.dropped
    assert balanced(handler)


@pytest.mark.parametrize("block", [-1, float("inf"), float("nan")])
def test_to_wait_for_ever_is_refused(block: float) -> None:
    with pytest.raises(ConfigurationError, match="block="):
        LogHandler(block=block)


def test_room_for_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_bytes="):
        LogHandler(max_bytes=0)


@pytest.mark.usefixtures("configured")
def test_several_sinks_have_their_own_levels(tmp_path: Path) -> None:
    config = dict_config(path=str(tmp_path / "all"))
    config["handlers"]["errors"] = {"class": CLASS, "path": str(tmp_path / "errors"), "level": "ERROR"}
    config["root"]["handlers"].append("errors")
    logging.config.dictConfig(config)
    logging.getLogger("app").info("hello")
    logging.getLogger("app").error("no")
    for handler in logging.getLogger().handlers:
        handler.flush()
    assert (messages(tmp_path / "all"), messages(tmp_path / "errors")) == (["hello", "no"], ["no"])
