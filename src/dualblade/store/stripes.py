"""Which bytes of a striped store lie on which member. Pure arithmetic; no I/O.

The data area is cut into stripes; N stripes in a row, one on each member:

    row        0   1   2   3   4
    member 0   0   5   6  10  14
    member 1   1   3   7  11  12
    member 2   2   4   8   9  13

Row r lies at r x stripe on every member, but does not always begin with member 0: else units that
fill only parts of rows would leave most bytes to the first members. A contiguous range of the store
is one contiguous range on each member that it meets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dualblade.store.format import DATA_OFFSET, STRIPE_BYTES

_TURN = 0x9E3779B9
"""2**32 / golden ratio: its multiples, as fractions of 2**32, lie evenly in [0, 1), also those of
every second, third or nth row, where units begin. Part of the format: docs/format.md."""


class Part(NamedTuple):
    """[offset, offset + size_bytes) of `member`; `at` is where it begins in the range asked for."""

    member: int
    offset: int
    size_bytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Stripes:
    """The mapping for `member_count` members; with one it is the identity.

    Offsets, of the store and of a member alike, begin with DATA_OFFSET.
    """

    member_count: int
    stripe_bytes: int = STRIPE_BYTES

    def parts(self, offset: int, size_bytes: int) -> Iterator[Part]:
        """The range stripe by stripe, in its own order."""
        if self.member_count == 1:
            yield Part(0, offset, size_bytes, 0)
            return
        position, end = offset - DATA_OFFSET, offset - DATA_OFFSET + size_bytes
        begin = position
        while position < end:
            stripe, within = divmod(position, self.stripe_bytes)
            row = stripe // self.member_count
            size = min(self.stripe_bytes - within, end - position)
            where = DATA_OFFSET + row * self.stripe_bytes + within
            yield Part(self.member_of(stripe), where, size, position - begin)
            position += size

    def ranges(self, offset: int, size_bytes: int) -> list[tuple[int, int, int]]:
        """(member, offset, bytes) of the one range on each member that holds some of it."""
        begin, end = offset - DATA_OFFSET, offset - DATA_OFFSET + size_bytes
        edges = [
            (member, self._edge(member, begin), self._edge(member, end))
            for member in range(self.member_count)
        ]
        return [(m, DATA_OFFSET + first, last - first) for m, first, last in edges if first < last]

    def member_of(self, stripe: int) -> int:
        """The member that holds the `stripe`-th stripe."""
        row, column = divmod(stripe, self.member_count)
        return (column + self._turn(row)) % self.member_count

    def member_bytes(self, capacity_bytes: int) -> int:
        """What each member must hold for a store of `capacity_bytes`."""
        row_bytes = self.stripe_bytes * self.member_count
        return -(-capacity_bytes // row_bytes) * self.stripe_bytes

    def _turn(self, row: int) -> int:
        """The member that row `row` begins with."""
        return ((row * _TURN) % 2**32 * self.member_count) >> 32

    def _edge(self, member: int, position: int) -> int:
        """How many bytes of `member` lie before `position` of the data area."""
        stripe, within = divmod(position, self.stripe_bytes)
        row, column = divmod(stripe, self.member_count)
        mine = (member - self._turn(row)) % self.member_count
        if mine == column:
            return row * self.stripe_bytes + within
        return (row + (mine < column)) * self.stripe_bytes
