"""Plans: never over the share, evenly spread, nested, and honest about what they gain."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.config import Path
from dualblade.errors import ConfigError
from dualblade.geometry import Part, UnitId
from dualblade.residency import (
    BudgetShares,
    DoorSpeeds,
    PlanInputs,
    ResidencyPlan,
    UnitDemand,
    decide,
    plan_fixed,
)
from dualblade.residency.ladder import spread_order
from dualblade.residency.speeds import GAIN_FRACTION, StepTime, predict
from dualblade.units import GIB, MIB
from tests.property.simulated_machine import by_size

sizes = st.lists(st.integers(1, 1 << 32), min_size=1, max_size=80)


grains = st.integers(0, 1 << 30)


def demands(sizes: list[int], grain: int = 0) -> list[UnitDemand]:
    units = [UnitId(i // 2, list(Part)[i % 2]) for i in range(len(sizes))]
    return [
        UnitDemand(unit=u, size_bytes=s, grain_bytes=grain)
        for u, s in zip(units, sizes, strict=True)
    ]


def is_part(small: ResidencyPlan, large: ResidencyPlan) -> bool:
    """Whether all that `small` caches `large` does too."""
    pairs = zip(small.placements, large.placements, strict=True)
    return all(one.cached_bytes <= other.cached_bytes for one, other in pairs)


@given(sizes, st.integers(0, 1 << 40), grains)
def test_the_share_is_never_passed(sizes: list[int], share: int, grain: int) -> None:
    plan = by_size(demands(sizes, grain), share)
    assert plan.cached_bytes <= share
    assert plan.cached_bytes + plan.direct_bytes == sum(sizes)
    assert [p.unit for p in plan.placements] == [d.unit for d in demands(sizes)]


@given(st.integers(1, 1 << 32), st.integers(1, 160), st.integers(0, 1 << 40))
def test_equal_units_fill_the_share_and_are_spread_evenly(
    size: int, count: int, share: int
) -> None:
    plan = by_size(demands([size] * count), share)
    fit = min(count, share // size)
    places = [i for i, p in enumerate(plan.placements) if p.path is Path.PAGE_CACHE]
    assert len(places) == fit
    for start in range(0, count, 8):
        here = sum(start <= place < start + 8 for place in places)
        assert abs(here - min(8, count - start) * fit / count) < 1.6
    for before, after in pairwise([-1, *places, count]):
        assert (after - before - 1) * fit <= 1.75 * count  # no long run without a cached unit


@given(st.integers(1, 1 << 32), st.integers(1, 160), st.floats(0, 0.999), st.integers(1, 1 << 32))
def test_what_is_left_of_the_share_holds_the_beginning_of_one_unit(
    size: int, count: int, fraction: float, grain: int
) -> None:
    share = int(size * count * fraction)
    plan = by_size(demands([size] * count, grain), share)
    parts = [p for p in plan.placements if p.path is Path.DUAL]
    assert len(parts) <= 1
    assert all(p.cached_bytes % grain == 0 for p in parts)
    assert share - plan.cached_bytes < min(grain, size)


@given(sizes, st.integers(0, 1 << 38), st.integers(0, 1 << 38), grains)
def test_more_memory_only_adds_to_a_plan(
    sizes: list[int], share: int, more: int, grain: int
) -> None:
    small = by_size(demands(sizes, grain), share)
    large = by_size(demands(sizes, grain), share + more)
    assert is_part(small, large)


@given(st.integers(0, 300))
def test_the_order_names_each_unit_once(count: int) -> None:
    assert sorted(spread_order(count)) == list(range(count))


@given(sizes)
def test_all_fits_when_the_share_is_enough(sizes: list[int]) -> None:
    plan = by_size(demands(sizes), sum(sizes))
    assert plan.direct_bytes == 0


def test_a_fixed_path_is_for_every_unit() -> None:
    plan = plan_fixed(demands([1, 2, 3]), Path.DIRECT)
    assert {p.path for p in plan.placements} == {Path.DIRECT}


rates = st.floats(1e6, 1e11)
speeds = st.builds(
    DoorSpeeds,
    direct_bytes_per_s=rates,
    cache_hit_bytes_per_s=rates,
    cache_miss_bytes_per_s=rates,
)
LAB = DoorSpeeds(
    direct_bytes_per_s=3 * GIB, cache_hit_bytes_per_s=12 * GIB, cache_miss_bytes_per_s=2 * GIB
)
"""Huge-page O_DIRECT, and buffered reads that hit and miss, on the machine of the benchmarks."""


@given(sizes, st.integers(0, 1 << 38), st.integers(0, 1 << 38), speeds, grains)
def test_with_speeds_too_more_memory_only_adds(
    sizes: list[int], share: int, more: int, speeds: DoorSpeeds, grain: int
) -> None:
    inputs = PlanInputs(demands=tuple(demands(sizes, grain)), page_cache_bytes=share, speeds=speeds)
    small, large = decide(inputs), decide(replace(inputs, page_cache_bytes=share + more))
    assert small.cached_bytes <= share
    assert is_part(small, large)
    assert small == decide(inputs)


@given(sizes, st.integers(0, 1 << 38), speeds)
def test_a_plan_is_never_predicted_to_lose_to_all_direct(
    sizes: list[int], share: int, speeds: DoorSpeeds
) -> None:
    inputs = PlanInputs(demands=tuple(demands(sizes)), page_cache_bytes=share, speeds=speeds)
    alone = predict(sum(sizes), 0, 0, speeds).seconds
    assert predicted(inputs, speeds).seconds <= alone * (1 + 2 * GAIN_FRACTION)


def predicted(inputs: PlanInputs, speeds: DoorSpeeds) -> StepTime:
    """A step of what `decide` makes of them."""
    cached = decide(inputs).cached_bytes
    return predict(inputs.total_bytes, cached, inputs.page_cache_bytes, speeds)


def planned(share: int, speeds: DoorSpeeds, percent: int | None = None) -> PlanInputs:
    return PlanInputs(
        demands=tuple(demands([32 * MIB] * 48)),
        page_cache_bytes=share,
        speeds=speeds,
        cache_percent=percent,
    )


def test_the_step_time_is_that_of_the_slowest_part() -> None:
    half = predicted(planned(768 * MIB, LAB), LAB)
    assert half.seconds == pytest.approx(0.25)  # 768 MiB at 3 GiB/s
    assert half.bound == "the drive"
    slow = predict(1536 * MIB, 768 * MIB, GIB, LAB, compute_seconds=0.4)
    assert (slow.seconds, slow.bound) == (0.4, "compute")


def test_a_drive_as_fast_as_the_page_cache_gets_everything() -> None:
    plan = decide(planned(2 * GIB, replace(LAB, direct_bytes_per_s=11.9 * GIB)))
    assert plan.cached_bytes == 0
    assert "as fast as the page cache (12.0 GiB/s)" in plan.placements[0].reason


def test_so_little_memory_that_it_gains_nothing_is_left_alone() -> None:
    plan = decide(planned(20 * MIB, LAB))
    assert plan.cached_bytes == 0
    assert "gain too little" in plan.placements[0].reason


def test_no_more_is_cached_than_copies_can_serve() -> None:
    """With hits at 6 GiB/s and the drive at 3 two thirds are the best split, whatever fits."""
    plan = decide(planned(2 * GIB, replace(LAB, cache_hit_bytes_per_s=6 * GIB)))
    assert plan.cached_bytes == pytest.approx(1024 * MIB, rel=0.03)
    direct = [p for p in plan.placements if p.path is Path.DIRECT]
    assert "would be slower" in direct[0].reason


@given(st.integers(0, 100), st.integers(0, 2 * GIB))
def test_a_split_by_hand_is_kept_whether_it_fits_or_not(percent: int, share: int) -> None:
    plan = decide(planned(share, LAB, percent))
    cached = plan.cached_bytes
    assert 0 <= 48 * 32 * MIB * percent / 100 - cached < 32 * MIB
    kept = [p.reason for p in plan.placements if p.path is Path.PAGE_CACHE]
    assert all(("fit" in reason) == (cached > share) for reason in kept)


def test_the_cliff_is_predicted() -> None:
    under, over = (predicted(planned(800 * MIB, LAB, percent), LAB) for percent in (50, 60))
    assert over.seconds > 2 * under.seconds
    with pytest.raises(ConfigError, match="percentage"):
        planned(0, LAB, 101)


def test_growth_is_planned_for() -> None:
    grown = tuple(replace(d, stored_bytes=d.size_bytes // 2) for d in demands([32 * MIB] * 48))
    plan = decide(PlanInputs(demands=grown, page_cache_bytes=768 * MIB, speeds=LAB))
    assert plan.cached_bytes == 768 * MIB


def shares(budget: int, fixed: int) -> BudgetShares:
    return BudgetShares(
        budget_bytes=budget, staging_bytes=fixed, gather_bytes=0, tail_bytes=0, table_bytes=0
    )


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_shares_stay_under_the_budget(budget: int, fixed: int) -> None:
    share = shares(budget, fixed)
    assert share.page_cache_bytes == 0 or share.page_cache_bytes + fixed <= budget


def test_a_budget_below_the_fixed_part_does_not_fit() -> None:
    assert not shares(4 * MIB, 9 * MIB).fits
    assert shares(9 * MIB, 9 * MIB).fits
