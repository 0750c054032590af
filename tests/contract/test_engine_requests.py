"""What reaches the device is what was asked for: as many requests as pieces, none merged."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualblade.io import Arena, EngineChoice, Op, Transfer, open_engine
from dualblade.units import KIB, MIB
from tests.devices import loop_device

SIZE_BYTES = 16 * MIB
CHUNK_BYTES = 128 * KIB
_COUNTED_SECONDS = 1.0


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    backing = tmp_path / "backing"
    backing.write_bytes(os.urandom(SIZE_BYTES))
    with loop_device(backing, SIZE_BYTES) as device:
        yield device


def requests(device: str) -> tuple[int, int, int]:
    """Read requests, merges and sectors of 512 bytes so far. Source: block/stat.rst."""
    fields = Path(f"/sys/block/{Path(device).name}/stat").read_text().split()
    return int(fields[0]), int(fields[1]), int(fields[2])


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("engine_name", ["io_uring", "posix"])
def test_sequential_pieces_are_not_merged(
    loop: str, engine_name: EngineChoice, registered: bool
) -> None:
    """Merged neighbours end together: a queue of eight would be one or two for the device."""
    fd = os.open(loop, os.O_RDONLY | os.O_DIRECT)
    with (
        open_engine(engine_name, queue_depth=8, chunk_bytes=CHUNK_BYTES) as engine,
        Arena(SIZE_BYTES) as arena,
    ):
        if registered:
            engine.register_arena(arena)
            engine.register_file(fd)
        before = requests(loop)
        engine.submit([Transfer(fd, Op.READ, arena.address, SIZE_BYTES, 0)]).wait()
        # The kernel ends the last request before it counts it.
        until = time.monotonic() + _COUNTED_SECONDS
        while requests(loop)[0] - before[0] < SIZE_BYTES // CHUNK_BYTES:
            if time.monotonic() > until:
                break
            time.sleep(0.001)
        done = [now - then for now, then in zip(requests(loop), before, strict=True)]
    os.close(fd)
    assert done == [SIZE_BYTES // CHUNK_BYTES, 0, SIZE_BYTES // 512]
