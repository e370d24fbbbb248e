"""One execution for all who ask for the same at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from enum import Enum
from typing import TypeAlias

from .entry import Entry, Instant


class Landed(Enum):
    """What a flight brings that brings no response."""

    #: A response that is not for others: each makes its own.
    ALONE = "alone"
    #: Nothing, as whoever was to make it has left: somebody else takes over.
    NOWHERE = "nowhere"


Landing: TypeAlias = Entry | Exception | Landed


#: Seconds somebody waits for another's result before they make their own.
_PATIENCE = 10.0


def patience() -> float:
    """Return when somebody who begins to wait now has waited long enough, on the loop's clock."""
    return asyncio.get_running_loop().time() + _PATIENCE


class Flights:
    """The executions under way in this process, by what they are for."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight] = {}

    def join(self, purpose: Hashable, instant: Instant) -> tuple[Flight, bool]:
        """Return the execution for `purpose`, and whether it is the caller's to carry out and to end.

        instant: when the caller asked. One that began at another instant may have read what was outdated by then;
            one that has not begun will read nothing older.
        """
        flight = self._flights.get(purpose)
        if flight is not None and flight.instant in (None, instant):
            return flight, False
        flight = self._flights[purpose] = Flight(self._flights, purpose)
        return flight, True


class Flight:
    """One execution, and those who wait for what it brings."""

    __slots__ = ("_flights", "_landed", "_purpose", "awaited", "instant", "lease")

    def __init__(self, flights: dict[Hashable, Flight], purpose: Hashable) -> None:
        self._flights = flights
        self._purpose = purpose
        self._landed: asyncio.Future[Landing] = asyncio.get_running_loop().create_future()
        #: Whether anybody in this process waits.
        self.awaited = False
        #: The instant before the first read; None until it has begun.
        self.instant: Instant | None = None
        #: What keeps other processes waiting, and tells them how it ended; None where there are none.
        self.lease: Callable[[Landing], None] | None = None

    async def landing(self, until: float) -> Landing:
        """Wait for what the execution brings, but not for ever.

        until: on the loop's clock.
        """
        self.awaited = True
        try:
            async with asyncio.timeout_at(until):
                # Those who wait come and go, and the others wait on.
                return await asyncio.shield(self._landed)
        except TimeoutError:
            return Landed.ALONE

    def end(self, result: Landing) -> None:
        """End the execution: those who wait get the result, and those who come later are not among them."""
        if self._flights.get(self._purpose) is self:
            del self._flights[self._purpose]
        self._landed.set_result(result)
        if self.lease is not None:
            self.lease(result)
