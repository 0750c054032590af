"""Which unit goes through which path, and why. Pure: no torch, no I/O, no clock.

Units are cached in one fixed order in which every beginning is spread evenly over the sweep. So
a plan for less memory is part of the plan for more, and a change of plan moves only what differs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from dualblade.config import Path
from dualblade.errors import BudgetError, ConfigError
from dualblade.geometry import UnitId
from dualblade.residency.speeds import DoorSpeeds, StepTime, predict, worth_caching
from dualblade.units import MIB, format_size

_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio: its multiples fill the circle evenly, however many they are."""

MARGIN_FRACTION = 0.05
"""Left free under the budget: one step above it, a cyclic sweep of the page cache hits nothing
(768 MiB of 1024 cached: 3.7 GiB/s; 900 MiB cached: 1.0 GiB/s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitDemand:
    """Bytes that `unit` is expected to have stored when the plan has done its time, and those
    that it has now (None: the same)."""

    unit: UnitId
    size_bytes: int
    stored_bytes: int | None = None

    @property
    def now_bytes(self) -> int:
        """Bytes stored now."""
        return self.size_bytes if self.stored_bytes is None else self.stored_bytes


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
        return max(int(self.budget_bytes * MARGIN_FRACTION), min(MIB, self.budget_bytes // 4))

    def require(self) -> None:
        """Raises: BudgetError, with the bytes needed, when the fixed part alone does not fit."""
        if self.fixed_bytes > self.budget_bytes:
            raise BudgetError(
                f"the memory budget of {format_size(self.budget_bytes)} is too small: staging "
                f"{format_size(self.staging_bytes)}, gather buffer "
                f"{format_size(self.gather_bytes)}, tails and tables "
                f"{format_size(self.tail_bytes + self.table_bytes)}",
                needed_bytes=self.fixed_bytes,
                hint=f"give it at least {round_up_mib(self.fixed_bytes)} MiB, or a shorter context",
            )


def round_up_mib(size_bytes: int) -> int:
    """Whole MiB that hold `size_bytes`."""
    return -(-size_bytes // MIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The path of one unit, and why."""

    unit: UnitId
    path: Path
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyPlan:
    """The path of every unit, in the order of the sweep.

    `now` and `expected` predict a step with the bytes stored now and with those planned for;
    None where speeds are not known.
    """

    placements: tuple[Placement, ...]
    page_cache_bytes_max: int
    now: StepTime | None = None
    expected: StepTime | None = None

    @property
    def cached_units(self) -> frozenset[UnitId]:
        """Units on the page-cache path."""
        return frozenset(p.unit for p in self.placements if p.path is Path.PAGE_CACHE)

    def bytes_on(self, path: Path) -> int:
        """Bytes of all units on `path`."""
        return sum(p.size_bytes for p in self.placements if p.path is path)


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


@lru_cache(maxsize=16)
def spread_order(count: int) -> tuple[int, ...]:
    """Indices below `count` such that each beginning of the list is spread evenly over them.

    Of index i + 1, the part after the point of its multiple of the golden ratio decides: those
    below any threshold lie at two or three distances from each other (the three-gap theorem).
    """
    return tuple(sorted(range(count), key=lambda i: (i + 1) * _GOLDEN % (1 << 64)))


def decide(inputs: PlanInputs) -> ResidencyPlan:
    """Keep in the page cache what fits and is worth it, spread evenly; the rest goes direct.

    So the drive always has a direct unit to stream while cached ones are served.
    """
    total, room = inputs.total_bytes, inputs.page_cache_bytes
    if inputs.cache_percent is None:
        worth = worth_caching(total, room, inputs.speeds)
        cached = _first_fitting(inputs, worth.cache_bytes)
        whole = len(cached) == len(inputs.demands)
        within = f"the page cache's {format_size(room)}"
        kept = "all KV fits the page cache's share" if whole else f"in {within}"
        left = worth.reason or f"beyond {within}"
    else:
        cached = _first_fitting(inputs, total * inputs.cache_percent // 100)
        kept = left = f"{inputs.cache_percent} % through the page cache was asked for"
        if sum(d.size_bytes for d in inputs.demands if d.unit in cached) > room:
            kept += f"; only {format_size(room)} fit"
    return ResidencyPlan(
        placements=tuple(
            Placement(
                unit=demand.unit,
                path=Path.PAGE_CACHE if demand.unit in cached else Path.DIRECT,
                size_bytes=demand.size_bytes,
                reason=kept if demand.unit in cached else left,
            )
            for demand in inputs.demands
        ),
        page_cache_bytes_max=room,
        now=_predicted([(d.unit, d.now_bytes) for d in inputs.demands], cached, inputs),
        expected=_predicted([(d.unit, d.size_bytes) for d in inputs.demands], cached, inputs),
    )


def plan_fixed(demands: Sequence[UnitDemand], path: Path) -> ResidencyPlan:
    """Every unit on `path`, because it was asked for."""
    placements = tuple(
        Placement(unit=d.unit, path=path, size_bytes=d.size_bytes, reason=f"path {path.value}")
        for d in demands
    )
    return ResidencyPlan(placements=placements, page_cache_bytes_max=0)


def plan_by_size(demands: Sequence[UnitDemand], page_cache_bytes: int) -> ResidencyPlan:
    """`decide` without speeds: what fits in `page_cache_bytes` is cached."""
    return decide(PlanInputs(demands=tuple(demands), page_cache_bytes=page_cache_bytes))


def resized(plan: ResidencyPlan, demands: Sequence[UnitDemand]) -> ResidencyPlan:
    """`plan` with other sizes of the same units, each on its path. Its predictions are void."""
    placements = tuple(
        replace(placement, size_bytes=demand.size_bytes)
        for placement, demand in zip(plan.placements, demands, strict=True)
    )
    return replace(plan, placements=placements, now=None, expected=None)


def _first_fitting(inputs: PlanInputs, cache_bytes: int) -> frozenset[UnitId]:
    """Units in spread order up to the first that does not fit: skipping it would break the
    order, and with it that more memory never demotes."""
    cached = []
    for index in spread_order(len(inputs.demands)):
        demand = inputs.demands[index]
        cache_bytes -= demand.size_bytes
        if cache_bytes < 0:
            break
        cached.append(demand.unit)
    return frozenset(cached)


def _predicted(
    sizes: Sequence[tuple[UnitId, int]], cached: Collection[UnitId], inputs: PlanInputs
) -> StepTime | None:
    if inputs.speeds is None:
        return None
    through_cache = sum(size for unit, size in sizes if unit in cached)
    total = sum(size for _, size in sizes)
    return predict(total, through_cache, inputs.page_cache_bytes, inputs.speeds)
