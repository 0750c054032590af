"""The superblock: golden bytes, and hostile files."""

import uuid
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dualblade.errors import NotAStore
from dualblade.store.format import (
    DATA_OFFSET,
    DEVICE_VERSION,
    FILE_VERSION,
    SUPERBLOCK_BYTES,
    DeviceSection,
    MemberSection,
    Superblock,
    device_capacity,
)
from dualblade.units import GIB

BLOCK = Superblock(
    uuid=uuid.UUID("00112233-4455-6677-8899-aabbccddeeff"),
    capacity_bytes=GIB,
    generation=7,
    created_unix_seconds=1_700_000_000,
    in_use=True,
)

GOLDEN_FIELDS = bytes.fromhex(
    "4455414c424c4144"  # DUALBLAD
    "01000000"  # version
    "00100000"  # superblock bytes
    "00112233445566778899aabbccddeeff"
    "0000200000000000"  # data offset
    "0000004000000000"  # capacity
    "0700000000000000"  # generation
    "00f1536500000000"  # created
    "01000000"  # in use
)
GOLDEN_CHECKSUM = "0d57ae883b17825f31075a5a30f851a5"


def decode(raw: bytes, file_bytes: int = DATA_OFFSET) -> Superblock:
    return Superblock.decode(raw, path="kv.store", file_bytes=file_bytes)


def test_golden_bytes() -> None:
    raw = BLOCK.encode()
    assert len(raw) == SUPERBLOCK_BYTES
    assert raw[: len(GOLDEN_FIELDS)] == GOLDEN_FIELDS
    assert not any(raw[len(GOLDEN_FIELDS) : -16])
    assert raw[-16:].hex() == GOLDEN_CHECKSUM


def test_round_trip() -> None:
    assert decode(BLOCK.encode()) == BLOCK


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda raw: b"\x7fELF" + raw[4:], "not a dualblade store"),
        (lambda raw: raw[:8] + b"\x02" + raw[9:], "version 2"),
        (lambda raw: raw[:100], "truncated"),
        (lambda raw: raw[:60] + b"\xff" + raw[61:], "damaged"),
        (lambda _: b"", "not a dualblade store"),
    ],
)
def test_hostile_superblocks(change: object, why: str) -> None:
    with pytest.raises(NotAStore, match=why):
        decode(change(BLOCK.encode()))  # type: ignore[operator]


def test_a_file_cut_short_is_refused() -> None:
    with pytest.raises(NotAStore, match="truncated"):
        decode(BLOCK.encode(), file_bytes=DATA_OFFSET - 1)


@given(st.binary(max_size=2 * SUPERBLOCK_BYTES))
@example(BLOCK.encode()[:4095])
def test_any_bytes_are_a_store_or_refused(raw: bytes) -> None:
    with pytest.raises(NotAStore):
        decode(raw)


@given(at=st.integers(0, SUPERBLOCK_BYTES - 1), flip=st.integers(1, 255))
def test_one_changed_byte_is_always_found(at: int, flip: int) -> None:
    raw = bytearray(BLOCK.encode())
    raw[at] ^= flip
    with pytest.raises(NotAStore):
        decode(bytes(raw))


DEVICE_BLOCK = Superblock(
    uuid=BLOCK.uuid,
    capacity_bytes=device_capacity(GIB),
    generation=7,
    created_unix_seconds=1_700_000_000,
    in_use=False,
    device=DeviceSection(
        size_bytes=GIB,
        block_bytes=512,
        copy=1,
        serial="S3R1AL",
        wwid="eui.0123",
        part_uuid="aa-01",
    ),
)

