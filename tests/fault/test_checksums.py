"""Silent corruption: stored bytes change without an error, on the drive or on the way.

Fault model, beyond `dualblade.testing.faulty`: a byte rots; half of a tile is old (a torn write); a
tile holds another tile's bytes (misdirected), or those that it held before it was written again
(lost); a cached page differs from the drive. With `all` none is attended to; with `sample` each is
found within 16 sweeps, or within 64 where it has been in memory for 16. What is sound raises
nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualblade import Closed, CorruptExtent, DualBladeCache, EngineConfig
from dualblade.io import Op
from dualblade.pipeline.checksums import SAMPLE_SWEEPS, STEADY_SWEEPS
from dualblade.testing import Fault, FaultyEngine
from dualblade.units import KIB, MIB
from tests.devices import loop_device, needs_root
from tests.integration.tiny_models import prompt, tiny_model
from tests.stepping import take_turn

LAYERS, HEADS, DIM = 3, 2, 16
TOKENS, ROWS = 2000, 64
TILES = TOKENS // ROWS
SLAB = HEADS * ROWS * DIM * 4
DOORS = ["direct", "page-cache"]


@pytest.fixture(params=["exact", "tiles"])
def attention(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def cache_on(store: Path | str | None, path: str, checksums: str, **options: Any) -> DualBladeCache:
    config = EngineConfig(staging_bytes=512 * KIB, checksums=checksums)  # type: ignore[arg-type]
    options = {"memory_budget": "16MiB", **options}
    return DualBladeCache.for_model(tiny_model(), store=store, path=path, config=config, **options)


def rows(tokens: int, seed: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(2)]
    return made[0], made[1]


def fill(cache: DualBladeCache, tokens: int = TOKENS, seed: int = 0) -> None:
    for layer in range(LAYERS):
        cache.append(*rows(tokens, seed + layer), layer)
    cache._pipeline._machinery.writes.drain()


def step(cache: DualBladeCache) -> torch.Tensor:
    return torch.stack([take_turn(cache, *rows(1, layer), layer) for layer in range(LAYERS)])


def place(cache: DualBladeCache, layer: int, tile: int) -> int:
    """Where a slab of values begins in the store (batch 1)."""
    (segment,) = cache._pipeline._layers[layer].values.unit.segments
    return segment.extent.range.offset + tile * SLAB


def rot(node: Path | str, offset: int, new: bytes | None = None) -> bytes:
    """Replace bytes (by default flip one) behind everybody's back; what was there."""
    with open(node, "r+b") as file:
        file.seek(offset)
        old = file.read(1 if new is None else len(new))
        file.seek(offset)
        file.write(bytes([old[0] ^ 0x04]) if new is None else new)
        file.flush()
        os.fsync(file.fileno())
        # The direct door reads past these pages, and the other one as the drive has them.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return old


@contextlib.contextmanager
def formatted_loop(folder: Path, block_bytes: int = 4096) -> Iterator[tuple[str, Path]]:
    """A formatted loop device and its image."""
    from dualblade.store.formatting import carry_out_format, plan_format

    image = folder / "image"
    with loop_device(image, 64 * MIB, block_bytes) as device:
        carry_out_format(plan_format(device))
        yield device, image


@pytest.mark.parametrize("path", DOORS)
@pytest.mark.parametrize(("layer", "tile"), [(0, 0), (1, 17), (2, TILES - 1)])
def test_a_rotten_byte_is_found_before_it_is_attended_to(
    tmp_path: Path, attention: str, path: str, layer: int, tile: int
) -> None:
    store = tmp_path / "kv.store"
    with cache_on(store, path, "all", attention=attention) as cache:
        fill(cache)
        at = place(cache, layer, tile)
        rot(store, at + SLAB - 1)
        for index in range(layer):
            take_turn(cache, *rows(1, index), index)
        with pytest.raises(
            CorruptExtent, match=f"layer {layer} values, tokens {tile * ROWS} "
        ) as e:
            take_turn(cache, *rows(1, layer), layer)
        error = e.value
        assert (error.operation, error.path, error.offset) == ("read", str(store), at)
        assert (error.size_bytes, error.block, error.retryable) == (SLAB, None, False)
        assert cache.stats().checksums.mismatches == 1
        assert cache.stats().checksums.healed_reads == 0
        with pytest.raises(Closed, match="CorruptExtent"):
            step(cache)


