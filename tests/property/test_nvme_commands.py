"""The command encoder: what it cannot say matters more than what it can.

The kernel passes commands on unchecked. Whatever is asked for, a command's data length is its
block count times the block, its blocks lie inside the store, and its opcode is on the list.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dualblade.errors import ConfigError, DeviceError, Unsupported
from dualblade.io import Arena, EngineChoice, Namespace, Op, Transfer, open_engine
from dualblade.io._native import nvme_command
from dualblade.units import GIB, KIB, MIB

COMMAND = struct.Struct("<BBHIIIQQIIIIIIIIII")
SPACE = Namespace(
    namespace_id=7,
    block_bytes=512,
    begin=2 * MIB,
    end=2 * MIB + GIB,
    command_bytes_max=512 * KIB,
    scattered_bytes_max=128 * KIB,
)


def encode(op: Op, size_bytes: int, offset: int, space: Namespace = SPACE) -> bytes | None:
    return nvme_command(space, Transfer(9, op, 0x1122334455667000, size_bytes, offset))


def test_golden_bytes() -> None:
    assert encode(Op.READ, 128 * KIB, 3 * MIB) == bytes.fromhex(
        "02000000" "07000000"  # read; namespace 7
        "0000000000000000" "0000000000000000"  # dwords 2 and 3; no metadata
        "0070665544332211"  # address
        "00000000" "00000200"  # metadata bytes; data bytes: 131072
        "00180000" "00000000"  # first block: 6144
        "ff000000"  # 256 blocks, counted from 0
        "000000000000000000000000" "00000000" "00000000"  # dwords 13 to 15; time-out; reserved
    )  # fmt: skip
    write = encode(Op.WRITE, 512, 2 * MIB)
    assert write is not None
    assert (write[0], write[36:40], write[48:52]) == (1, b"\0\2\0\0", bytes(4))
    beyond_32_bits = SPACE._replace(end=1 << 45, block_bytes=4096)
    far = encode(Op.READ, 4096, (1 << 44) + 4096, beyond_32_bits)
    assert far is not None
    assert struct.unpack_from("<Q", far, 40) == ((1 << 32) + 1,)


@pytest.mark.parametrize("op", [Op.SYNC_RANGE, Op.DATASYNC])
def test_a_sync_is_a_flush_of_the_namespace(op: Op) -> None:
    flush = encode(op, 4096, 0)
    assert flush == bytes(4) + b"\7" + bytes(67)


sizes = st.one_of(
    st.integers(0, 2 * MIB),
    st.integers(0, 4096).map(lambda blocks: blocks * 512),
    st.sampled_from([1 << 31, 1 << 32, (1 << 32) + 512, (1 << 61)]),
)
offsets = st.one_of(
    st.integers(0, 2 * GIB),
    st.integers(0, 4 * MIB).map(lambda blocks: blocks * 512),
    st.sampled_from([2 * MIB - 512, 2 * MIB, SPACE.end - 512, SPACE.end, 1 << 45, 1 << 61]),
)


@settings(max_examples=3000)
@given(
    op=st.sampled_from(Op),
    size_bytes=sizes,
    offset=offsets,
    block_bytes=st.sampled_from([512, 4096, 8192]),
)
@example(op=Op.READ, size_bytes=512, offset=SPACE.end - 512, block_bytes=512)
@example(op=Op.WRITE, size_bytes=1024, offset=SPACE.end - 512, block_bytes=512)
def test_no_command_says_what_it_must_not(
    op: Op, size_bytes: int, offset: int, block_bytes: int
) -> None:
    space = SPACE._replace(block_bytes=block_bytes)
    raw = encode(op, size_bytes, offset, space)
    may = op in (Op.SYNC_RANGE, Op.DATASYNC) or (
        size_bytes % block_bytes == offset % block_bytes == 0
        and 0 < size_bytes <= space.command_bytes_max
        and space.begin <= offset
        and offset + size_bytes <= space.end
    )
    assert (raw is not None) == may
    if raw is None:
        return
    (opcode, flags, _, nsid, _, _, metadata, address, metadata_bytes, data_bytes, *rest) = (
        COMMAND.unpack(raw)
    )
    low, high, dword12, *others = rest
    assert (flags, nsid, metadata, metadata_bytes, others) == (0, 7, 0, 0, [0] * 5)
    assert opcode == {Op.READ: 2, Op.WRITE: 1}.get(op, 0)
    if opcode == 0:
        assert (address, data_bytes, low, high, dword12) == (0,) * 5
        return
    first, count = low | high << 32, (dword12 & 0xFFFF) + 1
    assert dword12 >> 16 == 0, "no flags beside the block count"
    assert data_bytes == count * block_bytes == size_bytes
    assert first * block_bytes == offset
    assert space.begin <= first * block_bytes
    assert (first + count) * block_bytes <= space.end


@given(
    st.tuples(
        st.integers(0, (1 << 32) - 1),
        *(st.one_of(st.integers(0, 1 << 40), st.sampled_from([512, 4096, MIB])) for _ in range(5)),
    )
)
def test_limits_are_accepted_only_where_they_hold_together(limits: tuple[int, ...]) -> None:
    space = Namespace(*limits)
    whole = [space.begin, space.end, space.command_bytes_max, space.scattered_bytes_max]
    block = space.block_bytes
    good = (
        0 < space.namespace_id < (1 << 32) - 1
        and block in [1 << shift for shift in range(9, 17)]
        and not any(value % block for value in whole)
        and space.begin < space.end
        and all(0 < value <= min(block << 16, (1 << 31) - 1) for value in whole[2:])
    )
    try:
        nvme_command(space, Transfer(0, Op.DATASYNC, 0, 0, 0))
    except ValueError:
        assert not good
    else:
        assert good


def test_limits_of_no_namespace_are_no_passthrough() -> None:
    with open_engine("posix") as engine:
        with pytest.raises(ConfigError):
            engine.register_namespace(0, SPACE._replace(block_bytes=1000))
        assert engine.name == "posix"


@pytest.mark.parametrize("name", ["posix", "auto"])
def test_what_cannot_be_said_never_reaches_the_kernel(name: EngineChoice, tmp_path: Path) -> None:
    """A plain file in the place of a namespace: commands reach the kernel, which knows no such
    thing there; what is outside the store ends before it, with a block device's answers."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        with open_engine(name) as engine, Arena(2 * MIB) as arena:
            try:
                engine.register_namespace(fd, SPACE)
            except Unsupported:
                pytest.skip("this kernel has no IORING_OP_URING_CMD")
            assert engine.name == ("nvme-ioctl" if name == "posix" else "uring-cmd")

            def error_of(op: Op, size_bytes: int, offset: int) -> int | None:
                transfer = Transfer(fd, op, arena.address, size_bytes, offset)
                with pytest.raises(DeviceError) as caught:
                    engine.submit([transfer]).wait()
                return caught.value.errno

            unknown = errno.ENOTTY if name == "posix" else errno.EOPNOTSUPP
            assert error_of(Op.READ, 4096, SPACE.begin) == unknown
            assert error_of(Op.DATASYNC, 0, 0) == unknown
            assert error_of(Op.WRITE, 4096, SPACE.begin - 4096) == errno.EINVAL
            assert error_of(Op.WRITE, 4096, SPACE.begin + 1) == errno.EINVAL
            assert error_of(Op.WRITE, 4096, SPACE.end) == errno.ENOSPC
            assert error_of(Op.READ, 4096, SPACE.end) == 0
            assert os.fstat(fd).st_size == 0
    finally:
        os.close(fd)


def test_a_status_in_words_and_whether_to_try_again() -> None:
    for status, words, retryable in (
        (0x281, "unrecovered read error (NVMe status 0x281)", True),
        (0x4280, "write fault (NVMe status 0x280)", False),
        (0x4080, "block address out of range (NVMe status 0x80)", False),
        (0x7FF, "refused by the drive (NVMe status 0x7ff)", True),
    ):
        error = DeviceError(
            errno=errno.EIO,
            operation="read",
            path="/dev/ng0n1",
            offset=MIB,
            size_bytes=4096,
            nvme_status=status,
        )
        assert words in str(error)
        assert "1048576 of /dev/ng0n1" in str(error)
        assert error.retryable is retryable
