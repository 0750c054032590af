"""Everything that can be wrong with a store's file: a clear error, nothing lost or half-written."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualblade.errors import (
    Closed,
    DeviceError,
    NoSpace,
    NotAStore,
    StorageError,
    Unsupported,
)
from dualblade.io import Arena, Engine, open_engine
from dualblade.store import Door, Store
from dualblade.store.format import DATA_OFFSET, SUPERBLOCK_BYTES
from dualblade.store.formatting import carry_out_wipe, plan_wipe
from dualblade.units import MIB
from tests.fault.disks import disk_with_failing_writeback, ext4_disk, needs_root


@pytest.fixture
def engine() -> Iterator[Engine]:
    with open_engine("posix", queue_depth=2) as opened:
        yield opened


def open_store(path: Path | list[Path] | None, engine: Engine, **options: object) -> Store:
    return Store.open(path, engine, capacity_bytes=16 * MIB, **options)


def test_a_missing_file_is_made_private_and_cut_back_at_close(
    tmp_path: Path, engine: Engine
) -> None:
    path = tmp_path / "kv.store"
    with open_store(path, engine) as store:
        assert path.stat().st_mode & 0o777 == 0o600
        store.allocate(4 * MIB, Door.DIRECT)
        assert path.stat().st_size >= DATA_OFFSET + 4 * MIB
    assert path.stat().st_size == DATA_OFFSET
    assert path.stat().st_blocks * 512 <= 64 * 1024


def test_kept_blocks_stay(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "kv.store"
    with open_store(path, engine, keep_blocks=True) as store:
        store.allocate(4 * MIB, Door.DIRECT)
    assert path.stat().st_blocks * 512 >= 4 * MIB


def test_ctrl_c_while_a_file_is_made_leaves_nothing(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty file would be refused from then on: it is no store."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "kv.store"
    with monkeypatch.context() as patch:
        patch.setattr("dualblade.store.backing._lock", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_store(path, engine)
    assert not path.exists()
    open_store(path, engine).close()


def test_wiping_through_a_link_removes_the_file(tmp_path: Path, engine: Engine) -> None:
    path, link = tmp_path / "drive.store", tmp_path / "kv.store"
    open_store(path, engine).close()
    link.symlink_to(path)
    assert carry_out_wipe(plan_wipe(str(link)), tell=lambda _: None) == ["removed"]
    assert not path.exists()
    assert not os.path.lexists(link), "its name is free again"


def test_a_store_that_cannot_be_removed_stays_one(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory may be somebody else's."""
    path = tmp_path / "kv.store"
    open_store(path, engine).close()
    plan = plan_wipe(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(
            "dualblade.store.formatting.os.unlink",
            lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
        )
        with pytest.raises(StorageError, match="Permission denied"):
            carry_out_wipe(plan, tell=lambda _: None)
    open_store(path, engine).close()


def test_a_private_store_has_no_name(own_cache_directory: Path, engine: Engine) -> None:
    with open_store(None, engine) as store:
        store.allocate(2 * MIB, Door.DIRECT)
        assert list(own_cache_directory.iterdir()) == []
        assert "private" in store.path


def test_a_folder_takes_a_private_store(
    tmp_path: Path, own_cache_directory: Path, engine: Engine
) -> None:
    with open_store(tmp_path, engine) as store:
        store.allocate(2 * MIB, Door.DIRECT)
        left = os.dup(store._members.backings[0].buffered_fd)
        assert os.fstat(left).st_blocks * 512 >= 2 * MIB
        assert store.path == f"{tmp_path} (private)"
        assert list(tmp_path.iterdir()) == []
        assert not own_cache_directory.exists()
    assert os.fstat(left).st_nlink == 0, "it is gone with its last descriptor"
    os.close(left)
    both = [tmp_path / "one", tmp_path / "other"]
    for folder in both:
        folder.mkdir()
    with open_store(both, engine) as store:
        assert store.member_count == 2
    assert [list(folder.iterdir()) for folder in both] == [[], []]
    with pytest.raises(NotAStore, match="is a directory and others are files"):
        open_store([both[0], both[1] / "kv.store"], engine)
    assert list(both[1].iterdir()) == []


def test_an_existing_store_is_reused(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "kv.store"
    open_store(path, engine).close()
    before = path.read_bytes()[:SUPERBLOCK_BYTES]
    open_store(path, engine).close()
    after = path.read_bytes()[:SUPERBLOCK_BYTES]
    assert after[16:32] == before[16:32], "the uuid stays"
    assert after[48] == before[48] + 1, "the generation grows"


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "not a dualblade store"), (b"my thesis" * 1000, "not a dualblade store")],
)
def test_another_file_is_refused_and_left_alone(
    tmp_path: Path, engine: Engine, content: bytes, why: str
) -> None:
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    with pytest.raises(NotAStore, match=why):
        open_store(path, engine)
    assert path.read_bytes() == content


def test_another_version_and_a_truncated_store_are_refused(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "kv.store"
    open_store(path, engine).close()
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"\x09" + raw[9:])
    with pytest.raises(NotAStore, match="version 9"):
        open_store(path, engine)
    path.write_bytes(raw[:SUPERBLOCK_BYTES])
    with pytest.raises(NotAStore, match="truncated"):
        open_store(path, engine)


