"""The thread writes everything once, to real files and pipes, and nobody waits for it without a bound."""

from __future__ import annotations

import errno
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from overdrive.log import writer as writer_module
from overdrive.log.writer import Dropped, FileSink, StreamSink, Writer

INFO, ERROR = logging.INFO, logging.ERROR
MEBIBYTE = 1024 * 1024


def notice(dropped: Dropped) -> bytes:
    return b"dropped %d\n" % sum(dropped.values())


def make(sink: writer_module.Sink, max_bytes: int = MEBIBYTE) -> Writer:
    return Writer(sink, max_bytes, notice)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def balanced(writer: Writer) -> bool:
    stats = writer.stats
    return stats.emitted == stats.written + sum(stats.sampled.values()) + sum(stats.dropped.values()) + stats.pending


class Gate:
    """A sink that is stalled until it is opened, and fails while it is told to."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.failing = False
        self.writes: list[list[bytes]] = []

    def write(self, lines: Sequence[bytes], deadline: float) -> int:
        self.open.wait(30)
        if self.failing:
            raise OSError(errno.ENOSPC, "no space")
        self.writes.append(list(lines))
        return len(lines)

    def close(self) -> None:
        pass

    @property
    def lines(self) -> list[bytes]:
        return [line for lines in self.writes for line in lines]


@pytest.fixture
def pipe() -> Iterator[tuple[int, StreamSink]]:
    """The reading end, and a sink on the writing end."""
    reading, writing = os.pipe()
    with open(writing, "w") as stream:
        yield reading, StreamSink(stream)
        os.close(reading)


def python(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_no_thread_before_the_first_line(tmp_path: Path) -> None:
    before = threading.active_count()
    writer = make(FileSink(tmp_path / "log"))
    assert writer.flush(1)
    assert threading.active_count() == before
    assert not (tmp_path / "log").exists()
    writer.put(INFO, b"a\n")
    assert threading.active_count() == before + 1
    writer.close(5)
    assert threading.active_count() == before


def test_lines_are_written_without_being_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = make(FileSink(path))
    for line in (b"a\n", b"b\n"):
        writer.put(INFO, line)
        eventually(lambda line=line: path.exists() and path.read_bytes().endswith(line))
    assert path.read_bytes() == b"a\nb\n"
    writer.close(5)


def test_lines_gather_for_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_TICK", 5.0)
    gate = Gate()
    gate.open.set()
    writer = make(gate)
    for _ in range(10):
        writer.put(INFO, b"a\n")
        time.sleep(0.02)
    assert gate.writes == []
    assert writer.flush(4)
    assert gate.writes == [[b"a\n"] * 10]
    writer.close(5)


@pytest.mark.parametrize(("level", "line"), [(ERROR, b"a\n"), (INFO, b"x" * (MEBIBYTE // 8) + b"\n")])
def test_an_error_and_a_lot_are_not_left_to_the_tick(level: int, line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_TICK", 3600.0)
    gate = Gate()
    gate.open.set()
    writer = make(gate)
    writer.put(INFO, b"first\n")
    writer.put(level, line)
    eventually(lambda: gate.lines == [b"first\n", line])
    writer.put(level, line)
    eventually(lambda: len(gate.lines) == 3)
    writer.close(5)


def test_the_idle_thread_sleeps() -> None:
    gate = Gate()
    gate.open.set()
    writer = make(gate)
    writer.put(INFO, b"a\n")
    assert writer.flush(5)
    waits = []
    wait = writer._bell.wait
    writer._bell.wait = lambda timeout=-1: (waits.append(timeout), wait(timeout))  # type: ignore[method-assign]
    time.sleep(0.3)
    assert len(waits) <= 2
    writer.close(5)


def test_a_stalled_pipe_stops_nobody_and_loses_no_count(pipe: tuple[int, StreamSink]) -> None:
    reading, sink = pipe
    writer = make(sink, 256 * 1024)
    for number in range(10_000):
        writer.put(INFO, b"%0100d\n" % number)
    stats = writer.stats
    assert stats.emitted == 10_000
    assert stats.dropped["INFO"] > 7000
    assert stats.pending * 101 < 256 * 1024
    assert not writer.flush(0.05)

    received = bytearray()

    def read() -> None:
        while part := os.read(reading, 65536):
            received.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    assert writer.flush(10)
    writer.close(5)
    sink._stream.close()
    reader.join()
    assert balanced(writer)
    assert writer.stats.pending == 0
    lines = bytes(received).splitlines()
    numbers = [int(line) for line in lines if not line.startswith(b"dropped")]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == writer.stats.written
    told = sum(int(line.split()[1]) for line in lines if line.startswith(b"dropped"))
    assert told == writer.stats.dropped["INFO"] == 10_000 - len(numbers)


def test_close_gives_up_on_a_stalled_pipe_and_the_thread_finishes_later(pipe: tuple[int, StreamSink]) -> None:
    reading, sink = pipe
    writer = make(sink)
    for _ in range(4000):
        writer.put(INFO, b"%0100d\n" % 1)
    started = time.monotonic()
    writer.close(0.2)
    writer.put(INFO, b"late\n")
    assert time.monotonic() - started < 5
    assert balanced(writer)
    received = b""
    while not received.endswith(b"late\n"):
        received += os.read(reading, 65536)
    eventually(lambda: writer.stats.written == 4001)
    assert received.count(b"\n") == 4001


def test_after_close_a_stalled_pipe_holds_its_caller_for_a_moment_only(
    pipe: tuple[int, StreamSink], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_WRITE_THROUGH_TIMEOUT", 0.05)
    reading, sink = pipe
    writer = make(sink)
    writer.close(1)
    while not writer.stats.dropped:
        writer.put(INFO, b"%01000d\n" % 1)
    assert balanced(writer)
    written = writer.stats.written
    received = b""
    while received.count(b"\n") < written:
        received += os.read(reading, 65536)
    writer.put(INFO, b"again\n")
    assert os.read(reading, 65536) == b"again\ndropped 1\n"


def test_a_full_disk_is_counted() -> None:
    with open("/dev/full", "w") as full:
        writer = make(StreamSink(full))
        for level in (INFO, INFO, ERROR):
            writer.put(level, b"a\n")
        assert writer.flush(5)
        assert writer.stats.dropped == {"INFO": 2, "ERROR": 1}
        assert balanced(writer)
        writer.close(5)


def test_a_broken_pipe_is_counted(pipe: tuple[int, StreamSink]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        writer = make(StreamSink(stream))
        writer.put(INFO, b"a\n")
        assert writer.flush(5)
        assert writer.stats.dropped == {"INFO": 1}
        writer.close(5)


def test_a_sink_that_works_again_is_told_what_it_missed() -> None:
    gate = Gate()
    gate.open.set()
    gate.failing = True
    writer = make(gate)
    writer.put(INFO, b"a\n")
    assert writer.flush(5)
    gate.failing = False
    writer.put(INFO, b"b\n")
    assert writer.flush(5)
    writer.put(INFO, b"c\n")
    writer.close(5)
    assert gate.lines == [b"b\n", b"dropped 1\n", b"c\n"]
    assert balanced(writer)


def test_a_line_that_never_fits_is_announced() -> None:
    gate = Gate()
    gate.open.set()
    writer = make(gate, 1024)
    writer.put(INFO, b"x" * 2048)
    eventually(lambda: gate.lines == [b"dropped 1\n"])
    writer.close(5)


def test_after_an_error_the_next_line_begins_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    room = [3 + 2]
    write = os.write

    def limited(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "no space")
        taken = min(room[0], len(data))
        room[0] -= taken
        return write(fd, data[:taken])

    monkeypatch.setattr(os, "write", limited)
    sink = FileSink(path)
    assert sink.write([b"aa\n", b"bbb\n", b"cc\n"], float("inf")) == 1
    assert sink.write([b"lost\n"], float("inf")) == 0
    sink.close()
    room[0] = 1000
    assert sink.write([b"dd\n"], float("inf")) == 1
    assert path.read_bytes() == b"aa\nbb\ndd\n"
    sink.close()


def test_a_short_write_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:2]))
    sink = FileSink(tmp_path / "log")
    assert sink.write([b"aaaa\n", b"bbbb\n"], float("inf")) == 2
    assert (tmp_path / "log").read_bytes() == b"aaaa\nbbbb\n"
    sink.close()


def test_a_descriptor_someone_made_non_blocking_loses_nothing(pipe: tuple[int, StreamSink]) -> None:
    reading, sink = pipe
    os.set_blocking(sink._stream.fileno(), False)
    writer = make(sink)
    for _ in range(3000):
        writer.put(INFO, b"%0100d\n" % 1)
    assert not writer.flush(0.1)
    received = b""
    while received.count(b"\n") < 3000:
        received += os.read(reading, 65536)
    assert writer.flush(5)
    assert (writer.stats.written, writer.stats.dropped) == (3000, {})
    writer.close(5)


def test_a_pipe_gets_whole_lines_in_writes_that_cannot_be_interrupted(
    pipe: tuple[int, StreamSink], monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda fd, data: (writes.append(data), len(data))[1])
    lines = [b"x" * size + b"\n" for size in range(0, 1000, 50)]
    assert pipe[1].write(lines, float("inf")) == len(lines)
    assert b"".join(writes) == b"".join(lines)
    assert 1 < len(writes) < len(lines)
    assert all(len(data) <= select.PIPE_BUF and data.endswith(b"\n") for data in writes)


def test_writers_that_share_a_pipe_tear_no_line() -> None:
    script = """
