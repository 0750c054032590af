"""Each engine on a namespace: what is asked for is in force, or refused with the reason."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualblade.errors import DeviceError, Unsupported
from dualblade.io import Arena, Engine, EngineChoice, open_engine
from dualblade.store import Door, Store
from dualblade.store.formatting import carry_out_wipe, plan_wipe
from dualblade.testing.contract import pattern
from dualblade.units import KIB, MIB
from tests.lab.guest.conftest import ask, block_of, find_namespace, formatted, reads_of
from tests.lab.guest.test_store import fill, read_back

_SYSCTL = Path("/proc/sys/kernel/io_uring_disabled")


@pytest.fixture
def small() -> Iterator[str]:
    """The drive with commands of at most 128 KiB, formatted; wiped afterwards."""
    path = formatted(find_namespace("LABSMALL"))
    yield path
    carry_out_wipe(plan_wipe(path), tell=lambda _: None)


@pytest.fixture
def no_io_uring() -> Iterator[None]:
    """As where an administrator, or a container's seccomp profile, forbids it."""
    if not _SYSCTL.exists():
        pytest.skip("this kernel (before 6.6) cannot forbid io_uring")
    before = _SYSCTL.read_text()
    _SYSCTL.write_text("2")
    yield
    _SYSCTL.write_text(before)


