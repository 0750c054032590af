"""Pages of the page cache, attended to where they lie: the same bytes, and no copy of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dualblade.attention import AttentionQuery
from dualblade.config import EngineConfig
from dualblade.errors import ConfigError
from dualblade.host import mapped
from dualblade.host.groups import FilePages
from dualblade.host.memory import MemoryProbe, OwnMemory
from dualblade.io import Arena, Engine, open_engine
from dualblade.pipeline import read_ahead
from dualblade.pipeline.checksums import SAMPLE_SWEEPS
from dualblade.pipeline.read_ahead import _Read, _Resident
from dualblade.store import Door, InPlace, Store
from dualblade.store.extent import Extent
from dualblade.store.formatting import carry_out_format, plan_format
from dualblade.testing import FaultyEngine
from dualblade.testing.contract import pattern
from dualblade.units import BLOCK_BYTES, KIB, MIB
from tests.devices import loop_device, needs_root
from tests.integration.test_residence_io import (
    DIM,
    HEADS,
    KV_BYTES,
    LAYERS,
    TOKENS,
    UNIT_BYTES,
    Cache,
)

SIZE = 4 * MIB
PART = (MIB, 2 * MIB)  # offset and size


@pytest.fixture
def engine() -> Iterator[Engine]:
    with open_engine(queue_depth=4) as opened:
        yield opened


@pytest.fixture(params=["file", pytest.param("loop", marks=needs_root)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield str(tmp_path / "kv.store")
        return
    with loop_device(tmp_path / "image", 32 * MIB) as device:
        carry_out_format(plan_format(device))
        yield device


@pytest.fixture
def store(place: str, engine: Engine) -> Iterator[Store]:
    is_file = not place.startswith("/dev")
    with Store.open(place, engine, capacity_bytes=16 * MIB if is_file else None) as opened:
        yield opened


def filled(store: Store, seed: int = 1) -> tuple[Extent, bytes]:
    """An extent in the page cache, and what is in it."""
    extent, data = store.allocate(SIZE, Door.PAGE_CACHE), pattern(SIZE, seed)
    write(store, extent, data)
    return extent, data


def write(store: Store, extent: Extent, data: bytes) -> None:
    with Arena(SIZE) as arena:
        arena.buffer[: len(data)] = data
        store.write(extent, 0, arena.address, len(data)).wait()


def test_cached_bytes_are_seen_where_they_lie(store: Store, engine: Engine) -> None:
    extent, data = filled(store)
    reads = engine.counters().read_ops
    there = store.in_place(extent, *PART)
    assert there is not None
    assert store.mapped_bytes == 0  # nothing before it is held
    assert there.hold() == data[MIB : 3 * MIB]
    assert store.counters.in_place_read_bytes == 0
    there.count()
    assert store.counters.in_place_read_bytes == store.counters.page_cache_read_bytes == 2 * MIB
    assert store.mapped_bytes == 3 * MIB
    assert engine.counters().read_ops == reads
    # What is written later is seen too: it is the same memory.
    data = pattern(SIZE, seed=2)
    write(store, extent, data)
    assert there.hold() == data[MIB : 3 * MIB]


def test_what_is_not_cached_is_read(store: Store) -> None:
    extent, _ = filled(store)
    there = store.in_place(extent, *PART)
    assert there is not None
    assert there.hold() is not None
    store._drop(extent)  # unmaps, and so the kernel does drop it
    assert store.cached_bytes(extent) == 0
    assert there.hold() is None
    assert store.in_place(extent, *PART) is None
    assert store.mapped_bytes == 0
    direct = store.allocate(2 * MIB, Door.DIRECT)
    assert store.in_place(direct, 0, 2 * MIB) is None


def test_what_is_mapped_behind_a_missing_page_still_counts(store: Store) -> None:
    """Else it would be taken for others' memory, and units would give way to it."""
    extent, data = filled(store)
    there = store.in_place(extent, 0, SIZE)
    assert there is not None
    assert there.hold() == data
    assert extent.memory is not None
    extent.memory._there_bytes = 0  # as when the kernel took its beginning
    assert store.mapped_bytes == SIZE
    part = store.in_place(extent, *PART)
    assert part is not None
    assert part.hold() == data[MIB : 3 * MIB]
    assert store.mapped_bytes == SIZE


