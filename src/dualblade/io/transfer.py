"""What may be asked of an engine."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Op(IntEnum):
    """The operations. The numbers are those of `native/engine/types.hpp`.

    A sync is a barrier in its batch: it starts when all before it landed, and what follows starts
    when it succeeded. So [write data, DATASYNC, write header] is ordered. Syncs in a row are one
    barrier: they run side by side.
    """

    READ = 0
    WRITE = 1
    SYNC_RANGE = 2
    """sync_file_range(WAIT_BEFORE | WRITE | WAIT_AFTER), a GiB at a time; size 0 is to the end. On
    a namespace a flush of all of it."""
    DATASYNC = 3
    """fdatasync, once for each GiB; offset is for error texts only. On a namespace a flush."""

    @property
    def word(self) -> str:
        """The operation in an error text."""
        return ("read", "write", "sync_file_range", "fdatasync")[self]


class Transfer(NamedTuple):
    """One contiguous transfer between memory at `address` and `offset` of `fd`.

    The memory is the caller's and must stay mapped, and `fd` open, until the ticket is done. With
    O_DIRECT address, size_bytes and offset are multiples of the device's block; nothing here
    rounds.
    """

    fd: int
    op: Op
    address: int
    size_bytes: int
    offset: int


class Namespace(NamedTuple):
    """What NVMe commands for one store may say; sizes and offsets are bytes.

    begin, end           of the store's extents, from the namespace's first block.
    command_bytes_max    most that a command may carry: MDTS and the kernel's limit.
    scattered_bytes_max  likewise from memory that is not in huge pages: a segment a page.
    """

    namespace_id: int
    block_bytes: int
    begin: int
    end: int
    command_bytes_max: int
    scattered_bytes_max: int