class _WithoutUringCmd:
    """The native engine as before Linux 5.19."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def register_namespace(self, _fd: int, _limits: Any) -> int:
        return errno.EOPNOTSUPP


def use(store: Store, arena: Arena, node: str | None = None) -> None:
    """Bytes through both doors come back; with `node` the drive counts a command a piece."""
    data = pattern(4 * MIB, seed=5)
    extent = store.allocate(4 * MIB, Door.DIRECT)
    fill(store, extent, arena, data)
    before = reads_of(node) if node else 0
    assert read_back(store, extent, arena, len(data)) == data
    assert store.page_cache_bytes() == 0
    if node:
        assert reads_of(node) - before == 4 * MIB // (128 * KIB)
    store.move(extent, Door.PAGE_CACHE)
    assert read_back(store, extent, arena, len(data)) == data
    data = data[::-1]
    fill(store, extent, arena, data)
    store.move(extent, Door.DIRECT)
    assert read_back(store, extent, arena, len(data)) == data
    store.free(extent)


@pytest.mark.parametrize(
    ("choice", "name", "reason"),
    [
        ("uring-cmd", "uring-cmd", None),
        ("io_uring", "io_uring", "io_engine io_uring was asked for: O_DIRECT on {block}"),
        ("posix", "nvme-ioctl", None),
    ],
)
def test_what_is_asked_for_is_in_force(
    small: str, arena: Arena, choice: EngineChoice, name: str, reason: str | None
) -> None:
    with open_engine(choice, queue_depth=4) as engine, Store.open(small, engine) as store:
        engine.register_arena(arena)
        assert engine.name == name
        assert engine.reason == (reason and reason.format(block=block_of(small)))
        use(store, arena, "small")


def test_uring_cmd_is_refused_where_it_cannot_be(small: str) -> None:
    with open_engine("uring-cmd") as engine:
        with pytest.raises(Unsupported, match="needs a store on an NVMe namespace"):
            Store.open(block_of(small), engine)
        with pytest.raises(Unsupported, match="path page-cache"):
            Store.open(small, engine, direct=False)
        engine._native = _WithoutUringCmd(engine._native)  # type: ignore[assignment]
        with pytest.raises(Unsupported, match=r"Linux 5\.19"):
            Store.open(small, engine)


def test_a_kernel_without_uring_cmd_takes_the_block_device(small: str, arena: Arena) -> None:
    with open_engine(queue_depth=4) as engine:
        engine._native = _WithoutUringCmd(engine._native)  # type: ignore[assignment]
        with Store.open(small, engine) as store:
            assert engine.name == "io_uring"
            assert engine.reason == (
                "NVMe passthrough needs io_uring with IORING_OP_URING_CMD (Linux 5.19): "
                f"O_DIRECT on {block_of(small)}"
            )
            use(store, arena)


@pytest.mark.usefixtures("no_io_uring")
def test_without_io_uring_commands_go_by_ioctl(small: str, arena: Arena) -> None:
    with open_engine(queue_depth=4) as engine, Store.open(small, engine) as store:
        assert engine.name == "nvme-ioctl"
        assert engine.reason is not None
        assert engine.reason.startswith("io_uring is forbidden here: EPERM")
        use(store, arena, "small")
    with pytest.raises(Unsupported, match="forbidden here"):
        open_engine("uring-cmd")


def interrupts_of(path: str) -> int:
    """Interrupts of the queues for I/O of the drive behind a namespace, since boot."""
    controller = re.sub(r"n\d+$", "", os.path.basename(block_of(path)))
    lines = Path("/proc/interrupts").read_text().splitlines()
    counts = [
        sum(int(word) for word in line.split()[1:] if word.isdigit())
        for line in lines
        if re.search(rf"\b{controller}q[1-9]\d*$", line)
    ]
    assert counts, lines
    return sum(counts)


@pytest.mark.parametrize("by", ["commands", "O_DIRECT"])
def test_polled_reads_interrupt_nobody(small: str, arena: Arena, by: str) -> None:
    """The drive has a queue that is polled (nvme.poll_queues=1): what goes through it raises no
    interrupt, and what does not go through it does."""
    path = small if by == "commands" else block_of(small)
    data = pattern(4 * MIB, seed=8)
    raised = {}
    for io_poll in (False, True):
        with (
            open_engine(queue_depth=4, io_poll=io_poll) as engine,
            Store.open(path, engine) as store,
        ):
            assert engine.name == ("uring-cmd" if by == "commands" else "io_uring")
            assert ("completions of direct reads and writes are polled for" in engine.notes) == (
                io_poll
            )
            engine.register_arena(arena)
            extent = store.allocate(4 * MIB, Door.DIRECT)
            fill(store, extent, arena, data)
            for _ in range(3):
                reads, before = reads_of("small"), interrupts_of(path)
                for _ in range(4):
                    assert read_back(store, extent, arena, len(data)) == data
                raised[io_poll] = interrupts_of(path) - before
                if raised[io_poll] >= 0:
                    break  # else the drive was reset, and counts anew: an emulator that is starved
            assert reads_of("small") - reads == 4 * 32
            # The other door has a ring of its own, which sleeps as ever.
            store.move(extent, Door.PAGE_CACHE)
            assert read_back(store, extent, arena, len(data)) == data
            fill(store, extent, arena, data[::-1])
            store.move(extent, Door.DIRECT)
            assert read_back(store, extent, arena, len(data)) == data[::-1]
    assert raised[True] == 0
    assert raised[False] > 0


def test_a_hang_ends_commands_by_ioctl_as_in_a_ring(arena: Arena) -> None:
    """Given up by the kernel after its time limit (2 s here), and tried once more."""
    path = formatted(find_namespace("LABSLOW"))
    limit = Path(f"/sys/block/{block_of(path).removeprefix('/dev/')}/queue/io_timeout")
    before = limit.read_text()
    limit.write_text("2000")
    with open_engine("posix", queue_depth=4) as engine, Store.open(path, engine) as store:
        assert engine.name == "nvme-ioctl"
        extent = store.allocate(8 * MIB, Door.DIRECT)
        data = pattern(MIB, seed=9)
        fill(store, extent, arena, data)
        ask("pause", seconds=10)
        assert read_back(store, extent, arena, len(data)) == data
        counters = engine.counters()
        assert counters.retries > 0
        assert counters.errors == 0
    limit.write_text(before)
    carry_out_wipe(plan_wipe(path), tell=lambda _: None)


def test_a_bad_sector_by_ioctl_is_told_by_drive_and_place(arena: Arena) -> None:
    path = formatted(find_namespace("LABBAD"))
    with open_engine("posix", queue_depth=4) as engine, Store.open(path, engine) as store:
        extent = store.allocate(32 * MIB, Door.DIRECT)
        at = 16 * MIB - extent.range.offset
        with pytest.raises(DeviceError) as caught:
            store.read(extent, at, arena.address, 128 * KIB).wait()
        status = caught.value.nvme_status
        assert status is not None
        assert status & 0x7FF == 0x281
        assert (caught.value.path, caught.value.offset) == (path, 16 * MIB)
    carry_out_wipe(plan_wipe(path), tell=lambda _: None)


@pytest.mark.parametrize("discard", [False, True])
def test_freed_extents_are_discarded_when_asked(
    small: str, engine: Engine, arena: Arena, discard: bool
) -> None:
    """What the drive has forgotten it reads as zeros; what it has not, nobody asked it to."""
    with Store.open(small, engine, discard=discard) as store:
        extents = [store.allocate(2 * MIB, Door.DIRECT) for _ in range(2)]
        data = pattern(2 * MIB, seed=2)
        for extent in extents:
            fill(store, extent, arena, data)
        store.free(extents[0])
        again = store.allocate(2 * MIB, Door.DIRECT)
        assert again.range == extents[0].range
        expected = bytes(len(data)) if discard else data
        assert read_back(store, again, arena, len(data)) == expected
        assert read_back(store, extents[1], arena, len(data)) == data
