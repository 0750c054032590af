"""Extents are aligned, disjoint, merged when freed, and never more than the capacity."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dualblade.errors import NoSpace
from dualblade.store.extents import ExtentAllocator, Range
from dualblade.units import EXTENT_ALIGN_BYTES as ALIGN

CAPACITY = 32 * ALIGN


def test_lowest_fit_first_and_merging() -> None:
    allocator = ExtentAllocator(ALIGN, 8 * ALIGN)
    first, second, third = (allocator.allocate(2 * ALIGN) for _ in range(3))
    assert [r.offset for r in (first, second, third)] == [ALIGN, 3 * ALIGN, 5 * ALIGN]
    allocator.free(first)
    allocator.free(second)
    assert allocator.allocate(4 * ALIGN).offset == ALIGN


def test_the_capacity_holds_and_the_error_says_what_is_free() -> None:
    allocator = ExtentAllocator(ALIGN, 4 * ALIGN)
    taken = allocator.allocate(3 * ALIGN)
    with pytest.raises(NoSpace, match=r"2\.00 MiB of 8\.00 MiB are free"):
        allocator.allocate(ALIGN + 1)
    allocator.free(taken)
    assert allocator.allocate(4 * ALIGN).size_bytes == 4 * ALIGN


def test_freeing_twice_is_a_bug_that_is_caught() -> None:
    allocator = ExtentAllocator(0, 4 * ALIGN)
    taken = allocator.allocate(ALIGN)
    allocator.free(taken)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(taken)


class AllocatorMachine(RuleBasedStateMachine):
    """Against a set of taken blocks as the model."""

    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ExtentAllocator(3 * ALIGN, CAPACITY)
        self.blocks: set[int] = set()

    @rule(target=taken, size=st.integers(1, 12 * ALIGN))
    def allocate(self, size: int) -> Range | None:
        try:
            got = self.allocator.allocate(size)
        except NoSpace:
            wanted = -(-size // ALIGN)
            free = [at for at in range(3, 35) if at not in self.blocks]
            runs = any(all(at + step in free for step in range(wanted)) for at in free)
            assert not runs, "refused although it fits"
            return None
        blocks = set(range(got.offset // ALIGN, got.end // ALIGN))
        assert got.size_bytes >= size
        assert not blocks & self.blocks
        assert min(blocks) >= 3
        assert max(blocks) < 35
        self.blocks |= blocks
        return got

    @rule(got=consumes(taken))
    def free(self, got: Range | None) -> None:
        if got is not None:
            self.allocator.free(got)
            self.blocks -= set(range(got.offset // ALIGN, got.end // ALIGN))

    @invariant()
    def counts(self) -> None:
        assert self.allocator.used_bytes == len(self.blocks) * ALIGN


TestAllocator = AllocatorMachine.TestCase


@given(st.integers(0, 5 * ALIGN))
def test_capacity_is_cut_to_whole_steps(capacity: int) -> None:
    assert ExtentAllocator(0, capacity).capacity_bytes == capacity // ALIGN * ALIGN
