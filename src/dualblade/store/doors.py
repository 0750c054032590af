"""The life of an extent: which door is open, and which moves are legal.

    FREE ----> DIRECT <----> PAGE_CACHE        promotion drops the range, then opens the door;
                  ^              |             no data moves
                  `- DEMOTING <--'             demotion writes back, drops, then opens the door
    any of them ----> FREE                     freeing drops the range too

An extent is open through one door at a time: while its direct door is open, no page of it is
cached, dirty or stale.
"""

from __future__ import annotations

from enum import Enum


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
