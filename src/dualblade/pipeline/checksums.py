"""Checksums of stored tiles: made as they leave for the drive, verified as they come back.

Each slab has one: XXH3, 64 bits, of its bytes as stored. They are kept in memory with the segment,
apart from the data and by place, so that bytes which are sound but belong elsewhere (a misdirected
or lost write) are found as surely as flipped ones. Chance hides one damage in 2^64; nothing here
withstands somebody who means to.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Iterable, Iterator

from xxhash import xxh3_64_intdigest

from dualblade.config import ChecksumMode
from dualblade.errors import CorruptExtent
from dualblade.metrics import ChecksumTotals
from dualblade.pipeline.layer import Layer
from dualblade.pipeline.staging import Slot
from dualblade.pipeline.unit import Piece, Unit
from dualblade.store import Store

log = logging.getLogger("dualblade.pipeline")

SAMPLE_SWEEPS = 16
"""A sample is one tile in so many, the next one at each sweep: in so many sweeps all are verified.
At 11 GiB/s from memory that is 6 ms per GiB read, where a drive of 3 GiB/s takes 330."""

STEADY_SWEEPS = 64
"""The same, of a unit that was read from memory alone in the last SAMPLE_SWEEPS: all of it was
verified there, and nothing was read from a drive since."""


_NO_TILES: frozenset[int] = frozenset()


class Checksums:
    """Makes and verifies the checksums of all tiles of one cache, in the calling thread (XXH3
    leaves Python's lock to others meanwhile).

    mode  off; sample: see SAMPLE_SWEEPS and STEADY_SWEEPS; all: whatever is read is verified
          before it is used. The first mismatch makes `all` of a sample.
    """

    def __init__(self, store: Store, mode: ChecksumMode) -> None:
        self._store = store
        self._mode = mode
        self._every = {"off": 0, "sample": SAMPLE_SWEEPS, "all": 1}[mode]
        self._made_bytes = 0
        self._verified_bytes = 0
        self._mismatches = 0
        self._healed = 0
        self.seconds = 0.0

    def make(self, unit: Unit, piece: Piece, slot: Slot) -> None:
        """Keep the checksums of `piece`, which lies in `slot` and is about to be written."""
        if not self._every:
            return
        started = time.perf_counter()
        kept, memory = piece.segment.checksums, slot.buffer
        for index, at, end in _slabs(unit, piece, range(piece.tile, piece.tile + piece.tiles)):
            assert index <= len(kept), "tiles are stored in order"
            # After a crop a tile is stored again, in the place of the one that was taken back.
            kept[index : index + 1] = array("Q", [xxh3_64_intdigest(memory[at:end])])
        self._made_bytes += piece.size_bytes(unit.geometry)
        self.seconds += time.perf_counter() - started

    def verify(self, unit: Unit, piece: Piece, slot: Slot, *, whole: bool = False) -> None:
        """Verify what of `piece` has its turn (with `whole` all of it), as it landed in `slot`.

        What does not match is read once more, past any cached copy, and then verified whole.
        Raises: CorruptExtent when it still does not match; DeviceError of the second read.
        """
        if self.damaged_tiles(unit, piece, slot.buffer, whole=whole):
            self.heal(unit, piece, slot)

    def damaged_tiles(
        self, unit: Unit, piece: Piece, memory: memoryview, *, whole: bool = False
    ) -> frozenset[int]:
        """Tiles of `piece`, among those that have their turn (with `whole` all), that are not in
        `memory` as they were written. If there are any, a warning tells, and everything is verified
        from here on."""
        if not self._every:
            return _NO_TILES
        every = self._every
        if whole:
            every = 1
        elif every == SAMPLE_SWEEPS <= unit.sweeps_in_memory:
            every = STEADY_SWEEPS
        turn = unit.sweeps + unit.id.layer  # layers take turns, so that steps cost alike
        first = piece.tile + -(piece.tile + turn) % every
        damaged = self._compare(unit, piece, memory, range(first, piece.tile + piece.tiles, every))
        if not damaged:
            return _NO_TILES
        self._mismatches += len(damaged)
        self._every = 1  # a drive or memory that damaged one may have damaged others
        log.warning("%s; it is read again", self._describe(unit, piece, damaged[0]).message)
        tile_bytes = piece.sequences * unit.geometry.slab_bytes
        return frozenset(piece.tile + at // tile_bytes for at in damaged)

    def heal(self, unit: Unit, piece: Piece, slot: Slot) -> None:
        """Read `piece` into `slot` once more, past any cached copy, and verify it whole.

        Raises: CorruptExtent when it still does not match; DeviceError of the read.
        """
        extent, size = piece.segment.extent, piece.size_bytes(unit.geometry)
        offset = piece.offset(unit.geometry)
        self._store.read_again(extent, offset, slot.address, size).wait()
        tiles = range(piece.tile, piece.tile + piece.tiles)
        damaged = self._compare(unit, piece, slot.buffer, tiles)
        if damaged:
            raise self._describe(unit, piece, damaged[0])
        self._healed += 1

    def swept(self, layer: Layer) -> None:
        """All of the layer's tiles were read once more: the next sample has its turn."""
        for half in layer.halves:
            half.unit.sweeps += 1
            half.unit.sweeps_in_memory += 1

    def totals(self) -> ChecksumTotals:
        """What was made, verified and found so far."""
        return ChecksumTotals(
            mode=self._mode,
            made_bytes=self._made_bytes,
            verified_bytes=self._verified_bytes,
            mismatches=self._mismatches,
            healed_reads=self._healed,
        )

    def _compare(
        self, unit: Unit, piece: Piece, memory: memoryview, tiles: Iterable[int]
    ) -> list[int]:
        """Offsets in `memory` of slabs of these tiles that are not what was written."""
        started = time.perf_counter()
        kept = piece.segment.checksums
        damaged, count = [], 0
        for index, at, end in _slabs(unit, piece, tiles):
            count += 1
            if xxh3_64_intdigest(memory[at:end]) != kept[index]:
                damaged.append(at)
        self._verified_bytes += count * unit.geometry.slab_bytes
        self.seconds += time.perf_counter() - started
        return damaged

    def _describe(self, unit: Unit, piece: Piece, at: int) -> CorruptExtent:
        """The error for the slab at `at` of the piece's bytes."""
        geometry = unit.geometry
        tile, sequence = divmod(at // geometry.slab_bytes, piece.sequences)
        first = (piece.tile + tile) * geometry.rows
        found = self._store.locate(piece.segment.extent, piece.offset(geometry) + at)
        return CorruptExtent(
            f"{unit.id}, tokens {first} to {first + geometry.rows - 1} of stored sequence "
            f"{piece.sequence + sequence}: {found} is not what was written",
            operation="read",
            path=found.path,
            offset=found.offset,
            block=found.block,
            size_bytes=geometry.slab_bytes,
            hint="read twice; the drive or memory damages data: see dmesg and smartctl -a, and "
            "start again with a new cache, on another drive if you can",
        )


def _slabs(unit: Unit, piece: Piece, tiles: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """(index of the checksum, begin, end in the piece's bytes) of each slab of these tiles."""
    segment, size = piece.segment, unit.geometry.slab_bytes
    for tile in tiles:
        index = (tile - segment.first_tile) * segment.batch + piece.sequence
        at = (tile - piece.tile) * piece.sequences * size
        for sequence in range(piece.sequences):
            yield index + sequence, at + sequence * size, at + (sequence + 1) * size
