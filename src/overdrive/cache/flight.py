"""One execution for all who ask for the same at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from enum import Enum
from typing import Generic, TypeAlias, TypeVar

from .entry import Entry

T = TypeVar("T")


class Landed(Enum):
    """What a flight brings that brings no response."""

    #: A response that is not for others: each makes its own.
    ALONE = "alone"
    #: Nothing, as whoever was to make it has left: somebody else takes over.
    NOWHERE = "nowhere"


Landing: TypeAlias = Entry | Exception | Landed


class Flights(Generic[T]):
    """The executions under way, by what they are for."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight[T]] = {}

    def join(self, purpose: Hashable) -> tuple[Flight[T], bool]:
        """Return the execution for `purpose`, and whether it is the caller's to carry out and to end."""
        flight = self._flights.get(purpose)
        if flight is not None:
            return flight, False
        flight = self._flights[purpose] = Flight(self._flights, purpose)
        return flight, True


class Flight(Generic[T]):
    """One execution, and those who wait for what it brings."""

    __slots__ = ("_flights", "_landed", "_purpose", "awaited")

    def __init__(self, flights: dict[Hashable, Flight[T]], purpose: Hashable) -> None:
        self._flights = flights
        self._purpose = purpose
        self._landed: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        #: Whether anybody waits.
        self.awaited = False

    async def landing(self) -> T:
        """Wait for what the execution brings."""
        self.awaited = True
        # Those who wait come and go, and the others wait on.
        return await asyncio.shield(self._landed)

    def end(self, result: T) -> None:
        """End the execution: those who wait get the result, and those who come later are not among them."""
        del self._flights[self._purpose]
        self._landed.set_result(result)
