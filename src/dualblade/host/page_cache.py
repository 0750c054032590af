"""What of a file is in the page cache, and how to have it dropped."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass

from dualblade.errors import DeviceError

_CACHESTAT = 451
"""System call number, the same on every architecture (kernel 6.5; Debian 12's headers lack it)."""

_NO_CACHESTAT = frozenset({errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP})
"""Old kernel; forbidden by a seccomp profile or for want of ownership; a file system without it."""

_OVERLAYFS = 0x794C7630
_EXT, _XFS, _TMPFS = 0xEF53, 0x58465342, 0x01021994
_STATFS_BYTES = 256
"""More than struct statfs of any architecture; its first word is the type."""

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _Stat(ctypes.Structure):
    _fields_ = [
        ("cache", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("writeback", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("recently_evicted", ctypes.c_uint64),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCacheUse:
    """Page cache in a range, in bytes of whole pages. None: the kernel does not tell.

    A page under writeback is usually no longer dirty, and always cached.
    """

    cached_bytes: int
    dirty_bytes: int | None
    writeback_bytes: int | None

    @property
    def unwritten_bytes(self) -> int:
        """Most that is yet to be written to the device; all, where the kernel does not tell."""
        if self.dirty_bytes is None:
            return self.cached_bytes
        return self.dirty_bytes + (self.writeback_bytes or 0)


def cached_bytes(fd: int, offset: int, size_bytes: int) -> PageCacheUse:
    """How much of [offset, offset + size_bytes) of the open file or block device is cached.

    Asks cachestat(2); where that is missing, forbidden or blind (`is_overlay`) mincore(2), which
    knows nothing of dirty pages and calls everything cached when the file is neither ours nor
    writable to us.
    Pages beyond the end of the file are not cached. Neither call reads or keeps pages.
    Cost of cachestat: by folio; 2 us for 16 MiB in large folios, 35 us in 4 KiB pages.

    Raises:  DeviceError.
    Source:  cachestat(2), mincore(2); mm/filemap.c, filemap_cachestat().
    """
    _check_range(offset, size_bytes)
    if size_bytes == 0:  # a length of 0 means 'to the end of the file' to cachestat
        return PageCacheUse(cached_bytes=0, dirty_bytes=0, writeback_bytes=0)
    use = _cachestat(fd, offset, size_bytes)
    if use is not None and (use.cached_bytes or not is_overlay(fd)):
        return use
    cached = _mincore(fd, offset, size_bytes)
    return PageCacheUse(cached_bytes=cached, dirty_bytes=None, writeback_bytes=None)


def is_overlay(fd: int) -> bool:
    """Whether the open file is on overlayfs, as a container's own files are.

    Its pages belong to another file, below. Reads, writes, fsync, fadvise and mmap go there;
    cachestat and sync_file_range do not: they find nothing, and say so without an error.
    Source: statfs(2); fs/overlayfs/file.c.
    """
    return _file_system(fd) == _OVERLAYFS


def waits_for_device(fd: int) -> bool:
    """Whether sync_file_range(2), which waits for the writeback of pages, waits for the device and
    tells what it refused, on the open file's file system. FUSE and NFS end writeback earlier, btrfs
    may, and overlayfs has no pages of its own: there only fdatasync(2) tells.

    Source: sync_file_range(2); fs/fuse/file.c, fs/nfs/write.c, fs/btrfs/extent_io.c.
    """
    return _file_system(fd) in (_EXT, _XFS, _TMPFS)


def _file_system(fd: int) -> int | None:
    """Its type, as statfs(2) has it."""
    buffer = (ctypes.c_long * (_STATFS_BYTES // ctypes.sizeof(ctypes.c_long)))()
    return None if _libc.fstatfs(fd, ctypes.byref(buffer)) else buffer[0]


def drop(fd: int, offset: int, size_bytes: int) -> None:
    """Free the clean page cache of a range. Dirty pages stay: write them back first, and wait.

    The kernel keeps a folio that the range covers only partly, and page-cache folios are up to
    2 MiB and more: align the range to EXTENT_ALIGN_BYTES, and check with `cached_bytes`.

    Raises:  DeviceError.
    Source:  posix_fadvise(2), POSIX_FADV_DONTNEED; mm/fadvise.c.
    """
    _check_range(offset, size_bytes)
    if size_bytes == 0:  # would mean 'to the end of the file'
        return
    try:
        os.posix_fadvise(fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)
    except OSError as exc:
        raise _device_error("drop", fd, exc.errno or errno.EIO, offset, size_bytes) from exc


def map_pages(fd: int, offset: int, size_bytes: int) -> int:
    """Address of whole pages of an open file or block device, shared and read-only, not touched
    yet. Raises: OSError. By the C library, for Python's mmap keeps a descriptor for each."""
    address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(address)


def unmap_pages(address: int, size_bytes: int) -> None:
    """Take away what `map_pages` mapped."""
    _libc.munmap(address, size_bytes)


def blank_pages(address: int, size_bytes: int) -> None:
    """Have zeros where `map_pages` mapped a file, which it is no more. Raises: OSError."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    if _libc.mmap(address, size_bytes, mmap.PROT_READ, flags, -1, 0) == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _check_range(offset: int, size_bytes: int) -> None:
    assert offset >= 0, f"negative offset {offset}"
    assert size_bytes >= 0, f"negative size {size_bytes}"


def _cachestat(fd: int, offset: int, size_bytes: int) -> PageCacheUse | None:
    """None when this kernel or sandbox has no cachestat."""
    where = _Range(offset, size_bytes)
    pages = _Stat()
    failed = _libc.syscall(
        ctypes.c_long(_CACHESTAT),
        ctypes.c_uint(fd),
        ctypes.byref(where),
        ctypes.byref(pages),
        ctypes.c_uint(0),
    )
    if failed:
        number = ctypes.get_errno()
        if number in _NO_CACHESTAT:
            return None
        raise _device_error("cachestat", fd, number, offset, size_bytes)
    return PageCacheUse(
        cached_bytes=pages.cache * mmap.PAGESIZE,
        dirty_bytes=pages.dirty * mmap.PAGESIZE,
        writeback_bytes=pages.writeback * mmap.PAGESIZE,
    )


def _mincore(fd: int, offset: int, size_bytes: int) -> int:
    """Cached bytes of the range, by mapping it. The mapping is never touched: nothing is read.

    Costs one byte of memory per page of the range (256 KiB per GiB of 4 KiB pages).
    """
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    length = offset + size_bytes - start
    try:
        address = map_pages(fd, start, length)
    except OSError as exc:
        if exc.errno == errno.ENODEV:  # FUSE without a page cache: it cannot be mapped, or cached
            return 0
        raise _device_error("mmap", fd, exc.errno or errno.EIO, offset, size_bytes) from exc
    try:
        flags = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
        if _libc.mincore(address, length, ctypes.byref(flags)):
            raise _device_error("mincore", fd, ctypes.get_errno(), offset, size_bytes)
    finally:
        unmap_pages(address, length)
    # Bit 0 alone has a meaning; the kernel sets no other. bytes.count is 20 times faster than sum.
    return bytes(flags).count(1) * mmap.PAGESIZE


def _file_name(fd: int) -> str:
    """What /proc calls the file: its path, of a private one a path that is gone."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"descriptor {fd}"


def _device_error(
    operation: str, fd: int, number: int, offset: int, size_bytes: int
) -> DeviceError:
    return DeviceError(
        errno=number,
        operation=operation,
        path=_file_name(fd),
        offset=offset,
        size_bytes=size_bytes,
    )
