"""Writing behind compute: full tiles leave through their own slots while the model goes on."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from dualblade.errors import StorageError
from dualblade.geometry import UnitId
from dualblade.io import Ticket
from dualblade.pipeline.checksums import Checksums
from dualblade.pipeline.staging import Slot, Slots
from dualblade.pipeline.timeline import Lane, Timeline, now_ns
from dualblade.pipeline.unit import Piece, Unit
from dualblade.store import Store

log = logging.getLogger("dualblade.pipeline")


@dataclass(slots=True, eq=False)
class _Write:
    """A piece filled into its slot, one of `slots`; `ticket` is None until the device copy into it
    has ended."""

    unit: Unit
    piece: Piece
    slot: Slot
    slots: Slots
    ticket: Ticket | None = None
    submitted_ns: int = 0


class WriteBehind:
    """Writes in flight, oldest first. Bounded by the slots: a full set waits for the oldest.

    A slot is held until its bytes are stored (through the page cache: written back), so the
    trusted copy is never a page that could still fail.

    `spare` are the slots of reads while nothing is read, as in a prompt's first pass: a layer's
    tiles come all at once, and with more room they leave while the next layer computes. They are
    borrowed after its own, until `give_back`.
    """

    spare: Slots | None = None

    def __init__(
        self, store: Store, slots: Slots, checksums: Checksums, timeline: Timeline
    ) -> None:
        self._store = store
        self._checksums = checksums
        self._slots = self._filling = slots
        self._timeline = timeline
        self._writes: deque[_Write] = deque()

    def slot(self) -> Slot:
        """A free slot to fill; waits for the oldest write when there is none.

        Raises: DeviceError of that write.
        """
        self._submit_ready()
        while True:
            for slots in (self._slots, self.spare):
                slot = None if slots is None else slots.acquire()
                if slots is not None and slot is not None:
                    self._filling = slots
                    return slot
            self._finish_oldest()

    def write(self, unit: Unit, piece: Piece, slot: Slot) -> None:
        """Write `slot`, the last that was asked for, to `piece`; `slot.busy` set means a device
        copy still fills it."""
        self._writes.append(_Write(unit, piece, slot, self._filling))
        self._submit_ready()

    def give_back(self) -> None:
        """Return when no slot is borrowed any more; none is until `spare` is set again. Raises:
        DeviceError."""
        self.spare = None
        while any(write.slots is not self._slots for write in self._writes):
            self._finish_oldest()

    def wait(self, unit_id: UnitId) -> None:
        """Return when all writes of the unit so far are stored. Raises: DeviceError."""
        while any(write.unit.id == unit_id for write in self._writes):
            self._finish_oldest()

    def drain(self) -> None:
        """Return when all writes are stored. Raises: DeviceError of the first that failed."""
        while self._writes:
            self._finish_oldest()

    def forget(self) -> None:
        """Return when all writes have ended, well or badly: what they stored is of no use any more.
        One that failed is told to the log."""
        while self._writes:
            try:
                self._finish_oldest()
            except StorageError as exc:
                log.warning("%s; what it was to store was about to be forgotten", exc.message)
                failed = self._writes.popleft()
                failed.slots.release(failed.slot)

    def abandon(self) -> None:
        """Forget all writes: the store is closed. Waits for copies into their slots."""
        for write in self._writes:
            if write.slot.busy is not None:
                with suppress(Exception):  # the end is not hindered by a copy that failed
                    write.slot.busy.synchronize()
        self._writes.clear()

    def _submit_ready(self) -> None:
        """Hand to the store, in order, what device copies have filled by now."""
        for write in self._writes:
            if write.ticket is None:
                event = write.slot.busy
                if event is not None:
                    if not event.query():
                        return
                    self._slots.end_copy(write.slot, event)
                self._submit(write)

    def _submit(self, write: _Write) -> None:
        geometry, write.submitted_ns = write.unit.geometry, now_ns()
        self._checksums.make(write.unit, write.piece, write.slot)
        write.ticket = self._store.write(
            write.piece.segment.extent,
            write.piece.offset(geometry),
            write.slot.address,
            write.piece.size_bytes(geometry),
        )

    def _finish_oldest(self) -> None:
        write = self._writes[0]
        if write.ticket is None:
            if write.slot.busy is not None:
                self._slots.end_copy(write.slot, write.slot.busy)
            self._submit(write)
        assert write.ticket is not None
        began = now_ns()
        # Without this wait a failed write would be noticed by nobody.
        write.ticket.wait()
        self._writes.popleft()
        write.slots.release(write.slot)
        timeline, piece, unit = self._timeline, write.piece, write.unit
        timeline.stall(Lane.WRITES, began, now_ns())
        timeline.span(
            Lane.WRITES,
            f"{unit.id.part.value}, {piece.segment.extent.door.value}",
            write.submitted_ns,
            write.ticket.ended_ns,
            unit.id.layer,
            piece.size_bytes(unit.geometry),
        )