import sys
from overdrive.log.writer import StreamSink
sink = StreamSink(sys.stdout)
for _ in range(20):
    sink.write([sys.argv[1].encode() * size + b"\\n" for size in range(1, 900, 3)], float("inf"))
"""
    reading, writing = os.pipe()
    processes = [subprocess.Popen([sys.executable, "-c", script, name], stdout=writing) for name in "abc"]
    os.close(writing)
    with open(reading, "rb") as stream:
        lines = stream.read().splitlines()
    assert [process.wait(10) for process in processes] == [0, 0, 0]
    assert len(lines) == 3 * 20 * 300
    assert all(len(set(line)) == 1 for line in lines)


@pytest.mark.parametrize("start", ["exec", "fork"])
def test_workers_that_share_a_pipe_tear_no_long_line(start: str) -> None:
    work = """
import os, sys
from overdrive.log.writer import StreamSink
def work(name, sink):
    for _ in range(20):
        sink.write([name * size + b"\\n" for size in (65_536, 10, 9_000)], float("inf"))
"""
    forks = """
sink = StreamSink(sys.stdout)
for name in b"abcd":
    if os.fork() == 0:
        work(bytes([name]), sink)
        os._exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""
    alone = "work(sys.argv[1].encode(), StreamSink(sys.stdout))"
    scripts = [(work + alone, name) for name in "abcd"] if start == "exec" else [(work + forks, "")]
    reading, writing = os.pipe()
    processes = [subprocess.Popen([sys.executable, "-c", *script], stdout=writing) for script in scripts]
    os.close(writing)
    with open(reading, "rb") as stream:
        lines = stream.read().splitlines()
    assert [process.wait(10) for process in processes] == [0] * len(processes)
    assert len(lines) == 4 * 20 * 3
    assert all(len(set(line)) == 1 for line in lines)


