"""The store inside the process, for as long as no other process on the machine uses the same databases.

It hears of its own process' writes alone, so beside another process that writes it would serve what is outdated.
Containers and machines do not see each other: several of them need a Redis, and nothing here can tell them so.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from weakref import WeakSet

from overdrive.workers import workers

from .entry import Entry, Instant
from .store import Found, MemoryStore
from .tags import CALL, TENANT

logger = logging.getLogger("overdrive")

#: Seconds between two looks whether those who were there have gone, and whether the file is still the one.
_LOOK_INTERVAL = 0.5

#: Bytes of the number.
_SIZE = 8
#: What is locked of the file: by everybody who is there, and by whoever is just coming.
_THERE, _COMING = 0, 1

_SAID = (
    "another process uses this database, and the cache is in each process' memory, where nobody hears of another's "
    "writes: while that is so, nothing that reads the database is kept. Give all of them a Redis, OVERDRIVE_REDIS_URL"
)
_UNKNOWN = (
    "nobody can tell whether another process uses this database (%s), and the cache is in each process' memory: "
    "nothing that reads the database is kept. Give it a Redis, OVERDRIVE_REDIS_URL, or a TMPDIR it may write to"
)


class Neighbours:
    """The processes of one account on this machine that use one database.

    All of them have one file open. It holds a number that grows whenever a process comes, and is mapped into memory, so
    that everybody sees at once that somebody has. A process has a shared lock on it for as long as it lives. It is a
    record lock (POSIX, fcntl): converted without letting go of it, not inherited by a fork, gone with its process.

    name: what stands for the database.
    """

    def __init__(self, name: str) -> None:
        digest = blake2b(name.encode(), digest_size=12).hexdigest()
        self._path = os.path.join(tempfile.gettempdir(), f"overdrive-{os.getuid()}-{digest}")
        self._fd: int | None = None
        #: Where this process itself keeps what was read of the database: a store for each of its apps.
        self.stores: WeakSet[LoneStore] = WeakSet()
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._lock = threading.Lock()
        #: The number as it is now, what it was at the last look, the same if nobody else was there then, and when to
        #: look again.
        self._number: memoryview[int] | tuple[int] = (0,)
        self._known: int | None = None
        self._alone: int | None = None
        self._look_at = 0.0

    def alone_since(self) -> int | None:
        """Return what stays the same for as long as this process is alone; None while it is not.

        The first call lets the others know that it is there. Raises `OSError` where it cannot.
        """
        if self._number[0] != self._known or time.monotonic() >= self._look_at:
            with self._lock:
                self._look()
        return self._alone

    def come(self) -> None:
        """Let the others know that this process is there, if there are any."""
        if self._fd is not None or os.path.exists(self._path):
            self.alone_since()

    def leave(self) -> None:
        """Be gone, until the next look; the last one takes the file along."""
        with self._lock:
            if self._fd is not None:
                # Who comes just now waits for this lock, and finds the file gone.
                with suppress(BlockingIOError, PermissionError):
                    fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _THERE)
                    if self._is_here(self._fd):
                        os.unlink(self._path)
                fd, self._fd = self._fd, None
                self._number, self._known = (0,), None
                os.close(fd)

    def _look(self) -> None:
        # What cleans a temporary directory may have taken the file: who comes then makes another one.
        if self._fd is not None and not self._is_here(self._fd):
            os.close(self._fd)
            self._fd = None
        if self._fd is None:
            self._fd, self._number = self._join()
        # Whoever comes after this has changed the number.
        self._known = self._number[0]
        self._alone = self._known if self._is_alone(self._fd) else None
        self._look_at = time.monotonic() + _LOOK_INTERVAL

    def _join(self) -> tuple[int, memoryview[int]]:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            fcntl.lockf(fd, fcntl.LOCK_SH, 1, _THERE)
            if self._is_here(fd):
                break
            # The last one has taken it along, just now.
            os.close(fd)
        os.ftruncate(fd, _SIZE)
        number = memoryview(mmap.mmap(fd, _SIZE)).cast("Q")
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, _COMING)
        # No number is ever that of a former file.
        number[0] = (number[0] or time.time_ns()) + 1
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, _COMING)
        return fd, number

    def _is_here(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(fd))
        except FileNotFoundError:
            return False

    def _is_alone(self, fd: int) -> bool:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _THERE)
        except (BlockingIOError, PermissionError):
            return False
        fcntl.lockf(fd, fcntl.LOCK_SH, 1, _THERE)
        return True


@functools.cache
def neighbours(name: str) -> Neighbours:
    """Return those who use the database of this name: one object a process, which loses its locks with any other."""
    return Neighbours(name)


class LoneStore(MemoryStore):
    """Entries inside the process. What another process could outdate is kept while there is none.

    max_bytes: see `MemoryStore`.
    databases: what stands for each database whose writes outdate entries.
    """

    def __init__(self, max_bytes: int | None, databases: Iterable[str]) -> None:
        super().__init__(max_bytes)
        self._neighbours = [neighbours(name) for name in databases]
        for each in self._neighbours:
            each.stores.add(self)
        self._is_one_of_several = workers() > 1
        self._is_alone = not self._is_one_of_several
        #: Who may be there, and what each has said at the last look.
        self._alone_since = self._unknown()
        self._why = _SAID
        self._said = False

    def is_alone(self) -> bool:
        """Say whether no other process can outdate anything; where one could have until now, all is forgotten."""
        try:
            for each, since in self._alone_since:
                if each.alone_since() != since:
                    self._look()
                    break
        except OSError as error:
            self._is_alone, self._alone_since = False, self._unknown()
            self._why = _UNKNOWN % error
        return self._is_alone

    def _unknown(self) -> list[tuple[Neighbours, int | None]]:
        return [(each, -1) for each in self._neighbours]

    def _look(self) -> None:
        self._alone_since = [(each, each.alone_since()) for each in self._neighbours]
        self._is_alone = not self._is_one_of_several and all(since is not None for _, since in self._alone_since)
        self._why = _SAID
        if self._is_alone:
            self.begin_anew()

    def seen(self) -> Instant:
        """Return the clock; before its first instant is told, the others know of this process."""
        if not self.is_alone():
            # What others write moves no clock: each look is a moment of its own, and nobody joins an earlier one.
            self._instant = Instant(self._instant.epoch, self._instant.now + 1)
        return self._instant

    def held(self, key: str) -> Entry | None:
        """Return an entry, if nothing it read can have been written since."""
        is_alone = self.is_alone()
        entry = super().held(key)
        return entry if is_alone or entry is None or _is_own(entry.versions) else None

    async def load(self, key: str, fingerprint: str) -> Found:
        """Look up an entry."""
        self.seen()
        found = await super().load(key, fingerprint)
        return found if self.is_alone() or _is_own(found.versions) else found._replace(entry=None)

    async def versions(self, tags: Collection[str]) -> tuple[str, dict[str, int]]:
        """Return the epoch, which is a new one where somebody else was here meanwhile, and the stamp of each tag."""
        self.is_alone()
        return await super().versions(tags)

    def refuses(self, tags: Collection[str]) -> str | None:
        """Refuse what another process could outdate, which is said once; and what another app is writing just now."""
        if _is_own(tags):
            return None
        if self.is_alone():
            now = time.monotonic()
            pending = (until for each in self._beside() for marks in each._pending.values() for until in marks.values())
            return "pending" if any(until > now for until in pending) else None
        if not self._said:
            self._said = True
            logger.warning(self._why)
        return "several-processes"

    async def bump(self, tags: Collection[str], writer: str = "") -> None:
        """Move the clock, and stamp `tags` with it; by then, who serves the same database knows of this process."""
        for each in self._neighbours:
            with suppress(OSError):
                each.come()
        await super().bump(tags, writer)

    def _stamp(self, tags: Iterable[str]) -> None:
        super()._stamp(tags)
        if not _is_own(tags):
            # Another app may know the same tables by another engine's name, so all it keeps is outdated.
            for each in self._beside():
                each.begin_anew()

    def _beside(self) -> Iterator[LoneStore]:
        """Walk the stores of other apps in this process that use one of these databases."""
        return (store for each in self._neighbours for store in list(each.stores) if store is not self)

    async def aclose(self) -> None:
        """Be gone, for the others."""
        for each in self._neighbours:
            with suppress(OSError):
                each.leave()


def _is_own(tags: Iterable[str]) -> bool:
    """Say whether no commit ever names one of these."""
    return all(tag.startswith((CALL, TENANT)) for tag in tags)
