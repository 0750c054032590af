"""A block device with one sector that cannot be read: told by its place, by all who meet it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualblade.errors import DeviceError
from dualblade.io import Arena, EngineChoice, open_engine
from dualblade.store import Door, Store
from dualblade.store.formatting import carry_out_format, plan_format, plan_formats
from dualblade.store.inspect import inspect_store, unreadable_ranges
from dualblade.units import MIB
from tests.devices import loop_device, needs_root

BAD_OFFSET = 9 * MIB + 40960
DAEMON = "qemu-storage-daemon"


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """QEMU's block layer injects the error into a file (FUSE); a loop device is over that."""
    if shutil.which(DAEMON) is None or not os.path.exists("/dev/fuse"):
        pytest.skip(f"needs {DAEMON} and FUSE")
    image, export = tmp_path / "image", tmp_path / "export"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    export.touch()
    bad = (
        f"driver=blkdebug,node-name=bad,image.driver=file,image.filename={image},"
        "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5,"
        f"inject-error.0.sector={BAD_OFFSET // 512}"
    )
    served = f"type=fuse,id=export,node-name=bad,mountpoint={export},writable=on"
    daemon = subprocess.Popen([DAEMON, "--blockdev", bad, "--export", served])
    try:
        while export.stat().st_size == 0:
            assert daemon.poll() is None, "no FUSE export"
            time.sleep(0.02)
        with loop_device(export, 32 * MIB, 512) as made:
            yield made
    finally:
        daemon.terminate()
        daemon.wait()


@needs_root
@pytest.mark.parametrize("engine_name", ["io_uring", "posix"])
def test_an_error_at_an_exact_sector(device: str, engine_name: EngineChoice) -> None:
    carry_out_format(plan_format(device))
    with (
        open_engine(engine_name, queue_depth=4, chunk_bytes=64 * 1024) as engine,
        Store.open(device, engine) as store,
        Arena(2 * MIB) as arena,
    ):
        extent = store.allocate(8 * MIB, Door.DIRECT)
        at = BAD_OFFSET - extent.range.offset
        for door in (Door.DIRECT, Door.PAGE_CACHE):
            store.move(extent, door)
            with pytest.raises(DeviceError, match="Input/output error") as caught:
                store.read(extent, at // MIB * MIB, arena.address, MIB).wait()
            found = caught.value.offset
            assert found is not None
            assert 0 <= BAD_OFFSET - found < 64 * 1024
            store.read(extent, 0, arena.address, 2 * MIB).wait()
    bad = unreadable_ranges(inspect_store(device), lambda _: None)
    assert bad == [(BAD_OFFSET // 4096 * 4096, 4096)]


@needs_root
def test_a_striped_store_names_the_member(device: str, tmp_path: Path) -> None:
    """The bad sector is on the second of two: its path and its offset there, through both doors;
    verify finds it there, and the first one whole."""
    with loop_device(tmp_path / "good", 32 * MIB, 4096) as good:
        carry_out_format(*plan_formats([good, device]))
        with (
            open_engine("io_uring", queue_depth=4, chunk_bytes=64 * 1024) as engine,
            Store.open([good, device], engine) as store,
            Arena(16 * MIB) as arena,
        ):
            extent = store.allocate(24 * MIB, Door.DIRECT)
            for door in (Door.DIRECT, Door.PAGE_CACHE):
                store.move(extent, door)
                with pytest.raises(DeviceError, match="Input/output error") as caught:
                    store.read(extent, 8 * MIB, arena.address, 16 * MIB).wait()
                assert caught.value.path == device
                assert caught.value.offset is not None
                assert 0 <= BAD_OFFSET - caught.value.offset < 64 * 1024
                store.read(extent, 0, arena.address, 8 * MIB).wait()
        reports = [inspect_store(path) for path in (good, device)]
        bad = [unreadable_ranges(report, lambda _: None) for report in reports]
        assert bad == [[], [(BAD_OFFSET // 4096 * 4096, 4096)]]