def test_what_cannot_be_a_store_is_refused(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(NotAStore, match="no NVMe namespace"):
        open_store(Path("/dev/null"), engine)
    with pytest.raises(StorageError, match="does not exist"):
        open_store(tmp_path / "no" / "kv.store", engine)


def test_a_folder_that_takes_no_files_is_told(engine: Engine) -> None:
    with pytest.raises(StorageError, match="cannot open the store /proc"):
        open_store(Path("/proc"), engine)


def test_a_store_in_use_is_refused(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "kv.store"
    with open_store(path, engine), pytest.raises(NotAStore, match="in use"):
        open_store(path, engine)
    open_store(path, engine).close()


def test_kill_9_leaves_no_lock_and_is_told(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kv.store"
    script = f"""
import os, sys
from dualblade.io import open_engine
from dualblade.store import Store, Door
store = Store.open({str(path)!r}, open_engine("posix"), capacity_bytes=1 << 24)
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
    assert path.stat().st_blocks * 512 >= 4 * MIB
    with open_store(path, engine) as store:
        assert store.used_bytes == 0
        assert path.stat().st_size == DATA_OFFSET, "what the killed one stored is still there"
    assert "not closed cleanly" in caplog.text


def test_a_store_that_others_can_read_is_made_private(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "kv.store"
    open_store(path, engine).close()
    path.chmod(0o644)
    open_store(path, engine).close()
    assert path.stat().st_mode & 0o777 == 0o600


@needs_root
def test_the_store_of_another_user_is_refused_and_can_be_wiped(
    tmp_path: Path, engine: Engine
) -> None:
    """Who owns it could read what is stored in it."""
    path = tmp_path / "kv.store"
    open_store(path, engine).close()
    os.chown(path, 12345, -1)
    path.chmod(0o666)
    with pytest.raises(NotAStore, match="belongs to user 12345, who could read"):
        open_store(path, engine)
    assert path.stat().st_mode & 0o777 == 0o666
    carry_out_wipe(plan_wipe(str(path)), tell=lambda _: None)
    assert not path.exists()


def test_a_file_system_in_memory_offers_the_page_cache(engine: Engine) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        pytest.skip("no writable /dev/shm")
    path = shm / f"dualblade-test-{os.getpid()}"
    try:
        with pytest.raises(Unsupported, match="page-cache"):
            open_store(path, engine)
        assert not path.exists(), "the refused file was left behind"
        open_store(path, engine, direct=False).close()
    finally:
        path.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of 24 MiB on a loop device."""
    with ext4_disk(tmp_path / "disk", tmp_path / "disk.img", 24 * MIB) as place:
        yield place


@needs_root
def test_a_full_disk_at_format_leaves_nothing(small_disk: Path, engine: Engine) -> None:
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize // MIB * MIB)
    with pytest.raises(NoSpace):
        Store.open(small_disk / "kv.store", engine)
    assert not (small_disk / "kv.store").exists()


@needs_root
def test_a_disk_that_fills_up_refuses_the_extent_and_keeps_the_others(
    small_disk: Path, engine: Engine
) -> None:
    with Store.open(small_disk / "kv.store", engine, capacity_bytes=64 * MIB) as store:
        kept = store.allocate(4 * MIB, Door.DIRECT)
        with pytest.raises(NoSpace, match="cannot grow"):
            store.allocate(48 * MIB, Door.DIRECT)
        assert store.used_bytes == kept.size_bytes
        free = os.statvfs(small_disk)
        assert free.f_bavail * free.f_frsize > 4 * MIB, "what was refused holds all that was free"
        store.allocate(2 * MIB, Door.PAGE_CACHE)


@needs_root
def test_a_read_only_file_system_is_told(small_disk: Path, engine: Engine) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match=r"Read-only file system\nthe file system is read-only"):
        open_store(small_disk / "kv.store", engine)


def test_use_after_close_is_told_and_closing_twice_is_once(tmp_path: Path, engine: Engine) -> None:
    store = open_store(tmp_path / "kv.store", engine)
    extent = store.allocate(2 * MIB, Door.DIRECT)
    store.close()
    store.close()
    with pytest.raises(Closed):
        store.allocate(2 * MIB, Door.DIRECT)
    with pytest.raises(Closed):
        store.read(extent, 0, 0, 4096)


@needs_root
def test_a_failed_writeback_is_an_error_of_its_write(tmp_path: Path, engine: Engine) -> None:
    arena = Arena(2 * MIB)
    with disk_with_failing_writeback(tmp_path, real_bytes=16 * MIB, size_bytes=64 * MIB) as disk:
        store = Store.open(disk / "kv.store", engine, capacity_bytes=48 * MIB)
        extent = store.allocate(40 * MIB, Door.PAGE_CACHE)
        with pytest.raises(DeviceError) as caught:
            for at in range(0, extent.size_bytes, 2 * MIB):
                store.write(extent, at, arena.address, 2 * MIB).wait()
        assert caught.value.errno in (errno.EIO, errno.ENOSPC)
        assert at >= 2 * MIB, "the first writes fit"
        with contextlib.suppress(StorageError):
            store.close()
    arena.close()
