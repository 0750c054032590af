"""How long each door had something in flight, as the pipeline's tuner is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualblade.errors import Unsupported
from dualblade.io import Arena, EngineChoice, open_engine
from dualblade.store import Door, Store
from dualblade.units import MIB


@pytest.mark.parametrize("name", ["io_uring", "posix"])
def test_direct_seconds_are_the_direct_queues(tmp_path: Path, name: EngineChoice) -> None:
    """Both doors at once would count twice, and a drive that stood still would look busy."""
    try:
        engine = open_engine(name)
    except Unsupported as exc:
        pytest.skip(str(exc))
    with (
        engine,
        Arena(4 * MIB) as arena,
        Store.open(tmp_path / "kv.store", engine, capacity_bytes=16 * MIB) as store,
    ):
        cached = store.allocate(4 * MIB, Door.PAGE_CACHE)
        store.write(cached, 0, arena.address, 4 * MIB).wait()
        counters = engine.counters()
        assert counters.busy_seconds > 0
        of_both = 0.0 if name == "io_uring" else counters.busy_seconds  # one queue for all
        assert counters.direct_busy_seconds == of_both
        direct = store.allocate(4 * MIB, Door.DIRECT)
        store.write(direct, 0, arena.address, 4 * MIB).wait()
        since = engine.counters() - counters
        assert since.direct_busy_seconds == pytest.approx(since.busy_seconds)
        assert since.busy_seconds > 0
