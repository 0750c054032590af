"""A store of several members: files and devices, striped. What one place does, several do."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dualblade.errors import ConfigError, DeviceError, NoSpace, NotAStore
from dualblade.io import Arena, Engine, Op, Transfer, open_engine
from dualblade.store import Door, Store
from dualblade.store.backing import FileBacking
from dualblade.store.device import write_superblocks
from dualblade.store.format import DATA_OFFSET, STRIPE_BYTES, SUPERBLOCK_BYTES, Superblock
from dualblade.store.formatting import (
    carry_out_format,
    carry_out_wipe,
    plan_formats,
    plan_wipe,
    plan_wipes,
)
from dualblade.store.inspect import inspect_store, store_problem
from dualblade.store.place import write_superblock
from dualblade.testing.contract import pattern
from dualblade.testing.faulty import Fault, FaultyEngine
from dualblade.units import KIB, MIB
from tests.devices import contents, loop_device, needs_root

KINDS = ["1 file", "2 files", "3 files", "2 devices", "3 devices"]
DEVICE_BYTES = 24 * MIB


@pytest.fixture(
    params=[pytest.param(kind, marks=[needs_root] if "device" in kind else []) for kind in KINDS]
)
def members(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    """Files that are not there yet, or formatted devices: 512, 4096 and again 512-byte blocks."""
    count, kind = request.param.split()
    with contextlib.ExitStack() as stack:
        yield make_members(stack, tmp_path, int(count), kind.startswith("device"))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    with contextlib.ExitStack() as stack:
        return make_members(stack, tmp_path, 2, devices=False)


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        yield make_members(stack, tmp_path, 2, devices=True)


def make_members(stack: contextlib.ExitStack, folder: Path, count: int, devices: bool) -> list[str]:
    if not devices:
        return [str(folder / f"kv.{index}") for index in range(count)]
    made = [
        stack.enter_context(loop_device(folder / f"image{index}", DEVICE_BYTES, block_bytes))
        for index, block_bytes in enumerate([512, 4096, 512][:count])
    ]
    carry_out_format(*plan_formats(made))
    return made


@pytest.fixture
def engine() -> Iterator[Engine]:
    with open_engine(queue_depth=4) as opened:
        yield opened


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(8 * MIB) as arena:
        yield arena


def fill(arena: Arena, data: bytes) -> None:
    arena.buffer[: len(data)] = data


@contextlib.contextmanager
def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Transfer]]:
    """All transfers that are handed to `engine` meanwhile."""
    seen: list[Transfer] = []
    submit = engine.submit
    with monkeypatch.context() as patch:
        patch.setattr(
            engine, "submit", lambda batch, **path: (seen.extend(batch), submit(batch, **path))[1]
        )
        yield seen


@needs_root
def test_folios_that_reach_over_the_end_of_a_range_are_dropped_whole(
    devices: list[str], engine: Engine
) -> None:
    """Another program's read-ahead leaves folios of up to 2 MiB, and of two members a range begins
    at any MiB: the kernel keeps a folio that is dropped in part."""
    with Store.open(devices, engine) as store:
        extents = [store.allocate(2 * MIB, Door.DIRECT) for _ in range(6)]
        for device in devices:
            subprocess.run(["blockdev", "--setra", str(16 * MIB // 512), device], check=True)
            Path(device).read_bytes()
        for extent in extents[1::2]:
            store.move(extent, Door.PAGE_CACHE)
            assert store.cached_bytes(extent) == 0


def test_both_doors_see_the_same_bytes(members: list[str], engine: Engine, arena: Arena) -> None:
    with Store.open(members, engine, capacity_bytes=18 * MIB) as store:
        assert store.member_count == len(members)
        store.allocate(2 * MIB, Door.DIRECT)
        extent = store.allocate(6 * MIB, Door.DIRECT)
        for turn, door in enumerate([Door.PAGE_CACHE, Door.DIRECT] * 2):
            data = pattern(6 * MIB, seed=turn)
            fill(arena, data)
            store.write(extent, 0, arena.address, len(data)).wait()
            store.move(extent, door)
            fill(arena, bytes(len(data)))
            store.read(extent, 0, arena.address, len(data)).wait()
            assert arena.buffer[: len(data)] == data
            cached = store.cached_bytes(extent)
            # The machine may take pages at any moment, and none may come.
            assert 6 * MIB >= cached >= store.page_cache_bytes() >= 0
            assert (cached > 0) == (door is Door.PAGE_CACHE)


def test_any_transfers_equal_a_bytearray(members: list[str], engine: Engine, arena: Arena) -> None:
    """Sizes and places off by blocks around the stripes, through both doors, in two extents."""
    draw = random.Random(len(members))
    with Store.open(members, engine, capacity_bytes=18 * MIB) as store:
        extents = [store.allocate(6 * MIB, door) for door in (Door.DIRECT, Door.PAGE_CACHE)]
        models = [bytearray(6 * MIB), bytearray(6 * MIB)]
        fill(arena, bytes(6 * MIB))
        for extent in extents:
            store.write(extent, 0, arena.address, 6 * MIB).wait()
        for turn in range(60):
            which = turn % 2
            edge = draw.randrange(7) * MIB + draw.randrange(-2, 3) * 4096
            at = min(max(0, edge), 6 * MIB - 4096)
            size = min(draw.choice([4096, 60 * KIB, MIB, MIB + 4096, 3 * MIB]), 6 * MIB - at)
            if turn % 3:
                data = pattern(size, seed=turn)
                fill(arena, data)
                store.write(extents[which], at, arena.address, size).wait()
                models[which][at : at + size] = data
            store.read(extents[which], at, arena.address, size).wait()
            assert arena.buffer[:size] == models[which][at : at + size]
            if turn % 20 == 19:
                doors = [extent.door for extent in extents]
                for extent, door in zip(extents, reversed(doors), strict=True):
                    store.move(extent, door)


def test_every_member_carries_its_share(
    members: list[str], engine: Engine, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of whole rows: equal bytes of each, in requests no smaller than a stripe, all in one
    ticket, whose first bytes are the first to be waited for."""
    count = len(members)
    with Store.open(members, engine, capacity_bytes=18 * MIB) as store:
        extent = store.allocate(6 * MIB, Door.DIRECT)
        data = pattern(6 * MIB, seed=9)
        fill(arena, data)
        store.write(extent, 0, arena.address, 6 * MIB).wait()
        fill(arena, bytes(6 * MIB))
        before = engine.counters()
        with watched(engine, monkeypatch) as seen:
            ticket = store.read(extent, 0, arena.address, 6 * MIB)
        ticket.wait(MIB + 4096)
        assert arena.buffer[: MIB + 4096] == data[: MIB + 4096]
        ticket.wait()
        shares: dict[int, int] = {}
        for transfer in seen:
            shares[transfer.fd] = shares.get(transfer.fd, 0) + transfer.size_bytes
        assert list(shares.values()) == [6 * MIB // count] * count
        done = engine.counters() - before
        assert (done.read_ops, done.read_bytes) == (6, 6 * MIB)
        assert store.counters.direct_read_bytes == 6 * MIB


def test_a_buffered_write_is_stored_on_all_members_when_it_has_ended(
    members: list[str], engine: Engine, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes to all, then one sync for each member that was written, on its own descriptor."""
    with Store.open(members, engine, capacity_bytes=18 * MIB) as store:
        extent = store.allocate(6 * MIB, Door.PAGE_CACHE)
        with watched(engine, monkeypatch) as seen:
            store.write(extent, 0, arena.address, 6 * MIB).wait()
        kinds = [transfer.op for transfer in seen]
        syncs = [transfer for transfer in seen if transfer.op is Op.SYNC_RANGE]
        assert kinds == [Op.WRITE] * (len(kinds) - len(syncs)) + [Op.SYNC_RANGE] * len(members)
        written = {t.fd for t in seen if t.op is Op.WRITE}
        assert {t.fd for t in syncs} == written
        assert sum(t.size_bytes for t in syncs) == 6 * MIB
        assert len(written) == len(members)


def test_demotion_frees_its_own_pages_and_no_neighbours(
    members: list[str], engine: Engine, arena: Arena
) -> None:
    """On a member, the stripes of two extents may lie in one 2 MiB folio's range."""
    with Store.open(members, engine, capacity_bytes=18 * MIB) as store:
        extents = [store.allocate(2 * MIB, Door.PAGE_CACHE) for _ in range(6)]
        for extent in extents:
            store.write(extent, 0, arena.address, 2 * MIB).wait()
        for extent in extents[::2]:
            store.move(extent, Door.DIRECT)
        held = [store.cached_bytes(extent) for extent in extents]
        assert held == [0, 2 * MIB] * 3


def test_a_capacity_is_a_limit_for_all_together(members: list[str], engine: Engine) -> None:
    with Store.open(members, engine, capacity_bytes=11 * MIB) as store:
        assert store.capacity_bytes == 10 * MIB
        for _ in range(5):
            store.allocate(2 * MIB, Door.DIRECT)
        with pytest.raises(NoSpace):
            store.allocate(2 * MIB, Door.DIRECT)
    with pytest.raises(NoSpace):
        Store.open(members, engine, capacity_bytes=MIB)


def test_order_of_names_does_not_matter(members: list[str], engine: Engine) -> None:
    """Names of devices change from one start to the next: the superblocks know the order."""
    with Store.open(members, engine, capacity_bytes=12 * MIB) as store:
        first = store.path
    with Store.open(members[::-1], engine, capacity_bytes=12 * MIB) as store:
        assert store.path == first


def test_closing_leaves_nothing_but_superblocks(
    members: list[str], engine: Engine, arena: Arena
) -> None:
    fill(arena, b"\xff" * (6 * MIB))
    for keep in (False, True):
        with Store.open(members, engine, capacity_bytes=12 * MIB, keep_blocks=keep) as store:
            extent = store.allocate(6 * MIB, Door.DIRECT)
            store.write(extent, 0, arena.address, 6 * MIB).wait()
        for path in members:
            share = 6 * MIB // len(members)
            data = contents(path)[DATA_OFFSET : DATA_OFFSET + share]
            assert data == (b"\xff" * share if keep else bytes(len(data)))
    reports = [inspect_store(path) for path in members]
    assert store_problem(reports) is None
    blocks = [report.superblock for report in reports]
    assert len({(b.uuid, b.generation, b.in_use) for b in blocks if b is not None}) == 1


@needs_root
def test_capacity_is_that_of_the_smallest(tmp_path: Path, engine: Engine, arena: Arena) -> None:
    """Every extent of a set of 24 and 40 MiB is written; what is beside them stays as it was."""
    with (
        loop_device(tmp_path / "small", 24 * MIB, 512) as small,
        loop_device(tmp_path / "large", 40 * MIB, 4096) as large,
    ):
        carry_out_format(*plan_formats([large, small]))
        before = contents(large), contents(small)
        fill(arena, b"\xff" * (8 * MIB))
        with Store.open([large, small], engine, keep_blocks=True) as store:
            assert store.capacity_bytes == 40 * MIB
            for _ in range(5):
                extent = store.allocate(8 * MIB, Door.DIRECT)
                store.write(extent, 0, arena.address, 8 * MIB).wait()
        for path, was in zip((large, small), before, strict=True):
            now, end = contents(path), DATA_OFFSET + 20 * MIB
            assert now[DATA_OFFSET:end] == b"\xff" * (20 * MIB)
            assert now[SUPERBLOCK_BYTES:DATA_OFFSET] == was[SUPERBLOCK_BYTES:DATA_OFFSET]
            assert now[end:-SUPERBLOCK_BYTES] == was[end:-SUPERBLOCK_BYTES]


# What is refused: each names the member, and writes to none.


@pytest.fixture(params=["files", pytest.param("devices", marks=needs_root)])
def pair(request: pytest.FixtureRequest, tmp_path: Path, engine: Engine) -> Iterator[list[str]]:
    """Two members of a store that was used once."""
    with contextlib.ExitStack() as stack:
        made = make_members(stack, tmp_path, 2, request.param == "devices")
        Store.open(made, engine, capacity_bytes=8 * MIB).close()
        yield made


@pytest.fixture
def other(pair: list[str], tmp_path: Path, engine: Engine) -> Iterator[list[str]]:
    """Two members of another store of the same kind."""
    folder = tmp_path / "other"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        made = make_members(stack, folder, 2, pair[0].startswith("/dev/"))
        Store.open(made, engine, capacity_bytes=8 * MIB).close()
        yield made


def refused(paths: list[str], engine: Engine, why: str, named: str) -> None:
    """Opening `paths` is refused for `why`, naming `named`; not a byte of any changes."""
    before = [contents(path) for path in paths if os.path.exists(path)]
    with pytest.raises(NotAStore, match=why) as caught:
        Store.open(paths, engine, capacity_bytes=8 * MIB)
    assert caught.value.path == named
    assert named in caught.value.message
    assert [contents(path) for path in paths if os.path.exists(path)] == before


def test_a_member_alone_is_refused(pair: list[str], engine: Engine) -> None:
    for index, path in enumerate(pair):
        refused([path], engine, f"is member {index + 1} of 2 of a striped store", path)


def test_a_foreign_member_is_refused(pair: list[str], other: list[str], engine: Engine) -> None:
    refused([pair[0], other[1]], engine, "is a member of another store", other[1])
    refused([*pair, other[0]], engine, "is a member of another store", other[0])
    refused([other[0], *pair], engine, "is a member of another store", other[0])


def test_a_whole_store_is_no_member(files: list[str], engine: Engine, tmp_path: Path) -> None:
    whole = str(tmp_path / "whole.store")
    for paths in (files, [whole]):
        Store.open(paths, engine, capacity_bytes=8 * MIB).close()
    refused([files[0], whole], engine, "is a whole store", whole)


def test_a_missing_member_is_named(tmp_path: Path, engine: Engine) -> None:
    three = [str(tmp_path / f"kv.{index}") for index in range(3)]
    Store.open(three, engine, capacity_bytes=12 * MIB).close()
    refused([three[0], three[2]], engine, "lack member 2 of 3", three[0])
    os.unlink(three[2])
    refused(three, engine, "does not exist, and other members", three[2])
    assert not os.path.exists(three[2])


def test_a_copy_is_refused(files: list[str], engine: Engine, tmp_path: Path) -> None:
    Store.open(files, engine, capacity_bytes=8 * MIB).close()
    copy = str(tmp_path / "copy")
    Path(copy).write_bytes(contents(files[0]))
    refused([files[0], copy], engine, "are both member 1 of 2: one is a copy", copy)


def test_members_that_disagree_are_refused(files: list[str], engine: Engine) -> None:
    """Same store, another stripe: nobody could say which one counts."""
    Store.open(files, engine, capacity_bytes=8 * MIB).close()
    forge(files[1], lambda block: replace(block, member=replace(block.member, stripe_bytes=4096)))
    refused(files, engine, "disagrees with .* on how the store is striped", files[1])


def test_kinds_are_not_mixed_and_names_not_repeated(
    files: list[str], engine: Engine, tmp_path: Path
) -> None:
    refused([files[0], "/dev/null"], engine, "is a file and others are devices", files[0])
    for paths in ([files[0], files[0]], [], [str(tmp_path / str(n)) for n in range(17)]):
        with pytest.raises(ConfigError):
            Store.open(paths, engine)
    link = str(tmp_path / "link")
    os.symlink(files[0], link)
    with pytest.raises(ConfigError, match="named twice"):
        Store.open([files[0], link], engine)
    assert not any(os.path.exists(path) for path in files)


def test_one_refusal_leaves_nothing_new_behind(engine: Engine, tmp_path: Path) -> None:
    """The second file's folder is missing: the first is not made either."""
    paths = [str(tmp_path / "kv.0"), str(tmp_path / "no" / "kv.1")]
    with pytest.raises(Exception, match="does not exist"):
        Store.open(paths, engine)
    assert os.listdir(tmp_path) == []


@needs_root
def test_all_are_looked_at_before_one_is_formatted(tmp_path: Path) -> None:
    with (
        loop_device(tmp_path / "free", DEVICE_BYTES, 512) as free,
        loop_device(tmp_path / "swap", DEVICE_BYTES, 4096) as taken,
    ):
        os.system(f"mkswap {taken} > /dev/null")
        with pytest.raises(NotAStore, match="swap signature"):
            plan_formats([free, taken])
        plans = [*plan_formats([free]), *plan_formats([free])]
        # Found free, and taken in between: the device is looked at again when all are held.
        swapped = replace(plans[1], path=taken, drive=replace(plans[1].drive, path=taken))
        with pytest.raises(NotAStore):
            carry_out_format(plans[0], swapped)
        assert not any(contents(free))


@needs_root
def test_a_held_member_holds_the_store(devices: list[str], engine: Engine) -> None:
    with Store.open(devices, engine):
        refused_in_use(devices, engine)
    fd = os.open(devices[1], os.O_RDONLY | os.O_EXCL)
    try:
        generations = [inspect_store(path).superblock for path in devices]
        with pytest.raises(NotAStore, match=f"{devices[1]} is in use"):
            Store.open(devices, engine)
        assert [inspect_store(path).superblock for path in devices] == generations
    finally:
        os.close(fd)
    Store.open(devices, engine).close()


def refused_in_use(paths: list[str], engine: Engine) -> None:
    with pytest.raises(NotAStore, match="in use"):
        Store.open(paths, engine)


def test_a_member_left_behind_by_a_crash(
    pair: list[str], engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed between the superblocks: one is in use and a generation ahead. The KV is discarded,
    all agree again."""
    forge(pair[0], lambda block: replace(block, generation=block.generation + 1, in_use=True))
    Store.open(pair, engine, capacity_bytes=8 * MIB).close()
    assert "not closed cleanly" in caplog.text
    blocks = [inspect_store(path).superblock for path in pair]
    # Files are made by their first open, devices by format before it.
    expected = 4 if pair[0].startswith("/dev/") else 3
    assert [block.generation for block in blocks if block is not None] == [expected] * 2
    assert store_problem([inspect_store(path) for path in pair]) is None


def test_wiping_members(pair: list[str]) -> None:
    """All of them, or one whose store is gone."""
    assert len(carry_out_wipe(*plan_wipes(pair[:1]), tell=lambda _: None)) == 1
    parts: list[float] = []
    carry_out_wipe(plan_wipe(pair[1]), tell=parts.append)
    assert parts[-1] == 1
    for path in pair:
        assert not os.path.exists(path) or not any(contents(path))
    carry_out_format(*plan_formats(pair))
    assert len(carry_out_wipe(*plan_wipes(pair), tell=parts.append)) == 2


def test_an_error_names_the_member_and_its_place(files: list[str], arena: Arena) -> None:
    """EIO at 1 MiB of the second member's data: its path, its offset; the others are not blamed."""
    with FaultyEngine(open_engine("posix", queue_depth=4)) as engine:
        store = Store.open(files, engine, capacity_bytes=16 * MIB)
        extent = store.allocate(8 * MIB, Door.DIRECT)
        for part in store._members.stripes.parts(extent.range.offset, 8 * MIB):
            fd = store._members.backings[part.member].direct_fd
            nth = sum(engine._counts.values()) + part.at // STRIPE_BYTES
            engine.inject(Fault(nth=nth, errno=errno.EIO))
            with pytest.raises(DeviceError) as caught:
                store.read(extent, 0, arena.address, 8 * MIB).wait()
            assert caught.value.path == files[part.member]
            assert caught.value.offset == part.offset
            assert engine.struck[-1][1].fd == fd
        store.close()


def test_a_failed_writeback_of_one_member_fails_the_write(files: list[str], arena: Arena) -> None:
    with FaultyEngine(open_engine("posix", queue_depth=4)) as engine:
        store = Store.open(files, engine, capacity_bytes=16 * MIB)
        extent = store.allocate(4 * MIB, Door.PAGE_CACHE)
        engine.inject(Fault(op=Op.SYNC_RANGE, nth=1))
        with pytest.raises(DeviceError) as caught:
            store.write(extent, 0, arena.address, 4 * MIB).wait()
        assert (caught.value.operation, caught.value.path) == ("sync_file_range", files[1])
        store.close()


def forge(path: str, change: Callable[[Superblock], Superblock]) -> None:
    """Rewrite the superblock of a file, or both of a device."""
    block = inspect_store(path).superblock
    assert block is not None
    fd = os.open(path, os.O_RDWR)
    write = write_superblock if block.device is None else write_superblocks
    write(fd, change(block))
    os.close(fd)


def test_ctrl_c_while_one_member_closes_lets_go_of_all(
    files: list[str], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing takes seconds where much is cut back or trimmed."""
    store = Store.open(files, engine, capacity_bytes=8 * MIB)
    real = FileBacking.close
    closed: list[str] = []

    def interrupted(backing: FileBacking, *, keep_blocks: bool, end: int) -> None:
        real(backing, keep_blocks=keep_blocks, end=end)
        closed.append(backing.path)
        if len(closed) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(FileBacking, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.close()
    assert closed == files
    store.close()
    Store.open(files, engine, capacity_bytes=8 * MIB).close()
