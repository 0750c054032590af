"""Reading ahead of compute: the layers to come, in the order of the sweep.

Every decode step reads all stored tiles in the same order: layer by layer, some tiles of keys, the
same tiles of values, and so on, then again from layer 0. The cursor walks that ring ahead of the
consumer; free slots and the lookahead hold it back. It never enters a layer twice before the
consumer has finished with it, because the layer's next rows are not stored yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from dualblade.errors import StorageError
from dualblade.io import Ticket
from dualblade.pipeline.checksums import Checksums
from dualblade.pipeline.layer import HalfLayer, Layer
from dualblade.pipeline.staging import Slot, Slots
from dualblade.pipeline.timeline import Lane, Timeline, now_ns
from dualblade.pipeline.tuner import Setting
from dualblade.pipeline.unit import Piece, Unit, paired_pieces
from dualblade.store import Store


@dataclass(slots=True)
class Landing:
    """A piece of `half` on its way into a slot."""

    half: HalfLayer
    piece: Piece
    slot: Slot
    ticket: Ticket
    submitted_ns: int


@dataclass(slots=True, eq=False)
class _Visit:
    """One layer's turn in the sweep: pieces not yet issued, and pieces on their way."""

    index: int
    waiting: deque[tuple[HalfLayer, Piece]]
    landing: deque[Landing] = field(default_factory=deque)


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
        before_visit: Callable[[Unit], None],
        timeline: Timeline,
    ) -> None:
        self._store = store
        self._slots = slots
        self._checksums = checksums
        self._layers = layers
        self.setting = setting
        self._held = 0
        self._before_visit = before_visit
        self._timeline = timeline
        self._visits: deque[_Visit] = deque()
        self._closed_to_cursor: set[int] = set()
        self._cursor = 0

    def take(self, index: int) -> Iterator[Landing]:
        """All stored pieces of layer `index`, each landed; its slot is free again afterwards. Keys
        come before the values of the same tiles.

        A layer out of the order of the sweep restarts it there. Raises: DeviceError,
        CorruptExtent.
        """
        if not self._visits or self._visits[0].index != index:
            self.cancel()
            self._enter(index)
        self.advance()
        visit = self._visits[0]
        while visit.landing or visit.waiting:
            if not visit.landing:
                self._issue(visit, wait=True)  # all slots are still read by copies
                assert visit.landing, "a free slot always serves the head of the sweep first"
            landing = visit.landing.popleft()
            try:
                self._wait_for(visit.index, landing)
            except BaseException:
                visit.landing.appendleft(landing)  # so that cancel() finds the slot
                raise
            yield landing
            self._release(landing.slot)
            self.advance()
        self._visits.popleft()
        self._checksums.swept(self._layers[index])

    def has_landed(self) -> bool:
        """Whether the next piece that `take` hands out is there already."""
        landing = self._visits[0].landing
        return bool(landing) and landing[0].ticket.done

    def _wait_for(self, layer: int, landing: Landing) -> None:
        began = now_ns()
        # Without this wait attention would read what the drive has not delivered yet.
        landing.ticket.wait()
        landed = now_ns()
        timeline, piece, unit = self._timeline, landing.piece, landing.half.unit
        timeline.stall(Lane.READS, began, landed)
        timeline.span(
            Lane.READS,
            f"{unit.id.part.value}, {piece.segment.extent.door.value}",
            landing.submitted_ns,
            landing.ticket.ended_ns,
            layer,
            piece.size_bytes(unit.geometry),
        )
        self._checksums.verify(unit, piece, landing.slot)
        timeline.span(Lane.CONTROL, "verify", landed, now_ns(), layer)

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
        for visit in self._visits:
            for landing in visit.landing:
                # Nobody asked for these bytes; a later read of them fails by itself.
                with suppress(StorageError):
                    landing.ticket.wait()
                self._release(landing.slot)
        self._visits.clear()
        self._closed_to_cursor.clear()

    def _enter(self, index: int) -> _Visit:
        layer = self._layers[index]
        for half in layer.halves:
            self._before_visit(half.unit)
        pairs = paired_pieces(
            layer.keys.unit,
            layer.values.unit,
            layer.stored_tiles,
            self._slots.slot_bytes,
            layer.group_tiles,
        )
        each = (some for pair in pairs for some in zip(layer.halves, pair, strict=True))
        visit = _Visit(index, deque(each))
        self._visits.append(visit)
        self._closed_to_cursor.add(index)
        self._cursor = (index + 1) % len(self._layers)
        return visit

    def _release(self, slot: Slot) -> None:
        self._slots.release(slot)
        self._held -= 1

    def _issue(self, visit: _Visit, *, wait: bool = False) -> bool:
        """Issue what is left of `visit`; False when the slots ran out. `wait`: for the first one,
        until a copy gives it back."""
        while visit.waiting:
            slot = None
            if self._held < self.setting.slots:
                slot = self._slots.acquire(wait=wait)
            if slot is None:
                return False
            self._held += 1
            wait = False
            half, piece = visit.waiting.popleft()
            geometry, submitted = half.unit.geometry, now_ns()
            ticket = self._store.read(
                piece.segment.extent,
                piece.offset(geometry),
                slot.address,
                piece.size_bytes(geometry),
            )
            visit.landing.append(Landing(half, piece, slot, ticket, submitted))
        return True
