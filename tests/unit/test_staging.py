"""How many slots of how many bytes there are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from dualblade.config import EngineConfig
from dualblade.geometry import TileGeometry
from dualblade.pipeline.budget import MemoryBudget
from dualblade.pipeline.division import LayerSizes, fitting_staging, staging_room
from dualblade.pipeline.staging import StagingShape, staging_shape
from dualblade.residency import BudgetShares, DoorSpeeds
from dualblade.units import GIB, KIB, MIB


def shape(budget_bytes: int, *, weights: int = 0, staging: int | None = None) -> StagingShape:
    engine = EngineConfig(staging_bytes=staging)
    return staging_shape(engine, budget_bytes, 64 * KIB, multiplied_bytes=weights)


def test_an_eighth_of_the_budget_and_64_mib_at_most() -> None:
    assert shape(256 * MIB).total_bytes == 32 * MIB
    assert shape(4 * GIB).total_bytes == 64 * MIB
    assert (shape(4 * GIB).read_slots, shape(4 * GIB).write_slots) == (12, 4)


def test_what_is_read_while_weights_are_multiplied_is_for_reads() -> None:
    """OPT-6.7B in bfloat16: 402 MiB a layer, a sixth of it is 67."""
    heavy = shape(4 * GIB, weights=402 * MIB)
    assert (heavy.read_slots, heavy.write_slots, heavy.slot_bytes) == (28, 4, 4 * MIB)
    assert heavy.total_bytes == 128 * MIB
    assert heavy.slots_first(8 * MIB) == 10, "the tuner takes more where it is of use"


def test_weights_take_no_more_than_an_eighth_of_the_budget() -> None:
    assert shape(512 * MIB, weights=402 * MIB).total_bytes == 64 * MIB
    assert shape(256 * MIB, weights=402 * MIB) == shape(256 * MIB)


def test_what_is_asked_for_is_what_there_is() -> None:
    asked = shape(4 * GIB, weights=402 * MIB, staging=96 * MIB)
    assert asked.total_bytes == 96 * MIB
    assert (asked.read_slots, asked.write_slots) == (20, 4)


def test_a_slot_holds_a_slab_and_there_are_eight() -> None:
    wide = staging_shape(EngineConfig(), 64 * MIB, 16 * MIB)
    assert (wide.slot_bytes, wide.read_slots, wide.write_slots) == (16 * MIB, 6, 2)


def test_a_small_budget_gives_what_room_there_is_until_the_drive_is_busy() -> None:
    def total(budget_bytes: int, room_bytes: int, staging: int | None = None) -> int:
        engine = EngineConfig(staging_bytes=staging)
        return staging_shape(engine, budget_bytes, 64 * KIB, room_bytes=room_bytes).total_bytes

    assert total(80 * MIB, 28 * MIB) == 28 * MIB
    assert total(192 * MIB, 82 * MIB) == 48 * MIB
    assert total(4 * GIB, GIB) == 64 * MIB, "its share is more"
    assert total(24 * MIB, 0) == 4 * MIB, "others leave nothing: its share, as ever"
    assert total(192 * MIB, 82 * MIB, staging=8 * MIB) == 8 * MIB


def test_staging_gives_way_where_it_alone_would_leave_kv_to_be_read() -> None:
    def total(fitting_bytes: int, staging: int | None = None) -> int:
        engine = EngineConfig(staging_bytes=staging)
        return staging_shape(engine, 4 * GIB, 64 * KIB, fitting_bytes=fitting_bytes).total_bytes

    assert total(0) == total(31 * MIB) == 64 * MIB, "some is to be read anyway"
    assert total(32 * MIB) == total(64 * MIB) == total(111 * MIB) == 32 * MIB
    assert total(112 * MIB) == 64 * MIB, "all fits with room to spare"
    assert total(32 * MIB, staging=48 * MIB) == 48 * MIB


def test_what_leaves_room_for_all_kv_is_asked_only_where_it_would_be_used() -> None:
    claimed = BudgetShares(
        budget_bytes=GIB, staging_bytes=0, gather_bytes=16 * MIB, tail_bytes=16 * MIB, table_bytes=0
    )
    speeds = DoorSpeeds(
        direct_bytes_per_s=3e9, cache_hit_bytes_per_s=1e12, cache_miss_bytes_per_s=1e9
    )
    assert fitting_staging(claimed, 900 * MIB, None) == 60 * MIB, "32 are a margin"
    assert fitting_staging(claimed, 1000 * MIB, None) == 0
    assert fitting_staging(claimed, 900 * MIB, speeds) == 60 * MIB
    copied = replace(speeds, cache_hit_bytes_per_s=10e9)
    assert fitting_staging(claimed, 900 * MIB, copied) == 0, "a part is read directly anyway"


def test_room_is_half_of_what_is_left_and_leaves_room_for_tails_of_two_tiles() -> None:
    def room(tails: int, gather: int = 16 * MIB) -> int:
        return staging_room(
            BudgetShares(
                budget_bytes=100 * MIB,
                staging_bytes=0,
                gather_bytes=gather,
                tail_bytes=tails,
                table_bytes=0,
            )
        )

    assert room(4 * MIB) == 40 * MIB
    assert room(34 * MIB) == 16 * MIB, "34 twice, 16 for a group, 16 for staging"
    assert room(60 * MIB) == 0
    assert room(4 * MIB, gather=120 * MIB) == 0


def test_slots_of_four_mib_or_sixteen_unless_they_would_be_small() -> None:
    def slots(staging: int) -> tuple[int, int]:
        got = shape(4 * GIB, staging=staging)
        return got.slot_bytes, got.read_slots + got.write_slots

    assert slots(48 * MIB) == (4 * MIB, 12)
    assert slots(32 * MIB) == (4 * MIB, 8)
    assert slots(16 * MIB) == (MIB, 16)
    assert slots(6 * MIB) == (512 * KIB, 12)
    assert slots(2 * MIB) == (256 * KIB, 8)
    assert slots(512 * KIB) == (64 * KIB, 8)
    assert slots(96 * MIB) == (4 * MIB, 24)


def test_a_claim_for_tokens_to_come_keeps_to_the_memory_that_there_is_now() -> None:
    """Gather buffers of an eighth more tokens are memory that nobody takes back; what is needed at
    once is held to the largest budget that there was."""
    half = TileGeometry(kv_heads=8, rows=64, dim=64, item_bytes=4)
    sizes = LayerSizes(batch=1, keys=half, values=half, tail_rows=64)
    layer: Any = SimpleNamespace(index=0, batch=1, tail_capacity=sizes.tail_rows, sizes=sizes)
    buffers: Any = SimpleNamespace(try_to_hold=lambda *_: True)
    refuse: Any = None  # nothing is refused
    tokens = 40 * 1024  # 160 MiB are gathered of keys and values, of an eighth more 180
    for in_force, capacity in ((512 * MIB, 45 * 1024), (170 * MIB, tokens), (1 * MIB, tokens)):
        budget = MemoryBudget(512 * MIB, None, layer_count=1)
        budget.claim(
            [layer],
            tokens,
            staging_bytes=2 * MIB,
            in_force_bytes=in_force,
            buffers=buffers,
            too_small=refuse,
        )
        assert budget.capacity_tokens == capacity
