"""A mapped range of a file: what bringing a missing page reads, and what is left of the advice."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualblade.host import mapped
from dualblade.host.devices import MEMORY_FILE_SYSTEMS, device_facts
from dualblade.host.mapped import FileMemory
from dualblade.host.page_cache import cached_bytes, drop
from dualblade.units import KIB, MIB

SIZE_BYTES, EXTENT, GONE = 24 * MIB, 10 * MIB, 4 * KIB


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """Of a file of which 2 MiB are cached, page by page; advised as a store's."""
    if device_facts(tmp_path).file_system in MEMORY_FILE_SYSTEMS:
        pytest.skip("needs a file system on a device")
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, os.urandom(SIZE_BYTES), 0)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    drop(fd, 0, SIZE_BYTES)
    for at in range(EXTENT, EXTENT + 2 * MIB, 4096):
        os.pread(fd, 4096, at)
    yield fd
    os.close(fd)


def flags(address: int) -> list[str]:
    """Of the mapping at `address`; `rr` is MADV_RANDOM."""
    text = Path("/proc/self/smaps").read_text()
    (found,) = re.findall(rf"^0*{address:x}-.*?^VmFlags: (.*?)$", text, re.DOTALL | re.MULTILINE)
    return str(found).split()


@pytest.mark.parametrize("others_read", [False, True])
def test_a_page_that_went_is_brought_alone(
    fd: int, monkeypatch: pytest.MonkeyPatch, *, others_read: bool
) -> None:
    """The last of an extent, after `hold` had seen it: half of a read around it would be the next
    extent's, whose direct door may be open. Where the kernel is to read ahead it may."""

    def is_cached(*_: object) -> bool:
        drop(fd, EXTENT + 2 * MIB - GONE, GONE)
        return True

    monkeypatch.setattr(FileMemory, "is_cached", is_cached)
    memory = FileMemory(fd, EXTENT, 2 * MIB, others_read=others_read)
    assert memory.hold(0, 2 * MIB)
    assert cached_bytes(fd, EXTENT, 2 * MIB).cached_bytes == 2 * MIB
    beside = cached_bytes(fd, 0, SIZE_BYTES).cached_bytes - 2 * MIB
    assert others_read or not beside
    assert "rr" not in flags(memory.address)  # what is used is to count as used
    assert bytes(memory.buffer[-GONE:]) == os.pread(fd, GONE, EXTENT + 2 * MIB - GONE)
    memory.close()


def test_what_lies_before_a_part_that_is_held_is_not_held_by_it(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FileMemory(fd, EXTENT, 2 * MIB)
    brought: list[int] = []
    plain = memory._bring

    def bring(offset: int, size_bytes: int) -> bool:
        brought.append(offset)
        return plain(offset, size_bytes)

    monkeypatch.setattr(memory, "_bring", bring)
    for offset in (MIB, 0, 0, MIB, MIB):
        assert memory.hold(offset, MIB)
    assert brought == [MIB, 0]
    memory.close()


def test_ctrl_c_leaves_no_mapping(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as pages are mapped the kernel does not drop them."""
    memory = FileMemory(fd, EXTENT, 2 * MIB)
    assert memory.hold(0, 2 * MIB)

    def interrupted(*_: object) -> None:
        raise AssertionError("a line of Python, at which Ctrl-C may come")

    monkeypatch.setattr(mapped, "unmap_pages", interrupted)
    memory.close()
    drop(fd, EXTENT, 2 * MIB)
    assert cached_bytes(fd, EXTENT, 2 * MIB).cached_bytes == 0


def test_a_touch_reads_around_its_page(fd: int) -> None:
    """What no advice bounds without a price (docs/decisions/0010): up to `read_ahead_kb`."""
    memory = FileMemory(fd, EXTENT, 2 * MIB)
    drop(fd, EXTENT, 2 * MIB)
    touched = memory.buffer[MIB]
    brought = cached_bytes(fd, 0, SIZE_BYTES).cached_bytes
    assert touched == os.pread(fd, 1, EXTENT + MIB)[0]
    device = os.fstat(fd).st_dev
    queue = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    if queue.exists():
        assert 0 < brought <= max(int(queue.read_text()) * KIB, 2 * MIB)
    memory.close()
