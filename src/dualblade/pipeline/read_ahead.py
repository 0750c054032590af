"""Reading ahead of compute: the layers to come, in the order of the sweep.

Every decode step reads all stored tiles in the same order: layer by layer, some tiles of keys, the
same tiles of values, and so on, then again from layer 0. The cursor walks that ring ahead of the
consumer; free slots and the lookahead hold it back. It never enters a layer twice before the
consumer has finished with it, because the layer's next rows are not stored yet.

What is in the page cache when its turn comes is not read: it is handed out where it lies there, if
the copy stage takes any memory for a slot's (Store.in_place). A layer that has been there for a
while is expected there, and looked for only when it is used (docs/decisions/0010).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import reduce

import torch

from dualblade.errors import StorageError
from dualblade.geometry import UnitId
from dualblade.io import Ticket
from dualblade.pipeline.checksums import SAMPLE_SWEEPS, Checksums
from dualblade.pipeline.layer import HalfLayer, Layer
from dualblade.pipeline.staging import Slot, Slots
from dualblade.pipeline.timeline import Lane, Timeline, now_ns
from dualblade.pipeline.tuner import Setting
from dualblade.pipeline.unit import Piece, Unit, paired_pieces
from dualblade.store import InPlace, Store
from dualblade.units import MIB

_TOGETHER_BYTES = 32 * MIB
"""Of keys that are handed out together, at least, where so many lie side by side: what is spent on
each is then nothing beside attention to them."""


@dataclass(slots=True)
class Landing:
    """A piece of `half` at hand: in a slot of staging, or `in_place`, in memory that the page cache
    has and `slot` stands for. `values_follow`: of the same tiles, in place too, and keys stay at
    hand meanwhile."""

    half: HalfLayer
    piece: Piece
    slot: Slot
    in_place: bool = False
    values_follow: bool = False


@dataclass(slots=True)
class _Read:
    """A piece on its way into a slot."""

    landing: Landing
    ticket: Ticket
    submitted_ns: int

    @property
    def is_at_hand(self) -> bool:
        return self.ticket.done

    @property
    def wanted(self) -> tuple[HalfLayer, Piece]:
        return self.landing.half, self.landing.piece


@dataclass(slots=True)
class _Resident:
    """A piece that was in the page cache when its turn came, or is expected there."""

    wanted: tuple[HalfLayer, Piece]
    place: InPlace
    is_at_hand: bool = True
    # No repr: that of a tensor reads it, and its memory may be gone.
    _landing: Landing | None = field(default=None, init=False, repr=False)

    def landing(self, memory: memoryview) -> Landing:
        """It as it is handed out. `memory`, its bytes as they are held, are the same each time: a
        mapping does not move."""
        if self._landing is None:
            slot = Slot(torch.frombuffer(memory, dtype=torch.uint8), self.place.address, memory)
            self._landing = Landing(*self.wanted, slot, in_place=True)
        return self._landing

    def is_followed_by(self, after: _Resident) -> bool:
        """Whether `after` goes on where this ends, in one mapping: a re-read makes another."""
        goes_on = self.wanted[1].goes_on_in(after.wanted[1])
        return goes_on and self.place.memory is after.place.memory

    def joined(self, after: _Resident) -> _Resident:
        """This and `after`, which lie side by side, as one."""
        (half, piece), (_, other) = self.wanted, after.wanted
        whole = replace(piece, tiles=piece.tiles + other.tiles)
        return _Resident((half, whole), self.place.joined(after.place))


@dataclass(slots=True, eq=False)
class _Visit:
    """One layer's turn in the sweep: pieces not yet issued, and pieces that come. `is_large`: all
    go through the page cache, and are larger than slots: to be taken in place, or cut. `taken`:
    those of them that were. `is_expected`: nobody looked yet whether they are there. `damaged`:
    tiles of units that are known not to be there as they were written."""

    index: int
    stored_tiles: int
    waiting: deque[tuple[HalfLayer, Piece]] = field(default_factory=deque)
    coming: deque[_Read | _Resident] = field(default_factory=deque)
    is_large: bool = False
    taken: list[_Resident] = field(default_factory=list)
    is_expected: bool = False
    damaged: set[tuple[UnitId, int]] = field(default_factory=set)

    @property
    def next_tile(self) -> int:
        """Of the piece that is handed out next."""
        return (self.coming[0].wanted if self.coming else self.waiting[0])[1].tile


def _side_by_side(coming: Iterable[_Read | _Resident]) -> list[tuple[_Resident, _Resident]]:
    """Pairs at the head of `coming` that are in the page cache one behind the other."""
    pairs: list[tuple[_Resident, _Resident]] = []
    size_bytes, pieces = 0, iter(coming)
    for one, other in zip(pieces, pieces, strict=False):
        if not isinstance(one, _Resident) or not isinstance(other, _Resident):
            break
        if pairs and not all(
            before.is_followed_by(after)
            for before, after in zip(pairs[-1], (one, other), strict=True)
        ):
            break
        pairs.append((one, other))
        size_bytes += one.place.size_bytes
        if size_bytes >= _TOGETHER_BYTES:
            break
    return pairs


def _may_be_large(layer: Layer) -> bool:
    """Whether all of it goes through the page cache, to be taken in large pieces."""
    units = [half.unit for half in layer.halves]
    # Of a tile that were cut between sequences, some could be handed out before it is cut anew.
    are_small = all(unit.tile_bytes_max <= _TOGETHER_BYTES for unit in units)
    return are_small and all(unit.is_cached_whole for unit in units)


def _is_steady(layer: Layer) -> bool:
    """Whether nothing of it was read from the drive in a while."""
    return all(half.unit.sweeps_in_memory >= SAMPLE_SWEEPS for half in layer.halves)


def _tiles(resident: _Resident) -> Iterator[tuple[UnitId, int]]:
    half, piece = resident.wanted
    return ((half.unit.id, tile) for tile in range(piece.tile, piece.tile + piece.tiles))


class ReadAhead:
    """Issues reads for the sweep over `layers` and hands them out in order.

    `before_visit` is called with a unit before its pieces are fixed: it waits until all tiles of
    the unit are on the device, for a read must not overtake the write of the same tile.
    """

    def __init__(
        self,
        store: Store,
        slots: Slots,
        checksums: Checksums,
        layers: Sequence[Layer],
        *,
        setting: Setting,
        in_place: bool,
        before_visit: Callable[[Unit], None],
        timeline: Timeline,
    ) -> None:
        self._store = store
        self._slots = slots
        self._checksums = checksums
        self._layers = layers
        self.setting = setting
        self._held = 0
        self._in_place = in_place
        self._before_visit = before_visit
        self._timeline = timeline
        self._visits: deque[_Visit] = deque()
        # The last visits to layers that have been in the page cache for a while: in all likelihood
        # they are taken so again. Of anything that happened meanwhile `InPlace.hold` tells.
        self._standing: dict[int, _Visit] = {}
        self._is_cancelling = False
        self._closed_to_cursor: set[int] = set()
        self._cursor = 0

    def take(self, index: int, *, any_size: bool = False) -> Iterator[Landing]:
        """All stored pieces of layer `index`, each at hand until the next is asked for. Keys come
        before the values of the same tiles.

        `any_size`: in place they may be larger than slots, and reach over the edges of groups.
        A layer out of the order of the sweep restarts it there. Raises: DeviceError,
        CorruptExtent.
        """
        if self._is_cancelling or (self._visits and self._visits[0].index != index):
            self.cancel()
        if not self._visits:
            self._enter(index)
        self.advance()
        visit = self._visits[0]
        if visit.is_large and not any_size:
            self._cut(visit)
        while visit.coming or visit.waiting:
            if not visit.coming:
                self._issue(visit, wait=True)  # all slots are still read by copies
            if not visit.coming:  # or layers to come have them: this one was to need none
                visit.coming.append(self._read(*visit.waiting.popleft(), self._spare_slot()))
            if any_size and (together := self._hold_together(visit)):
                yield from together
                self.advance()
                continue
            if visit.is_large:  # it is not all there any more, or not all sound
                if visit.is_expected:
                    self._expect_nothing()
                self._cut(visit)
                continue
            landing, coming = None, visit.coming.popleft()
            if isinstance(coming, _Resident):
                landing = self._hold(visit, coming)
                if landing is None:
                    coming = self._read(*coming.wanted, self._spare_slot())
            if isinstance(coming, _Read):
                landing = coming.landing
                try:
                    self._wait_for(index, coming)
                except BaseException:
                    visit.coming.appendleft(coming)  # so that cancel() finds the slot
                    raise
            assert landing is not None, "in place, or read"
            yield landing
            if not landing.in_place:
                self._release(landing.slot)
            self.advance()
        self._visits.popleft()
        layer = self._layers[index]
        if visit.is_large and _is_steady(layer):
            self._standing[index] = visit
        self._checksums.swept(layer)

    @property
    def is_idle(self) -> bool:
        """Nothing is read ahead: no read has a slot."""
        return not self._visits

    def has_landed(self) -> bool:
        """Whether the next piece that `take` hands out is there already."""
        coming = self._visits[0].coming
        return bool(coming) and coming[0].is_at_hand

    def _wait_for(self, layer: int, read: _Read) -> None:
        began, landing = now_ns(), read.landing
        # Without this wait attention would read what the drive has not delivered yet.
        read.ticket.wait()
        landed = now_ns()
        timeline, piece, unit = self._timeline, landing.piece, landing.half.unit
        timeline.stall(Lane.READS, began, landed)
        timeline.span(
            Lane.READS,
            f"{unit.id.part.value}, {piece.segment.extent.door.value}",
            read.submitted_ns,
            read.ticket.ended_ns,
            layer,
            piece.size_bytes(unit.geometry),
        )
        self._checksums.verify(unit, piece, landing.slot)
        timeline.span(Lane.CONTROL, "verify", landed, now_ns(), layer)

    def _hold(self, visit: _Visit, resident: _Resident) -> Landing | None:
        """The piece where it lies, or in a slot if it was damaged there; None: it is not there any
        more, and to be read. Raises: CorruptExtent, DeviceError."""
        began = now_ns()
        (half, piece), place = resident.wanted, resident.place
        assert not visit.is_expected, "taken together, or cut"
        memory = place.hold()
        if memory is None:
            return None
        place.count()
        if visit.damaged.isdisjoint(_tiles(resident)):
            self._verify(visit, resident, memory)
        if not visit.damaged.isdisjoint(_tiles(resident)):
            slot = self._spare_slot()
            half.unit.sweeps_in_memory = 0
            try:
                self._checksums.heal(half.unit, piece, slot)
            except BaseException:
                self._release(slot)
                raise
            return Landing(half, piece, slot)
        self._timeline.span(Lane.CONTROL, "in place", began, now_ns(), visit.index)
        return resident.landing(memory)

    def _hold_together(self, visit: _Visit) -> list[Landing]:
        """Keys and values at the head of what comes, as far as they lie side by side in the page
        cache; nothing when they do not, or not all are sound: each is then taken by itself."""
        began, landings = now_ns(), []
        pairs = [] if visit.damaged else _side_by_side(visit.coming)
        if not pairs or pairs[0][0].wanted[0] is not self._layers[visit.index].keys:
            return []
        both = [reduce(_Resident.joined, column) for column in zip(*pairs, strict=True)]
        for resident in both:
            memory = resident.place.hold()
            if memory is None:
                return []
            self._verify(visit, resident, memory)
            if visit.damaged:
                return []
            landings.append(resident.landing(memory))
        landings[0].values_follow = True
        for resident in both:
            resident.place.count()
        visit.taken.extend(both)
        for _ in range(2 * len(pairs)):
            visit.coming.popleft()
        self._timeline.span(Lane.CONTROL, "in place", began, now_ns(), visit.index)
        return landings

    def _verify(self, visit: _Visit, resident: _Resident, memory: memoryview) -> None:
        """Note which tiles in `memory` are not what was written."""
        (half, piece) = resident.wanted
        found = self._checksums.damaged_tiles(half.unit, piece, memory)
        visit.damaged.update((half.unit.id, tile) for tile in found)

    def _spare_slot(self) -> Slot:
        """A slot for what was to need none: the farthest that is read ahead gives its own up."""
        slot = self._slots.acquire()
        if slot is not None:
            self._held += 1
            return slot
        for visit in reversed(self._visits):
            has_slot = any(isinstance(some, _Read) for some in visit.coming)
            while has_slot and visit.coming:
                last = visit.coming[-1]
                if isinstance(last, _Read):
                    with suppress(StorageError):  # it is read again, and fails then
                        last.ticket.wait()
                visit.coming.pop()  # not before: a Ctrl-C in the wait leaves it known
                visit.waiting.appendleft(last.wanted)
                if isinstance(last, _Read):
                    return last.landing.slot
        raise AssertionError("somebody else has the slots")

    def finish(self, index: int) -> None:
        """The layer's next tiles are stored (or on their way): the cursor may visit it again."""
        self._closed_to_cursor.discard(index)
        self.advance()

    def advance(self) -> None:
        """Issue reads until the slots, the lookahead or the sweep hold the cursor back."""
        for visit in self._visits:
            if not self._issue(visit):
                return
        ahead = self.setting.lookahead
        while ahead and len(self._visits) <= ahead and self._cursor not in self._closed_to_cursor:
            has_slot = self._slots.free_count and self._held < self.setting.slots
            if not has_slot or not self._issue(self._enter(self._cursor)):
                return

    def cancel(self) -> None:
        """Forget what was read ahead; waits until no transfer touches a slot any more."""
        self._is_cancelling = True  # a Ctrl-C in the waits leaves it so, and the rest to the next
        for visit in self._visits:
            while visit.coming:
                if isinstance(visit.coming[-1], _Read):
                    # Nobody asked for these bytes; a later read of them fails by itself.
                    with suppress(StorageError):
                        visit.coming[-1].ticket.wait()
                last = visit.coming.pop()  # not before it ended, and before its slot is free
                if isinstance(last, _Read):
                    self._release(last.landing.slot)
        self._visits.clear()
        self._standing.clear()
        self._closed_to_cursor.clear()
        self._is_cancelling = False

    def _enter(self, index: int) -> _Visit:
        layer = self._layers[index]
        for half in layer.halves:
            self._before_visit(half.unit)
        self._store.check_open()  # of what is expected it is not asked
        visit = _Visit(index, layer.stored_tiles)
        standing = self._standing.pop(index, None)
        if standing is not None and standing.stored_tiles == layer.stored_tiles:
            visit.is_large = visit.is_expected = True
            visit.coming.extend(standing.taken)
        elif self._in_place and _may_be_large(layer):
            visit.is_large = True
            self._plan(visit, 0, _TOGETHER_BYTES, max(layer.stored_tiles, 1))
        else:
            self._plan(visit, 0, self._slots.slot_bytes, layer.group_tiles)
        self._visits.append(visit)
        self._closed_to_cursor.add(index)
        self._cursor = (index + 1) % len(self._layers)
        return visit

    def _plan(self, visit: _Visit, tile: int, piece_bytes: int, edge_tiles: int) -> None:
        """Have the layer's pieces from `tile` on wait for their turn."""
        layer = self._layers[visit.index]
        tiles, units = range(tile, layer.stored_tiles), (layer.keys.unit, layer.values.unit)
        for pair in paired_pieces(*units, tiles, piece_bytes, edge_tiles):
            visit.waiting.extend(zip(layer.halves, pair, strict=True))

    def _expect_nothing(self) -> None:
        """A layer is not where it was expected: have the others looked up, and read ahead."""
        self._standing.clear()
        for visit in self._visits:
            if visit.is_expected:
                visit.is_expected = False
                visit.waiting.extendleft(some.wanted for some in reversed(visit.coming))
                visit.coming.clear()

    def _cut(self, visit: _Visit) -> None:
        """Have pieces that fit slots instead."""
        visit.is_large = visit.is_expected = False
        if not visit.coming and not visit.waiting:
            return
        tile = visit.next_tile
        visit.coming.clear()  # they were not read: no slot is held
        visit.waiting.clear()
        self._plan(visit, tile, self._slots.slot_bytes, self._layers[visit.index].group_tiles)

    def _release(self, slot: Slot) -> None:
        self._slots.release(slot)
        self._held -= 1

    def _issue(self, visit: _Visit, *, wait: bool = False) -> bool:
        """Issue what is left of `visit`; False when the slots ran out. `wait`: for the first one,
        until a copy gives it back."""
        while visit.waiting:
            half, piece = visit.waiting[0]
            place = self._place(half, piece)
            if place is not None:
                visit.coming.append(_Resident(visit.waiting.popleft(), place))
                continue
            if visit.is_large:
                self._cut(visit)
                continue
            slot = None
            if self._held < self.setting.slots:
                slot = self._slots.acquire(wait=wait)
            if slot is None:
                return False
            self._held += 1
            wait = False
            visit.coming.append(self._read(*visit.waiting.popleft(), slot))
        return True

    def _place(self, half: HalfLayer, piece: Piece) -> InPlace | None:
        if not self._in_place:
            return None
        geometry, extent = half.unit.geometry, piece.segment.extent
        return self._store.in_place(extent, piece.offset(geometry), piece.size_bytes(geometry))

    def _read(self, half: HalfLayer, piece: Piece, slot: Slot) -> _Read:
        geometry, submitted = half.unit.geometry, now_ns()
        half.unit.sweeps_in_memory = 0
        ticket = self._store.read(
            piece.segment.extent, piece.offset(geometry), slot.address, piece.size_bytes(geometry)
        )
        return _Read(Landing(half, piece, slot), ticket, submitted)
