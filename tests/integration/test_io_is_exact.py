"""I/O is counted, not only results: what a decode step reads, writes and keeps cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dualblade import DualBladeCache, EngineConfig
from dualblade.host.process import process_io
from dualblade.units import KIB, MIB
from tests.integration.tiny_models import tiny_model
from tests.stepping import take_turn

CacheOn = Callable[..., DualBladeCache]
LAYERS, HEADS, DIM = 3, 2, 16
TILE_BYTES = HEADS * 64 * DIM * 4
CONTEXT = 2000


def rows(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(2)]
    return made[0], made[1]


def device_bytes(cache: DualBladeCache) -> int:
    """Bytes read from the device so far, with what is read ahead landed."""
    cache._pipeline._engine.drain()
    return process_io().read_bytes


def step(cache: DualBladeCache, tokens: int = 1) -> None:
    for layer in range(LAYERS):
        take_turn(cache, *rows(tokens, layer), layer)


@pytest.fixture(params=["exact", "tiles"], autouse=True)
def cache_on(request: pytest.FixtureRequest, tmp_path: Path) -> CacheOn:
    """A cache with either way into attention."""

    def opened(path: str, **options: Any) -> DualBladeCache:
        settings = {"memory_budget": "16MiB", "store": tmp_path / "kv.store", **options}
        return DualBladeCache.for_model(
            tiny_model(), path=path, attention=request.param, **settings
        )

    return opened


def filled(cache_on: CacheOn, path: str, **options: Any) -> DualBladeCache:
    cache = cache_on(path, **options)
    for layer in range(LAYERS):
        cache.append(*rows(CONTEXT, layer), layer)
    return cache


def test_a_direct_step_reads_each_stored_byte_once_and_caches_nothing(cache_on: CacheOn) -> None:
    with filled(cache_on, "direct") as cache:
        step(cache)
        stored = cache.stats().stored_bytes
        assert stored == 2 * LAYERS * (CONTEXT // 64) * TILE_BYTES
        for _ in range(4):
            before, asked = device_bytes(cache), cache.stats().io.direct_read_bytes
            step(cache)
            assert cache.stats().io.direct_read_bytes - asked == stored
            assert device_bytes(cache) - before == stored
            assert cache.stats().memory.page_cache_bytes == 0


def test_a_warm_page_cache_step_reads_nothing_from_the_device(cache_on: CacheOn) -> None:
    with filled(cache_on, "page-cache") as cache:
        step(cache)
        stored = cache.stats().stored_bytes
        for _ in range(3):
            before, asked = device_bytes(cache), cache.stats().io.page_cache_read_bytes
            step(cache)
            assert cache.stats().io.page_cache_read_bytes - asked == stored
            assert device_bytes(cache) == before


@pytest.mark.parametrize("budget_mib", [7, 8, 9, 64])
def test_a_dual_step_reads_the_planned_direct_bytes(cache_on: CacheOn, budget_mib: int) -> None:
    config = EngineConfig(staging_bytes=512 * KIB)
    budget = budget_mib * MIB
    with filled(cache_on, "dual", memory_budget=budget, config=config) as cache:
        step(cache)
        stats = cache.stats()
        direct = sum(unit.path == "direct" for unit in stats.plan)
        unit_bytes = (CONTEXT // 64) * TILE_BYTES
        for _ in range(3):
            before = device_bytes(cache)
            step(cache)
            assert device_bytes(cache) - before == direct * unit_bytes
            memory = cache.stats().memory
            assert memory.used_bytes <= budget
            assert memory.page_cache_bytes == (2 * LAYERS - direct) * unit_bytes
        if budget_mib == 64:
            assert direct == 0


def test_each_tile_is_written_once(cache_on: CacheOn) -> None:
    with cache_on("direct") as cache:
        for tokens in (63, 1, 1, 63, 200, 128, 1):
            step(cache, tokens)
        tiles = (63 + 1 + 1 + 63 + 200 + 128 + 1) // 64
        assert cache.stats().io.written_bytes == 2 * LAYERS * tiles * TILE_BYTES


def test_reordering_beams_moves_no_stored_byte(cache_on: CacheOn) -> None:
    with cache_on("direct") as cache:
        for layer in range(LAYERS):
            pair = [tensor.expand(4, -1, -1, -1) for tensor in rows(640, layer)]
            cache.append(pair[0], pair[1], layer)
        written = cache.stats().io.written_bytes
        for _ in range(10):
            cache.reorder_cache(torch.tensor([1, 1, 3, 0]))
        stats = cache.stats()
        assert stats.io.written_bytes == written
        assert stats.io.direct_read_bytes == 0
        for layer in range(LAYERS):
            pair = [tensor.expand(4, -1, -1, -1) for tensor in rows(1, layer)]
            take_turn(cache, pair[0], pair[1], layer)
        assert cache.stats().io.dead_read_bytes > 0


def test_a_crop_into_a_stored_tile_reads_that_tile_alone(cache_on: CacheOn) -> None:
    with filled(cache_on, "direct") as cache:
        cache.crop(-(CONTEXT % 64 + 10))
        assert cache.stats().io.direct_read_bytes == 2 * LAYERS * TILE_BYTES


def test_candidates_that_are_taken_back_meet_no_stored_tile(cache_on: CacheOn) -> None:
    with filled(cache_on, "direct") as cache:
        cache.activate_past_recording()
        step(cache, 1)
        for _ in range(60):
            step(cache, 6)
            before = cache.stats().io.written_bytes
            cache.crop(-4)
            assert cache.stats().io.written_bytes == before
        tokens = cache.get_seq_length()
        whole = (tokens - 64) // 64
        assert cache.stats().io.written_bytes <= 2 * LAYERS * (whole + 1) * TILE_BYTES


def test_demotion_as_the_context_grows_moves_only_dirty_bytes(cache_on: CacheOn) -> None:
    config = EngineConfig(staging_bytes=512 * KIB)
    with cache_on("dual", memory_budget="8MiB", config=config) as cache:
        step(cache, 500)
        assert {unit.path for unit in cache.stats().plan} == {"page-cache"}
        while cache.stats().io.demotions == 0:
            step(cache, 500)
            memory = cache.stats().memory
            assert memory.used_bytes <= 8 * MIB
        stats = cache.stats()
        assert {unit.path for unit in stats.plan} == {"page-cache", "direct"}
        assert stats.io.promotions == 0
        assert stats.io.written_bytes == stats.stored_bytes, "a tile was written twice"
        assert stats.memory.page_cache_bytes <= stats.memory.page_cache_planned_bytes
