"""Moving units costs no I/O of its own, and what moved is read through the other door.

The memory that there is is told by the test; pages, reads and writes are the kernel's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dualblade.config import EngineConfig
from dualblade.config import Path as KVPath
from dualblade.errors import Closed, DeviceError
from dualblade.hf.opening import budget_of
from dualblade.host.memory import MemoryReading, OwnMemory
from dualblade.host.page_cache import cached_bytes
from dualblade.host.pressure import Pressure
from dualblade.host.process import ProcessIO, process_io
from dualblade.io import open_engine
from dualblade.pipeline import KVPipeline, KVSettings
from dualblade.pipeline.hits import HitSweep
from dualblade.pipeline.memory_watch import MemorySource
from dualblade.store import Door, Store
from dualblade.store.format import DATA_OFFSET
from dualblade.store.pages import CachedPages
from dualblade.units import KIB, MIB, parse_size

LAYERS, HEADS, DIM, TOKENS = 6, 2, 32, 4096
UNIT_BYTES = HEADS * DIM * TOKENS * 4
KV_BYTES = 2 * LAYERS * UNIT_BYTES


class Memory:
    """What there is, and the time: a second passes at each look."""

    def __init__(self) -> None:
        self.there_bytes = 256 * MIB
        self.reserve_bytes = 0
        self.seconds = 0.0
        self.tick_seconds = 1.0
        self.stalled_seconds = 0.0
        self.told: list[OwnMemory] = []

    def read(self, own: OwnMemory) -> MemoryReading:
        self.told.append(own)
        return MemoryReading(
            available_bytes=max(0, self.there_bytes - own.fixed_bytes),
            source="test",
            machine_available_bytes=self.there_bytes,
            limits=(),
            own=own,
            reserve_bytes=self.reserve_bytes,
            machine_pressure=Pressure(
                some_seconds=self.stalled_seconds, full_seconds=0.0, some_percent=0.0
            ),
        )

    def clock(self) -> float:
        self.seconds += self.tick_seconds
        return self.seconds


class Cache:
    """A pipeline, and one step over all its layers. Reads hold as many slots in each step: with
    more than in the last, what the step reads ahead for the next is more than was read for it."""

    layers, heads, dim, batch = LAYERS, HEADS, DIM, 1
    asked_bytes: int | None = None
    tokens_max: int | None = TOKENS + 512

    def __init__(self, store_path: Path, **settings: Any) -> None:
        self.memory = Memory()
        self.engine = open_engine("auto")
        self.store = Store.open(store_path, self.engine, capacity_bytes=256 * MIB)
        kv = KVSettings(
            path=KVPath.DUAL,
            budget_bytes=256 * MIB,
            layer_count=self.layers,
            tokens_max=self.tokens_max,
            device=torch.device("cpu"),
            config=EngineConfig(staging_bytes=512 * KIB, pipeline="layers", **settings),
            memory=MemorySource(
                asked_bytes=self.asked_bytes, read=self.memory.read, clock=self.memory.clock
            ),
        )
        self.pipeline = KVPipeline(self.store, self.engine, kv)

    def step(self, tokens: int = 1) -> torch.Tensor:
        """The sum over all keys and values: what a step saw."""
        seen = []
        for layer in range(self.layers):
            generator = torch.Generator().manual_seed(layer)
            shape = (self.batch, self.heads, tokens, self.dim)
            rows = [torch.randn(shape, generator=generator) for _ in range(2)]
            seen += [tensor.double().sum() for tensor in self.pipeline.update(layer, *rows)]
        return torch.stack(seen)

    def settle(self) -> ProcessIO:
        self.engine.drain()
        return process_io()

    def evict(self) -> None:
        """As another program's memory does to all pages of the store."""
        for layer in self.pipeline._layers.values():
            for half in layer.halves:
                for segment in half.unit.segments:
                    self.engine.drain()
                    self.store._drop(segment.extent)

    def close(self) -> None:
        self.pipeline.close()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    made = Cache(tmp_path / "kv.store")
    made.step(TOKENS)
    made.step()
    yield made
    made.close()


