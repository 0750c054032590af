"""A store on a namespace: passthrough for the direct door, the block device for the other."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualblade.errors import DeviceError, NotAStore, StorageError
from dualblade.io import Arena, Engine, open_engine
from dualblade.store import Door, Extent, Store
from dualblade.store.format import DATA_OFFSET
from dualblade.store.formatting import carry_out_wipe, plan_format, plan_wipe
from dualblade.store.inspect import inspect_store, unreadable_ranges
from dualblade.testing.contract import pattern
from dualblade.units import KIB, MIB
from tests.lab.guest.conftest import ask, block_of, find_namespace, formatted, reads_of

NAMESPACES = [("LABSMALL", 1, "small"), ("LABTWO", 7, "four"), ("LABTWO", 3, "three")]


@pytest.fixture(params=NAMESPACES, ids=lambda each: each[2])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """(a formatted namespace's device, the name of the image behind it); wiped afterwards."""
    serial, number, node = request.param
    path = formatted(find_namespace(serial, number))
    yield path, node
    carry_out_wipe(plan_wipe(path), tell=lambda _: None)


def fill(store: Store, extent: Extent, arena: Arena, data: bytes) -> None:
    arena.buffer[: len(data)] = data
    store.write(extent, 0, arena.address, len(data)).wait()


def read_back(store: Store, extent: Extent, arena: Arena, size_bytes: int) -> bytes:
    arena.buffer[:size_bytes] = bytes(size_bytes)
    store.read(extent, 0, arena.address, size_bytes).wait()
    return bytes(arena.buffer[:size_bytes])


def test_passthrough_and_page_cache_are_coherent(
    place: tuple[str, str], engine: Engine, arena: Arena
) -> None:
    """Written through one door, read through the other, with a stray reader in between: what it
    leaves in the block device's cache is stale after the next command, and must not be seen."""
    path, _ = place
    with Store.open(path, engine) as store:
        assert (engine.name, engine.reason) == ("uring-cmd", None)
        extent = store.allocate(2 * MIB, Door.DIRECT)
        for turn, door in enumerate([Door.PAGE_CACHE, Door.DIRECT] * 3):
            with open(block_of(path), "rb") as stray:
                stray.seek(extent.range.offset)
                stray.read(MIB)
            data = pattern(2 * MIB, seed=turn)
            fill(store, extent, arena, data)
            store.move(extent, door)
            assert read_back(store, extent, arena, len(data)) == data
        # A new extent where a freed one was: its page-cache door meets no page of the old one.
        store.free(extent)
        with open(block_of(path), "rb") as stray:
            stray.seek(extent.range.offset)
            stray.read(MIB)
        again = store.allocate(2 * MIB, Door.DIRECT)
        assert again.range == extent.range
        fill(store, again, arena, data[::-1])
        store.move(again, Door.PAGE_CACHE)
        assert read_back(store, again, arena, len(data)) == data[::-1]


def test_one_command_a_piece_and_no_page_cached(place: tuple[str, str], arena: Arena) -> None:
    """Counted by the drive: as many commands as pieces of the limit, all in flight at once."""
    path, node = place
    chunk_bytes = MIB if node == "small" else 128 * KIB  # one limit is the drive's, one is ours
    with (
        open_engine(queue_depth=8, chunk_bytes=chunk_bytes) as engine,
        Store.open(path, engine) as store,
    ):
        engine.register_arena(arena)
        extent = store.allocate(4 * MIB, Door.DIRECT)
        fill(store, extent, arena, pattern(4 * MIB, seed=1))
        before, counted = reads_of(node), engine.counters()
        for _ in range(4):
            tickets = [store.read(extent, 0, arena.address, 4 * MIB) for _ in range(2)]
            for ticket in tickets:
                ticket.wait()
        done = engine.counters() - counted
        pieces = 8 * 4 * MIB // (128 * KIB)
        assert (done.read_ops, done.read_bytes, done.retries) == (pieces, 32 * MIB, 0)
        assert reads_of(node) - before == pieces
        assert done.short_transfers == 0
        assert store.page_cache_bytes() == 0
        # While anything waited the queue was full, but for the moment in which it is refilled.
        assert 4 < done.effective_queue_depth <= 8


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.parametrize("registered", [True, False])
def test_scattered_pages_are_cut_finer(engine: Engine, huge: bool, registered: bool) -> None:
    """A megabyte in 4 KiB pages is more segments than a command may have: EINVAL if not cut."""
    path = formatted(find_namespace("LABTWO", 7))
    data = pattern(3 * MIB, seed=7)
    with Store.open(path, engine) as store, Arena(4 * MIB, huge=huge) as arena:
        if registered:
            engine.register_arena(arena)
        extent = store.allocate(4 * MIB, Door.DIRECT)
        fill(store, extent, arena, data)
        assert read_back(store, extent, arena, len(data)) == data
        pieces = 3 if registered and arena.huge else -(-3 * MIB // (127 * 4 * KIB))
        assert engine.counters().read_ops == pieces
    carry_out_wipe(plan_wipe(path), tell=lambda _: None)


def test_the_block_device_is_held(place: tuple[str, str], engine: Engine) -> None:
    path, _ = place
    with Store.open(path, engine):
        for other in (path, block_of(path)):
            with open_engine("posix") as second, pytest.raises(NotAStore, match="in use"):
                Store.open(other, second)
        with pytest.raises(NotAStore):
            plan_format(path)


def test_nothing_outside_the_store_can_be_said(
    place: tuple[str, str], engine: Engine, arena: Arena
) -> None:
    """Even asked by hand, the superblocks are out of reach of the direct door's descriptor."""
    from dualblade.io import Op, Transfer

    path, _ = place
    before = [copy.superblock for copy in inspect_store(path).copies]
    with Store.open(path, engine) as store:
        fd = store._members.backings[0].direct_fd
        assert fd is not None
        for offset in (0, DATA_OFFSET - 4096):
            with pytest.raises(DeviceError) as caught:
                engine.submit([Transfer(fd, Op.WRITE, arena.address, 4096, offset)]).wait()
            assert caught.value.errno == errno.EINVAL
        end = DATA_OFFSET + store.capacity_bytes
        with pytest.raises(DeviceError) as caught:
            engine.submit([Transfer(fd, Op.WRITE, arena.address, 4096, end)]).wait()
        assert caught.value.errno == errno.ENOSPC
    after = [copy.superblock for copy in inspect_store(path).copies]
    assert [b.uuid for b in before if b] == [a.uuid for a in after if a]


def test_kill_9_in_mid_write(place: tuple[str, str], engine: Engine, arena: Arena) -> None:
    """Commands in flight, the process gone: told at the next open, discarded, and all works."""
    path, _ = place
    script = f"""
from dualblade.io import Arena, open_engine
from dualblade.store import Store, Door
engine, arena = open_engine(queue_depth=8), Arena(4 << 20)
store = Store.open({path!r}, engine)
extent = store.allocate(32 << 20, Door.DIRECT)
print(engine.name, flush=True)
while True:
    tickets = [store.write(extent, at << 20, arena.address, 4 << 20) for at in range(0, 32, 4)]
    for ticket in tickets:
        ticket.wait()
    print("written", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"uring-cmd\n"
    assert child.stdout.readline() == b"written\n"  # and goes on
    child.send_signal(signal.SIGKILL)
    child.communicate()
    block = inspect_store(path).superblock
    assert block is not None
    assert block.in_use
    with Store.open(path, engine) as store:
        assert store._members.was_unclean
        extent = store.allocate(2 * MIB, Door.DIRECT)
        data = pattern(2 * MIB, seed=3)
        fill(store, extent, arena, data)
        assert read_back(store, extent, arena, len(data)) == data


def test_a_bad_sector_is_told_by_drive_and_place(engine: Engine, arena: Arena) -> None:
    """One sector of 512 bytes at 16 MiB cannot be read; through both doors and by `verify`."""
    path = formatted(find_namespace("LABBAD"))
    with Store.open(path, engine) as store:
        extent = store.allocate(32 * MIB, Door.DIRECT)
        at = 16 * MIB - extent.range.offset
        store.write(extent, at, arena.address, MIB).wait()
        with pytest.raises(DeviceError) as caught:
            store.read(extent, at, arena.address, MIB).wait()
        error = caught.value
        assert error.nvme_status is not None
        assert error.nvme_status & 0x7FF == 0x281
        assert "unrecovered read error (NVMe status 0x281)" in str(error)
        assert (error.path, error.offset) == (path, 16 * MIB)
        store.read(extent, at + MIB, arena.address, MIB).wait()
    bad = unreadable_ranges(inspect_store(path), lambda _: None)
    assert bad == [(16 * MIB, 4096)]
    with Store.open(block_of(path), engine) as store:
        extent = store.allocate(32 * MIB, Door.DIRECT)
        with pytest.raises(DeviceError) as caught:
            store.read(extent, at, arena.address, MIB).wait()
        assert caught.value.errno in (errno.EIO, errno.ENODATA)
    carry_out_wipe(plan_wipe(path), tell=lambda _: None)


def test_a_partitioned_and_a_mounted_drive_are_refused(tmp_path: Path) -> None:
    path = find_namespace("LABSMALL")
    disk = block_of(path)
    entry = struct.pack("<B3sB3sII", 0, b"\0" * 3, 0x83, b"\0" * 3, 4096, 400_000)
    with open(disk, "r+b") as raw:
        raw.write(bytes(440) + b"\x78\x56\x34\x12" + bytes(2) + entry + bytes(48) + b"\x55\xaa")
    subprocess.run(["blockdev", "--rereadpt", disk], check=True)
    part = f"{disk}p1"
    for device in (path, disk):
        with pytest.raises(NotAStore, match=f"it is partitioned: {part}"):
            plan_format(device)
    # A partition is a store of its own, through O_DIRECT on its node.
    formatted(part)
    with open_engine() as engine, Store.open(part, engine) as store:
        assert engine.name == "io_uring"
        store.allocate(2 * MIB, Door.DIRECT)
        with pytest.raises(NotAStore):
            plan_format(path)
    subprocess.run(["mkfs.ext4", "-qF", part], check=True)
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", part, place], check=True)
    try:
        for device in (path, disk, part):
            with pytest.raises(NotAStore, match=f"mounted at {place}"):
                plan_format(device)
    finally:
        subprocess.run(["umount", place], check=True)
    subprocess.run(["wipefs", "-qa", part], check=True)
    subprocess.run(["wipefs", "-qa", disk], check=True)
    subprocess.run(["blockdev", "--rereadpt", disk], check=True)
    plan_format(path)


def test_a_member_of_dm_and_of_md_is_refused() -> None:
    """A drive that something is built on is held by the kernel, whatever lies on it."""
    modules = Path(os.environ["DUALBLADE_LAB_MODULES"])
    for name in ("dm-mod", "md-mod", "raid1"):
        subprocess.run(["insmod", modules / f"{name}.ko"], check=True)
    path = find_namespace("LABTWO", 3)
    disk = block_of(path)
    table = f"0 100000 linear {disk} 2048"
    subprocess.run(["dmsetup", "create", "--noudevsync", "part", "--table", table], check=True)
    try:
        free_with = "dmsetup remove part"
        refused(path, disk, f"/dev/dm-0 (dm) is built on it; to free it: {free_with}")
        # With the node that udev would have made, lsblk lists it too.
        subprocess.run(["dmsetup", "mknodes", "part"], check=True)
        refused(path, disk, f"/dev/mapper/part (dm) is built on it; to free it: {free_with}")
    finally:
        subprocess.run(["dmsetup", "remove", "--noudevsync", "part"], check=True)
    device = os.stat(disk).st_rdev
    Path("/sys/module/md_mod/parameters/new_array").write_text("md9")
    array = Path("/sys/block/md9/md")
    for name, text in (
        ("metadata_version", "none"),
        ("level", "raid1"),
        ("raid_disks", "1"),
        ("new_dev", f"{os.major(device)}:{os.minor(device)}"),
        (f"dev-{os.path.basename(disk)}/slot", "0"),
        ("array_state", "active"),
    ):
        (array / name).write_text(text)
    try:
        refused(path, disk, "/dev/md9 (raid1) is built on it; to free it: mdadm --stop /dev/md9")
    finally:
        (array / "array_state").write_text("clear")
    formatted(path)
    carry_out_wipe(plan_wipe(path), tell=lambda _: None)


def refused(path: str, disk: str, finding: str) -> None:
    for device in (path, disk):
        with pytest.raises(NotAStore) as caught:
            plan_format(device)
        assert finding in caught.value.message
        assert caught.value.message.count("is built on it") == 1
        with open_engine("posix") as engine, pytest.raises(NotAStore, match="in use"):
            Store.open(device, engine)


def test_another_drive_is_not_taken_for_it(engine: Engine) -> None:
    """A byte-for-byte copy on a drive of the same size: the serial tells."""
    path = formatted(find_namespace("LABSMALL"))
    copy = find_namespace("LABTWO", 3)
    with open(block_of(path), "rb") as source, open(block_of(copy), "r+b") as target:
        for offset in (0, 256 * MIB - 4096):
            source.seek(offset)
            target.seek(offset)
            target.write(source.read(4096))
    with pytest.raises(NotAStore, match="serial 'LABSMALL' in the superblock, 'LABTWO' here"):
        Store.open(copy, engine)
    with pytest.raises(NotAStore):
        plan_wipe(copy)
    formatted(copy)
    for place in (path, copy):
        carry_out_wipe(plan_wipe(place), tell=lambda _: None)


def test_a_drive_that_hangs_is_reset_and_asked_again(engine: Engine, arena: Arena) -> None:
    """The kernel gives the commands up after its time limit (2 s here) and resets the drive; each
    was tried once more by then, and nobody saw wrong bytes."""
    path = formatted(find_namespace("LABSLOW"))
    limit = Path(f"/sys/block/{block_of(path).removeprefix('/dev/')}/queue/io_timeout")
    limit.write_text("2000")
    with Store.open(path, engine) as store:
        extent = store.allocate(8 * MIB, Door.DIRECT)
        data = pattern(4 * MIB, seed=9)
        fill(store, extent, arena, data)
        ask("pause", seconds=10)
        assert read_back(store, extent, arena, len(data)) == data
        counters = engine.counters()
        assert counters.retries > 0
        assert counters.errors == 0
    limit.write_text("30000")
    carry_out_wipe(plan_wipe(path), tell=lambda _: None)


def test_a_drive_that_is_unplugged(engine: Engine, arena: Arena) -> None:
    """Commands end with ENODEV or a drive's refusal; closing tells and lets go of all."""
    path = formatted(find_namespace("LABGONE"))
    store = Store.open(path, engine)
    extent = store.allocate(8 * MIB, Door.DIRECT)
    fill(store, extent, arena, pattern(MIB, seed=1))
    ask("device_del", id="gone-drive")
    with pytest.raises(DeviceError) as caught:
        while True:
            store.read(extent, 0, arena.address, MIB).wait()
    assert caught.value.errno in (errno.ENODEV, errno.EIO, errno.ENXIO)
    with pytest.raises(StorageError):
        store.close()
    store.close()
    with contextlib.suppress(OSError):
        assert not os.path.exists(path)
