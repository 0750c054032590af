"""The life of an extent: which door is open, and which moves are legal.

    FREE ----> DIRECT <----> PAGE_CACHE        promotion drops the range, then opens the door;
                  ^              |             no data moves
                  `- DEMOTING <--'             demotion writes back, drops, then opens the door
    any of them ----> FREE                     freeing drops the range too

An extent is open through one door at a time. While its direct door is open no page of it is dirty,
and none is read by us. Some may be cached: what the kernel reads around a mapped page that is
touched next to it, or what others read of a device. They are dropped before the page-cache door
opens.
"""

from __future__ import annotations

from enum import Enum

from dualblade.errors import ConfigError


class Door(Enum):
    """Where an extent is in its life."""

    FREE = "free"
    DIRECT = "direct"
    PAGE_CACHE = "page-cache"
    DEMOTING = "demoting"


LEGAL_MOVES: dict[Door, frozenset[Door]] = {
    Door.FREE: frozenset({Door.DIRECT, Door.PAGE_CACHE}),
    Door.DIRECT: frozenset({Door.PAGE_CACHE, Door.FREE}),
    Door.PAGE_CACHE: frozenset({Door.DEMOTING, Door.FREE}),
    Door.DEMOTING: frozenset({Door.DIRECT, Door.FREE}),
}


def as_door(door: Door | str) -> Door:
    """One of the two doors, also by its word. Raises: ConfigError."""
    try:
        found = Door(door)
    except ValueError:
        found = Door.FREE
    if found not in (Door.DIRECT, Door.PAGE_CACHE):
        raise ConfigError(f"{door!r} is no door", hint="use Door.DIRECT or Door.PAGE_CACHE")
    return found
