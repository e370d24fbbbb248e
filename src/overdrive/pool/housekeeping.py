"""What falls due in the pools of threads, which have no event loop: one thread does it for all of a process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from weakref import WeakMethod

logger = logging.getLogger("overdrive")


class Housekeeper:
    """Calls methods when they are due, in a thread that begins with the first and ends after the last.

    is_running: whether there is such a thread.
    """

    def __init__(self) -> None:
        # Reentrant: what is collected as garbage gives its connection back from wherever that happens.
        self._changed = threading.Condition(threading.RLock())
        self._due: dict[WeakMethod[Callable[[], None]], float] = {}
        self.is_running = False

    def call_at(self, at: float, method: Callable[[], None]) -> None:
        """Call `method` at `at`, by `time.monotonic`.

        Of several such times it is the last one said that counts; and whose object is gone is not called.
        """
        with self._changed:
            self._due[WeakMethod(method)] = at
            if self.is_running:
                self._changed.notify()
            else:
                threading.Thread(target=self._run, name="overdrive-housekeeping", daemon=True).start()
                self.is_running = True

    def _run(self) -> None:
        while (methods := self._next()) is not None:
            for method in methods:
                try:
                    method()
                except Exception:
                    logger.exception("a pool could not be seen to")
            # Nothing is kept alive while this waits.
            del methods
            method = None  # type: ignore[assignment]

    def _next(self) -> list[Callable[[], None]] | None:
        with self._changed:
            while planned := self._due.copy():
                now = time.monotonic()
                if due := [each for each, at in planned.items() if at <= now]:
                    for each in due:
                        del self._due[each]
                    return [method for each in due if (method := each()) is not None]
                self._changed.wait(min(planned.values()) - now)
            self.is_running = False
            return None


housekeeper = Housekeeper()


if hasattr(os, "register_at_fork"):
    # A child has inherited no threads.
    os.register_at_fork(after_in_child=housekeeper.__init__)  # type: ignore[misc]
