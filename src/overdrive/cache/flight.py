"""One execution for all who ask for the same at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from enum import Enum
from typing import TypeAlias

from .entry import Entry


class Landed(Enum):
    """What a flight brings that brings no response."""

    #: A response that is not for others: each makes its own.
    ALONE = "alone"
    #: Nothing, as whoever was to make it has left: somebody else takes over.
    NOWHERE = "nowhere"


Landing: TypeAlias = Entry | Exception | Landed


#: Seconds somebody waits for another's result before they make their own.
_PATIENCE = 10.0


class Flights:
    """The executions under way, by what they are for."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight] = {}

    def join(self, purpose: Hashable) -> tuple[Flight, bool]:
        """Return the execution for `purpose`, and whether it is the caller's to carry out and to end."""
        flight = self._flights.get(purpose)
        if flight is not None:
            return flight, False
        flight = self._flights[purpose] = Flight(self._flights, purpose)
        return flight, True


class Flight:
    """One execution, and those who wait for what it brings."""

    __slots__ = ("_flights", "_landed", "_purpose", "awaited")

    def __init__(self, flights: dict[Hashable, Flight], purpose: Hashable) -> None:
        self._flights = flights
        self._purpose = purpose
        self._landed: asyncio.Future[Landing] = asyncio.get_running_loop().create_future()
        #: Whether anybody waits.
        self.awaited = False

    async def landing(self) -> Landing:
        """Wait for what the execution brings, but not for ever."""
        self.awaited = True
        try:
            async with asyncio.timeout(_PATIENCE):
                # Those who wait come and go, and the others wait on.
                return await asyncio.shield(self._landed)
        except TimeoutError:
            return Landed.ALONE

    def end(self, result: Landing) -> None:
        """End the execution: those who wait get the result, and those who come later are not among them."""
        del self._flights[self._purpose]
        self._landed.set_result(result)
