"""How contiguous a file really is: its extents on the device, as the file system maps them."""

from __future__ import annotations

import fcntl
import struct
from dataclasses import dataclass

_FS_IOC_FIEMAP = 0xC020660B
_HEADER = struct.Struct("=QQLLLL")
_EXTENT = struct.Struct("=QQQQQLLLL")
_EXTENT_LAST = 0x1
_EXTENTS_A_CALL = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FileExtent:
    """One contiguous piece of a file on its device; bytes."""

    logical_offset: int
    physical_offset: int
    size_bytes: int
    flags: int


def file_extents(fd: int, *, size_bytes: int = (1 << 63) - 1) -> list[FileExtent]:
    """The mapping of the first `size_bytes` of an open file, in order. What is written is not
    waited for: of a store's blocks, which are allocated before, it is known.

    Raises: OSError (EOPNOTSUPP, ENOTTY) where the file system cannot tell.
    Source: Documentation/filesystems/fiemap.rst.
    """
    found: list[FileExtent] = []
    start = 0
    while start < size_bytes:
        header = _HEADER.pack(start, size_bytes - start, 0, 0, _EXTENTS_A_CALL, 0)
        request = bytearray(header + bytes(_EXTENT.size * _EXTENTS_A_CALL))
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        mapped_count = _HEADER.unpack_from(request)[3]
        if mapped_count == 0:
            break
        for index in range(mapped_count):
            logical, physical, length, _, _, flags, *_ = _EXTENT.unpack_from(
                request, _HEADER.size + index * _EXTENT.size
            )
            found.append(
                FileExtent(
                    logical_offset=logical,
                    physical_offset=physical,
                    size_bytes=length,
                    flags=flags,
                )
            )
        if found[-1].flags & _EXTENT_LAST:
            break
        start = found[-1].logical_offset + found[-1].size_bytes
    return found


def count_fragments(extents: list[FileExtent]) -> int:
    """How many contiguous ranges there are: neighbours that touch on the device are one."""
    fragments = 0
    end_logical = end_physical = -1
    for extent in extents:
        if (extent.logical_offset, extent.physical_offset) != (end_logical, end_physical):
            fragments += 1
        end_logical = extent.logical_offset + extent.size_bytes
        end_physical = extent.physical_offset + extent.size_bytes
    return fragments
