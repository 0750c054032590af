"""When the kernel may read farther through the page cache than it is asked to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dualblade.config import EngineConfig, Path
from dualblade.hf.opening import lets_kernel_read_ahead
from dualblade.pipeline import KVSettings
from dualblade.pipeline.memory_watch import MemorySource
from dualblade.units import MIB

SETTINGS = KVSettings(
    path=Path.PAGE_CACHE,
    budget_bytes=256 * MIB,
    layer_count=2,
    tokens_max=None,
    device=torch.device("cpu"),
    config=EngineConfig(),
    memory=MemorySource(asked_bytes=256 * MIB),
)


@pytest.mark.parametrize("path", list(Path))
def test_it_may_where_all_goes_that_way(path: Path) -> None:
    assert lets_kernel_read_ahead(replace(SETTINGS, path=path)) == (path is Path.PAGE_CACHE)


def test_it_may_not_where_it_would_push_out_what_it_read() -> None:
    assert not lets_kernel_read_ahead(replace(SETTINGS, budget_bytes=256 * MIB - 1))
