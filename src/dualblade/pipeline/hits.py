"""How much of what goes through the page cache is there before it is read."""

from __future__ import annotations

from collections.abc import Callable

from dualblade.geometry import Part
from dualblade.pipeline.unit import Unit
from dualblade.store import Door, Extent

HITS_SECONDS = 1.0
"""Between two measurements of hits: cachestat of 1 GiB in 4 KiB pages costs 2 ms, asking it of 48
units 1 ms."""


class HitSweep:
    """How much of what a whole sweep read through the page cache was there before it was read.

    The read-ahead enters a step's first layers before the step begins, so a sweep counts from the
    visit of the first unit to that of the last, and a move in between makes it worthless.
    """

    def __init__(self, unit_count: int, cached_bytes: Callable[[Extent], int]) -> None:
        self._unit_count = unit_count
        self._cached_bytes = cached_bytes
        self._seen = 0
        self.is_counting = False
        self._cached = self._stored = 0
        self._measured_at = float("-inf")
        self._hit_fraction: float | None = None

    def begins(self, unit: Unit) -> bool:
        """Whether `unit` is the first of a sweep."""
        return unit.id.layer == 0 and unit.id.part is Part.KEYS

    def begin(self, now: float) -> None:
        """A sweep begins; it counts, if it is time."""
        self.is_counting = now - self._measured_at >= HITS_SECONDS
        self._seen = self._cached = self._stored = 0

    def visit(self, unit: Unit, now: float) -> None:
        """`unit` is about to be read, in a sweep that counts."""
        self._seen += 1
        for segment, stored in unit.stored_parts():
            if segment.extent.door is Door.PAGE_CACHE:
                self._stored += stored
                # An extent may be cached beyond its last tile.
                self._cached += min(stored, self._cached_bytes(segment.extent))
        if self._seen == self._unit_count:
            self.is_counting = False
            self._measured_at = now
            self._hit_fraction = self._cached / self._stored if self._stored else None

    @property
    def measured(self) -> float | None:
        """The hits of a sweep not told yet; None: none was measured."""
        return self._hit_fraction

    def take(self) -> float | None:
        """`measured`, which is told then."""
        taken, self._hit_fraction = self._hit_fraction, None
        return taken

    def restart(self) -> None:
        """Units moved: what was counted says nothing of the plan in force."""
        self.is_counting, self._hit_fraction = False, None