def test_an_extent_that_moves_takes_its_memory_along(store: Store) -> None:
    """A mapped page would outlive the demotion, and show direct writes too late on a namespace."""
    extent, data = filled(store)
    there = store.in_place(extent, *PART)
    assert there is not None
    assert there.hold() is not None
    store.move(extent, Door.DIRECT)
    assert store.cached_bytes(extent) == store.mapped_bytes == 0
    assert there.hold() is None
    store.move(extent, Door.PAGE_CACHE)
    assert store.in_place(extent, *PART) is None  # nobody read it yet
    with Arena(SIZE) as arena:
        store.read(extent, 0, arena.address, SIZE).wait()
        assert bytes(arena.buffer[:SIZE]) == data
    again = store.in_place(extent, *PART)
    assert again is not None
    assert again.hold() == data[MIB : 3 * MIB]
    assert there.hold() is None  # of the mapping before
    store.free(extent)
    assert again.hold() is None


def test_a_page_that_cannot_be_had_is_no_signal(tmp_path: Path, engine: Engine) -> None:
    """Touching it would end the process; asking for it first does not."""
    path = tmp_path / "kv.store"
    with Store.open(path, engine, capacity_bytes=16 * MIB) as store:
        extent, _ = filled(store)
        there = store.in_place(extent, 0, SIZE)
        assert there is not None
        os.truncate(path, extent.range.offset + MIB)
        assert there.hold() is None
        os.truncate(path, extent.range.end)
    assert there.hold() is None  # the store is closed


@pytest.mark.parametrize("read_ahead", [False, True])
def test_pages_that_others_bring_are_asked_for_each_time(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, *, read_ahead: bool
) -> None:
    """A page counts as cached while the kernel reads it ahead, and that may fail: a signal."""
    path = tmp_path / "kv.store"
    with Store.open(
        path, engine, capacity_bytes=16 * MIB, direct=False, read_ahead=read_ahead
    ) as store:
        there = store.in_place(filled(store)[0], *PART)
        assert there is not None
        assert there.hold() is not None
        assert store.mapped_bytes == 3 * MIB
        monkeypatch.setattr(mapped, "_MADV_POPULATE_READ", 9999)
        assert (there.hold() is None) == read_ahead


@pytest.mark.parametrize("read_ahead", [False, True])
def test_only_a_store_without_its_other_door_lets_the_kernel_read_ahead(
    place: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, *, read_ahead: bool
) -> None:
    advised: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advised.append(arguments[-1]))
    with Store.open(place, engine, direct=False, read_ahead=read_ahead):
        assert (os.POSIX_FADV_RANDOM in advised) != read_ahead
    with pytest.raises(ConfigError, match="written directly"):
        Store.open(place, engine, read_ahead=True)