@pytest.mark.parametrize("path", DOORS)
@pytest.mark.parametrize("tile", [0, 13, TILES - 1])
def test_a_sample_finds_it_within_its_sweeps(tmp_path: Path, path: str, tile: int) -> None:
    store = tmp_path / "kv.store"
    with cache_on(store, path, "sample") as cache:
        fill(cache)
        step(cache)  # not the first of its turns
        at = place(cache, 1, tile)
        rot(store, at)
        with pytest.raises(CorruptExtent) as caught:
            for _ in range(SAMPLE_SWEEPS):
                step(cache)
        assert caught.value.offset == at


def test_a_sample_is_everything_once_in_sixteen_sweeps() -> None:
    with cache_on(None, "direct", "sample") as cache:
        fill(cache)
        per_sweep = []
        for _ in range(SAMPLE_SWEEPS):
            per_sweep.append(verified_by_step(cache))
        stored = cache.stats().stored_bytes
        assert sum(per_sweep) == stored == LAYERS * 2 * TILES * SLAB
        assert max(per_sweep) - min(per_sweep) <= LAYERS * 2 * SLAB, "steps do not cost alike"


def verified_by_step(cache: DualBladeCache) -> int:
    before = cache.stats().checksums.verified_bytes
    step(cache)
    return cache.stats().checksums.verified_bytes - before


def test_what_stays_in_memory_is_verified_in_sixteen_sweeps_then_in_sixty_four() -> None:
    with cache_on(None, "page-cache", "sample") as cache:
        fill(cache)
        stored = cache.stats().stored_bytes
        assert sum(verified_by_step(cache) for _ in range(SAMPLE_SWEEPS)) == stored
        assert sum(verified_by_step(cache) for _ in range(STEADY_SWEEPS)) == stored
        stored = cache.stats().stored_bytes  # a tile more in each unit
        for layer in cache._pipeline._layers.values():
            for half in layer.halves:
                for segment in half.unit.segments:
                    cache._pipeline._store._drop(segment.extent)
        assert sum(verified_by_step(cache) for _ in range(SAMPLE_SWEEPS)) == stored
        assert cache.stats().checksums.mismatches == 0


@pytest.mark.parametrize("tile", [0, 13, TILES - 1])
def test_a_page_that_changes_after_long_is_found(tmp_path: Path, tile: int) -> None:
    store = tmp_path / "kv.store"
    with cache_on(store, "page-cache", "sample") as cache:
        fill(cache)
        for _ in range(SAMPLE_SWEEPS):
            step(cache)
        with open(store, "r+b") as file:  # the page, and so in the end the drive
            byte = os.pread(file.fileno(), 1, place(cache, 1, tile))
            os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), place(cache, 1, tile))
        with pytest.raises(CorruptExtent) as caught:
            for _ in range(STEADY_SWEEPS):
                step(cache)
        assert caught.value.offset == place(cache, 1, tile)


@pytest.mark.parametrize(("mode", "part"), [("off", 0), ("all", 1)])
def test_what_is_made_and_verified_is_counted(mode: str, part: int) -> None:
    with cache_on(None, "direct", mode) as cache:
        fill(cache)
        for _ in range(3):
            step(cache)
        stats = cache.stats()
        assert stats.checksums.mode == mode
        assert stats.checksums.made_bytes == part * stats.stored_bytes
        assert stats.checksums.verified_bytes == part * 3 * stats.stored_bytes
        tables = LAYERS * TILES * 4 + part * LAYERS * 2 * TILES * 8
        assert stats.memory.table_bytes == tables


