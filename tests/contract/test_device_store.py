"""A store on a block device: what it keeps, what it refuses, and what it never touches."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dualblade.errors import NoSpace, NotAStore, StorageError, Unsupported
from dualblade.io import Arena, Engine, open_engine
from dualblade.store import Door, Store
from dualblade.store import device as device_module
from dualblade.store.format import DATA_OFFSET, SUPERBLOCK_BYTES, second_copy_offset
from dualblade.store.formatting import carry_out_format, carry_out_wipe, plan_format, plan_wipe
from dualblade.store.inspect import inspect_store, unreadable_ranges
from dualblade.testing.contract import pattern
from dualblade.units import MIB
from tests.devices import contents, loop_device, needs_root
from tests.forks import waiting_child

pytestmark = needs_root
SIZE_BYTES = 24 * MIB


@pytest.fixture(params=[512, 4096])
def blank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "image", SIZE_BYTES, request.param) as device:
        yield device


@pytest.fixture
def device(blank: str) -> str:
    carry_out_format(plan_format(blank))
    return blank


@pytest.fixture
def engine() -> Iterator[Engine]:
    with open_engine(queue_depth=4) as opened:
        yield opened


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(4 * MIB) as arena:
        yield arena


def test_a_forked_child_does_not_hold_the_device(device: str, engine: Engine) -> None:
    """While its parent closes the store."""
    store = Store.open(device, engine)
    with waiting_child():
        store.close()
        Store.open(device, engine).close()


@pytest.mark.parametrize("lets_go", [True, False])
def test_a_page_that_cannot_be_dropped_is_not_read_as_the_stores(
    device: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, *, lets_go: bool
) -> None:
    """Another program's page of the block device stays as it was under direct writes. One that is
    busy for a moment alone is waited for."""
    with Store.open(device, engine) as store:
        extent = store.allocate(2 * MIB, Door.DIRECT)
        held = mapped_page(device, extent.range.offset)
        pauses: list[float] = []

        def sleep(seconds: float, really: Callable[[float], None] = time.sleep) -> None:
            pauses.append(seconds)
            really(seconds)  # read-ahead beside the page is under way
            if lets_go and len(pauses) == 3:
                held.close()

        monkeypatch.setattr(time, "sleep", sleep)
        if lets_go:
            store.move(extent, Door.PAGE_CACHE)
            assert extent.door is Door.PAGE_CACHE
            assert len(pauses) >= 3
        else:
            with pytest.raises(StorageError, match="another program holds them"):
                store.move(extent, Door.PAGE_CACHE)
            assert extent.door is Door.DIRECT
            held.close()
            store.move(extent, Door.PAGE_CACHE)


def test_without_a_direct_door_no_page_is_stale(device: str, engine: Engine) -> None:
    with (
        Store.open(device, engine, direct=False) as store,
        mapped_page(device, DATA_OFFSET),
    ):
        assert store.allocate(2 * MIB, Door.PAGE_CACHE).range.offset == DATA_OFFSET


def mapped_page(device: str, offset: int) -> mmap.mmap:
    """A page of the device at `offset` that the page cache cannot drop while this is open."""
    with open(device, "rb") as file:
        held = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ, offset=offset)
    assert len(held[:1]) == 1
    return held


def test_both_doors_see_the_same_bytes(device: str, engine: Engine, arena: Arena) -> None:
    """Written through one door, read through the other, as often as one likes."""
    data = pattern(2 * MIB, seed=1)
    with Store.open(device, engine) as store:
        extent = store.allocate(2 * MIB, Door.DIRECT)
        for turn, door in enumerate([Door.PAGE_CACHE, Door.DIRECT] * 3):
            data = pattern(2 * MIB, seed=turn)
            arena.buffer[: len(data)] = data
            store.write(extent, 0, arena.address, len(data)).wait()
            store.move(extent, door)
            arena.buffer[: len(data)] = bytes(len(data))
            store.read(extent, 0, arena.address, len(data)).wait()
            assert arena.buffer[: len(data)] == data
            cached = store.page_cache_bytes()
            assert cached == (2 * MIB if door is Door.PAGE_CACHE else 0)


def test_what_is_not_an_extent_is_left_alone(device: str, engine: Engine, arena: Arena) -> None:
    """Every extent is written: both superblocks and the bytes beside them stay as they were."""
    before = contents(device)
    with Store.open(device, engine, keep_blocks=True) as store:
        while True:
            try:
                extent = store.allocate(2 * MIB, Door.DIRECT)
            except NoSpace:
                break
            arena.buffer[: 2 * MIB] = b"\xff" * (2 * MIB)
            store.write(extent, 0, arena.address, 2 * MIB).wait()
        assert store.used_bytes == store.capacity_bytes == 20 * MIB
    after = contents(device)
    end = DATA_OFFSET + 20 * MIB
    assert after[DATA_OFFSET:end] == b"\xff" * (20 * MIB)
    assert after[SUPERBLOCK_BYTES:DATA_OFFSET] == before[SUPERBLOCK_BYTES:DATA_OFFSET]
    assert after[end:-SUPERBLOCK_BYTES] == before[end:-SUPERBLOCK_BYTES]
    report = inspect_store(device)
    assert report.problem is None
    assert [copy.superblock.generation for copy in report.copies if copy.superblock] == [2, 2]


def test_closing_discards_what_was_stored(device: str, engine: Engine, arena: Arena) -> None:
    """KV encodes prompts: TRIM of a loop device gives zeros; keep_blocks keeps it."""
    for keep in (False, True):
        with Store.open(device, engine, keep_blocks=keep) as store:
            extent = store.allocate(2 * MIB, Door.DIRECT)
            arena.buffer[: 2 * MIB] = b"\xff" * (2 * MIB)
            store.write(extent, 0, arena.address, 2 * MIB).wait()
        assert any(contents(device)[DATA_OFFSET : DATA_OFFSET + 2 * MIB]) is keep


@pytest.mark.parametrize("discard", [False, True])
def test_freed_extents_are_discarded_when_asked(
    device: str, engine: Engine, arena: Arena, tmp_path: Path, discard: bool
) -> None:
    """A discard punches the file behind a loop device: its blocks are counted."""

    def blocks_bytes() -> int:
        return 512 * os.stat(tmp_path / "image").st_blocks

    with Store.open(device, engine, discard=discard) as store:
        extents = [store.allocate(4 * MIB, Door.DIRECT) for _ in range(2)]
        for extent in extents:
            arena.buffer[: 4 * MIB] = pattern(4 * MIB, seed=1)
            store.write(extent, 0, arena.address, 4 * MIB).wait()
        before = blocks_bytes()
        store.free(extents[0])
        # To a block or two of the file system's own: the hole changes how it maps the file.
        assert round((before - blocks_bytes()) / MIB) == (4 if discard else 0)
        store.read(extents[1], 0, arena.address, 4 * MIB).wait()
        assert arena.buffer[: 4 * MIB] == pattern(4 * MIB, seed=1)


def test_what_the_device_cannot_do_is_refused(device: str) -> None:
    """No namespace, no poll queues: said at open, and nothing is held afterwards."""
    with (
        open_engine("uring-cmd") as engine,
        pytest.raises(Unsupported, match="needs a store on an NVMe namespace"),
    ):
        Store.open(device, engine)
    with open_engine(io_poll=True) as engine:
        with pytest.raises(Unsupported, match=r"loop\d+ has no poll queues"):
            Store.open(device, engine)
        with Store.open(device, engine, direct=False) as store:  # the buffered ring never polls
            assert store.capacity_bytes > 0


def test_a_capacity_asked_for_is_a_limit(device: str, engine: Engine) -> None:
    with Store.open(device, engine, capacity_bytes=5 * MIB) as store:
        assert store.capacity_bytes == 4 * MIB
    with pytest.raises(NoSpace):
        Store.open(device, engine, capacity_bytes=MIB)


def test_it_is_held_for_itself(device: str, engine: Engine) -> None:
    """No second store, no file system and no mount while it is open; all again afterwards."""
    with Store.open(device, engine):
        with pytest.raises(NotAStore, match="in use"):
            Store.open(device, engine)
        mkswap = subprocess.run(["mkswap", device], capture_output=True, check=False)
        assert mkswap.returncode != 0
        with pytest.raises(NotAStore, match="not free to format"):
            plan_format(device)
        assert inspect_store(device).in_use_now
    Store.open(device, engine).close()


def test_an_unformatted_device_is_refused_and_left_alone(blank: str, engine: Engine) -> None:
    with pytest.raises(NotAStore, match=f"dualblade store format {blank}"):
        Store.open(blank, engine)
    assert not any(contents(blank))


@pytest.mark.parametrize("where", ["start", "end"])
def test_a_damaged_copy_is_passed_over_and_made_whole(
    device: str, engine: Engine, where: str
) -> None:
    """A torn superblock: the other one serves."""
    offset = 0 if where == "start" else second_copy_offset(SIZE_BYTES)
    write(device, offset + 512, b"\xff" * 512)
    assert inspect_store(device).problem is None
    Store.open(device, engine).close()
    assert all(copy.problem is None for copy in inspect_store(device).copies)


@pytest.mark.parametrize("where", ["start", "end"])
def test_a_device_that_was_reused_is_refused(device: str, engine: Engine, where: str) -> None:
    """What is not ours where a superblock was: somebody took the device."""
    write(device, 0 if where == "start" else second_copy_offset(SIZE_BYTES), b"theirs" * 600)
    before = contents(device)
    with pytest.raises(NotAStore, match=f"its {where} was overwritten"):
        Store.open(device, engine)
    with pytest.raises(NotAStore):
        plan_wipe(device)
    assert contents(device) == before


def test_a_file_system_beside_the_superblock_is_refused(device: str, engine: Engine) -> None:
    """btrfs's magic lies at 64 KiB + 64: our first 4096 bytes are untouched by it."""
    filled = bytearray(4096)
    filled[64:72] = b"_BHRfS_M"
    filled[32:64] = os.urandom(32)
    write(device, 64 * 1024, bytes(filled))
    before = contents(device)
    with pytest.raises(NotAStore, match="now: a btrfs"):
        Store.open(device, engine)
    assert contents(device) == before


