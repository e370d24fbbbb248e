"""A stored response, its written form, and what it is worth now."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

import msgspec

from .conditional import Header
from .tags import CALL, DROPPED, TENANT

#: The first element of the written form; another number is another release's, and a miss.
FORMAT = 2


class State(Enum):
    """What an entry is worth."""

    FRESH = "fresh"
    #: Past its time to live, with nothing it read written since.
    EXPIRED = "expired"
    #: Something it read was written, or nobody can tell any more: not to be served unless its route says so.
    INVALIDATED = "invalidated"


class Instant(NamedTuple):
    """A point on a store's write clock.

    epoch: changes whenever the store may have forgotten a write.
    now: the number of writes announced in this epoch.
    """

    epoch: str
    now: int


class Form(msgspec.Struct, frozen=True, array_like=True):
    """A body in another content coding, with the headers it is sent with."""

    headers: list[Header]
    body: bytes


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A response as it was sent, and what it depends on.

    created, ttl: seconds on the cache's clock.
    versions: for each tag that was read, the write it was last named by.
    fingerprint: of the schema and policy it was made under.
    gzipped: its gzip form, if one was made.
    """

    format: int
    fingerprint: str
    epoch: str
    versions: dict[str, int]
    created: float
    ttl: float
    status: int
    headers: list[Header]
    body: bytes
    gzipped: Form | None = None

    def state(self, now: float, epoch: str, versions: Mapping[str, int]) -> State:
        """Judge the entry by the clock, and by the epoch and versions of its tags as they are now."""
        if self.is_outdated(epoch, versions):
            return State.INVALIDATED
        return State.FRESH if self.is_fresh(now) else State.EXPIRED

    def is_fresh(self, now: float) -> bool:
        """Say whether it is within its time to live."""
        return now - self.created < self.ttl

    def fresh_until(self, state: State) -> float:
        """Return when it has ended, or will.

        What a write has outdated may have been so ever since it was made: nobody remembers when that was.
        """
        return self.created if state is State.INVALIDATED else self.created + self.ttl

    def answers(self, now: float, window: float, state: State) -> bool:
        """Say whether it has ended less than `window` seconds ago."""
        # A clock may be set back.
        return max(0, now - self.fresh_until(state)) < window

    def is_outdated(self, epoch: str, versions: Mapping[str, int]) -> bool:
        """Say whether something it read was written, by the epoch and versions of its tags as they are now."""
        return epoch != self.epoch or any(versions.get(tag) != seen for tag, seen in self.versions.items())

    def may_be_outdated(self, epoch: str, versions: Mapping[str, int]) -> bool:
        """Say whether it may answer though what it read was written: its route says so, and nobody has dropped it.

        Entries of such routes have tags that no write names, of all that `invalidate` could have dropped them by.
        """
        by_hand = [tag for tag in self.versions if tag.startswith((DROPPED, CALL, TENANT))]
        is_allowed = any(tag.startswith(DROPPED) for tag in by_hand)
        return is_allowed and epoch == self.epoch and all(versions.get(tag) == self.versions[tag] for tag in by_hand)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Entry)


def encode(entry: Entry) -> bytes:
    """Write `entry` down."""
    return _encoder.encode(entry)


def decode(data: bytes, fingerprint: str) -> Entry | None:
    """Read an entry; None where it is damaged, of another format or of another release."""
    try:
        entry = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return entry if (entry.format, entry.fingerprint) == (FORMAT, fingerprint) else None
