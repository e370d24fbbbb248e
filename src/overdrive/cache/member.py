"""Who shares a store, and whether each of them can be heard: nothing is served while one cannot.

A process that is cut off from Redis, it alone, could answer writes which nobody else hears of. So each has a lease
(Gray and Cheriton: "Leases: An Efficient Fault-Tolerant Mechanism for Distributed File Cache Consistency", SOSP 1989),
and whoever reads takes no entry for valid unless all leases hold. A process with writes that it could not announce lets
its own run out, and answers them only then.

Who is back announces its writes and then takes its lease up again; everybody has heard of all writes by then, so
nothing is forgotten. Who stays away is forgotten after ten seconds, or at once if its process is seen to be gone. What
it wrote last nobody knows, so a new epoch begins.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

#: Seconds that a lease lasts, and between two renewals.
_LEASE = 1.0
_INTERVAL = 0.3

#: Seconds by which Redis may be later with ending a lease than it has said.
_MARGIN = 0.01

#: Seconds after the end of its lease in which a member may come back, and before it in which it is looked after.
_ABSENCE = 10.0
_CONCERN = 0.6

# What is trusted, until the first lease ends.
_TRUST = """
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if first[2] and tonumber(first[2]) > now then
    redis.call('SET', KEYS[2], first[2], 'PXAT', first[2])
end
"""

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# KEYS: members, trust, clock, a channel.  ARGV: a member, the end of its lease, whether it is one already, an epoch
# should there be need of one, milliseconds of absence and of concern, how many members there were, how many of the
# following are gone, and those of whom it knows besides. Returns the microseconds, whether it is a member, how many
# there are, who has not renewed a lease that ends soon, and all of them where there were more or fewer.
# The end of the lease is named by who asks, so that what arrives late prolongs nothing. Where Redis has lost its
# members, those whom one knows are taken for late: one that is cut off may be among them.
_RENEW = f"""{_NOW}
local anew = redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - ARGV[5])) > 0
if ARGV[3] == '1' and not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
    anew = true
    for i = 9 + ARGV[8], #ARGV do
        redis.call('ZADD', KEYS[1], 'NX', string.format('%.0f', now), ARGV[i])
    end
end
for i = 9, 8 + ARGV[8] do
    anew = redis.call('ZREM', KEYS[1], ARGV[i]) == 1 or anew
end
if anew then
    local clock = ARGV[4] .. ' 0'
    redis.call('SET', KEYS[3], clock)
    redis.pcall('PUBLISH', KEYS[4], cmsgpack.pack({{{{clock}}, 0}}))
end
if tonumber(ARGV[2]) > now then
    redis.call('ZADD', KEYS[1], 'GT', ARGV[2], ARGV[1])
end
{_TRUST}
local soon = string.format('%.0f', now + ARGV[6])
local late = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', soon, 'LIMIT', 0, 16)
local is_member = redis.call('ZSCORE', KEYS[1], ARGV[1]) and 1 or 0
local count = redis.call('ZCARD', KEYS[1])
local all = count ~= tonumber(ARGV[7]) and redis.call('ZRANGE', KEYS[1], 0, -1) or {{}}
return {{time[1] * 1000000 + time[2], is_member, count, late, all}}
"""

# KEYS: members, trust.  ARGV: a member.
_LEAVE = f"""{_NOW}
redis.call('ZREM', KEYS[1], ARGV[1])
{_TRUST}
"""

Command = tuple[str | int, ...]


class Connection(Protocol):
    """What a thread talks to Redis on."""

    def send_command(self, *command: Any) -> object:
        """Send a command."""

    def read_response(self) -> Any:
        """Wait for the reply."""

    def disconnect(self) -> object:
        """Close the connection."""


class _Sample(NamedTuple):
    """What Redis' clock said, in milliseconds, in an answer to what was sent and received by ours."""

    sent: float
    received: float
    then: float


