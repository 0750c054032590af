"""One unit's stored tiles: where each is, through which door, and how a run of them is read.

A unit is a list of segments. With a stated maximum there is one; without, they grow geometrically
to 256 MiB; a change of batch starts a new one, because its tiles have another size. Where only the
beginning of a unit goes through the page cache, the segment that the plan cuts is two.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dualblade.errors import NoSpace, StorageError
from dualblade.geometry import TileGeometry, UnitId
from dualblade.store import Door, Extent
from dualblade.units import EXTENT_ALIGN_BYTES, MIB

_SEGMENT_BYTES_MAX = 256 * MIB


@dataclass(slots=True, eq=False)
class Segment:
    """Tiles [first_tile, first_tile + capacity) of a unit, `batch` sequences each.

    `checksums` are those of its slabs, tile after tile, 8 bytes each; see `checksums.Checksums`.
    `is_rest`: it was cut off the one before, and lies right behind it.
    """

    extent: Extent
    batch: int
    first_tile: int
    capacity: int
    checksums: array[int] = field(default_factory=lambda: array("Q"))
    is_rest: bool = False

    @property
    def end_tile(self) -> int:
        """The tile after the last that it has room for."""
        return self.first_tile + self.capacity


@dataclass(frozen=True, slots=True)
class Piece:
    """One transfer: `tiles` whole tiles from `tile` on, or some sequences of a single one.

    A tile larger than a slot is moved in several pieces of whole slabs.
    """

    segment: Segment
    tile: int
    tiles: int
    sequence: int
    sequences: int

    def offset(self, geometry: TileGeometry) -> int:
        """Where it begins in its segment's extent."""
        tile_bytes = geometry.tile_bytes(self.segment.batch)
        within = (self.tile - self.segment.first_tile) * tile_bytes
        return within + self.sequence * geometry.slab_bytes

    def size_bytes(self, geometry: TileGeometry) -> int:
        """Bytes of the transfer; whole blocks."""
        return self.tiles * self.sequences * geometry.slab_bytes

    def goes_on_in(self, after: Piece) -> bool:
        """Whether both are whole tiles that lie side by side."""
        are_whole = self.sequences == after.sequences == self.segment.batch
        return are_whole and after.segment is self.segment and after.tile == self.tile + self.tiles


def tile_view(
    memory: torch.Tensor, geometry: TileGeometry, dtype: torch.dtype, tiles: int, sequences: int
) -> torch.Tensor:
    """`memory` (uint8, as stored) seen as [tiles, sequences, kv_heads, rows, dim] of `dtype`."""
    heads, rows, dim = geometry.kv_heads, geometry.rows, geometry.dim
    slab = geometry.slab_bytes // geometry.item_bytes
    shape = (tiles, sequences, heads, rows, dim)
    strides = (sequences * slab, slab, rows * dim, dim, 1)
    return memory.view(dtype).as_strided(shape, strides)


class Space(Protocol):
    """Where extents are: a store, or memory."""

    def allocate(self, size_bytes: int, door: Door) -> Extent:
        """An extent of at least `size_bytes`. Raises: NoSpace."""

    def free(self, extent: Extent) -> None:
        """Give `extent` back."""

    def move(self, extent: Extent, door: Door) -> None:
        """Open `extent` through `door`."""

    def split(self, extent: Extent, at_bytes: int) -> Extent:
        """Cut off what is behind `at_bytes`."""

    def join(self, extent: Extent, rest: Extent) -> None:
        """Undo `split`."""


