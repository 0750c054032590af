"""Whatever lies where superblocks should be: the right store, or NotAStore; never a write.

1,000 cases of damage and 1,000 of lies with a right checksum for the pure decision (a second each),
and 40 on a real device, each compared byte for byte with what it was (about 5 seconds). Whatever is
accepted can be opened once more, and its allocator stays between the superblocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dualblade.cli import device_checks
from dualblade.errors import NoSpace, NotAStore
from dualblade.io import open_engine
from dualblade.store import Store
from dualblade.store.device import write_superblocks
from dualblade.store.extents import ExtentAllocator
from dualblade.store.format import (
    DATA_OFFSET,
    DEVICE_BYTES_MIN,
    DEVICE_VERSION,
    MAGIC,
    SUPERBLOCK_BYTES,
    DeviceSection,
    MemberSection,
    OtherVersion,
    Superblock,
    choose_superblock,
    device_capacity,
    second_copy_offset,
)
from dualblade.store.formatting import carry_out_format, plan_format, plan_wipe
from dualblade.store.members import check_members
from dualblade.units import EXTENT_ALIGN_BYTES, GIB, MIB
from tests.devices import contents, loop_device, needs_root

_CHECKSUM_BYTES = 16

HERE = DeviceSection(
    size_bytes=GIB, block_bytes=512, copy=0, serial="S3R1AL", wwid="eui.01", part_uuid=""
)


def superblock(generation: int, copy: int, number: int = 1) -> Superblock:
    return Superblock(
        uuid=uuid.UUID(int=number),
        capacity_bytes=HERE.capacity_bytes,
        generation=generation,
        created_unix_seconds=1,
        in_use=bool(generation % 2),
        device=replace(HERE, copy=copy),
    )


def choose(first: bytes, second: bytes, here: DeviceSection = HERE) -> Superblock:
    return choose_superblock(first, second, path="/dev/x", here=here)


def test_the_newer_copy_is_taken() -> None:
    for generations in ((5, 6), (6, 5), (6, 6)):
        first, second = (superblock(g, copy) for copy, g in enumerate(generations))
        assert choose(first.encode(), second.encode()).generation == 6


def test_copies_of_different_stores_or_in_the_wrong_place_are_refused() -> None:
    with pytest.raises(NotAStore, match="do not belong together"):
        choose(superblock(5, 0).encode(), superblock(5, 1, number=2).encode())
    with pytest.raises(NotAStore, match="do not belong together"):
        choose(superblock(5, 1).encode(), superblock(5, 0).encode())


@pytest.mark.parametrize(
    "change",
    [{"serial": "0THER"}, {"wwid": ""}, {"part_uuid": "1"}, {"block_bytes": 4096}],
)
def test_another_device_is_refused(change: dict[str, object]) -> None:
    blocks = [superblock(5, copy).encode() for copy in (0, 1)]
    with pytest.raises(NotAStore, match="not the device"):
        choose(*blocks, here=replace(HERE, **change))  # type: ignore[arg-type]


def test_copies_of_different_members_are_refused() -> None:
    """Both of one store, but of two places in it."""
    first, second = (
        replace(superblock(5, copy), member=MemberSection(index=copy, count=2)) for copy in (0, 1)
    )
    with pytest.raises(NotAStore, match="do not belong together"):
        choose(first.encode(), second.encode())
    with pytest.raises(NotAStore, match="do not belong together"):
        choose(first.encode(), superblock(5, 1).encode())


@pytest.mark.parametrize("copy", [0, 1])
def test_a_whole_copy_of_another_version_is_refused_whatever_the_other_is(copy: int) -> None:
    blocks = [superblock(5, index).encode() for index in (0, 1)]
    blocks[copy] = of_version(blocks[copy], 9)
    with pytest.raises(OtherVersion, match="a store of version 9"):
        choose(*blocks)
    torn = bytearray(blocks[copy])
    torn[64] ^= 1
    blocks[copy] = bytes(torn)
    assert choose(*blocks) == superblock(5, 1 - copy)  # damaged, whatever version it says
    with pytest.raises(OtherVersion, match="a store of version 9"):
        choose(bytes(torn), bytes(torn))  # whole perhaps, by rules of that version


def of_version(raw: bytes, version: int) -> bytes:
    """A superblock that says so, with a right checksum."""
    body = raw[:8] + version.to_bytes(4, "little") + raw[12 : SUPERBLOCK_BYTES - _CHECKSUM_BYTES]
    return body + hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()


@needs_root
def test_a_store_of_another_version_is_not_formatted_over(tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", DEVICE_BYTES_MIN) as device:
        carry_out_format(plan_format(device))
        with open(device, "r+b") as file:
            for at in (0, second_copy_offset(DEVICE_BYTES_MIN)):
                file.seek(at)
                newer = of_version(file.read(SUPERBLOCK_BYTES), 9)
                file.seek(at)
                file.write(newer)
        before = contents(device)
        for plan in (plan_format, plan_wipe):
            with pytest.raises(NotAStore, match="a store of version 9"):
                plan(device)
        assert contents(device) == before
        told = device_checks.examine(device)
        assert told is not None
        (finding,) = told["drive"]["findings"]
        assert "a store of version 9" in finding["what"], "doctor does not call it free"


sections = st.builds(
    MemberSection,
    index=st.integers(0, 4),
    count=st.integers(2, 4),
    stripe_bytes=st.sampled_from([MIB, 4096]),
)
members = st.tuples(st.integers(1, 2), st.one_of(st.none(), sections), st.integers(1, 3))


@settings(max_examples=1000, deadline=None)
@given(drawn=st.lists(members, min_size=1, max_size=4), order=st.randoms())
def test_any_set_of_members_is_one_store_or_refused(
    drawn: list[tuple[int, MemberSection | None, int]], order: random.Random
) -> None:
    """In any order; what is taken is complete, of one store, and sorted. Refusals name one."""
    found = [
        (
            f"/dev/{number}",
            replace(superblock(generation, 0, uuid_number), member=section),
        )
        for number, (uuid_number, section, generation) in enumerate(drawn)
    ]
    order.shuffle(found)
    places = [path for path, _ in found]
    refusal, taken = None, []
    try:
        taken = [found[number][1] for number in check_members(found)]
    except NotAStore as exc:
        refusal = exc
    if refusal is not None:
        assert refusal.path in places
        assert refusal.message.startswith(str(refusal.path))
    elif len(taken) == 1:
        assert taken[0].member is None
    else:
        told = [block.member for block in taken if block.member is not None]
        assert [(m.index, m.count) for m in told] == [(n, len(found)) for n in range(len(found))]
        assert (
            len({(block.uuid, m.stripe_bytes) for block, m in zip(taken, told, strict=True)}) == 1
        )
        assert sorted(block.generation for block in taken) == sorted(d[2] for d in drawn)


def test_a_whole_set_is_taken_in_any_order() -> None:
    for count in (2, 3, 4):
        parts = [
            (f"/dev/{n}", replace(superblock(5, 0), member=MemberSection(index=n, count=count)))
            for n in range(count)
        ]
        for shuffled in itertools.permutations(parts):
            assert [shuffled[number] for number in check_members(shuffled)] == parts


damage = st.one_of(
    st.none(),
    st.tuples(st.integers(0, SUPERBLOCK_BYTES - 1), st.binary(min_size=1, max_size=600)),
)
cut = st.one_of(st.just(SUPERBLOCK_BYTES), st.integers(0, SUPERBLOCK_BYTES))


def damaged(raw: bytes, how: tuple[int, bytes] | None, length: int) -> bytes:
    if how is not None:
        at, data = how
        raw = (raw[:at] + data + raw[at + len(data) :])[:SUPERBLOCK_BYTES]
    return raw[:length]


@settings(max_examples=1000, deadline=None)
@given(hows=st.tuples(damage, damage), lengths=st.tuples(cut, cut))
def test_any_damage_gives_one_of_the_two_or_a_refusal(
    hows: tuple[tuple[int, bytes] | None, ...], lengths: tuple[int, ...]
) -> None:
    whole = [superblock(generation, copy).encode() for copy, generation in enumerate((8, 9))]
    first, second = (damaged(*each) for each in zip(whole, hows, lengths, strict=True))
    try:
        found = choose(first, second)
    except NotAStore:
        intact = [raw == old for raw, old in zip((first, second), whole, strict=True)]
        foreign = [not raw.startswith(MAGIC) for raw in (first, second)]
        assert not any(intact) or any(foreign)
    else:
        expected = 9 if second == whole[1] else 8
        assert found == superblock(expected, expected - 8)


@given(raw=st.binary(max_size=2 * SUPERBLOCK_BYTES), size=st.integers(0, 1 << 64))
def test_any_bytes_are_refused(raw: bytes, size: int) -> None:
    with pytest.raises(NotAStore):
        Superblock.decode(raw, path="/dev/x", file_bytes=size, version=DEVICE_VERSION)


anything = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, 1, DATA_OFFSET, HERE.capacity_bytes, GIB, 1 << 63, (1 << 64) - 1]),
)


@settings(max_examples=1000, deadline=None)
@given(
    values=st.dictionaries(
        st.sampled_from(["capacity_bytes", "generation", "created_unix_seconds"]), anything
    ),
    size=st.one_of(st.just(GIB), anything),
    copy=st.integers(0, 3),
    takes=st.lists(st.integers(1, GIB), max_size=8),
)
@example(values={"generation": (1 << 64) - 1}, size=GIB, copy=0, takes=[])
@example(values={"generation": (1 << 64) - 2}, size=GIB, copy=0, takes=[])
def test_lies_with_a_right_checksum(
    values: dict[str, int], size: int, copy: int, takes: list[int]
) -> None:
    """Somebody who can compute a checksum gets no further than a store of this very device."""
    section = replace(HERE, size_bytes=size, copy=copy)
    lie = replace(superblock(5, 0), device=section, **values)  # type: ignore[arg-type]
    try:
        found = choose(lie.encode(), superblock(5, 1).encode())
    except NotAStore:
        return
    assert found.device is not None
    again = replace(found, generation=found.generation + 1)  # as opening it writes
    is_last = again.generation == (1 << 64) - 1  # it has no next one: to be formatted anew
    with pytest.raises(NotAStore) if is_last else contextlib.nullcontext():
        Superblock.decode(again.encode(), path="/dev/x", file_bytes=GIB, version=DEVICE_VERSION)
    allocator = ExtentAllocator(DATA_OFFSET, found.capacity_bytes)
    taken = []
    for take in takes:
        with contextlib.suppress(NoSpace):
            taken.append(allocator.allocate(take))
    for extent in taken:
        assert DATA_OFFSET <= extent.offset < extent.end <= second_copy_offset(GIB)
        allocator.free(extent)
    assert allocator.used_bytes == 0


@given(size=st.integers(0, 1 << 50))
def test_superblocks_and_extents_never_meet(size: int) -> None:
    capacity = device_capacity(size)
    assert capacity % EXTENT_ALIGN_BYTES == 0
    if size >= DEVICE_BYTES_MIN:
        assert capacity >= EXTENT_ALIGN_BYTES
        assert DATA_OFFSET + capacity <= second_copy_offset(size) <= size - SUPERBLOCK_BYTES
    elif size < DEVICE_BYTES_MIN - SUPERBLOCK_BYTES:
        assert capacity == 0


@pytest.fixture(scope="module")
def formatted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Superblock]]:
    image: Path = tmp_path_factory.mktemp("hostile") / "image"
    with loop_device(image, 8 * MIB, 512) as device:
        yield device, carry_out_format(plan_format(device))


@needs_root
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(hows=st.tuples(damage, damage))
def test_a_hostile_device_is_refused_and_not_written(
    formatted: tuple[str, Superblock], hows: tuple[tuple[int, bytes] | None, ...]
) -> None:
    device, block = formatted
    with open(device, "r+b", buffering=0) as disk:
        write_superblocks(disk.fileno(), block)
        for offset, how in zip((0, second_copy_offset(8 * MIB)), hows, strict=True):
            if how is not None:
                disk.seek(offset)
                raw = disk.read(SUPERBLOCK_BYTES)
                disk.seek(offset)
                disk.write(damaged(raw, how, SUPERBLOCK_BYTES))
    before = contents(device)
    with open_engine("posix", queue_depth=1) as engine:
        try:
            store = Store.open(device, engine)
        except NotAStore:
            assert contents(device) == before
        else:
            store.close()
            after = contents(device)
            assert after[SUPERBLOCK_BYTES:-SUPERBLOCK_BYTES] == before[4096:-4096]
