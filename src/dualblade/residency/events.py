"""What the controller sees, and what it says when it moves units."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from dualblade.geometry import UnitId
from dualblade.residency.ladder import Level, UnitDemand
from dualblade.residency.plan import ResidencyPlan
from dualblade.residency.speeds import DoorSpeeds


class Cause(StrEnum):
    """Why units moved."""

    BUDGET_FELL = "budget fell"
    ROOM_ROSE = "room rose"
    KV_GREW = "KV grew"
    PRESSURE = "memory pressure"
    EVICTED = "cached pages were evicted"
    RETRY = "trying for more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One step boundary. None: not measured this time.

    time_seconds      monotonic.
    demands           all units in the order of the sweep; the same object while none has changed.
    page_cache_bytes  room as the budget probe tells it: BudgetShares.page_cache_bytes.
    steps             that have begun since the last observation.
    slack_bytes       of the margin under the budget, what the plan may stand above the room before
                      units go: readings swing by that much.
    hit_fraction      of reads through the page cache, of sweeps after the last move alone.
    resident_bytes    page cache of the store, in a sweep after the last move.
    stall_seconds     time lost for want of memory so far: Pressure.some_seconds.
    unused_bytes      memory that is nobody's, not even for its page cache.
    told_at_seconds   when room, stalls and unused memory were read; None: now.
    """

    time_seconds: float
    demands: tuple[UnitDemand, ...]
    page_cache_bytes: int
    steps: int = 1
    slack_bytes: int = 0
    speeds: DoorSpeeds | None = None
    hit_fraction: float | None = None
    resident_bytes: int | None = None
    stall_seconds: float | None = None
    unused_bytes: int | None = None
    told_at_seconds: float | None = None

    @property
    def read_at(self) -> float:
        """When what is told of the memory was read."""
        return self.time_seconds if self.told_at_seconds is None else self.told_at_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Of `unit`, the first `to_bytes` are in the page cache from now on, not the first
    `from_bytes`; `WHOLE`: all, however many they are."""

    unit: UnitId
    from_bytes: int
    to_bytes: int

    def moved_bytes(self, stored_bytes: int) -> int:
        """Bytes whose path changes, of `stored_bytes`."""
        return abs(min(self.from_bytes, stored_bytes) - min(self.to_bytes, stored_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One decision: units to move now, from `from_bytes` planned in the page cache to `to_bytes`,
    which is `level`. All go one way: a demotion writes what is dirty of them, a promotion nothing.
    """

    time_seconds: float
    cause: Cause
    from_bytes: int
    to_bytes: int
    level: Level
    moves: tuple[Move, ...]
    reason: str

    @property
    def is_down(self) -> bool:
        """Whether units give up page cache."""
        return self.to_bytes < self.from_bytes


def after(plan: ResidencyPlan, event: Event) -> ResidencyPlan:
    """The plan in force once the event's units have moved."""
    moved = {move.unit: move.to_bytes for move in event.moves}
    return replace(
        plan,
        placements=tuple(
            replace(
                p,
                cached_bytes=min(p.size_bytes, moved[p.unit]),
                reason=f"{event.cause.value}: {event.reason}",
            )
            if p.unit in moved
            else p
            for p in plan.placements
        ),
        level=event.level,
    )