def paths(cache: Cache) -> set[str]:
    return {unit.path for unit in cache.pipeline.placements()}


def test_demotion_reads_and_writes_nothing_that_is_clean(cache: Cache) -> None:
    assert paths(cache) == {"page-cache"}
    assert cache.pipeline.memory_use().page_cache_bytes >= KV_BYTES
    cache.memory.there_bytes = 0
    before, io = cache.settle(), cache.pipeline.transfers()
    cache.pipeline.append(0, *(torch.zeros(1, HEADS, 1, DIM),) * 2)  # the boundary alone
    after = cache.settle()
    assert paths(cache) == {"direct"}
    assert cache.pipeline.transfers().demotions == 2 * LAYERS
    assert after.write_bytes == before.write_bytes, "a clean page was written"
    read_bytes = after.read_bytes - before.read_bytes
    assert read_bytes < UNIT_BYTES, "a unit was read; less may be code that runs the first time"
    assert cache.pipeline.transfers().written_bytes == io.written_bytes
    assert cache.pipeline.memory_use().page_cache_bytes == 0


class Stated(Cache):
    """Under a budget that was asked for."""

    asked_bytes = 64 * MIB


def test_a_stated_budget_is_a_limit_that_less_memory_lowers(tmp_path: Path) -> None:
    cache = Stated(tmp_path / "kv.store")
    cache.step(TOKENS)
    cache.step()
    assert cache.pipeline.memory_use().budget_bytes == 64 * MIB  # of 256 that there are
    assert paths(cache) == {"page-cache"}
    cache.memory.there_bytes = 0
    cache.step()
    assert paths(cache) == {"direct"}
    assert cache.pipeline.memory_use().page_cache_bytes == 0
    cache.close()


@pytest.mark.parametrize("asked", ["auto", "64MiB"])
def test_every_budget_asks_what_memory_there_is(asked: str) -> None:
    budget, source = budget_of(None if asked == "auto" else parse_size(asked), EngineConfig())
    assert source.read is not None
    found = source.read(OwnMemory())
    if asked == "auto":
        assert source.asked_bytes is None
        assert found.reserve_bytes > 0
    else:
        assert source.asked_bytes == budget == 64 * MIB
        assert found.reserve_bytes == 0, "who states a budget has thought of the others"


def test_units_go_while_the_machine_stalls_for_memory(cache: Cache) -> None:
    """Whatever is said to be free."""
    for _ in range(4):
        cache.memory.stalled_seconds += 100
        cache.step()
    assert "memory pressure" in {event.cause for event in cache.pipeline.events()}
    assert "direct" in paths(cache)


class Growing(Cache):
    """Nobody said how long the text will be."""

    tokens_max = None