@pytest.mark.parametrize("fault", ["misdirected", "torn", "lost"])
@pytest.mark.parametrize("path", DOORS)
def test_sound_bytes_in_the_wrong_place_are_found(tmp_path: Path, path: str, fault: str) -> None:
    store = tmp_path / "kv.store"
    with cache_on(store, path, "all") as cache:
        fill(cache)
        at = place(cache, 1, 9)
        other = {"misdirected": place(cache, 1, 10), "torn": place(cache, 2, 9), "lost": at}[fault]
        with open(store, "rb") as file:
            old = os.pread(file.fileno(), SLAB, other)
        if fault == "lost":  # tiles 9 and on are taken back and stored again
            cache.crop(9 * ROWS - TOKENS)
            fill(cache, TOKENS - 9 * ROWS, seed=7)
        step(cache)
        rot(store, at, old[: SLAB // 2 if fault == "torn" else SLAB])
        with pytest.raises(CorruptExtent) as caught:
            step(cache)
        assert caught.value.offset == at


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layer=st.integers(0, LAYERS - 1),
    tile=st.integers(0, TILES - 1),
    byte=st.integers(0, SLAB - 1),
    path=st.sampled_from(DOORS),
)
def test_any_byte_of_any_tile(tmp_path: Path, layer: int, tile: int, byte: int, path: str) -> None:
    store = tmp_path / "kv.store"
    with cache_on(store, path, "all") as cache:
        fill(cache)
        at = place(cache, layer, tile)
        rot(store, at + byte)
        with pytest.raises(CorruptExtent) as caught:
            step(cache)
        assert caught.value.offset == at


@needs_root
@pytest.mark.parametrize("mode", ["all", "sample"])
@pytest.mark.parametrize("path", DOORS)
@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_on_a_device_the_block_is_told(
    tmp_path: Path, block_bytes: int, path: str, mode: str
) -> None:
    with (
        formatted_loop(tmp_path, block_bytes) as (device, _),
        cache_on(device, path, mode) as cache,
    ):
        fill(cache)
        at = place(cache, 2, 5)
        rot(device, at + 77)
        with pytest.raises(CorruptExtent, match=f"LBA {at // block_bytes}\\)") as caught:
            for _ in range(1 if mode == "all" else SAMPLE_SWEEPS):
                step(cache)
        assert caught.value.path == device
        assert (caught.value.offset, caught.value.block) == (at, at // block_bytes)


@needs_root
def test_a_cached_page_that_differs_from_the_drive_is_read_again(tmp_path: Path) -> None:
    with (
        formatted_loop(tmp_path) as (device, image),
        cache_on(device, "page-cache", "all") as cache,
        cache_on(None, "direct", "off") as sound,
    ):
        fill(cache)
        fill(sound)
        at = place(cache, 1, 9)
        old = rot(image, at)
        with open(device, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), 1, at) != old  # the page is wrong from here on
        rot(image, at, old)
        assert torch.equal(step(cache), step(sound))
        totals = cache.stats().checksums
        assert (totals.mismatches, totals.healed_reads) == (1, 1)


@pytest.mark.parametrize("path", DOORS)
def test_damage_on_the_way_is_healed_by_a_second_read(
    faulty: list[FaultyEngine], caplog: pytest.LogCaptureFixture, path: str
) -> None:
    with cache_on(None, path, "all") as cache, cache_on(None, path, "off") as sound:
        fill(cache)
        fill(sound)
        at = place(cache, 1, 9)
        reads = faulty[0].counters().read_ops
        faulty[0].inject(Fault(op=Op.READ, offsets=range(at, at + 1), errno=None, flipped_byte=5))
        assert torch.equal(step(cache), step(sound))
        totals = cache.stats().checksums
        assert (totals.mismatches, totals.healed_reads) == (1, 1)
        assert "layer 1 values" in caplog.text
        assert faulty[0].counters().read_ops > reads
        assert torch.equal(step(cache), step(sound))
        assert cache.stats().checksums.mismatches == 1


def test_after_one_mismatch_a_sample_becomes_all(faulty: list[FaultyEngine]) -> None:
    with cache_on(None, "direct", "sample") as cache:
        fill(cache)
        # The first read of all holds the tile that has the first turn.
        faulty[0].inject(Fault(op=Op.READ, nth=0, errno=None, flipped_byte=0))
        step(cache)
        assert cache.stats().checksums.healed_reads == 1
        before = cache.stats()
        step(cache)
        checked = cache.stats().checksums.verified_bytes - before.checksums.verified_bytes
        assert checked == before.stored_bytes


def test_off_believes_what_is_read(tmp_path: Path) -> None:
    """So that the tests above are known to damage what is attended to."""
    store = tmp_path / "kv.store"
    with cache_on(store, "direct", "off") as cache, cache_on(None, "direct", "off") as sound:
        fill(cache)
        fill(sound)
        rot(store, place(cache, 1, 9), bytes(SLAB))
        assert not torch.equal(step(cache), step(sound))


def test_a_tile_that_is_recalled_is_verified_whatever_the_sample(tmp_path: Path) -> None:
    store = tmp_path / "kv.store"
    with cache_on(store, "direct", "sample") as cache:
        fill(cache)
        at = place(cache, 1, 9)
        rot(store, at)
        with pytest.raises(CorruptExtent) as caught:
            cache.crop(9 * ROWS + 5 - TOKENS)
        assert caught.value.offset == at


@pytest.mark.parametrize("path", DOORS)
def test_beams_and_another_prompt_raise_nothing(path: str) -> None:
    model = tiny_model()
    with cache_on(None, path, "all") as cache:
        for _ in range(2):
            model.generate(
                **prompt(2, 200),
                cache=cache,
                max_new_tokens=70,
                num_beams=3,
                do_sample=False,
            )
            cache.reset()
        stats = cache.stats()
        read = stats.io.direct_read_bytes + stats.io.page_cache_read_bytes
        assert 0 < stats.checksums.verified_bytes <= read
        assert stats.checksums.mismatches == 0
