"""What the controller sees, and what it says when it moves units."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from dualblade.config import Path
from dualblade.geometry import UnitId
from dualblade.residency.plan import ResidencyPlan, UnitDemand
from dualblade.residency.speeds import DoorSpeeds


class Cause(StrEnum):
    """Why units moved."""

    BUDGET_FELL = "budget fell"
    ROOM_ROSE = "room rose"
    KV_GREW = "KV grew"
    PRESSURE = "memory pressure"
    EVICTED = "cached pages were evicted"
    SPEEDS = "the page cache gains less than it did"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One decision: units to move now, from `from_bytes` planned in the page cache to `to_bytes`.

    `moved_bytes` are stored bytes whose path changes; of them a demotion writes only dirty ones,
    and a promotion none.
    """

    time_seconds: float
    cause: Cause
    from_bytes: int
    to_bytes: int
    moved_bytes: int
    demoted: tuple[UnitId, ...]
    promoted: tuple[UnitId, ...]
    reason: str


def after(plan: ResidencyPlan, event: Event) -> ResidencyPlan:
    """The plan in force once the event's units have moved. Its predictions are void."""
    moved = dict.fromkeys(event.demoted, Path.DIRECT)
    moved.update(dict.fromkeys(event.promoted, Path.PAGE_CACHE))
    return replace(
        plan,
        placements=tuple(
            replace(p, path=moved[p.unit], reason=f"{event.cause.value}: {event.reason}")
            if p.unit in moved
            else p
            for p in plan.placements
        ),
        now=None,
        expected=None,
    )
