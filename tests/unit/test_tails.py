"""How much of the budget tails may take."""

from __future__ import annotations

from dualblade.pipeline.tails import TailLimit
from dualblade.units import MIB

LAYERS = 16
TOKEN = 2 * 16 * 64
"""Elements of a token in one layer: keys and values of 16 heads of 64."""


def limit(budget_bytes: int, *, over_tiles: bool = True, batch: int = 64) -> int:
    return TailLimit(budget_bytes, LAYERS, over_tiles).bytes_max(batch * TOKEN, 2)


SIXTEEN_TOKENS = 64 * TOKEN * 2 * 16


def test_a_tenth_of_the_budget() -> None:
    assert limit(1600 * MIB, batch=1) == 10 * MIB
    assert limit(160 * MIB, over_tiles=False) == MIB, "gather buffers grow with the context"


def test_sixteen_tokens_where_a_quarter_is_left() -> None:
    """64 sequences: 4 MiB of tails for 16 tokens of each layer, a group of 32 MiB."""
    assert SIXTEEN_TOKENS == 4 * MIB
    assert limit(128 * MIB) == SIXTEEN_TOKENS, "64 of tails, 32 of a group, 32 are left"
    assert limit(126 * MIB) == 126 * MIB // 10 // LAYERS, "eight are no better than one"
    assert limit(200 * MIB) == SIXTEEN_TOKENS, "and no more"


def test_staging_keeps_what_it_has() -> None:
    """From a prompt of one sequence before."""
    tails = TailLimit(128 * MIB, LAYERS, True, 48 * MIB).bytes_max(64 * TOKEN, 2)
    assert tails == 128 * MIB // 10 // LAYERS
    assert TailLimit(160 * MIB, LAYERS, True, 48 * MIB).bytes_max(64 * TOKEN, 2) == SIXTEEN_TOKENS


def test_a_group_that_leaves_no_room_changes_nothing() -> None:
    assert limit(40 * MIB) == 40 * MIB // 10 // LAYERS
