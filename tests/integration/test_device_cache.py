"""The same tokens with the KV on a raw block device as with transformers' own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from dualblade import DualBladeCache, EngineConfig
from dualblade.store.formatting import carry_out_format, plan_format, plan_formats
from dualblade.units import MIB
from tests.devices import loop_device, needs_root
from tests.integration.tiny_models import tiny_model


@needs_root
@pytest.mark.parametrize("path", ["dual", "page-cache", "direct"])
@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_a_block_device_holds_the_kv(tmp_path: Path, path: str, block_bytes: int) -> None:
    with loop_device(tmp_path / "image", 64 * MIB, block_bytes) as device:
        carry_out_format(plan_format(device))
        check_tokens(device, path)


@needs_root
@pytest.mark.parametrize("path", ["dual", "page-cache", "direct"])
def test_two_devices_hold_the_kv(tmp_path: Path, path: str) -> None:
    with (
        loop_device(tmp_path / "first", 48 * MIB, 512) as first,
        loop_device(tmp_path / "second", 64 * MIB, 4096) as second,
    ):
        carry_out_format(*plan_formats([first, second]))
        check_tokens([first, second], path)


@pytest.mark.parametrize("path", ["dual", "page-cache", "direct"])
@pytest.mark.parametrize("count", [2, 3])
def test_several_files_hold_the_kv(tmp_path: Path, path: str, count: int) -> None:
    files = [tmp_path / f"kv.{index}" for index in range(count)]
    for _ in range(2):  # made, then found
        check_tokens(files, path)
    assert all(file.stat().st_size == 2 * MIB for file in files)


def check_tokens(store: Any, path: str) -> None:
    model = tiny_model()
    prompt = torch.randint(3, 128, (2, 200), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options, cache=DynamicCache())
    with DualBladeCache.for_model(
        model,
        store=store,
        path=path,
        memory_budget="16MiB",
        config=EngineConfig(
            disk_capacity_bytes=32 * MIB, cache_percent=50 if path == "dual" else None
        ),
    ) as cache:
        assert torch.equal(model.generate(**inputs, **options, cache=cache), expected)
        stats = cache.stats()
        assert stats.stored_bytes > 0
        assert (stats.io.direct_write_bytes > 0) == (path != "page-cache")
        assert (stats.io.page_cache_write_bytes > 0) == (path != "direct")
        count = len(store) if isinstance(store, list) else 1
        assert stats.engine is not None
        assert stats.engine.queue_depth == 8 * count
