"""Reading ahead of compute: the layers to come, in the order of the sweep.

Every decode step reads all stored tiles in the same order: layer by layer, some tiles of keys, the
same tiles of values, and so on, then again from layer 0. The cursor walks that ring ahead of the
consumer; free slots and the lookahead hold it back. It never enters a layer twice before the
consumer has finished with it, because the layer's next rows are not stored yet.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from dualblade.errors import StorageError
from dualblade.io import Ticket
from dualblade.pipeline.checksums import Checksums
from dualblade.pipeline.layer import HalfLayer, Layer
from dualblade.pipeline.staging import Slot, Slots
from dualblade.pipeline.unit import Piece, Unit, paired_pieces
from dualblade.store import Store


@dataclass(slots=True)
class Landing:
    """A piece of `half` on its way into a slot."""

    half: HalfLayer
    piece: Piece
    slot: Slot
    ticket: Ticket


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
        lookahead: int,
        before_visit: Callable[[Unit], None],
    ) -> None:
        self._store = store
        self._slots = slots
        self._checksums = checksums
        self._layers = layers
        self._lookahead = lookahead
        self._before_visit = before_visit
        self._visits: deque[_Visit] = deque()
        self._closed_to_cursor: set[int] = set()
        self._cursor = 0
        self.wait_seconds = 0.0

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
        while visit.landing:
            landing = visit.landing.popleft()
            started = time.perf_counter()
            try:
                landing.ticket.wait()
                self.wait_seconds += time.perf_counter() - started
                self._checksums.verify(landing.half.unit, landing.piece, landing.slot)
            except BaseException:
                visit.landing.appendleft(landing)  # so that cancel() finds the slot
                raise
            yield landing
            self._slots.release(landing.slot)
            self.advance()
        assert not visit.waiting, "a free slot always serves the head of the sweep first"
        self._visits.popleft()
        self._checksums.swept(self._layers[index])

    def finish(self, index: int) -> None:
        """The layer's next tiles are stored (or on their way): the cursor may visit it again."""
        self._closed_to_cursor.discard(index)
        self.advance()

    def advance(self) -> None:
        """Issue reads until the slots, the lookahead or the sweep hold the cursor back."""
        for visit in self._visits:
            if not self._issue(visit):
                return
        while len(self._visits) <= self._lookahead and self._cursor not in self._closed_to_cursor:
            if not self._slots.free_count or not self._issue(self._enter(self._cursor)):
                return

    def cancel(self) -> None:
        """Forget what was read ahead; waits until no transfer touches a slot any more."""
        for visit in self._visits:
            for landing in visit.landing:
                # Nobody asked for these bytes; a later read of them fails by itself.
                with suppress(StorageError):
                    landing.ticket.wait()
                self._slots.release(landing.slot)
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

    def _issue(self, visit: _Visit) -> bool:
        """Issue what is left of `visit`; False when the slots ran out."""
        while visit.waiting:
            slot = self._slots.acquire()
            if slot is None:
                return False
            half, piece = visit.waiting.popleft()
            geometry = half.unit.geometry
            ticket = self._store.read(
                piece.segment.extent,
                piece.offset(geometry),
                slot.address,
                piece.size_bytes(geometry),
            )
            visit.landing.append(Landing(half, piece, slot, ticket))
        return True
