"""Which unit goes through which path, from sizes alone. Pure: no torch, no I/O, no clock."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dualblade.config import Path
from dualblade.errors import BudgetError
from dualblade.geometry import UnitId
from dualblade.units import MIB, format_size

MARGIN_FRACTION = 0.05
"""Left free under the budget: one step above it, a cyclic sweep of the page cache hits nothing
(768 MiB of 1024 cached: 3.7 GiB/s; 900 MiB cached: 1.0 GiB/s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitDemand:
    """Bytes that `unit` is expected to have stored."""

    unit: UnitId
    size_bytes: int


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
        margin = max(int(self.budget_bytes * MARGIN_FRACTION), min(MIB, self.budget_bytes // 4))
        return max(0, self.budget_bytes - self.fixed_bytes - margin)

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
    """The path of every unit, in the order of the sweep."""

    placements: tuple[Placement, ...]
    page_cache_bytes_max: int

    @property
    def cached_units(self) -> frozenset[UnitId]:
        """Units on the page-cache path."""
        return frozenset(p.unit for p in self.placements if p.path is Path.PAGE_CACHE)

    def bytes_on(self, path: Path) -> int:
        """Bytes of all units on `path`."""
        return sum(p.size_bytes for p in self.placements if p.path is path)


def plan_fixed(demands: Sequence[UnitDemand], path: Path) -> ResidencyPlan:
    """Every unit on `path`, because it was asked for."""
    placements = tuple(
        Placement(unit=d.unit, path=path, size_bytes=d.size_bytes, reason=f"path {path.value}")
        for d in demands
    )
    return ResidencyPlan(placements=placements, page_cache_bytes_max=0)


def plan_by_size(
    demands: Sequence[UnitDemand],
    page_cache_bytes: int,
    *,
    among: Collection[UnitId] | None = None,
) -> ResidencyPlan:
    """Keep in the page cache what fits in `page_cache_bytes`, spread evenly; the rest direct.

    With `among`, only those units may stay cached: a plan that shrinks as the KV grows then
    demotes a few units and promotes none, because a promotion costs a cold read.

    Spreading is by bytes: walking the sweep, each unit earns its share of the allowance and is
    cached once the credit covers it. So the sum never passes the allowance, and the drive always
    has a direct unit to stream while cached ones are served.
    """
    candidates = [d for d in demands if among is None or d.unit in among]
    total = sum(d.size_bytes for d in candidates)
    cached: set[UnitId] = set()
    credit = 0  # in units of bytes x total, so that integers stay exact
    for demand in candidates:
        credit += min(page_cache_bytes, total) * demand.size_bytes
        if credit >= demand.size_bytes * total:
            credit -= demand.size_bytes * total
            cached.add(demand.unit)
    whole = len(cached) == len(demands)
    room = format_size(page_cache_bytes)
    kept = "all KV fits the page cache's share" if whole else f"in the page cache's {room}"
    placements = tuple(
        Placement(
            unit=d.unit,
            path=Path.PAGE_CACHE if d.unit in cached else Path.DIRECT,
            size_bytes=d.size_bytes,
            reason=kept if d.unit in cached else f"beyond the page cache's {room}",
        )
        for d in demands
    )
    return ResidencyPlan(placements=placements, page_cache_bytes_max=page_cache_bytes)
