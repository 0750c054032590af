"""The mapping of a striped store to its members, against a dictionary of every block."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.store.format import DATA_OFFSET, MEMBERS_MAX, STRIPE_BYTES
from dualblade.store.stripes import Part, Stripes
from dualblade.units import BLOCK_BYTES, EXTENT_ALIGN_BYTES, MIB

counts = st.integers(1, MEMBERS_MAX)
stripe_sizes = st.sampled_from([BLOCK_BYTES, 64 * 1024, MIB, 2 * MIB])
blocks = st.integers(0, 1 << 30)


def covered(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Touching and overlapping ranges as one; asserts that none overlap."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            assert begin == merged[-1][1], "two parts share a byte"
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged


@given(count=counts, stripe=stripe_sizes, at=blocks, size=st.integers(1, 4000))
def test_a_range_is_covered_once_by_one_range_on_each_member(
    count: int, stripe: int, at: int, size: int
) -> None:
    stripes = Stripes(count, stripe)
    offset, size_bytes = DATA_OFFSET + at * BLOCK_BYTES, size * BLOCK_BYTES
    parts = list(stripes.parts(offset, size_bytes))
    assert covered([(p.at, p.at + p.size_bytes) for p in parts]) == [(0, size_bytes)]
    assert [part.at for part in parts] == sorted(part.at for part in parts)
    ranges = stripes.ranges(offset, size_bytes)
    assert len({member for member, *_ in ranges}) == len(ranges) <= count
    for member, begin, length in ranges:
        mine = [(p.offset, p.offset + p.size_bytes) for p in parts if p.member == member]
        assert covered(mine) == [(begin, begin + length)]
    assert {member for member, *_ in ranges} == {part.member for part in parts}
    for part in parts:
        assert count == 1 or part.size_bytes <= stripe


@given(count=counts, stripe=stripe_sizes, first=blocks, second=blocks)
def test_no_two_blocks_share_a_place(count: int, stripe: int, first: int, second: int) -> None:
    """And what a member must hold is what its last block needs, no more than a stripe above."""
    stripes = Stripes(count, stripe)
    places = set()
    for block in {first, second}:
        (part,) = stripes.parts(DATA_OFFSET + block * BLOCK_BYTES, BLOCK_BYTES)
        places.add((part.member, part.offset))
        end = part.offset + BLOCK_BYTES - DATA_OFFSET
        held = stripes.member_bytes((block + 1) * BLOCK_BYTES)
        assert held - stripe < end <= held
    assert len(places) == len({first, second})


@given(count=counts, rows=st.integers(1, 100), first=st.integers(0, 1 << 20))
def test_whole_rows_lie_equally_on_all(count: int, rows: int, first: int) -> None:
    row_bytes = count * STRIPE_BYTES
    found = Stripes(count).ranges(DATA_OFFSET + first * row_bytes, rows * row_bytes)
    expected = (DATA_OFFSET + first * STRIPE_BYTES, rows * STRIPE_BYTES)
    assert found == [(member, *expected) for member in range(count)]


@given(at=blocks, size=st.integers(0, 1 << 20))
def test_one_member_changes_nothing(at: int, size: int) -> None:
    """Whatever its size, a transfer stays one: the engine cuts it, as it always did."""
    offset, size_bytes = DATA_OFFSET + at * BLOCK_BYTES, size * BLOCK_BYTES
    assert list(Stripes(1).parts(offset, size_bytes)) == [Part(0, offset, size_bytes, 0)]
    assert Stripes(1).ranges(offset, size_bytes) == ([(0, offset, size_bytes)] if size else [])


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("extent_mib", [2, 4, 6, 8, 16, 24, 64])
@pytest.mark.parametrize("filled", [0.3, 0.6, 1.0])
def test_units_that_fill_parts_of_rows_load_all_members_alike(
    count: int, extent_mib: int, filled: float
) -> None:
    """64 units side by side, each filled from its beginning, as a sweep reads them. With stripe k
    on member k % N, units of 0.6 MiB in 2 MiB would all lie on one of two members."""
    stripes, loads = Stripes(count), Counter[int]()
    extent = extent_mib * MIB
    for unit in range(64):
        read = int(extent * filled) // BLOCK_BYTES * BLOCK_BYTES
        for member, _, size in stripes.ranges(DATA_OFFSET + unit * extent, read):
            loads[member] += size
    assert max(loads.values()) <= 1.2 * sum(loads.values()) / count


def test_golden_rows() -> None:
    """The table in docs/format.md and in the module."""
    rows = [[Stripes(3).member_of(3 * row + column) for column in range(3)] for row in range(5)]
    assert rows == [[0, 1, 2], [1, 2, 0], [0, 1, 2], [2, 0, 1], [1, 2, 0]]
    assert EXTENT_ALIGN_BYTES % STRIPE_BYTES == 0


def test_large_ranges_cost_nothing() -> None:
    """A range is found from its ends, not stripe by stripe: this would not end."""
    found = Stripes(3).ranges(DATA_OFFSET, 3 << 60)
    assert [size for _, _, size in found] == [1 << 60] * 3