class Member:
    """This process, among those that share a store.

    names: in Redis: the members, what says that all can be heard, the clock and the channel.
    connect: opens a connection.
    errors: what may be raised where Redis is away.

    Its lease is renewed from a thread, on a connection of its own: a loop that is held up is not cut off. What a
    process has inherited by a fork belongs to its parent.
    """

    def __init__(
        self, names: tuple[str, str, str, str], connect: Callable[[], Connection], errors: tuple[type[Exception], ...]
    ) -> None:
        self.pid = os.getpid()
        self.id = ":".join(
            (socket.gethostname().replace(":", "-"), _place(), str(self.pid), _started(self.pid), secrets.token_hex(4))
        )
        #: How many share the store, as was last heard.
        self.count = 0
        self._names = names
        self._connect = connect
        self._errors = errors
        self._lock = threading.Lock()
        self._sample: _Sample | None = None
        #: Until when a lease may hold, on our clock.
        self._holds_until = float("-inf")
        self._is_member = False
        self._is_silent = False
        self._gone: list[str] = []
        #: The members, as were last heard, and when that was.
        self._known: list[str] = []
        self._heard = float("-inf")
        self._call = threading.Event()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def learn(self, sent: float, received: float, then: float) -> None:
        """Take note of what Redis' clock said in an answer; then: in milliseconds."""
        self._sample = _Sample(sent, received, then)

    def until(self, deadline: int) -> float:
        """Return until when it is certain, on our clock, that one of Redis' clock has not passed."""
        sample = self._sample
        return float("-inf") if sample is None else sample.sent + (deadline - sample.then) / 1000

    def since(self, then: float) -> float:
        """Return the seconds since a moment of Redis' clock at most, in milliseconds: less by what an answer takes."""
        sample = self._sample
        return 0.0 if sample is None else time.monotonic() - sample.sent + (sample.then - then) / 1000

    def renewal(self) -> Command | None:
        """Return the command that prolongs the lease; None while it is to run out."""
        with self._lock:
            sample = self._sample
            if self._is_silent or sample is None:
                return None
            now = time.monotonic()
            # Whatever becomes of the command: the answer that was received first said that it was later than this.
            self._holds_until = now + _LEASE + _MARGIN
            end = int(sample.then + (now - sample.received + _LEASE) * 1000)
        times = (int(_ABSENCE * 1000), int(_CONCERN * 1000))
        # Who was away for so long knows of nobody any more.
        known = self._known if now - self._heard < _ABSENCE else []
        others = [*self._gone, *(other for other in known if other not in self._gone)]
        is_member, counts = int(self._is_member), (len(known), len(self._gone))
        own = (self.id, end, is_member, secrets.token_hex(8))
        return ("EVAL", _RENEW, 4, *self._names, *own, *times, *counts, *others)

    def renewed(self, reply: list[Any]) -> float:
        """Take the reply to the renewal, and return what Redis' clock said, in milliseconds."""
        now, is_member, self.count, late, known = reply
        self._is_member = bool(is_member)
        self._known = known or self._known
        self._heard = time.monotonic()
        self._gone = [member for member in late if _is_gone(member)]
        return int(now) / 1000

    def withdraw(self) -> float:
        """Let the lease run out, and return the seconds until it has."""
        with self._lock:
            self._is_silent = True
            return max(0.0, self._holds_until - time.monotonic())

    def rejoin(self) -> None:
        """Take the lease up again."""
        with self._lock:
            was_silent, self._is_silent = self._is_silent, False
        if was_silent:
            self._call.set()

    def start(self) -> None:
        """Renew the lease from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="overdrive-member", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Give the lease back, but where there are writes that nobody has heard of."""
        if self.pid != os.getpid():
            return
        self._is_closed = True
        self._call.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        connection: Connection | None = None
        is_closed = False
        while not is_closed:
            self._call.wait(_INTERVAL)
            self._call.clear()
            is_closed = self._is_closed
            try:
                connection = connection or self._connected()
                if is_closed and not self._is_silent:
                    connection.send_command("EVAL", _LEAVE, 2, *self._names[:2], self.id)
                    connection.read_response()
                elif (command := self.renewal()) is not None:
                    self._renew(connection, command)
            except self._errors:
                if connection is not None:
                    connection.disconnect()
                connection = None
        if connection is not None:
            connection.disconnect()

    def _connected(self) -> Connection:
        connection = self._connect()
        sent = time.monotonic()
        connection.send_command("TIME")
        seconds, microseconds = connection.read_response()
        # Another Redis may have another clock.
        self.learn(sent, time.monotonic(), int(seconds) * 1000 + int(microseconds) / 1000)
        return connection

    def _renew(self, connection: Connection, command: Command) -> None:
        sent = time.monotonic()
        connection.send_command(*command)
        reply = connection.read_response()
        self.learn(sent, time.monotonic(), self.renewed(reply))
        if self._gone:
            self._call.set()


def _place() -> str:
    """Return what tells where process ids mean the same: a machine since its start, and a container; or nothing."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    return ""


def _started(pid: int) -> str:
    """Return when a process was started, in ticks since the machine's start; nothing where nobody says."""
    with suppress(OSError):
        # After the name, which may have anything in it (proc(5)).
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "dead" if state in "ZX" else fields[18]
    return ""


def _is_gone(member: str) -> bool:
    """Say whether a member's process is known not to run any more."""
    _host, place, pid, started, _ = member.split(":")
    if not place or place != _place():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _started(int(pid)) not in ("", started)
