"""Which unit goes through which path, and why. Pure: no torch, no I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualblade.config import Path
from dualblade.errors import ConfigError
from dualblade.geometry import UnitId
from dualblade.residency.ladder import NOTHING, Ladder, Level, UnitDemand
from dualblade.residency.speeds import DoorSpeeds, worth_caching
from dualblade.units import MIB, format_size

MARGIN_FRACTION = 0.05
"""Left free under the budget: one step above it, a cyclic sweep of the page cache hits nothing
(768 MiB of 1024 cached: 3.7 GiB/s; 900 MiB cached: 1.0 GiB/s)."""

MARGIN_BYTES_MAX = 32 * MIB
"""What the margin is for does not grow with the budget: readings that lag, pages of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetShares:
    """How a budget is divided. All in bytes of host memory; they add up to at most the budget."""

    budget_bytes: int
    staging_bytes: int
    gather_bytes: int
    tail_bytes: int
    table_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """What is needed before any page of the store is cached."""
        return self.staging_bytes + self.gather_bytes + self.tail_bytes + self.table_bytes

    @property
    def page_cache_bytes(self) -> int:
        """What is left for the store's page cache, under the margin."""
        return max(0, self.budget_bytes - self.fixed_bytes - self._margin_bytes)

    @property
    def slack_bytes(self) -> int:
        """Half of the margin: a plan stands when the budget falls by less, and none is made into
        it. 0 where nothing is left for the page cache."""
        return min(self._margin_bytes // 2, self.page_cache_bytes)

    @property
    def _margin_bytes(self) -> int:
        share = min(int(self.budget_bytes * MARGIN_FRACTION), MARGIN_BYTES_MAX)
        return max(share, min(MIB, self.budget_bytes // 4))

    @property
    def fits(self) -> bool:
        """Whether the budget is enough for that."""
        return self.fixed_bytes <= self.budget_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The path of one unit, and why. `cached_bytes` of its beginning go through the page cache:
    all of `size_bytes`, none of them, or some (path `dual`)."""

    unit: UnitId
    size_bytes: int
    cached_bytes: int
    reason: str

    @property
    def path(self) -> Path:
        """In words for users."""
        if 0 < self.cached_bytes < self.size_bytes:
            return Path.DUAL
        return Path.PAGE_CACHE if self.cached_bytes else Path.DIRECT


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyPlan:
    """The path of every unit, in the order of the sweep.

    `level` is how far the page cache reaches; a plan for one fixed path has none.
    """

    placements: tuple[Placement, ...]
    level: Level = NOTHING

    @property
    def cached_bytes(self) -> int:
        """Bytes that go through the page cache."""
        return sum(placement.cached_bytes for placement in self.placements)

    @property
    def direct_bytes(self) -> int:
        """Bytes that go direct."""
        return sum(p.size_bytes - p.cached_bytes for p in self.placements)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """What a plan follows from. Staging, tails and the margin are not in `page_cache_bytes`
    (see BudgetShares).

    speeds         None: not measured; what fits is cached.
    cache_percent  this part of the bytes goes through the page cache, whether it fits or not.
    """

    demands: tuple[UnitDemand, ...]
    page_cache_bytes: int
    speeds: DoorSpeeds | None = None
    cache_percent: int | None = None

    def __post_init__(self) -> None:
        assert self.page_cache_bytes >= 0, "negative page cache"
        if self.cache_percent is not None and not 0 <= self.cache_percent <= 100:
            raise ConfigError(f"the cache percentage must be from 0 to 100: {self.cache_percent}")

    @property
    def total_bytes(self) -> int:
        """Bytes of all units when the plan has done its time."""
        return sum(demand.size_bytes for demand in self.demands)


def decide(inputs: PlanInputs) -> ResidencyPlan:
    """Keep in the page cache what fits and is worth it, spread evenly; the rest goes direct.

    So the drive always has a direct unit to stream while cached ones are served.
    """
    total, room = inputs.total_bytes, inputs.page_cache_bytes
    ladder = Ladder(inputs.demands)
    if inputs.cache_percent is None:
        worth = worth_caching(total, room, inputs.speeds)
        level = ladder.fitting(worth.cache_bytes)
        within = f"the page cache's {format_size(room)}"
        kept = "all KV fits the page cache's share" if level == ladder.top else f"in {within}"
        left = worth.reason or f"beyond {within}"
    else:
        level = ladder.fitting(total * inputs.cache_percent // 100)
        kept = left = f"{inputs.cache_percent} % through the page cache was asked for"
        if ladder.size_bytes(level) > room:
            kept += f"; only {format_size(room)} fit"
    cached = ladder.cached(level)
    return ResidencyPlan(
        placements=tuple(
            Placement(
                unit=demand.unit,
                size_bytes=demand.size_bytes,
                cached_bytes=min(demand.size_bytes, cached.get(demand.unit, 0)),
                reason=kept if demand.unit in cached else left,
            )
            for demand in inputs.demands
        ),
        level=level,
    )


def plan_fixed(demands: Sequence[UnitDemand], path: Path) -> ResidencyPlan:
    """Every unit on `path`, page-cache or direct, because it was asked for."""
    assert path in (Path.PAGE_CACHE, Path.DIRECT), path
    placements = tuple(
        Placement(
            unit=demand.unit,
            size_bytes=demand.size_bytes,
            cached_bytes=demand.size_bytes if path is Path.PAGE_CACHE else 0,
            reason=f"path {path.value}",
        )
        for demand in demands
    )
    return ResidencyPlan(placements=placements)
