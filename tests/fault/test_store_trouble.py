"""Everything that can be wrong with a store's file: a clear error, nothing lost or half-written."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualblade.errors import (
    Closed,
    ConfigError,
    DeviceError,
    NoSpace,
    NotAStore,
    StorageError,
    Unsupported,
)
from dualblade.host import devices, page_cache
from dualblade.io import Arena, Engine, Op, open_engine
from dualblade.store import Door, Store, backing, formatting
from dualblade.store import store as store_module
from dualblade.store.format import DATA_OFFSET, SUPERBLOCK_BYTES
from dualblade.store.formatting import carry_out_wipe, plan_formats, plan_wipe
from dualblade.store.inspect import inspect_store, unreadable_ranges
from dualblade.store.members import Members
from dualblade.testing import Fault, FaultyEngine
from dualblade.testing.contract import fork
from dualblade.units import MIB
from tests.fault.disks import disk_with_failing_writeback, ext4_disk, needs_root
from tests.forks import waiting_child


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


@pytest.fixture
def no_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot make files without a name, as NFS and FUSE."""
    real_open = os.open

    def refuse(path: Any, flags: int, *mode: int, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real_open(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.usefixtures("no_tmpfile")
def test_a_private_store_has_no_name_where_files_cannot_be_made_without(
    own_cache_directory: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has one for a moment."""
    real_unlink, unlinked = os.unlink, list[str]()

    def unlink(path: str, **options: Any) -> None:
        unlinked.extend([path] if "dualblade-" in path else [])
        real_unlink(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    with open_store(None, engine) as store:
        store.allocate(2 * MIB, Door.DIRECT)
        assert len(unlinked) == 1
        assert list(own_cache_directory.iterdir()) == []
        assert os.fstat(store._members.backings[0].buffered_fd).st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("no_tmpfile")
def test_a_private_store_that_keeps_a_name_is_told(
    tmp_path: Path,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """NFS renames a file that is unlinked while it is open, and removes it when it is closed."""
    monkeypatch.setattr(os, "unlink", lambda path: os.rename(path, tmp_path / ".nfs0001"))
    open_store(tmp_path, engine).close()
    assert f"{tmp_path} gives a file a name until it is closed" in caplog.text


def test_a_new_store_that_others_can_read_all_the_same_is_told(
    tmp_path: Path,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """exFAT and the like: modes are of the mount, and changing one may even succeed."""
    real_open = os.open

    def readable(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        fd = real_open(path, flags, mode, **options)
        if flags & os.O_CREAT:
            os.chmod(fd, 0o755)
        return fd

    monkeypatch.setattr(os, "open", readable)
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    open_store(tmp_path / "kv.store", engine).close()
    assert "can be read by others, which stays: its file system keeps no modes" in caplog.text


@pytest.mark.parametrize(("free", "left"), [(1000 * MIB, 50 * MIB), (100 << 30, 2 << 30)])
def test_a_twentieth_of_the_free_space_is_left_to_others(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, free: int, left: int
) -> None:
    system = SimpleNamespace(f_bavail=free // MIB, f_frsize=MIB)
    monkeypatch.setattr(os, "fstatvfs", lambda _: system)
    with Store.open(tmp_path / "kv.store", engine) as store:
        assert free - left - 4 * MIB <= store.capacity_bytes <= free - left


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


@pytest.mark.parametrize("names", [["nvme"], ["a", "b"], ["kv.0", "b"]])
def test_a_folder_that_is_not_there_is_no_name_for_a_file(
    tmp_path: Path, engine: Engine, names: list[str]
) -> None:
    """Its drive is not mounted: KV would lie on another one, and stay after a crash."""
    places = [tmp_path / name for name in names]
    with pytest.raises(ConfigError, match=f"there is no {places[-1].parent}") as caught:
        open_store(places, engine)
    assert "mount the drive or make the folder" in str(caught.value)
    with pytest.raises(ConfigError, match="there is no"):
        plan_formats([str(place) for place in places])
    assert list(tmp_path.iterdir()) == []
    store = tmp_path / "old.store"
    open_store(store, engine).close()
    kept = store.rename(tmp_path / "old")
    open_store(kept, engine).close()  # one that is there may have any name


def test_a_folder_that_takes_no_files_is_told(engine: Engine) -> None:
    with pytest.raises(StorageError, match="cannot open the store /proc"):
        open_store(Path("/proc"), engine)


def test_a_store_in_use_is_refused(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "kv.store"
    with open_store(path, engine), pytest.raises(NotAStore, match="in use"):
        open_store(path, engine)
    open_store(path, engine).close()


def test_a_file_that_is_removed_while_its_lock_is_waited_for_is_opened_again(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two programs begin with one name: the first only looks whether there can be a store."""
    path, lock, waits = tmp_path / "kv.store", backing._lock, []

    def locked_late(fd: int, name: str) -> None:
        if not waits:
            path.unlink()
        waits.append(name)
        lock(fd, name)

    path.touch()  # as the other made it
    monkeypatch.setattr(backing, "_lock", locked_late)
    with open_store(path, engine) as store:
        assert store.free_bytes
        assert len(waits) == 2
        assert path.stat().st_size == DATA_OFFSET
    monkeypatch.setattr(backing, "_is_at", lambda *_: False)
    with pytest.raises(StorageError, match="again and again"):
        open_store(path, engine)


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path, engine: Engine) -> None:
    link = tmp_path / "kv.store"
    link.symlink_to(tmp_path / "not-mounted" / "kv.store")
    with pytest.raises(StorageError, match=r"not-mounted/kv\.store, which is not there") as caught:
        open_store(link, engine)
    assert "mount the drive" in (caught.value.hint or "")
    assert link.is_symlink()


@pytest.mark.parametrize(("code", "found"), [(errno.EIO, 100), (errno.ENODEV, None)])
def test_verify_tells_of_so_many_blocks_and_of_no_drive_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, found: int | None
) -> None:
    path, parts = tmp_path / "large", []
    path.write_bytes(bytes(8 * MIB))

    def fail() -> None:
        raise DeviceError(errno=code, operation="read", offset=0, size_bytes=4096)

    failing = SimpleNamespace(submit=lambda *_, **__: SimpleNamespace(wait=fail))
    monkeypatch.setattr(
        "dualblade.store.inspect.open_engine", lambda: contextlib.nullcontext(failing)
    )
    report: Any = SimpleNamespace(path=str(path), drive=None)
    if found is None:
        with pytest.raises(DeviceError):
            unreadable_ranges(report, parts.append)
        return
    bad = unreadable_ranges(report, parts.append)
    assert bad == [(at * 4096, 4096) for at in range(found)]
    assert len(parts) == found, "each of them may take a drive seconds"


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


def test_a_name_that_went_to_another_file_is_not_removed(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who owns the folder may put a link there while a wipe goes on."""
    path, others = tmp_path / "kv.store", tmp_path / "others"
    open_store(path, engine).close()
    others.write_text("theirs")
    plan, real = plan_wipe(str(path)), formatting.hold_file

    def held_and_swapped(*places: Any, **options: Any) -> Any:
        held = real(*places, **options)
        path.rename(tmp_path / "aside.store")
        path.symlink_to(others)
        return held

    monkeypatch.setattr(formatting, "hold_file", held_and_swapped)
    with pytest.raises(NotAStore, match="another file by now"):
        carry_out_wipe(plan, tell=lambda _: None)
    assert others.read_text() == "theirs"
    assert inspect_store(str(tmp_path / "aside.store")).problem is None


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
    path = shm / f"dualblade-test-{os.getpid()}.store"
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


def test_a_dead_file_system_is_told_in_our_words_and_takes_nothing(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    store = open_store(tmp_path, engine)
    free = store.free_bytes
    monkeypatch.setattr(os, "posix_fallocate", fail)
    monkeypatch.setattr(os, "ftruncate", fail)
    with pytest.raises(StorageError, match="cannot grow"):
        store.allocate(2 * MIB, Door.DIRECT)
    assert store.free_bytes == free
    store.close()  # of a private one nothing is lost


@pytest.mark.parametrize("fails", [False, True])
def test_no_dirty_page_is_left_where_commands_will_write(tmp_path: Path, *, fails: bool) -> None:
    """It would be written back after them, over another prompt's bytes. A sync that fails has told
    of an earlier writeback perhaps, and written nothing."""
    faults = [Fault(op=Op.SYNC_RANGE, errno=errno.EIO)] if fails else []
    with (
        FaultyEngine(open_engine(), faults) as engine,
        open_store(tmp_path / "kv.store", engine) as store,
    ):
        store._pages.by_commands = True  # as on an NVMe namespace
        extent = store.allocate(2 * MIB, Door.PAGE_CACHE)
        buffered = store._members.backings[0].buffered_fd
        os.pwrite(buffered, b"x" * MIB, extent.range.offset)  # and its sync never came
        store.free(extent)
        os.pwrite(buffered, b"x" * MIB, extent.range.offset)
        again = store.allocate(2 * MIB, Door.DIRECT)
        assert again.range == extent.range
        assert store.cached_bytes(again) == 0


@needs_root
def test_a_member_whose_disk_is_full_leaves_the_others_as_they_were(
    small_disk: Path, tmp_path: Path, engine: Engine
) -> None:
    roomy = tmp_path / "roomy.store"
    with Store.open([roomy, small_disk / "kv.store"], engine, capacity_bytes=128 * MIB) as store:
        store.allocate(8 * MIB, Door.DIRECT)
        before = roomy.stat()
        with pytest.raises(NoSpace, match="cannot grow"):
            store.allocate(80 * MIB, Door.DIRECT)
        after = roomy.stat()
        assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)
        store.allocate(4 * MIB, Door.DIRECT)


def test_a_forked_child_keeps_neither_blocks_nor_lock(tmp_path: Path, engine: Engine) -> None:
    """Of the parent's store, when that is closed: as a worker does that never looks at it."""
    named = tmp_path / "kv.store"
    private, store = open_store(tmp_path, engine), open_store(named, engine)
    private.allocate(4 * MIB, Door.DIRECT)
    backing = private._members.backings[0]
    blocks = os.dup(backing.buffered_fd)
    with waiting_child():
        private.close()
        store.close()
        assert os.fstat(blocks).st_blocks == 0
        open_store(named, engine).close()
    os.close(blocks)


def test_a_forked_child_whose_hooks_did_not_run_leaves_the_store_alone(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork by the C library, or Ctrl-C that came to the whole group in that moment."""
    path = tmp_path / "kv.store"
    with open_store(path, engine) as store:
        store.allocate(4 * MIB, Door.DIRECT)
        size = path.stat().st_size
        monkeypatch.setattr(store_module, "_OPEN", [])
        child = fork()
        if child == 0:
            try:
                store.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert path.stat().st_size == size


def what_a_process_has(folder: Path) -> list[str]:
    """Its open files and mappings in `folder`."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.lexists(link)]
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [name for name in (*names, *lines) if str(folder) in name]


def test_a_forked_child_has_nothing_of_the_store(tmp_path: Path, engine: Engine) -> None:
    """No descriptor, whose number may be another file's by the time it ends, and no mapping."""
    arena = Arena(2 * MIB)
    with open_store(tmp_path / "kv.store", engine) as store:
        extent = store.allocate(2 * MIB, Door.PAGE_CACHE)
        store.write(extent, 0, arena.address, 2 * MIB).wait()
        place = store.in_place(extent, 0, 2 * MIB)
        assert place is not None
        assert place.hold()
        came, go = os.pipe()
        child = fork()
        if child == 0:
            try:
                kept = what_a_process_has(tmp_path)
                store.close()
                os.write(go, f"{kept} {store.page_cache_bytes()}".encode())
            finally:
                os._exit(0)
        os.close(go)
        os.waitpid(child, 0)
        assert os.read(came, 4096) == b"[] 0"
        assert what_a_process_has(tmp_path)
        assert bytes(place.memory.buffer[:4]) == bytes(arena.buffer[:4])
        os.close(came)
    arena.close()


def test_a_file_system_of_larger_blocks_is_refused_before_a_prompt(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_statx_alignment", lambda _fd: (4096, 16384))
    with pytest.raises(Unsupported, match="in blocks of 16384 bytes"):
        Store.open(tmp_path / "kv.store", engine)
    assert not (tmp_path / "kv.store").exists()
    Store.open(tmp_path / "kv.store", engine, direct=False, capacity_bytes=16 * MIB).close()


@pytest.mark.parametrize("left", [0, DATA_OFFSET])
def test_a_store_whose_making_was_cut_short_can_be_told(
    tmp_path: Path, engine: Engine, left: int
) -> None:
    path = tmp_path / "kv.store"
    path.write_bytes(bytes(left))
    with pytest.raises(NotAStore, match="nothing at its beginning") as caught:
        open_store(path, engine)
    assert "delete it" in (caught.value.hint or "")
    assert path.stat().st_size == left


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


def once(plain: Any, *, after: bool = False) -> Any:
    """`plain`, at its first call ended by Ctrl-C: before it did anything, or when it was done."""
    calls = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1 and not after:
            raise KeyboardInterrupt
        result = plain(*arguments, **options)
        if calls == 1:
            raise KeyboardInterrupt
        return result

    return interrupted


@pytest.mark.parametrize("members", [1, 2])
def test_a_close_that_ctrl_c_meets_late_is_ended_by_the_next(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, members: int
) -> None:
    paths = [tmp_path / f"kv{number}.store" for number in range(members)]
    store = open_store(paths, engine)
    store.allocate(4 * MIB, Door.DIRECT)
    gc.collect()  # what earlier tests left would go meanwhile
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(Members, "ends", once(Members.ends))
    with pytest.raises(KeyboardInterrupt):
        store.close()
    store.close()
    store.close()
    assert [path.stat().st_size for path in paths] == [DATA_OFFSET] * members
    assert len(os.listdir("/proc/self/fd")) == before - 2 * members
    open_store(paths, engine).close()  # nobody has it any more


def test_ctrl_c_while_blocks_are_allocated_takes_nothing(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path / "kv.store", engine) as store:
        plain = os.posix_fallocate
        monkeypatch.setattr(os, "posix_fallocate", once(plain, after=True))
        with pytest.raises(KeyboardInterrupt):
            store.allocate(4 * MIB, Door.DIRECT)
        assert store.free_bytes == store.capacity_bytes
        assert (tmp_path / "kv.store").stat().st_size == DATA_OFFSET
        store.allocate(store.capacity_bytes, Door.DIRECT)


@pytest.mark.parametrize("after", [False, True])
def test_a_free_that_ctrl_c_ends_is_ended_by_the_next(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, *, after: bool
) -> None:
    with open_store(tmp_path / "kv.store", engine) as store:
        extent = store.allocate(4 * MIB, Door.PAGE_CACHE)
        monkeypatch.setattr(Store, "_drop", once(Store._drop, after=after))
        with pytest.raises(KeyboardInterrupt):
            store.free(extent)
        for _ in range(2):
            store.free(extent)
            assert store.free_bytes == store.capacity_bytes


def test_close_waits_for_a_transfer_that_ctrl_c_kept_from_being_noted(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be written behind the cut, into a store that says that it is clean."""
    arena, path = Arena(2 * MIB), tmp_path / "kv.store"
    with FaultyEngine(engine) as held:
        store = open_store(path, held)
        extent = store.allocate(2 * MIB, Door.DIRECT)
        held.hold(Op.WRITE)
        monkeypatch.setattr(held, "submit", once(held.submit, after=True))
        with pytest.raises(KeyboardInterrupt):
            store.write(extent, 0, arena.address, 2 * MIB)
        assert held.held == 1
        closing = threading.Thread(target=store.close)
        closing.start()
        closing.join(0.2)
        held.release()
        closing.join()
        assert engine.counters().write_bytes == 2 * MIB
        assert path.stat().st_size == DATA_OFFSET
    arena.close()


def test_what_is_freed_is_not_written_by_a_transfer_that_was_not_noted(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its range is another extent's by then."""
    arena = Arena(2 * MIB)
    with FaultyEngine(engine) as held, open_store(tmp_path / "kv.store", held) as store:
        extent = store.allocate(2 * MIB, Door.DIRECT)
        held.hold(Op.WRITE)
        monkeypatch.setattr(held, "submit", once(held.submit, after=True))
        with pytest.raises(KeyboardInterrupt):
            store.write(extent, 0, arena.address, 2 * MIB)
        freeing = threading.Thread(target=store.free, args=[extent])
        freeing.start()
        freeing.join(0.2)
        assert freeing.is_alive(), "it waits"
        held.release()
        freeing.join()
        assert engine.counters().write_bytes == 2 * MIB
        assert store.free_bytes == store.capacity_bytes
    arena.close()


def test_a_write_that_failed_is_told_once_by_the_move(tmp_path: Path, engine: Engine) -> None:
    """Also where nobody waited for it, and other transfers came after."""
    arena = Arena(2 * MIB)
    with FaultyEngine(engine) as faulty, open_store(tmp_path / "kv.store", faulty) as store:
        extent = store.allocate(2 * MIB, Door.DIRECT)
        faulty.inject(Fault(op=Op.WRITE, errno=errno.EIO))
        store.write(extent, 0, arena.address, 2 * MIB)
        for _ in range(2):
            store.read(extent, 0, arena.address, 4096).wait()
        with pytest.raises(DeviceError):
            store.move(extent, Door.PAGE_CACHE)
        store.move(extent, Door.PAGE_CACHE)
        assert extent.door is Door.PAGE_CACHE
    arena.close()


@pytest.mark.parametrize("kind", ["btrfs", "fuse"])
def test_where_the_end_of_writeback_says_nothing_the_file_is_synced(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with open_store(tmp_path / "kv.store", engine) as store:
        if page_cache.waits_for_device(store._members.backings[0].buffered_fd):
            assert store._members.backings[0].sync is Op.SYNC_RANGE
    magic = {"btrfs": 0x9123683E, "fuse": 0x65735546}[kind]
    monkeypatch.setattr(page_cache, "_file_system", lambda _fd: magic)
    with open_store(tmp_path / "kv.store", engine) as store:
        assert store._members.backings[0].sync is Op.DATASYNC


@pytest.mark.parametrize(("op", "is_told"), [(Op.READ, False), (Op.WRITE, True)])
def test_a_move_tells_of_writes_that_failed_and_not_of_reads(
    tmp_path: Path, engine: Engine, op: Op, *, is_told: bool
) -> None:
    """Who asked for the bytes is told by the read itself; if nobody did, they are sound."""
    arena = Arena(2 * MIB)
    with FaultyEngine(engine) as faulty, open_store(tmp_path / "kv.store", faulty) as store:
        extent = store.allocate(2 * MIB, Door.DIRECT)
        store.write(extent, 0, arena.address, 2 * MIB).wait()
        faulty.inject(Fault(op=op, errno=errno.EIO))
        transfer = store.read if op is Op.READ else store.write
        ticket = transfer(extent, 0, arena.address, 2 * MIB)
        with pytest.raises(DeviceError):
            ticket.wait()
        with pytest.raises(DeviceError) if is_told else contextlib.nullcontext():
            store.move(extent, Door.PAGE_CACHE)
    arena.close()


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


MISUSE = """
import sys
from pathlib import Path
from dualblade.errors import ConfigError
from dualblade.io import Arena, open_engine
from dualblade.store import Door, Store

MIB = 1 << 20
folder = Path(sys.argv[1])

def refused(call, *arguments):
    before = {store: (store.used_bytes, str(store.counters)) for store in (mine, other, plain)}
    try:
        call(*arguments)
    except ConfigError:
        left = {store: (store.used_bytes, str(store.counters)) for store in before}
        if left == before:
            return
        print("changed something:", call, arguments)
    else:
        print("not refused:", call, arguments)

with (
    Arena(2 * MIB) as arena,
    open_engine("posix") as engine,
    Store.open(folder / "mine.store", engine, capacity_bytes="16MiB") as mine,
    Store.open(folder / "other.store", engine, capacity_bytes=16 * MIB) as other,
    Store.open(folder / "plain.store", engine, capacity_bytes=16 * MIB, direct=False) as plain,
):
    own, cached = mine.allocate("4MiB", "direct"), mine.allocate(4 * MIB, Door.PAGE_CACHE)
    foreign, stale = other.allocate(2 * MIB, Door.DIRECT), mine.allocate(2 * MIB, "page-cache")
    mine.free(stale)
    mine.free(stale)  # twice is once
    at, size = arena.address, 4096
    arena.buffer[:size] = b"k" * size
    mine.write(own, 0, at, size).wait()
    for call in (mine.read, mine.write, mine.read_again):
        for extent in (foreign, stale, None):
            refused(call, extent, 0, at, size)
        for extent in (own, cached):
            for offset, count in ((-4096, size), (4 * MIB, size), (0, 5 * MIB), (2 * MIB, 3 * MIB)):
                refused(call, extent, offset, at, count)
            for offset, count in ((100, size), (0, 100), (0, 0), (4096, -4096)):
                refused(call, extent, offset, at, count)
        refused(call, own, 0, at + 512, size)
    for extent in (foreign, stale):
        refused(mine.in_place, extent, 0, size)
        refused(mine.move, extent, Door.DIRECT)
        refused(mine.split, extent, 2 * MIB)
        refused(mine.join, own, extent)
    refused(mine.in_place, cached, -4096, size)
    refused(mine.in_place, cached, 0, 5 * MIB)
    refused(mine.free, foreign)
    for size_bytes in (0, -1, "many"):
        refused(mine.allocate, size_bytes, Door.DIRECT)
    for door in ("directly", Door.FREE, Door.DEMOTING, None):
        refused(mine.allocate, 2 * MIB, door)
        refused(mine.move, own, door)
    refused(plain.allocate, 2 * MIB, Door.DIRECT)
    refused(plain.move, plain.allocate(2 * MIB, Door.PAGE_CACHE), "direct")
    for at_bytes in (0, MIB, 4 * MIB):
        refused(mine.split, own, at_bytes)
    refused(mine.join, own, cached)  # of two doors
    rest = mine.split(own, 2 * MIB)
    refused(mine.join, rest, own)
    mine.join(own, rest)
    refused(mine.read, rest, 0, at, size)
    mine.free(rest)  # it went into the other
    arena.buffer[:size] = bytes(size)
    mine.read(own, 0, at, size).wait()
    if bytes(arena.buffer[:size]) != b"k" * size:
        print("overwritten")
"""


@pytest.mark.parametrize("flags", [[], ["-O"]])
def test_what_is_asked_of_a_store_wrongly_is_refused_and_changes_nothing(
    tmp_path: Path, flags: list[str]
) -> None:
    """Also where assertions are off: it would write over other KV, or beyond its extent."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", MISUSE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_demotion_that_failed_is_tried_again(tmp_path: Path, engine: Engine) -> None:
    with FaultyEngine(engine) as faulty, open_store(tmp_path / "kv.store", faulty) as store:
        extent = store.allocate(2 * MIB, Door.PAGE_CACHE)
        faulty.inject(Fault(op=Op.SYNC_RANGE, errno=errno.EIO))
        with pytest.raises(DeviceError):
            store.move(extent, Door.DIRECT)
        with Arena(2 * MIB) as arena, pytest.raises(ConfigError, match="did not end"):
            store.read(extent, 0, arena.address, 2 * MIB)
        with pytest.raises(ConfigError, match="did not end"):
            store.move(extent, Door.PAGE_CACHE)
        store.move(extent, Door.DIRECT)
        assert extent.door is Door.DIRECT
