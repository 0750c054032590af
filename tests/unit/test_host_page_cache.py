"""Page-cache truth, against real files of the file system that the tests run on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualblade.errors import DeviceError
from dualblade.host import page_cache
from dualblade.host.devices import MEMORY_FILE_SYSTEMS, device_facts
from dualblade.units import MIB

SIZE = 8 * MIB


def needs_device(folder: Path) -> None:
    kind = device_facts(folder).file_system
    if kind in MEMORY_FILE_SYSTEMS:
        pytest.skip(f"temporary files are on {kind}: they are page cache; use --basetemp")


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of SIZE random bytes, written back, nothing of it cached."""
    needs_device(tmp_path)
    with (tmp_path / "data").open("w+b") as file:
        file.write(os.urandom(SIZE))
        file.flush()
        os.fsync(file.fileno())
        page_cache.drop(file.fileno(), 0, SIZE)
        yield file.fileno()


@pytest.fixture(params=["cachestat", "mincore"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "mincore":
        monkeypatch.setattr(page_cache, "_CACHESTAT", 9999)  # no such call: ENOSYS
    return str(request.param)


def cached(fd: int, offset: int, size_bytes: int) -> int:
    return page_cache.cached_bytes(fd, offset, size_bytes).cached_bytes


def read_exactly(fd: int, offset: int, size_bytes: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead beyond what is asked
    assert len(os.pread(fd, size_bytes, offset)) == size_bytes


@pytest.mark.usefixtures("method")
def test_reading_caches_and_dropping_frees(fd: int) -> None:
    assert cached(fd, 0, SIZE) == 0
    read_exactly(fd, 2 * MIB, 4 * MIB)
    assert cached(fd, 2 * MIB, 4 * MIB) == 4 * MIB
    page_cache.drop(fd, 2 * MIB, 2 * MIB)
    assert cached(fd, 2 * MIB, 2 * MIB) == 0
    assert cached(fd, 4 * MIB, 2 * MIB) == 2 * MIB
    page_cache.drop(fd, 0, SIZE)
    assert cached(fd, 0, SIZE) == 0


@pytest.mark.usefixtures("method")
def test_a_range_of_nothing_is_not_the_whole_file(fd: int) -> None:
    read_exactly(fd, 0, SIZE)
    assert cached(fd, 0, 0) == 0
    page_cache.drop(fd, 0, 0)
    assert cached(fd, 0, SIZE) == SIZE


@pytest.mark.usefixtures("method")
def test_whole_pages_are_counted(fd: int) -> None:
    read_exactly(fd, 0, SIZE)
    assert cached(fd, 100, 10) == 4096
    assert cached(fd, 4090, 10) == 8192
    assert cached(fd, SIZE - 4096, 64 * 4096) == 4096  # beyond the end there is nothing


def test_asking_does_not_cache(fd: int, method: str) -> None:
    for _ in range(3):
        assert cached(fd, 0, SIZE) == 0, method


def test_dirty_pages_are_seen_and_are_not_dropped_before_writeback(fd: int) -> None:
    os.pwrite(fd, os.urandom(2 * MIB), 0)
    use = page_cache.cached_bytes(fd, 0, SIZE)
    if use.dirty_bytes is None or use.writeback_bytes is None:
        pytest.skip("no cachestat on this kernel: dirty pages are unknown")
    assert use.dirty_bytes + use.writeback_bytes == 2 * MIB
    os.fdatasync(fd)
    use = page_cache.cached_bytes(fd, 0, SIZE)
    assert (use.cached_bytes, use.dirty_bytes, use.writeback_bytes) == (2 * MIB, 0, 0)
    page_cache.drop(fd, 0, 2 * MIB)
    assert cached(fd, 0, SIZE) == 0


def test_mincore_does_not_know_dirty_pages(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_CACHESTAT", 9999)
    use = page_cache.cached_bytes(fd, 0, SIZE)
    assert use.dirty_bytes is None
    assert use.writeback_bytes is None


@pytest.mark.usefixtures("method")
def test_what_cannot_be_mapped_has_nothing_cached(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSE without a page cache, on a kernel that has no cachestat."""

    def refusing(*_: int) -> int:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(page_cache, "map_pages", refusing)
    assert page_cache._mincore(fd, 0, 4096) == 0


def test_a_closed_descriptor_is_a_device_error(tmp_path: Path) -> None:
    closed = os.open(tmp_path, os.O_RDONLY)
    os.close(closed)
    with pytest.raises(DeviceError) as caught:
        page_cache.cached_bytes(closed, 0, 4096)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(DeviceError) as caught:
        page_cache.drop(closed, 4096, 8192)
    assert caught.value.errno == errno.EBADF
    assert (caught.value.offset, caught.value.size_bytes) == (4096, 8192)
