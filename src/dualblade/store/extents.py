"""Which ranges of a store are taken. Pure arithmetic; no I/O."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from dualblade.errors import NoSpace
from dualblade.units import EXTENT_ALIGN_BYTES, format_size, round_up


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """[offset, offset + size_bytes) of the store, both multiples of 2 MiB."""

    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.size_bytes


class ExtentAllocator:
    """Hands out contiguous ranges of [start, start + capacity_bytes), lowest first.

    First fit from the low end keeps a file short and its rewritten blocks warm. Freed ranges
    merge with their free neighbours. The capacity is a limit that holds: NoSpace, never growth.
    """

    def __init__(self, start: int, capacity_bytes: int) -> None:
        assert start % EXTENT_ALIGN_BYTES == 0
        self.capacity_bytes = capacity_bytes // EXTENT_ALIGN_BYTES * EXTENT_ALIGN_BYTES
        self._free = [Range(start, self.capacity_bytes)] if self.capacity_bytes else []

    @property
    def free_bytes(self) -> int:
        """Bytes not taken, in however many pieces."""
        return sum(piece.size_bytes for piece in self._free)

    @property
    def used_bytes(self) -> int:
        """Bytes taken."""
        return self.capacity_bytes - self.free_bytes

    def allocate(self, size_bytes: int) -> Range:
        """A free range of at least `size_bytes`, rounded up to 2 MiB. Raises: NoSpace."""
        assert size_bytes > 0
        wanted = round_up(size_bytes, EXTENT_ALIGN_BYTES)
        index = next((i for i, p in enumerate(self._free) if p.size_bytes >= wanted), None)
        if index is None:
            largest = max((piece.size_bytes for piece in self._free), default=0)
            raise NoSpace(
                f"the store has no {format_size(wanted)} in one piece: "
                f"{format_size(self.free_bytes)} of {format_size(self.capacity_bytes)} are free, "
                f"the largest piece is {format_size(largest)}",
                operation="allocate",
                size_bytes=wanted,
                hint="give it more room (disk_capacity_bytes, or another drive), or a shorter "
                "context",
            )
        piece = self._free[index]
        rest = Range(piece.offset + wanted, piece.size_bytes - wanted)
        self._free[index : index + 1] = [rest] if rest.size_bytes else []
        return Range(piece.offset, wanted)

    def free(self, taken: Range) -> None:
        """Give `taken` back; it must come from `allocate` and not have been freed."""
        at = bisect_left(self._free, taken)
        before = self._free[at - 1] if at else None
        after = self._free[at] if at < len(self._free) else None
        assert before is None or before.end <= taken.offset, "extent freed twice"
        assert after is None or taken.end <= after.offset, "extent freed twice"
        low, high = at, at
        merged = taken
        if before is not None and before.end == taken.offset:
            merged, low = Range(before.offset, before.size_bytes + merged.size_bytes), at - 1
        if after is not None and after.offset == taken.end:
            merged, high = Range(merged.offset, merged.size_bytes + after.size_bytes), at + 1
        self._free[low:high] = [merged]
