"""How far the page cache reaches: units in an order that spreads every beginning of it evenly over
the sweep. Pure.

A level is whole units from the start of that order and the beginning of the next one. So a level
for less memory is part of the level for more, and a change moves only what differs; and memory is
used to within a few MiB, however large units are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from dualblade.geometry import UnitId

_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio: its multiples fill the circle evenly, however many they are."""

WHOLE = 1 << 62
"""Bytes of a unit that are cached: all that it has, and will have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitDemand:
    """Bytes that `unit` is expected to have stored when the plan has done its time, and those
    that it has now (None: the same). Its beginning may be cached alone, in multiples of
    `grain_bytes`; 0: only all of it."""

    unit: UnitId
    size_bytes: int
    stored_bytes: int | None = None
    grain_bytes: int = 0

    @property
    def now_bytes(self) -> int:
        """Bytes stored now."""
        return self.size_bytes if self.stored_bytes is None else self.stored_bytes

    def beginning_in(self, room_bytes: int) -> int:
        """Most bytes of its beginning, not all of it, that `room_bytes` hold."""
        if not self.grain_bytes:
            return 0
        return min(room_bytes, self.size_bytes - 1) // self.grain_bytes * self.grain_bytes


class Level(NamedTuple):
    """`whole` units in the order, and `part_bytes` of the beginning of the next one."""

    whole: int
    part_bytes: int


NOTHING = Level(0, 0)


class Ladder:
    """The levels of some demands, which are told in the order of the sweep."""

    def __init__(self, demands: Sequence[UnitDemand]) -> None:
        self.ordered = tuple(demands[index] for index in spread_order(len(demands)))
        self._ends = [0, *accumulate(demand.size_bytes for demand in self.ordered)]

    @property
    def top(self) -> Level:
        """All units."""
        return Level(len(self.ordered), 0)

    @property
    def step_bytes(self) -> int:
        """What moves at least, of units of a middling size."""
        middle = self.ordered[len(self.ordered) // 2]
        return middle.grain_bytes or middle.size_bytes

    def size_bytes(self, level: Level) -> int:
        """What is cached at `level`."""
        return self._ends[level.whole] + level.part_bytes

    def fitting(self, room_bytes: int) -> Level:
        """The highest level that `room_bytes` hold. A unit that does not fit ends it: skipping it
        would break the order, and with it that more memory never demotes."""
        whole = bisect_right(self._ends, room_bytes) - 1
        if whole < 0 or whole == len(self.ordered):
            return Level(max(whole, 0), 0)
        return Level(whole, self.ordered[whole].beginning_in(room_bytes - self._ends[whole]))

    def within(self, level: Level) -> Level:
        """`level`, of these demands: the part is no larger than its unit."""
        if level.whole >= len(self.ordered):
            return self.top
        return Level(level.whole, min(level.part_bytes, self.ordered[level.whole].size_bytes))

    def cached(self, level: Level) -> dict[UnitId, int]:
        """Bytes of each unit's beginning that are cached; units of which nothing is are left out,
        those that are cached whole have `WHOLE`."""
        cached = dict.fromkeys((d.unit for d in self.ordered[: level.whole]), WHOLE)
        if level.part_bytes:
            cached[self.ordered[level.whole].unit] = level.part_bytes
        return cached

    def between(self, one: Level, other: Level) -> tuple[UnitDemand, ...]:
        """Units of which not the same is cached at both, in the order."""
        low, high = min(one, other), max(one, other)
        return self.ordered[low.whole : high.whole + (high.part_bytes > 0)]


@lru_cache(maxsize=16)
def spread_order(count: int) -> tuple[int, ...]:
    """Indices below `count` such that each beginning of the list is spread evenly over them.

    Of index i + 1, the part after the point of its multiple of the golden ratio decides: those
    below any threshold lie at two or three distances from each other (the three-gap theorem).
    """
    return tuple(sorted(range(count), key=lambda i: (i + 1) * _GOLDEN % (1 << 64)))
