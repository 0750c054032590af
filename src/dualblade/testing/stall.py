"""Memory on which transfers stand still until the test lets them go on."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
from types import TracebackType

from dualblade.errors import Unsupported
from dualblade.units import round_up

# Source: userfaultfd(2), ioctl_userfaultfd(2), linux/userfaultfd.h.
_SYSTEM_CALL = {"x86_64": 323, "aarch64": 282}
_API_VERSION = 0xAA
_MODE_MISSING = 1


def _ioctl_number(number: int, size_bytes: int) -> int:
    read_write = 3
    return (read_write << 30) | (size_bytes << 16) | (0xAA << 8) | number


_API = _ioctl_number(0x3F, 24)
_REGISTER = _ioctl_number(0x00, 32)
_ZEROPAGE = _ioctl_number(0x04, 32)

_libc = ctypes.CDLL(None, use_errno=True)


class StalledMemory:
    """Anonymous memory whose pages are missing until release().

    A buffered transfer into it stops in the kernel at the first missing page: for an engine this
    is a device that does not answer. So time-outs, closing and forking with transfers in flight
    and out-of-order landing are tested without sleeping. Release all before closing.

    Raises: Unsupported where userfaultfd(2) is not allowed (needs root or
        vm.unprivileged_userfaultfd).
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = round_up(size_bytes, mmap.PAGESIZE)
        number = _SYSTEM_CALL.get(platform.machine())
        self._fd = _libc.syscall(number, os.O_CLOEXEC) if number else -1
        if self._fd < 0:
            raise Unsupported("userfaultfd is not allowed here", hint="run the tests as root")
        self._memory = mmap.mmap(-1, self.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        fcntl.ioctl(self._fd, _API, bytearray(struct.pack("QQQ", _API_VERSION, 0, 0)))
        where = struct.pack("QQQQ", self.address, self.size_bytes, _MODE_MISSING, 0)
        fcntl.ioctl(self._fd, _REGISTER, bytearray(where))

    def release(self, offset: int = 0, size_bytes: int | None = None) -> None:
        """Let transfers into these bytes (whole pages, once each) go on."""
        size_bytes = self.size_bytes - offset if size_bytes is None else size_bytes
        where = struct.pack("QQQq", self.address + offset, size_bytes, 0, 0)
        fcntl.ioctl(self._fd, _ZEROPAGE, bytearray(where))

    def read(self, offset: int, size_bytes: int) -> bytes:
        """What landed. Blocks for ever on what is not released."""
        return self._memory[offset : offset + size_bytes]

    def close(self) -> None:
        """Idempotent; lets everything go on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> StalledMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
