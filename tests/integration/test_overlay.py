"""A store on overlayfs, as in a container without a volume: its pages are another file's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from dualblade import DualBladeCache
from dualblade.host.page_cache import cached_bytes, drop, is_overlay
from dualblade.io import Op, open_engine
from dualblade.store import Door, Store
from dualblade.units import EXTENT_ALIGN_BYTES, MIB
from tests.integration.tiny_models import prompt, tiny_model


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    folders = {name: tmp_path / name for name in ("lower", "upper", "work", "merged")}
    for folder in folders.values():
        folder.mkdir()
    options = ",".join(f"{name}dir={folders[name]}" for name in ("lower", "upper", "work"))
    merged = folders["merged"]
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no overlay can be mounted here: {done.stderr.strip()}")
    yield merged
    subprocess.run(["umount", str(merged)], check=True)


def test_its_pages_are_seen(overlay: Path, tmp_path: Path) -> None:
    with (overlay / "file").open("w+b") as file, (tmp_path / "plain").open("w+b") as plain:
        assert is_overlay(file.fileno())
        assert not is_overlay(plain.fileno())
        file.write(os.urandom(4 * MIB))
        file.flush()
        fd = file.fileno()
        assert cached_bytes(fd, 0, 4 * MIB).cached_bytes == 4 * MIB
        os.fsync(fd)
        drop(fd, 0, 4 * MIB)
        assert cached_bytes(fd, 0, 4 * MIB).cached_bytes == 0


def test_writes_are_synced_and_demoted_pages_leave(overlay: Path) -> None:
    engine = open_engine("auto", queue_depth=8, chunk_bytes=MIB)
    try:
        with Store.open(overlay / "kv.store", engine, capacity_bytes=64 * MIB) as store:
            (backing,) = store._members.backings
            assert backing.sync is Op.DATASYNC
            extent = store.allocate(EXTENT_ALIGN_BYTES, Door.PAGE_CACHE)
            block = torch.ones(EXTENT_ALIGN_BYTES, dtype=torch.uint8)
            store.write(extent, 0, block.data_ptr(), EXTENT_ALIGN_BYTES).wait()
            assert store.cached_bytes(extent) == EXTENT_ALIGN_BYTES
            store.move(extent, Door.DIRECT)
            assert store.cached_bytes(extent) == 0
    finally:
        engine.close()


@pytest.mark.parametrize("path", ["dual", "page-cache"])
def test_what_is_cached_there_counts(overlay: Path, path: str) -> None:
    model, inputs = tiny_model(), prompt(tokens=400)
    expected = model.generate(
        **inputs, cache=DynamicCache(config=model.config), max_new_tokens=8, do_sample=False
    )
    with DualBladeCache.for_model(
        model, store=overlay, path=path, attention="exact", memory_budget="256MiB", max_tokens=512
    ) as cache:
        made = model.generate(**inputs, cache=cache, max_new_tokens=8, do_sample=False)
        stats = cache.stats()
    assert torch.equal(made, expected)
    assert stats.memory.page_cache_bytes > 0
    assert stats.io.direct_read_bytes == 0
