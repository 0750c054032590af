"""A range of a file in this process's memory, to be read where the page cache has it.

Nothing is copied: what reads the memory reads the kernel's pages, which the kernel may still take
back at any time. It then reads them again when they are touched; so `hold` a part just before it
is used, which tells when a page is missing, and maps them the first time. Between `hold` and the
use a page can only go missing if memory runs out in that moment; that its second reading fails
too would end the process (SIGBUS), never read something else.

A touch of such a page reads around it, half before and half behind, as much as the device's
read_ahead_kb (128 KiB is Linux' own; 8 MiB measured where it is 8192), whatever its descriptor was
advised: also what lies beside the range. No advice to the mapping ends that and keeps what is used
safe from reclaim (docs/decisions/0010).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref

from dualblade.host.page_cache import blank_pages, cached_bytes, map_pages, unmap_pages

_MADV_POPULATE_READ = 22
"""Linux 5.14. Debian 12's Python does not name it."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def can_hold_pages() -> bool:
    """Whether this kernel brings a part's pages before it is used (Linux 5.14)."""
    return bool(_libc.madvise(None, 0, _MADV_POPULATE_READ) == 0)


class FileMemory:
    """[offset, offset + size_bytes) of an open file or block device, shared and read-only; whole
    pages. `buffer` are its bytes: nobody may use them, or parts of them, after `close`; they are
    zeros after `blank`.

    `held_bytes`: at most so much of it is mapped. `others_read`:
    pages come into the page cache otherwise than by reads that ended well (readahead).
    Raises: OSError; EINVAL before Linux 5.14.
    """

    def __init__(self, fd: int, offset: int, size_bytes: int, *, others_read: bool = False) -> None:
        assert offset % mmap.PAGESIZE == size_bytes % mmap.PAGESIZE == 0, "not whole pages"
        if not can_hold_pages():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        address = map_pages(fd, offset, size_bytes)
        # A forked child has no use for it, and would keep the file's blocks for as long as it runs.
        _libc.madvise(address, size_bytes, mmap.MADV_DONTFORK)
        self.address = address
        self.size_bytes = size_bytes
        self._fd, self._offset = fd, offset
        self._others_read = others_read
        self.held_bytes = 0
        self._there = (0, 0)  # from, to: parts within were held, and not found missing since
        self.buffer = memoryview((ctypes.c_ubyte * size_bytes).from_address(address)).cast("B")
        self._is_open = True

    def is_cached(self, offset: int, size_bytes: int) -> bool:
        """Whether all of a part is in the page cache now. Raises: DeviceError."""
        if cached_bytes(self._fd, self._offset + offset, size_bytes).cached_bytes >= size_bytes:
            return True
        begin, end = self._there
        self._there = (begin, min(end, offset)) if offset > begin else (0, 0)
        return False

    def hold(self, offset: int, size_bytes: int) -> bool:
        """Have the pages of a part at hand; False when that cannot be: closed, not all cached any
        more (this reads nothing), or a page that cannot be read. Raises: DeviceError.

        What was held before and is cached is mapped, or a touch maps it, without reading: to ask
        for it again would cost 180 ns for each page that is not part of a huge one. Where others
        read it is asked for: a page counts as cached while it is being read, and that may fail.
        """
        if not self._is_open or not self.is_cached(offset, size_bytes):
            return False
        begin, end = self._there
        stop = offset + size_bytes
        if begin <= offset and stop <= end and not self._others_read:
            return True
        if not self._bring(offset, size_bytes):
            return False
        is_beside = offset <= end and begin <= stop  # else there is a hole between
        self._there = (min(begin, offset), max(end, stop)) if is_beside else (offset, stop)
        self.held_bytes = max(self.held_bytes, stop)
        return True

    def _bring(self, offset: int, size_bytes: int) -> bool:
        """Map the pages of a part. One that went since the look is read alone, unless the kernel is
        to read ahead: around it lies what goes by another door. For this call alone, 2 us: what is
        used through a mapping with MADV_RANDOM is unused to the kernel's reclaim."""
        if self._others_read:
            return not _libc.madvise(self.address + offset, size_bytes, _MADV_POPULATE_READ)
        _libc.madvise(self.address, self.size_bytes, mmap.MADV_RANDOM)
        try:
            return not _libc.madvise(self.address + offset, size_bytes, _MADV_POPULATE_READ)
        finally:
            _libc.madvise(self.address, self.size_bytes, mmap.MADV_NORMAL)

    def close(self) -> None:
        """Take the memory away. Idempotent."""
        if self._is_open:
            self.held_bytes = 0
            # One after the other, with no line of Python between where Ctrl-C could come.
            self._is_open = False
            _libc.munmap(self.address, self.size_bytes)

    def blank(self) -> None:
        """Let the file go, and have zeros in its place until nobody has `buffer` or a part of it:
        at the end somebody may, a traceback or a thread that is not told. Then as `close`."""
        if self._is_open:
            try:
                blank_pages(self.address, self.size_bytes)
            except OSError:  # no memory for the mapping
                self.close()
                return
            self._is_open = False
            self.held_bytes = 0
            end = weakref.finalize(self.buffer.obj, unmap_pages, self.address, self.size_bytes)
            end.atexit = False  # a thread may still look