GOLDEN_DEVICE_FIELDS = (
    bytes.fromhex(
        "4455414c424c4144"  # DUALBLAD
        "02000000"  # version
        "00100000"  # superblock bytes
        "00112233445566778899aabbccddeeff"
        "0000200000000000"  # data offset
        "0000c03f00000000"  # capacity: 1020 MiB
        "0700000000000000"  # generation
        "00f1536500000000"  # created
        "00000000"  # closed cleanly
    ).ljust(128, b"\0")
    + bytes.fromhex("00000040000000000002000001000000")  # device bytes, block bytes, copy
    + b"S3R1AL".ljust(128, b"\0")
    + b"eui.0123".ljust(128, b"\0")
    + b"aa-01".ljust(64, b"\0")
)


def test_golden_bytes_on_a_device() -> None:
    raw = DEVICE_BLOCK.encode()
    assert len(raw) == SUPERBLOCK_BYTES
    assert raw[: len(GOLDEN_DEVICE_FIELDS)] == GOLDEN_DEVICE_FIELDS
    assert not any(raw[len(GOLDEN_DEVICE_FIELDS) : -16])
    assert raw[-16:].hex() == "02173931138ba54bd7652e237eec07b2"
    found = Superblock.decode(raw, path="/dev/x", file_bytes=GIB, version=DEVICE_VERSION)
    assert found == DEVICE_BLOCK


def test_a_store_of_the_other_kind_is_refused() -> None:
    """An image of a device is no store file, and the other way about."""
    with pytest.raises(NotAStore, match="version 2"):
        decode(DEVICE_BLOCK.encode(), file_bytes=GIB)
    with pytest.raises(NotAStore, match="what a store file holds"):
        Superblock.decode(BLOCK.encode(), path="x", file_bytes=GIB, version=DEVICE_VERSION)


MEMBER = MemberSection(index=1, count=3)
GOLDEN_MEMBER = bytes.fromhex("01000000030000000000100000000000")  # index, count, stripe


@pytest.mark.parametrize(
    ("whole", "version", "checksum"),
    [
        (BLOCK, FILE_VERSION, "f0b4cf58bb816b54f0c8735c96cd970b"),
        (DEVICE_BLOCK, DEVICE_VERSION, "703fbff23cea078ebc9b00909585ea9b"),
    ],
)
def test_golden_bytes_of_a_member(whole: Superblock, version: int, checksum: str) -> None:
    """Versions 3 and 4: those that know only 1 and 2 must not take a member for a whole store."""
    block = replace(whole, member=MEMBER)
    raw, plain = block.encode(), whole.encode()
    assert raw[:8] + raw[12:512] == plain[:8] + plain[12:512]
    assert raw[8:12] == bytes([version + 2, 0, 0, 0])
    assert raw[512:528] == GOLDEN_MEMBER
    assert not any(raw[528:-16])
    assert raw[-16:].hex() == checksum
    found = Superblock.decode(raw, path="x", file_bytes=GIB, version=version)
    assert found == block
    other = DEVICE_VERSION if version == FILE_VERSION else FILE_VERSION
    why = f"version {version + 2}" if other == FILE_VERSION else "what a store file holds"
    with pytest.raises(NotAStore, match=why):
        Superblock.decode(raw, path="x", file_bytes=GIB, version=other)


@pytest.mark.parametrize(
    "member",
    [
        MemberSection(index=3, count=3),
        MemberSection(index=0, count=1),
        MemberSection(index=0, count=0),
        MemberSection(index=0, count=17),
        MemberSection(index=2**32 - 1, count=2**32 - 1),
        MemberSection(index=0, count=2, stripe_bytes=0),
        MemberSection(index=0, count=2, stripe_bytes=512),
        MemberSection(index=0, count=2, stripe_bytes=3 * 4096),
        MemberSection(index=0, count=2, stripe_bytes=2**63),
    ],
)
def test_members_that_cannot_be_are_refused(member: MemberSection) -> None:
    """Whole, with the right checksum, and nonsense."""
    with pytest.raises(NotAStore, match="out of range"):
        decode(replace(BLOCK, member=member).encode(), file_bytes=GIB)