def test_a_worker_that_is_stopped_with_the_lock_holds_nobody_beyond_the_deadline(pipe: tuple[int, StreamSink]) -> None:
    reading, sink = pipe
    fd = sink._stream.fileno()
    script = (
        "import fcntl, sys, time; fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(fd)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[fd])
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    assert sink.write([b"hello\n"], time.monotonic() + 0.05) == 1
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert os.read(reading, 100) == b"hello\n"


def test_a_moved_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = make(FileSink(path))
    writer.put(INFO, b"a\n")
    assert writer.flush(5)
    path.rename(tmp_path / "log.1")
    writer.put(INFO, b"b\n")
    assert writer.flush(5)
    path.unlink()
    writer.put(INFO, b"c\n")
    writer.close(5)
    assert (tmp_path / "log.1").read_bytes() == b"a\n"
    assert path.read_bytes() == b"c\n"
    path.rename(tmp_path / "log.2")
    path.touch()
    writer.put(INFO, b"d\n")
    assert path.read_bytes() == b"d\n"


def test_a_folder_that_does_not_exist_is_counted_and_may_come_later(tmp_path: Path) -> None:
    writer = make(FileSink(tmp_path / "folder" / "log"))
    writer.put(INFO, b"a\n")
    assert writer.flush(5)
    assert writer.stats.dropped == {"INFO": 1}
    (tmp_path / "folder").mkdir()
    writer.put(INFO, b"b\n")
    writer.close(5)
    assert (tmp_path / "folder" / "log").read_bytes() == b"b\ndropped 1\n"


def test_the_path_does_not_follow_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sink = FileSink("log")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sink.write([b"a\n"], float("inf"))
    sink.close()
    assert (tmp_path / "log").read_bytes() == b"a\n"


def test_after_close_lines_are_written_by_their_callers(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = make(FileSink(path))
    writer.put(INFO, b"a\n")
    writer.close(5)
    writer.close(5)
    assert path.read_bytes() == b"a\n"
    writer.put(INFO, b"b\n")
    assert path.read_bytes() == b"a\nb\n"
    assert writer.flush(1)
    writer.close(5)
    assert balanced(writer)


def test_close_while_others_emit_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = make(FileSink(path))

    def produce() -> None:
        for _ in range(500):
            writer.put(INFO, b"a\n")

    threads = [threading.Thread(target=produce) for _ in range(4)]
    for thread in threads:
        thread.start()
    writer.close(5)
    for thread in threads:
        thread.join()
    assert path.read_bytes() == b"a\n" * 2000
    assert writer.stats.written == 2000


def test_a_line_whose_caller_gave_up_waiting_is_written_by_the_one_it_waited_for() -> None:
    gate = Gate()
    gate.open.set()
    writer = make(gate)
    writer.close(1)

    class Draining:
        def __init__(self) -> None:
            self.late = [b"late\n"]

        def acquire(self, timeout: float) -> bool:
            return True

        def release(self) -> None:
            if self.late:
                writer._buffer.put(INFO, self.late.pop())

    writer._draining = Draining()  # type: ignore[assignment]
    writer.put(INFO, b"a\n")
    assert gate.lines == [b"a\n", b"late\n"]


def test_without_a_thread_to_be_had_lines_are_written_by_their_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    writer = make(FileSink(tmp_path / "log"))
    for line in (b"a\n", b"b\n"):
        writer.put(INFO, line)
    assert (tmp_path / "log").read_bytes() == b"a\nb\n"


def test_flush_and_close_from_the_sink_do_not_wait_for_themselves() -> None:
    answers = []

    class Sink(Gate):
        def write(self, lines: Sequence[bytes], deadline: float) -> int:
            answers.append(writer.flush(30))
            writer.close(30)
            return super().write(lines, deadline)

    gate = Sink()
    gate.open.set()
    writer = make(gate)
    writer.put(INFO, b"a\n")
    eventually(lambda: gate.lines == [b"a\n"])
    assert answers == [False]


FORK = """
import json, os, sys, threading
from overdrive.log.writer import FileSink, Writer
import overdrive.log.writer as module
module._TICK = 0.3
writer = Writer(FileSink(sys.argv[1]), 1 << 20, lambda dropped: b"dropped\\n")
for number in range(100):
    writer.put(20, b"parent\\n")
children = []
for number in range(5):
    child = os.fork()
    if child == 0:
        before = writer.stats
        writer.put(20, b"child\\n")
        flushed = writer.flush(5)
        after = writer.stats
        os._exit(0 if flushed and (before.emitted, before.pending, after.written) == (0, 0, 1) else 1)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
writer.put(20, b"parent\\n")
writer.close(5)
print(json.dumps([codes, writer.stats.written]))
"""


def test_after_a_fork_each_process_writes_its_own_lines_once(tmp_path: Path) -> None:
    done = python(FORK, tmp_path / "log")
    assert (done.stderr, json.loads(done.stdout)) == ("", [[0] * 5, 101])
    lines = (tmp_path / "log").read_bytes().splitlines()
    assert (lines.count(b"parent"), lines.count(b"child"), len(lines)) == (101, 5, 106)


FORK_IN_A_WRITE = """
import os, time
from overdrive.log.writer import Writer
class Stalled:
    def write(self, lines, deadline):
        if os.getpid() == parent:
            time.sleep(30)
        os.write(1, b"".join(lines))
        return len(lines)
    def close(self): pass
parent = os.getpid()
writer = Writer(Stalled(), 1 << 20, lambda dropped: b"dropped\\n")
writer.put(40, b"parent\\n")
while not writer._draining.locked(): time.sleep(0.01)
child = os.fork()
if child == 0:
    writer.put(20, b"child\\n")
    writer.close(5)
    os._exit(0)
os._exit(os.waitpid(child, 0)[1])
"""


def test_a_fork_in_the_middle_of_a_write_leaves_the_child_working() -> None:
    done = python(FORK_IN_A_WRITE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "child\n", "")
