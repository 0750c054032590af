"""Parts of a store that are read where the page cache has them, and what went through its doors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dualblade.host.mapped import FileMemory


@dataclass(frozen=True, slots=True, eq=False)
class InPlace:
    """A part of an extent where the page cache has it; see Store.in_place."""

    memory: FileMemory
    offset: int
    size_bytes: int
    counters: DoorCounters

    def hold(self) -> memoryview | None:
        """Its bytes, at hand; None when they cannot be had so any more: `read` them."""
        if not self.memory.hold(self.offset, self.size_bytes):
            return None
        return self.memory.buffer[self.offset : self.offset + self.size_bytes]

    def count(self) -> None:
        """It was read."""
        self.counters.page_cache_read_bytes += self.size_bytes
        self.counters.in_place_read_bytes += self.size_bytes

    def joined(self, after: InPlace) -> InPlace:
        """This and what begins where it ends, as one."""
        assert self.memory is after.memory
        assert self.offset + self.size_bytes == after.offset
        return replace(self, size_bytes=self.size_bytes + after.size_bytes)

    @property
    def address(self) -> int:
        """Of its first byte."""
        return self.memory.address + self.offset


@dataclass(slots=True)
class DoorCounters:
    """What went through each door since the store was opened; bytes. `in_place_read_bytes` of the
    reads through the page cache were not copied: see Store.in_place."""

    direct_read_bytes: int = 0
    direct_write_bytes: int = 0
    page_cache_read_bytes: int = 0
    page_cache_write_bytes: int = 0
    in_place_read_bytes: int = 0
    promotions: int = 0
    demotions: int = 0
