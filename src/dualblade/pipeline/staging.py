"""Staging: the fixed memory that transfers land in and leave from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch

from dualblade.config import EngineConfig
from dualblade.io import Arena
from dualblade.pipeline.timeline import Lane, Timeline, now_ns
from dualblade.units import BLOCK_BYTES, HUGE_PAGE_BYTES, KIB, MIB, round_up

_SHARE_OF_BUDGET = 8
_TOTAL_BYTES_MIN = 2 * MIB
_TOTAL_BYTES_ENOUGH = 48 * MIB
"""Small budgets give more than their share for this, as far as others leave it: with 10 MiB a drive
of 2.5 GiB/s delivers 0.7 of what it can, which costs more than 38 MiB more to read do."""
_TOTAL_BYTES_MAX = 64 * MIB
"""Enough to keep a 3 GiB/s drive busy through a layer's compute of 20 ms, and no more: what is more
is page cache."""

_TOTAL_BYTES_GIVEN_WAY = 32 * MIB
"""Where all KV fits beside it, and so nothing is read. It would keep a drive as busy, but a
prompt's first pass waits for its writes."""

_BARELY_BYTES = 48 * MIB
"""An automatic budget falls by as much once the process computes."""

_SHARE_OF_WEIGHTS = 6
"""What a drive reads while a processor multiplies a layer's weights: a sixth of their bytes, as a
drive of 3.5 GB/s beside weights at 13 to 20 GB/s. Meanwhile no slot comes free."""

_SLOT_BYTES_MAX = 4 * MIB
"""Four 1 MiB requests: the device's queue stays full while one slot is gathered."""

_SLOT_BYTES_MIN = 64 * KIB
SLOTS_MIN = 8

_SLOTS_WANTED = 16
_SLOT_BYTES_WANTED = 512 * KIB
"""Of few slots the queue runs dry between two; of small ones attention is called too often. Eight
of the largest are better than sixteen of half."""