class Unit:
    """The stored part of the keys or values of one layer. Knows places, holds no tensors.

    `tokens_max` None: segments grow; else the first segment holds that many tokens. Its first
    `cached_bytes` go through the page cache, as far as they are whole tiles and pages. `sweeps`
    counts how often all its tiles were read, `sweeps_in_memory` how often since one of them was
    not in the page cache.
    """

    def __init__(
        self, unit_id: UnitId, geometry: TileGeometry, space: Space, *, tokens_max: int | None
    ) -> None:
        self.id = unit_id
        self.geometry = geometry
        self.stored_tiles = 0
        self.cached_bytes = 0
        self.sweeps = 0
        self.sweeps_in_memory = 0
        self.segments: list[Segment] = []
        self.is_torn = False  # something ended `place` half way
        self._space = space
        self._tiles_max = None if tokens_max is None else -(-tokens_max // geometry.rows)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tiles."""
        return sum(size_bytes for _, size_bytes in self.stored_parts())

    def stored_parts(self) -> Iterator[tuple[Segment, int]]:
        """Segments that hold tiles, and the bytes of these."""
        for piece in self.pieces(0, self.stored_tiles, slot_bytes=1 << 62):
            yield piece.segment, piece.size_bytes(self.geometry)

    def make_room(
        self, tiles: int, batch: int, *, growth_bytes_max: int = _SEGMENT_BYTES_MAX
    ) -> None:
        """Have blocks for `tiles` more tiles of `batch` sequences; where no maximum was stated, and
        all that it has are used up, for more that may come: `growth_bytes_max` at most. Raises:
        NoSpace."""
        end = self.stored_tiles
        last = self.segments[-1] if self.segments else None
        if last is not None and last.batch == batch:
            tiles -= max(0, last.end_tile - end)
            end = max(end, last.end_tile)
        elif last is not None:
            self._end_batch(end)
        if tiles <= 0:
            return
        tile_bytes = self.geometry.tile_bytes(batch)
        needed = tiles * tile_bytes
        wanted = max(needed, self._growth_bytes(batch, growth_bytes_max))
        begins = sum(self._room_bytes(segment) for segment in self.segments)
        is_cached = self.cached_bytes - begins >= wanted
        door = Door.PAGE_CACHE if is_cached else Door.DIRECT
        try:
            extent = self._space.allocate(wanted, door)
        except NoSpace:
            if wanted == needed:
                raise
            extent = self._space.allocate(needed, door)
        self.segments.append(Segment(extent, batch, end, extent.size_bytes // tile_bytes))
        self.place(self.cached_bytes)

    def _end_batch(self, end: int) -> None:
        """No more tiles of the last segment's batch come, after tile `end`. Segments beyond it are
        rests that were cut, or room for a step that was refused."""
        while self.segments and self.segments[-1].first_tile >= end:
            self._free_last()
        if self.segments:
            last = self.segments[-1]
            last.capacity = min(last.capacity, end - last.first_tile)

    def _room_bytes(self, segment: Segment) -> int:
        return segment.capacity * self.geometry.tile_bytes(segment.batch)

    def _growth_bytes(self, batch: int, most: int) -> int:
        """Bytes that a new segment should have, however few are needed now."""
        if not self.segments and self._tiles_max is not None:
            return self._tiles_max * self.geometry.tile_bytes(batch)
        if not self.segments or self.segments[-1].batch != batch:
            return EXTENT_ALIGN_BYTES  # a new batch size may last for a few tokens only
        return min(2 * self.segments[-1].extent.size_bytes, most, _SEGMENT_BYTES_MAX)

    def pieces(self, start: int, stop: int, slot_bytes: int) -> Iterator[Piece]:
        """Transfers of at most `slot_bytes` that cover tiles [start, stop), in order."""
        slab = self.geometry.slab_bytes
        for segment in self.segments:
            low = max(start, segment.first_tile)
            high = min(stop, segment.end_tile)
            tiles_a_slot = slot_bytes // (segment.batch * slab)
            while low < high and tiles_a_slot:
                tiles = min(tiles_a_slot, high - low)
                yield Piece(segment, low, tiles, 0, segment.batch)
                low += tiles
            for tile in range(low, high):
                for sequence in range(0, segment.batch, slot_bytes // slab):
                    sequences = min(slot_bytes // slab, segment.batch - sequence)
                    yield Piece(segment, tile, 1, sequence, sequences)

    @property
    def is_cached_whole(self) -> bool:
        """Whether all of it goes through the page cache."""
        return all(segment.extent.door is Door.PAGE_CACHE for segment in self.segments)

    @property
    def tile_bytes_max(self) -> int:
        """Bytes of the largest of its tiles."""
        batches = (segment.batch for segment in self.segments)
        return self.geometry.tile_bytes(max(batches, default=0))

    def place(self, cached_bytes: int) -> None:
        """Have the first `cached_bytes` go through the page cache, the rest direct. Segments may be
        cut or joined: nobody may hold pieces of them, unless the unit goes as a whole.

        Blocks; raises DeviceError (see Store.move).
        """
        self.is_torn = True
        if cached_bytes != self.cached_bytes:
            self.sweeps_in_memory = 0
        self.cached_bytes = left = cached_bytes
        for segment in tuple(self.segments):
            size, grain = self._room_bytes(segment), self.geometry.cut_bytes(segment.batch)
            if grain <= left < size:
                self._cut(segment, left // grain * grain)
            is_cached = left > 0 and left >= self._room_bytes(segment)
            door = Door.PAGE_CACHE if is_cached else Door.DIRECT
            self._space.move(segment.extent, door)
            left = max(0, left - size)
        self._join()
        self.is_torn = False

    def _cut(self, segment: Segment, at_bytes: int) -> None:
        """Make two of `segment`; the second goes direct."""
        tiles = at_bytes // self.geometry.tile_bytes(segment.batch)
        rest = Segment(
            self._space.split(segment.extent, at_bytes),
            segment.batch,
            segment.first_tile + tiles,
            segment.capacity - tiles,
            segment.checksums[tiles * segment.batch :],
            is_rest=True,
        )
        del segment.checksums[tiles * segment.batch :]
        segment.capacity = tiles
        self.segments.insert(self.segments.index(segment) + 1, rest)
        self._space.move(rest.extent, Door.DIRECT)

    def _join(self) -> None:
        """Make one of segments that were one and have the same door again."""
        joined: list[Segment] = []
        for segment in self.segments:
            before = joined[-1] if joined else None
            if (
                before is None
                or not segment.is_rest
                or before.extent.door is not segment.extent.door
            ):
                joined.append(segment)
                continue
            self._space.join(before.extent, segment.extent)
            if len(before.checksums) == before.capacity * before.batch:  # else they were taken back
                before.checksums += segment.checksums
            before.capacity += segment.capacity
        self.segments = joined

    def crop(self, tiles: int) -> None:
        """Forget stored tiles from `tiles` on; segments beyond are freed."""
        self.stored_tiles = tiles
        while self._is_spare(tiles):
            self._free_last()

    def _is_spare(self, tiles: int) -> bool:
        """Whether the last segment is beyond, with all that was cut off it and before it."""
        whole = next((s for s in reversed(self.segments) if not s.is_rest), None)
        return whole is not None and whole.first_tile >= max(tiles, 1)

    def free(self) -> None:
        """Give all extents back."""
        self.stored_tiles = 0
        while self.segments:
            self._free_last()

    def _free_last(self) -> None:
        try:
            self._space.free(self.segments[-1].extent)  # first: Ctrl-C must not lose the extent
        except StorageError:  # it is free all the same
            self.segments.pop()
            raise
        self.segments.pop()


def paired_pieces(
    keys: Unit,
    values: Unit,
    tiles: range,
    slot_bytes: int,
    edge_tiles: int,
) -> Iterator[tuple[Piece, Piece]]:
    """Pieces of at most `slot_bytes` of the same `tiles` of keys and of values, in order. None
    reaches over a multiple of `edge_tiles`."""
    tile, stop = tiles.start, tiles.stop
    ours, theirs = iter(keys.segments), iter(values.segments)
    key_segment = value_segment = None
    while tile < stop:
        while key_segment is None or tile >= key_segment.end_tile:
            key_segment = next(ours)
        while value_segment is None or tile >= value_segment.end_tile:
            value_segment = next(theirs)
        batch = key_segment.batch
        slab = max(keys.geometry.slab_bytes, values.geometry.slab_bytes)
        ends = (segment.end_tile for segment in (key_segment, value_segment))
        high = min(stop, (tile // edge_tiles + 1) * edge_tiles, *ends)
        count = min(slot_bytes // (batch * slab), high - tile)
        step = batch if count else slot_bytes // slab
        for sequence in range(0, batch, step):
            size = (max(count, 1), sequence, min(step, batch - sequence))
            yield Piece(key_segment, tile, *size), Piece(value_segment, tile, *size)
        tile += max(count, 1)
