"""A unit that is cut and joined at random: no tile ever moves, each is at the door that is planned,
and checksums stay with their tiles.

The space is arithmetic: extents are ranges, as in a store, and nothing is read or written.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dualblade.geometry import Part, TileGeometry, UnitId
from dualblade.pipeline.unit import Unit
from dualblade.residency import WHOLE
from dualblade.store import Door, Extent
from dualblade.store.extents import ExtentAllocator, Range
from dualblade.units import EXTENT_ALIGN_BYTES, GIB, MIB


class ArithmeticSpace:
    """What a store does to extents, without the bytes."""

    def __init__(self) -> None:
        self.allocator = ExtentAllocator(EXTENT_ALIGN_BYTES, 4 * GIB)
        self.live: set[Extent] = set()

    def allocate(self, size_bytes: int, door: Door) -> Extent:
        extent = Extent(range=self.allocator.allocate(size_bytes), door=door)
        self.live.add(extent)
        return extent

    def free(self, extent: Extent) -> None:
        self.live.remove(extent)
        self.allocator.free(extent.range)

    def move(self, extent: Extent, door: Door) -> None:
        assert extent in self.live
        extent.door = door

    def split(self, extent: Extent, at_bytes: int) -> Extent:
        assert at_bytes % EXTENT_ALIGN_BYTES == 0
        whole = extent.range
        extent.range = Range(whole.offset, at_bytes)
        rest = Extent(Range(whole.offset + at_bytes, whole.size_bytes - at_bytes), extent.door)
        self.live.add(rest)
        return rest

    def join(self, extent: Extent, rest: Extent) -> None:
        assert extent.range.end == rest.range.offset
        assert extent.door is rest.door
        extent.range = Range(extent.range.offset, extent.size_bytes + rest.size_bytes)
        self.live.remove(rest)


class UnitMachine(RuleBasedStateMachine):
    """`self.tiles[i]` is (where tile i was written, its checksums)."""

    def __init__(self) -> None:
        super().__init__()
        self.space = ArithmeticSpace()
        self.tiles: list[tuple[int, list[int]]] = []
        self.batch = 1
        self.next_checksum = 0

    @initialize(
        rows=st.sampled_from([16, 64]),
        heads=st.sampled_from([1, 3, 8, 32]),
        tokens_max=st.sampled_from([None, 40_000]),
    )
    def open(self, rows: int, heads: int, tokens_max: int | None) -> None:
        self.geometry = TileGeometry(kv_heads=heads, rows=rows, dim=128, item_bytes=2)
        self.unit = Unit(UnitId(0, Part.KEYS), self.geometry, self.space, tokens_max=tokens_max)

    @rule(count=st.one_of(st.integers(1, 3), st.integers(1, 120)))
    def store(self, count: int) -> None:
        self.unit.make_room(count, self.batch)
        first = len(self.tiles)
        self.unit.stored_tiles += count
        for piece in self.unit.pieces(first, first + count, slot_bytes=4 * MIB):
            kept = piece.segment.checksums
            for tile in range(piece.tile, piece.tile + piece.tiles):
                if piece.sequence == 0:
                    self.tiles.append((self.place_of(tile), []))
                for sequence in range(piece.sequence, piece.sequence + piece.sequences):
                    # As Checksums.make does.
                    at = (tile - piece.segment.first_tile) * self.batch + sequence
                    assert at <= len(kept), "tiles are stored in order"
                    kept[at : at + 1] = type(kept)("Q", [self.next_checksum])
                    self.tiles[tile][1].append(self.next_checksum)
                    self.next_checksum += 1

    @rule(count=st.integers(1, 120))
    def refuse(self, count: int) -> None:
        """A step that another unit had no room for: this one's room stays unused."""
        self.unit.make_room(count, self.batch)

    @rule(cuts=st.integers(0, 40), more=st.integers(0, MIB))
    def place(self, cuts: int, more: int) -> None:
        self.unit.place(cuts * self.geometry.cut_bytes(self.batch) + more)

    @rule(cached=st.sampled_from([0, WHOLE]))
    def place_as_a_whole(self, cached: int) -> None:
        self.unit.place(cached)

    @precondition(lambda self: self.tiles)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        left = data.draw(st.integers(0, len(self.tiles)))
        self.unit.crop(left)
        del self.tiles[left:]

    @rule(batch=st.sampled_from([1, 2, 5]))
    def other_batch(self, batch: int) -> None:
        self.batch = batch

    @precondition(lambda self: len(self.tiles) > 100)
    @rule()
    def free(self) -> None:
        self.unit.free()
        self.tiles.clear()
        assert self.space.live == set()
        assert self.space.allocator.used_bytes == 0

    def place_of(self, tile: int) -> int:
        (piece, *_) = self.unit.pieces(tile, tile + 1, slot_bytes=1 << 62)
        offset = piece.offset(self.geometry)
        assert offset + piece.size_bytes(self.geometry) <= piece.segment.extent.size_bytes
        return piece.segment.extent.range.offset + offset

    @invariant()
    def tiles_are_where_they_were_written(self) -> None:
        for tile, (place, _) in enumerate(self.tiles):
            assert self.place_of(tile) == place

    @invariant()
    def segments_follow_each_other(self) -> None:
        end = 0
        for segment in self.unit.segments if hasattr(self, "unit") else ():
            assert segment.first_tile == end
            assert segment.capacity >= 0
            end = segment.end_tile

    @invariant()
    def checksums_are_those_of_their_tiles(self) -> None:
        for tile, (_, checksums) in enumerate(self.tiles):
            (piece, *_) = self.unit.pieces(tile, tile + 1, slot_bytes=1 << 62)
            at = (tile - piece.segment.first_tile) * piece.segment.batch
            assert list(piece.segment.checksums[at : at + piece.segment.batch]) == checksums

    @invariant()
    def the_beginning_is_cached_and_the_rest_is_not(self) -> None:
        """As much of it as can be cut, never more, and in as few segments as that takes."""
        if not hasattr(self, "unit"):
            return
        begins, cached, is_over = 0, 0, False
        for segment in self.unit.segments:
            size = segment.capacity * self.geometry.tile_bytes(segment.batch)
            if segment.extent.door is Door.PAGE_CACHE:
                assert not is_over
                cached += size
                assert cached <= self.unit.cached_bytes
            elif size:
                room = 0 if is_over else self.unit.cached_bytes - begins
                assert room < min(size, self.geometry.cut_bytes(segment.batch))
                is_over = True
            begins += size
        pairs = zip(self.unit.segments, self.unit.segments[1:], strict=False)
        assert all(not b.is_rest or a.extent.door is not b.extent.door for a, b in pairs)


TestUnitMachine = UnitMachine.TestCase
TestUnitMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_a_batch_of_which_nothing_is_stored_leaves_its_blocks_to_the_next() -> None:
    """Cropped to less than a tile, then other sequences: the room for all tokens is given back."""
    space = ArithmeticSpace()
    geometry = TileGeometry(kv_heads=8, rows=64, dim=128, item_bytes=2)
    unit = Unit(UnitId(0, Part.KEYS), geometry, space, tokens_max=40_000)
    unit.make_room(3, 1)
    unit.stored_tiles = 3
    unit.crop(0)
    unit.make_room(1, 2)
    (segment,) = unit.segments
    assert (segment.batch, segment.first_tile) == (2, 0)
    assert space.live == {segment.extent}
    assert segment.capacity >= 40_000 // 64