def test_a_kernel_that_cannot_bring_pages_is_read_from(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_MADV_POPULATE_READ", 9999)  # EINVAL, as before Linux 5.14
    with Store.open(tmp_path / "kv.store", engine, capacity_bytes=16 * MIB) as store:
        assert store.in_place(filled(store)[0], *PART) is None
        monkeypatch.undo()
        assert store.in_place(filled(store)[0], *PART) is None  # it is not asked again


def test_striped_stores_and_engines_that_must_see_all_are_read(tmp_path: Path) -> None:
    with (
        open_engine() as engine,
        Store.open(
            [tmp_path / "a.store", tmp_path / "b.store"], engine, capacity_bytes=16 * MIB
        ) as striped,
    ):
        assert striped.in_place(filled(striped)[0], *PART) is None
    with (
        FaultyEngine(open_engine()) as engine,
        Store.open(tmp_path / "kv.store", engine, capacity_bytes=16 * MIB) as store,
    ):
        assert store.in_place(filled(store)[0], *PART) is None


# -- decoding ------------------------------------------------------------------------------------


STEADY_STEPS = SAMPLE_SWEEPS + 2
"""After so many layers that stay in the page cache are no longer planned and looked up ahead."""


def decoding(store: Path, steps: int, **settings: Any) -> Cache:
    made = Cache(store, **settings)
    made.step(TOKENS)
    for _ in range(steps):
        made.step()
    return made


@pytest.fixture(params=[1, STEADY_STEPS], ids=["new", "steady"])
def steps(request: pytest.FixtureRequest) -> int:
    """Of one token, that came before the test."""
    return int(request.param)


@pytest.fixture
def cache(tmp_path: Path, steps: int) -> Iterator[Cache]:
    made = decoding(tmp_path / "kv.store", steps)
    yield made
    made.close()


@pytest.fixture
def copied(tmp_path: Path, steps: int) -> Iterator[Cache]:
    """The same, that reads all it attends to."""
    made = decoding(tmp_path / "copied.store", steps, in_place=False)
    yield made
    made.close()


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[Extent]:
    """Extents that a store was asked for what lies where in the page cache."""
    plain, asked = Store.in_place, []

    def in_place(self: Store, extent: Extent, offset: int, size_bytes: int) -> InPlace | None:
        asked.append(extent)
        return plain(self, extent, offset, size_bytes)

    monkeypatch.setattr(Store, "in_place", in_place)
    return asked


def extents(cache: Cache) -> list[Extent]:
    return [
        segment.extent
        for layer in cache.pipeline._layers.values()
        for half in layer.halves
        for segment in half.unit.segments
    ]


def test_steps_copy_nothing_that_is_cached(cache: Cache, copied: Cache) -> None:
    before, reads = cache.pipeline.transfers(), cache.engine.counters().read_ops
    seen = cache.step()
    cache.engine.drain()
    after = cache.pipeline.transfers()
    assert after.in_place_read_bytes - before.in_place_read_bytes == KV_BYTES
    assert after.page_cache_read_bytes - before.page_cache_read_bytes == KV_BYTES
    assert cache.engine.counters().read_ops == reads
    assert torch.equal(copied.step(), seen)
    assert copied.pipeline.transfers().in_place_read_bytes == 0
    assert copied.engine.counters().read_bytes >= KV_BYTES


def attending(cache: Cache, rows: int = 1) -> torch.Tensor:
    """A step as `Cache.step`, with attention over tiles, of `rows` new tokens."""
    seen = []
    for layer in range(LAYERS):
        generator = torch.Generator().manual_seed(100 + layer)
        shape = (cache.batch, HEADS, rows, DIM)
        new = [torch.randn(shape, generator=generator) for _ in range(2)]
        asked = torch.randn(cache.batch, 2 * HEADS, rows, DIM, generator=generator)
        query = AttentionQuery(query=asked, past=cache.pipeline.tokens(layer), scaling=DIM**-0.5)
        seen.append(cache.pipeline.offer(layer, *new).attend(query))
    return torch.stack(seen)


def test_what_lies_side_by_side_is_attended_to_as_one(
    cache: Cache, copied: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, held = InPlace.hold, []

    def hold(self: InPlace) -> memoryview | None:
        held.append(self.size_bytes)
        return plain(self)

    monkeypatch.setattr(InPlace, "hold", hold)
    assert torch.equal(attending(cache), attending(copied))
    assert held == [UNIT_BYTES] * 2 * LAYERS, "slots have 64 KiB"
    # Many rows go through groups, and these are not larger than slots. Some rows need scratch
    # memory for each token at hand.
    for rows in (8, 40):
        held.clear()
        assert torch.equal(attending(cache, rows=rows), attending(copied, rows=rows))
        assert sum(held) == KV_BYTES
        assert max(held) <= 64 * KIB


def test_of_what_is_cached_in_part_the_rest_is_read(
    cache: Cache, copied: Cache, steps: int
) -> None:
    second = extents(cache)[2]
    cache.store._drop(second)
    with Arena(64 * KIB) as arena:
        cache.store.read(second, 256 * KIB, arena.address, 64 * KIB).wait()
    if steps == 1:  # else nobody looked yet
        cache.pipeline._sweep().cancel()
    before, reads = cache.pipeline.transfers(), cache.engine.counters().read_bytes
    assert torch.equal(attending(cache), attending(copied))
    cache.engine.drain()
    after = cache.pipeline.transfers()
    assert 0 < cache.engine.counters().read_bytes - reads <= UNIT_BYTES
    assert after.page_cache_read_bytes - before.page_cache_read_bytes == KV_BYTES
    assert torch.equal(attending(cache), attending(copied))


@pytest.mark.parametrize("steps", [STEADY_STEPS], indirect=True)
def test_layers_that_stay_are_not_looked_up_ahead(
    cache: Cache, copied: Cache, looked_up: list[Extent]
) -> None:
    before = cache.pipeline.transfers()
    for _ in range(2):
        assert torch.equal(attending(cache), attending(copied))
    assert not looked_up
    after = cache.pipeline.transfers()
    assert after.in_place_read_bytes - before.in_place_read_bytes == 2 * KV_BYTES


@pytest.mark.parametrize("steps", [STEADY_STEPS], indirect=True)
def test_layers_that_grow_are_looked_up_anew(
    cache: Cache, copied: Cache, looked_up: list[Extent]
) -> None:
    """And once more when a step began with their last tile unfilled."""
    layer = cache.pipeline._layers[0]
    stored = layer.stored_tiles
    while layer.stored_tiles == stored:
        assert not looked_up
        assert torch.equal(cache.step(), copied.step())
    assert set(looked_up) <= set(extents(cache))
    before = cache.pipeline.transfers()
    for both in (Cache.step, attending):
        assert torch.equal(both(cache), both(copied))
    assert set(looked_up) == set(extents(cache))
    after = cache.pipeline.transfers()
    assert after.in_place_read_bytes - before.in_place_read_bytes > 2 * KV_BYTES


@pytest.mark.parametrize("steps", [STEADY_STEPS], indirect=True)
def test_layers_that_shrink_are_looked_up_anew(
    cache: Cache, copied: Cache, looked_up: list[Extent]
) -> None:
    for both in (cache, copied):
        for layer, there in both.pipeline._layers.items():
            both.pipeline.crop(layer, there.rows)
    assert torch.equal(attending(cache), attending(copied))
    assert set(looked_up) == set(extents(cache))


@pytest.mark.parametrize("steps", [STEADY_STEPS], indirect=True)
def test_a_layer_that_goes_is_looked_up_until_it_stays(
    cache: Cache, copied: Cache, looked_up: list[Extent]
) -> None:
    gone = extents(cache)[0]
    cache.store._drop(gone)
    reads = cache.engine.counters().read_bytes
    assert torch.equal(attending(cache), attending(copied))
    cache.engine.drain()
    assert 0 < cache.engine.counters().read_bytes - reads <= UNIT_BYTES
    assert set(looked_up) == set(extents(cache)), "what was expected after it, too"
    for _ in range(SAMPLE_SWEEPS - 1):
        looked_up.clear()
        assert torch.equal(attending(cache), attending(copied))
        assert gone in looked_up
        assert extents(cache)[-1] not in looked_up
    attending(cache)
    attending(copied)
    looked_up.clear()
    assert torch.equal(attending(cache), attending(copied))
    assert not looked_up


@pytest.mark.parametrize("steps", [STEADY_STEPS], indirect=True)
def test_what_goes_with_a_layer_is_read_ahead(cache: Cache, copied: Cache) -> None:
    """Not only when its turn comes: the first that is missing tells."""
    for extent in extents(cache):
        cache.store._drop(extent)
    sweep = cache.pipeline._sweep()
    for _ in sweep.take(0, any_size=True):
        pass
    assert isinstance(sweep._visits[0].coming[0], _Read)
    sweep.cancel()
    assert torch.equal(attending(cache), attending(copied))


@pytest.mark.parametrize("goes", range(8))
def test_layers_that_stay_in_several_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes: int
) -> None:
    """In the middle of one the pages are not there any more."""
    monkeypatch.setattr(read_ahead, "_TOGETHER_BYTES", UNIT_BYTES // 4)
    caches = [
        decoding(tmp_path / f"{name}.store", STEADY_STEPS, in_place=name == "kv")
        for name in ("kv", "copied")
    ]
    plain, held = InPlace.hold, 0

    def hold(self: InPlace) -> memoryview | None:
        nonlocal held
        held += 1
        return None if held == goes + 1 else plain(self)

    assert torch.equal(attending(caches[0]), attending(caches[1]))
    monkeypatch.setattr(InPlace, "hold", hold)
    for _ in range(2):
        assert torch.equal(attending(caches[0]), attending(caches[1]))
    assert held > 2 * goes
    for made in caches:
        made.close()


def test_pages_that_went_after_their_turn_came_are_read(cache: Cache, copied: Cache) -> None:
    """The read-ahead has passed into the next step, and holds nothing yet."""
    coming = [some for visit in cache.pipeline._sweep()._visits for some in visit.coming]
    assert coming
    assert all(isinstance(some, _Resident) for some in coming)
    for extent in extents(cache):
        cache.store._drop(extent)
    before = cache.pipeline.transfers()
    assert torch.equal(cache.step(), copied.step())
    after = cache.pipeline.transfers()
    assert after.page_cache_read_bytes - before.page_cache_read_bytes >= KV_BYTES
    # Read once, it is cached again: the step after takes it where it lies.
    assert torch.equal(cache.step(), copied.step())
    last = cache.pipeline.transfers()
    assert last.in_place_read_bytes - after.in_place_read_bytes >= KV_BYTES * 2 // 3


def test_the_farthest_read_ahead_gives_its_slot_up(cache: Cache, copied: Cache) -> None:
    """Pages of a layer go after its turn came, when what is read for the next has all slots."""
    sweep = cache.pipeline._sweep()
    sweep.cancel()
    first, *others = extents(cache)
    for extent in others:
        cache.store._drop(extent)
    sweep._enter(0)
    sweep.advance()
    assert sweep._slots.free_count == 0
    assert isinstance(sweep._visits[0].coming[0], _Resident)
    cache.store._drop(first)
    assert torch.equal(cache.step(), copied.step())
    assert torch.equal(cache.step(), copied.step())


@pytest.mark.parametrize("goes", range(3))
def test_a_tile_larger_than_what_is_handed_out_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes: int
) -> None:
    """It comes sequence by sequence. That its pages go meanwhile has none of them come twice, which
    attention would count twice."""
    monkeypatch.setattr(Cache, "batch", 4)
    monkeypatch.setattr(read_ahead, "_TOGETHER_BYTES", 16 * KIB)
    caches = [
        Cache(tmp_path / "kv.store", in_place=True),
        Cache(tmp_path / "copied.store", in_place=False),
    ]
    for made in caches:
        made.step(256)
        made.step()
    plain, asked = InPlace.hold, 0

    def hold(self: InPlace) -> memoryview | None:
        nonlocal asked
        asked += 1
        return None if asked == goes + 1 else plain(self)

    monkeypatch.setattr(InPlace, "hold", hold)
    assert torch.equal(attending(caches[0]), attending(caches[1]))
    assert asked > goes
    for made in caches:
        made.close()


@pytest.mark.parametrize("step", [Cache.step, attending])
def test_damage_in_the_page_cache_is_read_past(
    tmp_path: Path,
    copied: Cache,
    monkeypatch: pytest.MonkeyPatch,
    step: Callable[[Cache], torch.Tensor],
    steps: int,
) -> None:
    """The cached copy differs from the drive's, which is sound."""
    cache = decoding(tmp_path / "kv.store", steps, checksums="all")
    plain, struck = InPlace.hold, 0

    def damaged(self: InPlace) -> memoryview | None:
        nonlocal struck
        there = plain(self)
        if there is None or struck:
            return there
        struck += 1
        copy = bytearray(there)
        copy[BLOCK_BYTES] ^= 1
        return memoryview(copy)

    monkeypatch.setattr(InPlace, "hold", damaged)
    try:
        assert torch.equal(step(cache), step(copied))
        totals = cache.pipeline.checksums.totals()
        assert (totals.mismatches, totals.healed_reads, struck) == (1, 1, 1)
        assert torch.equal(step(cache), step(copied))
    finally:
        cache.close()


def test_our_own_mapped_pages_can_still_go(cache: Cache) -> None:
    """Mapped pages of others are not to be had; those of our store are, as if they were not."""
    cache.step()
    mapped = cache.store.mapped_bytes
    assert KV_BYTES <= mapped < 2 * KV_BYTES
    pages = FilePages(active_and_inactive=10 * KV_BYTES, mapped=2 * KV_BYTES + mapped)
    assert pages.without(mapped).reclaimable(KV_BYTES) == 8 * KV_BYTES
    assert pages.reclaimable(KV_BYTES) < 8 * KV_BYTES


def test_the_probe_counts_them_as_ours() -> None:
    probe = MemoryProbe(reserve_bytes=0)
    plain = probe.read(OwnMemory()).available_bytes
    assert probe.read(OwnMemory(mapped_bytes=1 << 60)).available_bytes > plain


def test_it_can_be_left_off() -> None:
    assert EngineConfig().in_place
    assert not EngineConfig.from_mapping({"in_place": False}).in_place