_WRITE_SLOTS_SHARE = 4
_QUEUES_HELD = 5
"""In flight, landed, attended to, and as much again to spare. Which number is best is the machine's
(decision 0009): ten slots of 4 MiB or four. Too many to begin with is what the tuner finds out by
itself, for it tries fewer; more it tries only where the drive stands still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingShape:
    """How many slots of how many bytes; reads and writes have their own, so that neither starves
    the other. While nothing is read, writes borrow (`WriteBehind.spare`)."""

    slot_bytes: int
    read_slots: int
    write_slots: int

    @property
    def total_bytes(self) -> int:
        """Memory of all slots, in whole huge pages."""
        return round_up(self.slot_bytes * (self.read_slots + self.write_slots), HUGE_PAGE_BYTES)

    def slots_first(self, queue_bytes: int) -> int:
        """Read slots to begin with, for a drive with `queue_bytes` in flight: see _QUEUES_HELD."""
        return min(self.read_slots, -(-_QUEUES_HELD * queue_bytes // self.slot_bytes))


def staging_shape(
    config: EngineConfig,
    budget_bytes: int,
    slab_bytes_max: int,
    *,
    room_bytes: int = 0,
    multiplied_bytes: int = 0,
    fitting_bytes: int = 0,
) -> StagingShape:
    """The slots for a budget. A slot holds at least one slab (`slab_bytes_max`); there are at
    least 8, so that the least staging is 8 slabs. `room_bytes`: what a small budget may give beyond
    its share (`staging_room`). `multiplied_bytes` of weights stream through the processor
    between two layers' attention, while the drive is to go on (`KVSettings.multiplied_bytes`); 0:
    in no time. `fitting_bytes`: the most that leaves room for all KV in the page cache; 0: no
    staging does. Where that is barely what staging would take, or less, it gives way, and all KV
    stays in memory."""
    share = min(
        max(budget_bytes // _SHARE_OF_BUDGET, _TOTAL_BYTES_MIN),
        _TOTAL_BYTES_MAX + multiplied_bytes // _SHARE_OF_WEIGHTS,
    )
    total = max(share, min(room_bytes, _TOTAL_BYTES_ENOUGH))
    if _TOTAL_BYTES_GIVEN_WAY <= fitting_bytes < total + _BARELY_BYTES:
        total = min(total, _TOTAL_BYTES_GIVEN_WAY)
    total = config.staging_bytes or total
    slot = _SLOT_BYTES_MAX
    if total < SLOTS_MIN * slot:
        enough = max(total // _SLOTS_WANTED, _SLOT_BYTES_WANTED)
        slot = min(enough, max(total // SLOTS_MIN, _SLOT_BYTES_MIN))
    slot = max(slot // BLOCK_BYTES * BLOCK_BYTES, round_up(slab_bytes_max, BLOCK_BYTES))
    count = max(total // slot, SLOTS_MIN)
    write_slots = max(min(total, _TOTAL_BYTES_MAX) // slot // _WRITE_SLOTS_SHARE, 2)
    return StagingShape(slot_bytes=slot, read_slots=count - write_slots, write_slots=write_slots)


class CopyEvent(Protocol):
    """The end of a copy that goes on by itself."""

    def query(self) -> bool:
        """Whether the copy has ended."""

    def synchronize(self) -> None:
        """Return when it has ended. Raises: whatever the device failed with."""

    def span_ns(self) -> tuple[int, int]:
        """When it began and ended, on the clock of `now_ns`; once it has ended."""


@dataclass(slots=True, eq=False)
class Slot:
    """One piece of staging. `memory` is uint8 [slot_bytes]; `address` is where it begins; `buffer`
    are the same bytes for who wants no tensor (making a view of one costs 3 us).

    `busy` is the event after which a device copy no longer touches it; None on the CPU. While one
    fills it for a write, that is the write's own.
    """

    memory: torch.Tensor
    address: int
    buffer: memoryview
    busy: CopyEvent | None = None


class Slots:
    """A fixed set of slots. An empty one answers None: back-pressure, not growth."""

    def __init__(
        self, arena: Arena, offset: int, count: int, slot_bytes: int, timeline: Timeline
    ) -> None:
        whole = torch.frombuffer(arena.buffer, dtype=torch.uint8)
        starts = range(offset, offset + count * slot_bytes, slot_bytes)
        self.slot_bytes = slot_bytes
        self._timeline = timeline
        self._free = deque(
            Slot(
                whole[at : at + slot_bytes], arena.address + at, arena.buffer[at : at + slot_bytes]
            )
            for at in starts
        )

    @property
    def free_count(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def acquire(self, *, wait: bool = True) -> Slot | None:
        """A slot that nobody touches any more; None when all are held, or, without `wait`, when the
        one released first is still read by its copy."""
        if not self._free:
            return None
        event = self._free[0].busy
        if event is not None:
            if not wait and not event.query():
                return None
            self.end_copy(self._free[0], event)
        return self._free.popleft()

    def end_copy(self, slot: Slot, event: CopyEvent) -> None:
        """Wait for the slot's copy, and note when it ran."""
        began = now_ns()
        # Without this wait the drive would overwrite bytes that a device copy still reads, or
        # store bytes that it has not written yet.
        event.synchronize()
        slot.busy = None
        self._timeline.stall(Lane.COPIES, began, now_ns())
        self._timeline.span(Lane.COPIES, "copy", *event.span_ns())

    def release(self, slot: Slot) -> None:
        """Give `slot` back; a device copy may still read it until `slot.busy` has passed.

        What nobody reads is taken again first: the fewer slots go round, the more of them the
        processor's caches hold when the drive fills them. Busy ones come in the order of their
        copies.
        """
        if slot.busy is None:
            self._free.appendleft(slot)
        else:
            self._free.append(slot)
