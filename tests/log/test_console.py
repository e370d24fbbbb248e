"""In a terminal, lines are for people; nothing that is logged can look like another line."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overdrive.errors import ConfigurationError
from overdrive.log.console import Console
from overdrive.log.event import encode, encode_notice
from overdrive.log.handler import LogHandler

HEAD = re.compile(r"\d\d:\d\d:\d\d\.\d{3} (\x1b\[[0-9;]+m)?[A-Z]+ *(\x1b\[0m)? ")
FORGING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

wild = st.text(st.one_of(st.characters(), st.sampled_from("\n\r\x1b\x85\x9b\u2028\u202e\ud800")))


def shown_in_a_terminal(log: Callable[[logging.Logger], None], **options: Any) -> str:
    """What a terminal receives."""
    ours, theirs = os.openpty()
    received: list[bytes] = []

    def read() -> None:
        while b"END" not in b"".join(received):
            received.append(os.read(ours, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as stream:
        handler = LogHandler(stream=stream, **options)
        logger = logging.Logger("app")
        logger.addHandler(handler)
        log(logger)
        logger.info("END")
        handler.close()
        reader.join(20)
        assert not reader.is_alive()
        stats = handler.stats
        assert stats.emitted == stats.written
    os.close(ours)
    return b"".join(received).decode().replace("\r\n", "\n")


def fail(logger: logging.Logger) -> None:
    try:
        raise ValueError("no\x1b[2J")
    except ValueError:
        logger.exception("it %s", "failed\nINFO forged", extra={"user": 7, "none": None})


def test_a_terminal_gets_colours_and_tracebacks_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    first, *trace, last = shown_in_a_terminal(fail).splitlines()
    assert re.fullmatch(r"[\d:.]{12} \x1b\[31mERROR   \x1b\[0m app: it failed\\nINFO forged user=7", first)
    assert trace[0] == "    Traceback (most recent call last):"
    assert trace[-1] == "    ValueError: no\\u001b[2J"
    assert "\x1b[32mINFO" in last


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown_in_a_terminal(fail)


def test_a_terminal_gets_json_if_that_is_wanted() -> None:
    first, _ = shown_in_a_terminal(fail, pretty=False).splitlines()
    assert json.loads(first)["user"] == 7


def test_a_stream_may_be_pretty_that_is_no_terminal(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        handler = LogHandler(stream=stream, pretty=True, names={"severity": "level"}, redact=["user"])
        logger = logging.Logger("app")
        logger.addHandler(handler)
        logger.warning("hello", extra={"user": 7})
        handler.close()
    assert re.fullmatch(r"[\d:.]{12} WARNING  app: hello user=\[redacted\]\n", (tmp_path / "log").read_text())


def test_a_file_is_not_pretty(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="for a stream"):
        LogHandler(tmp_path / "log", pretty=True)


@given(wild, wild, st.dictionaries(wild, st.one_of(wild, st.integers(), st.lists(wild))), wild, st.booleans())
def test_nothing_logged_looks_like_another_line(
    name: str, message: str, extra: dict[str, Any], error: str, colours: bool
) -> None:
    record = logging.LogRecord(name, logging.INFO, __file__, 1, message, (), None)
    vars(record).update({f"x{key}": value for key, value in extra.items()})
    try:
        raise ValueError(error)
    except ValueError:
        record.exc_info = sys.exc_info()
    shown = Console({}, colours=colours).show(encode(record, None, {})).decode()
    head, *below = shown.removesuffix("\n").split("\n")
    assert HEAD.match(head)
    assert all(each.startswith("    ") for each in below)
    assert not FORGING.search(re.sub(r"\x1b\[[0-9;]+m", "", head, count=2) + "".join(below))


def test_what_is_no_json_of_ours_stays_as_it_is() -> None:
    console = Console({}, colours=True)
    for line in (b"text\n", b"{}\n", b"[1]\n", b"\xff\n"):
        assert console.show(line) == line
    assert b'dropped={"INFO":3}' in console.show(encode_notice(0, {"INFO": 3}, {"full": 3}))
