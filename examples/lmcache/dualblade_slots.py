"""Room for objects of any size on the extents of a dualblade store."""

from __future__ import annotations

from dataclasses import dataclass

from dualblade import NoSpace
from dualblade.store import Door, Extent, Store

# Extents are multiples of 2 MiB: with eight slots in each at most 256 KiB a slot are lost.
SLOTS_PER_EXTENT = 8


@dataclass(slots=True, eq=False)
class Shelf:
    """An extent cut into slots of one size; `free` are offsets."""

    extent: Extent
    slot_bytes: int
    count: int
    free: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Room for one object."""

    shelf: Shelf
    offset: int

    @property
    def size_bytes(self) -> int:
        """Whole blocks."""
        return self.shelf.slot_bytes


class Slots:
    """Slots of any size on the extents of a store."""

    def __init__(self, store: Store, door: Door) -> None:
        self._store = store
        self._door = door
        self._open: dict[int, dict[Shelf, None]] = {}  # by size: those with free slots, in order

    def take(self, slot_bytes: int) -> Slot:
        """A slot of `slot_bytes`, whole blocks. Raises: NoSpace, StorageError."""
        shelves = self._open.setdefault(slot_bytes, {})
        if not shelves:
            shelves[self._new_shelf(slot_bytes)] = None
        shelf = next(reversed(shelves))
        slot = Slot(shelf, shelf.free.pop())
        if not shelf.free:
            del shelves[shelf]
        return slot

    def give_back(self, slot: Slot) -> None:
        """Nothing is being read from or written to it any more."""
        shelf, shelves = slot.shelf, self._open[slot.size_bytes]
        shelf.free.append(slot.offset)
        if len(shelf.free) < shelf.count:
            shelves[shelf] = None
        else:
            shelves.pop(shelf, None)
            self._store.free(shelf.extent)

    def _new_shelf(self, slot_bytes: int) -> Shelf:
        try:
            extent = self._store.allocate(SLOTS_PER_EXTENT * slot_bytes, self._door)
        except NoSpace:
            extent = self._store.allocate(slot_bytes, self._door)  # what is left may do for one
        count = extent.size_bytes // slot_bytes
        return Shelf(extent, slot_bytes, count, [i * slot_bytes for i in reversed(range(count))])
