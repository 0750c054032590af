"""Plans by size: never over the share, evenly spread, and demoting only as they shrink."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.config import Path
from dualblade.errors import BudgetError
from dualblade.geometry import Part, UnitId
from dualblade.residency import BudgetShares, UnitDemand, plan_by_size, plan_fixed
from dualblade.units import MIB

sizes = st.lists(st.integers(1, 1 << 32), min_size=1, max_size=80)


def demands(sizes: list[int]) -> list[UnitDemand]:
    units = [UnitId(i // 2, list(Part)[i % 2]) for i in range(len(sizes))]
    return [UnitDemand(unit=u, size_bytes=s) for u, s in zip(units, sizes, strict=True)]


@given(sizes, st.integers(0, 1 << 40))
def test_the_share_is_never_passed(sizes: list[int], share: int) -> None:
    plan = plan_by_size(demands(sizes), share)
    assert plan.bytes_on(Path.PAGE_CACHE) <= share
    assert plan.bytes_on(Path.PAGE_CACHE) + plan.bytes_on(Path.DIRECT) == sum(sizes)
    assert [p.unit for p in plan.placements] == [d.unit for d in demands(sizes)]


@given(st.integers(1, 1 << 32), st.integers(1, 80), st.integers(0, 1 << 40))
def test_equal_units_fill_the_share_and_are_spread_evenly(
    size: int, count: int, share: int
) -> None:
    plan = plan_by_size(demands([size] * count), share)
    fit = min(count, share // size)
    places = [i for i, p in enumerate(plan.placements) if p.path is Path.PAGE_CACHE]
    assert len(places) in (fit, min(count, fit))
    for start in range(0, count, 8):
        here = sum(start <= place < start + 8 for place in places)
        length = min(8, count - start)
        assert abs(here - length * min(share, size * count) / (size * count)) <= 1.0


@given(sizes, st.integers(0, 1 << 36), st.integers(0, 1 << 36))
def test_a_shrinking_plan_only_demotes(sizes: list[int], share: int, less: int) -> None:
    before = plan_by_size(demands(sizes), share)
    after = plan_by_size(demands(sizes), min(share, less), among=before.cached_units)
    assert after.cached_units <= before.cached_units
    assert after.bytes_on(Path.PAGE_CACHE) <= less


@given(sizes)
def test_all_fits_when_the_share_is_enough(sizes: list[int]) -> None:
    plan = plan_by_size(demands(sizes), sum(sizes))
    assert plan.bytes_on(Path.DIRECT) == 0


def test_a_fixed_path_is_for_every_unit() -> None:
    plan = plan_fixed(demands([1, 2, 3]), Path.DIRECT)
    assert {p.path for p in plan.placements} == {Path.DIRECT}


def shares(budget: int, fixed: int) -> BudgetShares:
    return BudgetShares(
        budget_bytes=budget, staging_bytes=fixed, gather_bytes=0, tail_bytes=0, table_bytes=0
    )


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_shares_stay_under_the_budget(budget: int, fixed: int) -> None:
    share = shares(budget, fixed)
    assert share.page_cache_bytes == 0 or share.page_cache_bytes + fixed <= budget


def test_a_budget_below_the_fixed_part_says_the_least_that_would_do() -> None:
    with pytest.raises(BudgetError, match="at least 9 MiB") as caught:
        shares(4 * MIB, 9 * MIB).require()
    assert caught.value.needed_bytes == 9 * MIB