def test_a_store_grows_to_three_times_the_kv_at_most(tmp_path: Path) -> None:
    cache = Growing(tmp_path / "kv.store")
    for _ in range(40):
        cache.step(TOKENS // 8)
        units = [half.unit for layer in cache.pipeline._layers.values() for half in layer.halves]
        taken = sum(segment.extent.size_bytes for unit in units for segment in unit.segments)
        assert taken <= max(3 * cache.pipeline.stored_bytes, 4 * MIB * LAYERS)
    assert all(1 < len(unit.segments) < 6 for unit in units)
    cache.close()


def test_a_plan_is_for_little_more_than_there_is(tmp_path: Path) -> None:
    """What is planned for and not there yet is memory that waits."""
    cache = Growing(tmp_path / "kv.store")
    tokens = 0
    for count in (TOKENS // 4, 1, TOKENS // 4, TOKENS):
        cache.step(count)
        tokens += count
        rows = cache.pipeline._layers[0].rows
        planned = sum(unit.bytes for unit in cache.pipeline.placements())
        ahead = planned // (2 * LAYERS * HEADS * DIM * 4) - tokens
        assert -rows < ahead <= max(rows, tokens // 32)
    cache.close()


def test_demotion_writes_back_what_is_dirty(tmp_path: Path) -> None:
    """Dirty pages exist only while a write is on its way; put some there behind its back."""
    with open_engine("auto") as engine, Store.open(tmp_path / "kv.store", engine) as store:
        extent = store.allocate(4 * MIB, Door.PAGE_CACHE)
        fd, at = store._members.backings[0].buffered_fd, extent.range.offset
        content = bytes(range(256)) * (64 * KIB // 256)
        with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as file:
            file.seek(at + MIB)
            file.write(content)
        store.move(extent, Door.DIRECT)
        assert store.cached_bytes(extent) == 0
        assert store.counters.direct_write_bytes == store.counters.page_cache_write_bytes == 0
        with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as file:
            file.seek(at + MIB)
            assert file.read(len(content)) == content


def test_promotion_moves_nothing_and_the_next_sweep_fills_the_cache(cache: Cache) -> None:
    cache.memory.there_bytes = 0
    earlier = cache.step()
    want = cache.step()
    of_a_step = want - earlier  # each takes in the same rows
    cache.memory.there_bytes = 256 * MIB
    while paths(cache) != {"page-cache"}:
        promotions = cache.pipeline.transfers().promotions
        before = cache.settle()
        cache.pipeline.append(0, *(torch.zeros(1, HEADS, 1, DIM),) * 2)
        if cache.pipeline.transfers().promotions > promotions:
            assert cache.settle() == before, "a promotion moved data"
        for layer in range(1, LAYERS):
            cache.pipeline.append(layer, *(torch.zeros(1, HEADS, 1, DIM),) * 2)
    assert {event.cause for event in cache.pipeline.events()} == {"budget fell", "room rose"}
    cache.step()  # cold
    before, io = cache.settle(), cache.pipeline.transfers()
    got = cache.step()
    after = cache.pipeline.transfers()
    assert cache.settle().read_bytes == before.read_bytes
    assert after.direct_read_bytes == io.direct_read_bytes
    assert after.page_cache_read_bytes > io.page_cache_read_bytes
    torch.testing.assert_close(got, want + 2 * of_a_step)


def test_part_of_the_memory_keeps_part_of_the_units(cache: Cache) -> None:
    fixed = cache.pipeline.memory_use().used_bytes - cache.pipeline.memory_use().page_cache_bytes
    cache.memory.there_bytes = fixed + 8 * UNIT_BYTES
    cache.step()
    use = cache.pipeline.memory_use()
    assert paths(cache) == {"page-cache", "direct"}
    assert use.used_bytes <= use.budget_bytes
    assert use.page_cache_bytes <= use.page_cache_planned_bytes
    event = cache.pipeline.events()[-1]
    assert event.cause == "budget fell"
    assert event.moved_bytes == event.demoted_units * UNIT_BYTES
    cache.step()
    before, io = cache.settle(), cache.pipeline.transfers()
    cache.step()
    direct = cache.pipeline.transfers().direct_read_bytes - io.direct_read_bytes
    assert direct == event.demoted_units * UNIT_BYTES
    assert cache.settle().read_bytes - before.read_bytes == direct, "a cached unit was read"


class LargeUnits(Cache):
    """Four units of 16 MiB, tiles of 256 KiB: a unit may be cut after every 4 MiB."""

    layers, heads, dim = 2, 8, 128
    unit_bytes = 8 * 128 * TOKENS * 4


def stored_in_cache(cache: Cache) -> int:
    """Of what is stored, what the plan has in the page cache."""
    unit_bytes = cache.pipeline.stored_bytes // (2 * cache.layers)
    return sum(min(part.cached_bytes, unit_bytes) for part in cache.pipeline.placements())


def read_by_a_step(cache: Cache) -> tuple[int, int, int]:
    """Bytes of one step: read directly, through the page cache, and by the device."""
    before, io = cache.settle(), cache.pipeline.transfers()
    cache.step()
    after, now = cache.pipeline.transfers(), cache.settle()
    return (
        after.direct_read_bytes - io.direct_read_bytes,
        after.page_cache_read_bytes - io.page_cache_read_bytes,
        now.read_bytes - before.read_bytes,
    )


def test_what_is_left_of_the_memory_holds_the_beginning_of_a_unit(tmp_path: Path) -> None:
    """As memory falls and rises, units are cut and joined; each step reads every tile once, what is
    cached from memory, and sees the same as with all in the page cache."""
    cache = LargeUnits(tmp_path / "kv.store")
    cache.step(TOKENS)
    cache.step()
    whole = LargeUnits(tmp_path / "other.store")
    whole.step(TOKENS)
    whole.step()
    for there in (64, 60, 44, 30, 52, 200, 41, 256):
        cache.memory.there_bytes = there * MIB
        for _ in range(12):  # up it goes by eight units at most, a second and three steps apart
            assert torch.equal(cache.step(), whole.step())
        use, parts = cache.pipeline.memory_use(), cache.pipeline.placements()
        kv, fits = cache.pipeline.stored_bytes, stored_in_cache(cache)
        assert use.used_bytes <= use.budget_bytes
        assert use.page_cache_planned_bytes == sum(part.cached_bytes for part in parts)
        assert sum(part.path == "dual" for part in parts) <= 1
        assert read_by_a_step(cache) == (kv - fits, fits, kv - fits)
        whole.step()
    events = cache.pipeline.events()
    assert {event.cause for event in events} == {"budget fell", "room rose"}
    assert any(event.moved_bytes < LargeUnits.unit_bytes for event in events), "no part moved"
    for one in (cache, whole):
        one.close()


def test_a_prompt_is_written_through_both_doors_of_a_unit_that_is_cut(tmp_path: Path) -> None:
    cache, kv = LargeUnits(tmp_path / "kv.store"), 4 * LargeUnits.unit_bytes
    cache.memory.there_bytes = 72 * MIB
    cache.step(TOKENS)
    io, parts = cache.pipeline.transfers(), cache.pipeline.placements()
    fits = stored_in_cache(cache)
    assert [part.path for part in parts if part.path == "dual"] == ["dual"]
    assert (io.page_cache_write_bytes, io.direct_write_bytes) == (fits, kv - fits)
    assert io.demotions == 0
    cache.step()
    assert read_by_a_step(cache) == (kv - fits, fits, kv - fits)
    assert cache.pipeline.memory_use().page_cache_bytes == fits
    cache.close()


@pytest.mark.parametrize("percent", [0, 25, 100])
def test_a_fixed_split_holds_whatever_memory_there_is(tmp_path: Path, percent: int) -> None:
    cache = Cache(tmp_path / "kv.store", cache_percent=percent)
    cache.memory.there_bytes = 8 * MIB
    cache.step(TOKENS // 2)
    cache.step(TOKENS // 2)  # past the first horizon: the sizes are new, the split is not
    cache.memory.there_bytes = 256 * MIB
    cached = 2 * LAYERS * percent // 100
    for _ in range(4):
        io = cache.pipeline.transfers()
        cache.step()
        after = cache.pipeline.transfers()
        through = after.page_cache_read_bytes - io.page_cache_read_bytes
        assert through == cached * UNIT_BYTES
        assert after.direct_read_bytes - io.direct_read_bytes == KV_BYTES - through
    assert cache.pipeline.events() == ()
    units = cache.pipeline.placements()
    assert sum(unit.path == "page-cache" for unit in units) == cached
    assert all(f"{percent} %" in unit.reason for unit in units)
    planned = sum(unit.bytes for unit in units if unit.path == "page-cache")
    assert cache.pipeline.memory_use().page_cache_planned_bytes == planned
    cache.close()


def test_evicted_pages_are_noticed_and_given_up(tmp_path: Path) -> None:
    # Hits are counted as the read-ahead comes to a layer: it may not come to all but one of them
    # before the pages go.
    cache = Cache(tmp_path / "kv.store", lookahead=1)
    cache.step(TOKENS)
    for _ in range(4):
        cache.step()
    assert cache.pipeline.events() == ()
    for _ in range(6):
        cache.evict()
        cache.step()
    assert "cached pages were evicted" in {event.cause for event in cache.pipeline.events()}
    cache.close()


def test_a_prompt_after_a_squeeze_begins_with_what_was_learned(tmp_path: Path) -> None:
    """And is not judged by the steps of the prompt before it, however fast those were."""
    cache = Cache(tmp_path / "kv.store", lookahead=1)
    cache.step(TOKENS)
    for _ in range(10):
        cache.evict()
        cache.step()
    assert cache.pipeline.events()
    cache.memory.tick_seconds = 0.0
    for _ in range(6):
        cache.step()
    assert cache.pipeline._placements._steps_since > 2
    cache.pipeline.reset()
    cache.memory.seconds += 1000.0  # what was found overstated may be tried again by now
    cache.step(TOKENS)
    assert paths(cache) >= {"direct"}
    cache.close()


def test_gone_pages_are_a_reason_to_look_at_the_memory_again(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading of before does not know who took them; what is gone is mapped no more."""
    cache.step()
    cache.memory.tick_seconds = 0.0
    cache.step()  # whatever is due since the last look
    asked = len(cache.memory.told)
    cache.step()
    assert len(cache.memory.told) == asked
    monkeypatch.setattr(cache.store, "page_cache_bytes", lambda: KIB)
    monkeypatch.setattr(HitSweep, "measured", 0.2)
    cache.step()
    assert len(cache.memory.told) == asked + 1
    assert cache.memory.told[-1].mapped_bytes == KIB
    assert cache.memory.told[-2].mapped_bytes > KV_BYTES // 2


def test_below_the_fixed_part_all_goes_direct_and_one_warning_says_so(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.memory.reserve_bytes = 4 * MIB  # what others are left even when there is nothing
    with caplog.at_level(logging.INFO, logger="dualblade.residency"):
        for there in (MIB, 256 * MIB, 0):
            cache.memory.there_bytes = there
            for _ in range(8):
                cache.step()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "below the" in warnings[0].getMessage()
    assert len(caplog.records) - 1 == len(cache.pipeline.events())
    assert paths(cache) == {"direct"}


def test_a_prompt_that_does_not_fit_is_written_directly_from_the_start(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "kv.store")
    cache.memory.there_bytes = 16 * MIB
    cache.step(TOKENS)
    io = cache.pipeline.transfers()
    assert cache.pipeline.events() == ()
    assert io.demotions == 0
    assert io.written_bytes == KV_BYTES
    assert io.page_cache_write_bytes > 0
    assert io.direct_write_bytes > 0
    cache.close()


def test_dirty_pages_are_bounded_by_staging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the prompt: a slot is free again when its bytes are written back."""
    cache = Cache(tmp_path / "kv.store")
    dirty: list[int] = []
    write = Store.write

    def watched(store: Store, *args: Any) -> Any:
        use = cached_bytes(
            store._members.backings[0].buffered_fd, DATA_OFFSET, store._end - DATA_OFFSET
        )
        if use.dirty_bytes is None:
            pytest.skip("this kernel does not tell which pages are dirty (Linux 6.5)")
        dirty.append(use.dirty_bytes + (use.writeback_bytes or 0))
        return write(store, *args)

    monkeypatch.setattr(Store, "write", watched)
    cache.step(TOKENS)
    machinery = cache.pipeline._machinery
    assert machinery is not None
    assert 0 < max(dirty) <= machinery.shape.total_bytes < KV_BYTES
    assert cache.pipeline.transfers().page_cache_write_bytes == KV_BYTES
    cache.close()


def test_a_writeback_that_fails_in_a_demotion_loses_the_content(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise DeviceError(errno=5, operation="sync", path="store", offset=0, size_bytes=MIB)

    monkeypatch.setattr(CachedPages, "write_back_and_drop", fail)
    cache.memory.there_bytes = 0
    with pytest.raises(DeviceError):
        cache.step()
    with pytest.raises(Closed, match="content is lost"):
        cache.step()