def test_a_copy_on_another_device_is_refused(device: str, engine: Engine, tmp_path: Path) -> None:
    """The superblock names the device: size here; serial and world-wide name on drives."""
    other = tmp_path / "copy"
    other.write_bytes(contents(device) + bytes(4 * MIB))
    with loop_device(other, 0, 4096) as copied:
        with pytest.raises(NotAStore, match="not the device that its store was made on"):
            Store.open(copied, engine)
        assert contents(copied) == other.read_bytes()


def test_kill_9_is_told_and_its_content_is_discarded(
    device: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    write(device, DATA_OFFSET, b"\xff" * 4096)
    script = f"""
import sys
from dualblade.io import open_engine
from dualblade.store import Store, Door
store = Store.open({device!r}, open_engine("posix"))
store.allocate(1 << 22, Door.DIRECT)
print("open", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    block = inspect_store(device).superblock
    assert block is not None
    assert block.in_use
    with Store.open(device, engine) as store:
        assert store.used_bytes == 0
        assert not any(contents(device)[DATA_OFFSET : DATA_OFFSET + 4 * MIB])
    assert "not closed cleanly" in caplog.text


def test_wiping_leaves_nothing(device: str, engine: Engine, arena: Arena) -> None:
    with Store.open(device, engine, keep_blocks=True) as store:
        extent = store.allocate(4 * MIB, Door.PAGE_CACHE)
        arena.buffer[:] = b"\xff" * (4 * MIB)
        store.write(extent, 0, arena.address, 4 * MIB).wait()
    parts: list[float] = []
    assert carry_out_wipe(plan_wipe(device), tell=parts.append) == ["discarded"]
    assert parts[-1] == 1
    assert not any(contents(device))
    carry_out_format(plan_format(device))


def test_a_drive_that_keeps_what_it_was_told_to_discard_is_overwritten(
    device: str, engine: Engine, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRIM is advice: a drive may take it and go on reading what was there."""
    assert device_module.find_drive(device).discard_bytes_max
    with Store.open(device, engine, keep_blocks=True) as store:
        extent = store.allocate(4 * MIB, Door.DIRECT)
        arena.buffer[:] = b"\x55" * (4 * MIB)
        store.write(extent, 0, arena.address, 4 * MIB).wait()
    real = fcntl.ioctl

    def deaf(fd: int, request: int, *rest: object) -> object:
        return 0 if request == device_module._BLKDISCARD else real(fd, request, *rest)

    monkeypatch.setattr(device_module.fcntl, "ioctl", deaf)
    assert carry_out_wipe(plan_wipe(device), tell=lambda _: None) == ["overwritten with zeros"]
    assert not any(contents(device))


def test_planning_writes_nothing(blank: str) -> None:
    plan_format(blank)
    assert not any(contents(blank))
    carry_out_format(plan_format(blank))
    before = contents(blank)
    plan_wipe(blank)
    with pytest.raises(NotAStore, match="store wipe"):
        plan_format(blank)
    assert contents(blank) == before


def test_a_store_that_was_made_meanwhile_is_not_formatted_over(blank: str) -> None:
    """Two people format at a time; one types the serial after the other has made a store."""
    late = plan_format(blank)
    carry_out_format(plan_format(blank))
    before = contents(blank)
    with pytest.raises(NotAStore, match="a dualblade store already"):
        carry_out_format(late)
    assert contents(blank) == before


def test_a_drive_without_trim_tells_what_stays_on_it(
    device: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = device_module.find_drive
    monkeypatch.setattr(
        device_module, "find_drive", lambda path: replace(real(path), discard_bytes_max=0)
    )
    with Store.open(device, engine) as store:
        store.allocate(4 * MIB, Door.DIRECT)
    assert f"{device} has no TRIM: what was stored stays on it" in caplog.text


@pytest.mark.parametrize("error", [errno.EREMOTEIO, errno.EIO])
def test_a_drive_that_refuses_trim_is_closed_opened_and_wiped(
    device: str,
    engine: Engine,
    arena: Arena,
    error: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Bridges to USB and SCSI say that they take it, and answer with an error."""
    real = fcntl.ioctl

    def refusing(fd: int, request: int, *rest: object) -> object:
        if request == device_module._BLKDISCARD:
            raise OSError(error, os.strerror(error))
        return real(fd, request, *rest)

    monkeypatch.setattr(device_module.fcntl, "ioctl", refusing)
    with Store.open(device, engine) as store:
        extent = store.allocate(4 * MIB, Door.DIRECT)
        arena.buffer[:] = b"\xff" * (4 * MIB)
        store.write(extent, 0, arena.address, 4 * MIB).wait()
    assert "refuses TRIM" in caplog.text
    assert "store wipe" in caplog.text
    report = inspect_store(device)
    assert report.problem is None
    assert report.superblock is not None
    assert not report.superblock.in_use
    assert carry_out_wipe(plan_wipe(device), tell=lambda _: None) == ["overwritten with zeros"]
    assert not any(contents(device))


def test_a_read_only_device_is_refused_before_any_write(device: str, engine: Engine) -> None:
    before = contents(device)
    subprocess.run(["blockdev", "--setro", device], check=True)
    try:
        with pytest.raises(NotAStore, match="read-only") as caught:
            Store.open(device, engine)
        assert f"blockdev --setrw {device}" in str(caught.value)
    finally:
        subprocess.run(["blockdev", "--setrw", device], check=True)
    assert contents(device) == before
    Store.open(device, engine).close()


def test_ctrl_c_while_a_device_is_recognised_leaves_it_free(
    device: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> list[object]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(device_module, "signatures", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Store.open(device, engine)
    Store.open(device, engine).close()


def test_a_name_that_went_to_another_device_is_refused(blank: str) -> None:
    """Between looking and writing people type a serial; names are given anew meanwhile."""
    plan = plan_format(blank)
    assert plan.drive is not None
    swapped = replace(plan, drive=replace(plan.drive, serial="0THER"))
    with pytest.raises(NotAStore, match="not the device any more"):
        carry_out_format(swapped)
    assert not any(contents(blank))
    carry_out_format(plan)
    with pytest.raises(NotAStore, match="not the device any more"):
        carry_out_wipe(swapped, tell=lambda _: None)
    assert inspect_store(blank).problem is None


def test_every_block_can_be_read(device: str) -> None:
    parts: list[float] = []
    assert unreadable_ranges(inspect_store(device), parts.append) == []
    assert parts[-1] == 1


def test_a_device_that_loses_its_end_while_open(
    tmp_path: Path, engine: Engine, arena: Arena
) -> None:
    """Its image is cut short: reads fail with words."""
    image = tmp_path / "image"
    with loop_device(image, SIZE_BYTES) as device:
        carry_out_format(plan_format(device))
        store = Store.open(device, engine)
        extent = store.allocate(20 * MIB, Door.DIRECT)
        os.truncate(image, 4 * MIB)
        with pytest.raises(StorageError, match=device):
            store.read(extent, 16 * MIB, arena.address, 4 * MIB).wait()
        store.close()


def write(device: str, offset: int, data: bytes) -> None:
    fd = os.open(device, os.O_WRONLY | os.O_DSYNC)
    os.pwrite(fd, data, offset)
    os.close(fd)
