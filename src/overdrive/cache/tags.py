"""The names by which what is kept is dropped, besides what it has read."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from overdrive.context import OF_ROWS
from overdrive.errors import ConfigurationError

#: What the tags of tenants begin with, and those of calls: no commit ever names one of these.
TENANT = "tenant/"
CALL = "call/"
#: What the tags begin with that tell what is dropped by hand from what is written: no commit names them either.
DROPPED = "dropped/"


def tags_of(names: Iterable[str]) -> list[str]:
    """Return tags as they are stamped: a table's name alone is one of the default engine's.

    Raises `ConfigurationError` for what is not a collection of names.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ConfigurationError(f"tags are several names, in a list or a tuple, and not {names!r} alone")
    tags = []
    for name in names:
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"a tag is a name, and not {name!r}")
        tags.append(name if "/" in name else f"default/{name}")
    return tags


def everything_beside(tag: str) -> str:
    """Return the tag of what is written to a table's engine in ways that nobody can read."""
    return f"{tag.partition('/')[0]}/*"


def tag_of_tenant(tenant: str) -> str:
    """Return the tag of what is kept for a tenant.

    A store remembers every tag, and tenants may be named by clients, so there is one for each 65,536th part of them.
    """
    return TENANT + blake2b(str(tenant).encode(), digest_size=2).hexdigest()


def dropped(tags: Iterable[str]) -> set[str]:
    """Return the tags that are stamped where these are dropped by hand, and are not where they are written."""
    return {DROPPED + tag.partition(OF_ROWS)[0] for tag in tags if not tag.startswith((TENANT, CALL))}
