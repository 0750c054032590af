"""What a store stands on, whatever it is: the interfaces, and errors with their words."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from dualblade.errors import NoSpace, StorageError
from dualblade.host.page_cache import drop
from dualblade.io import Op
from dualblade.store.format import DATA_OFFSET, SUPERBLOCK_BYTES, Superblock

_T = TypeVar("_T")
_TRIES, _PAUSE_SECONDS = 6, 0.02


@dataclass(frozen=True, slots=True)
class Location:
    """A byte of a store: `offset` of the file or device at `path`, and there its logical block."""

    path: str
    offset: int
    block: int | None

    def __str__(self) -> str:
        at = "" if self.block is None else f" (LBA {self.block})"
        return f"offset {self.offset}{at} of {self.path}"


class Held(Protocol):
    """A file or device that is locked, compared and fit to be written; nothing was written yet.

    superblock   what it holds; None: it is new.
    file_system  number of the one whose free space it takes; None: a device, it has its own.
    """

    @property
    def path(self) -> str: ...
    @property
    def superblock(self) -> Superblock | None: ...
    @property
    def file_system(self) -> int | None: ...

    def capacity(self, wanted: int | None, sharers: int) -> int:
        """Bytes that extents may occupy here; `wanted` None: all that is free.

        `sharers`: members of the store on its file system, this one included.
        """
        ...

    def take(self, superblock: Superblock, *, unclean: bool) -> Backing:
        """Write `superblock` and begin; `unclean` content is discarded. Raises: StorageError."""
        ...

    def let_go(self) -> None:
        """Close all descriptors, also after `take`; a file that was new is gone."""
        ...


class Backing(Protocol):
    """An open, held, formatted place, one of a store's members: `FileBacking`, `DeviceBacking`.

    direct_fd    the direct door; None when none was asked for.
    buffered_fd  the page-cache door, and the descriptor whose writeback errors count.
    superblock   as it is there now.
    sync         what writes a range of buffered_fd back: SYNC_RANGE where the file system has it.
    coherent     direct writes leave no stale page behind: of a file. Of a block device the kernel
                 drops pages before an asynchronous write alone, not those that are read meanwhile,
                 and NVMe commands pass it by.
    by_commands  the direct door sends NVMe commands.
    """

    @property
    def path(self) -> str: ...
    @property
    def direct_fd(self) -> int | None: ...
    @property
    def buffered_fd(self) -> int: ...
    @property
    def superblock(self) -> Superblock: ...
    @property
    def sync(self) -> Op: ...
    @property
    def coherent(self) -> bool: ...
    @property
    def by_commands(self) -> bool: ...

    def allocate(self, offset: int, size_bytes: int) -> None:
        """Have blocks for a range before its first write; where that fails some may be there: see
        `cut`. Raises: OSError."""
        ...

    @property
    def end(self) -> int:
        """Where the blocks that it has end."""
        ...

    def cut(self, end: int) -> None:
        """Give back what lies beyond `end`, which was asked for before. Raises: OSError."""
        ...

    def locate(self, offset: int) -> Location:
        """Where `offset` of the store is, for people who look at the device."""
        ...

    def discard(self, offset: int, size_bytes: int) -> None:
        """Tell the device that a range is of no use any more, where that is its to know.

        Raises: OSError.
        """
        ...

    def fragments(self) -> int | None:
        """Contiguous ranges on the device; None where the file system cannot tell."""
        ...

    def close(self, *, keep_blocks: bool, end: int) -> None:
        """Discard the content up to `end` (or keep it), mark it clean, and let go.

        Raises: StorageError; all is let go of anyway.
        """
        ...

    def let_go(self) -> None:
        """Close the descriptors, and leave all as it is."""
        ...


def close_descriptors(*fds: int | None) -> None:
    """Close those that are open."""
    for fd in fds:
        if fd is not None:
            os.close(fd)


def patiently(take: Callable[[], _T], busy: int) -> _T:
    """What `take` gives, tried again for a moment while it fails with errno `busy`: who looks at a
    store (inspect, doctor) holds it for that long. Raises: OSError."""
    for _ in range(_TRIES - 1):
        try:
            return take()
        except OSError as exc:
            if exc.errno != busy:
                raise
        time.sleep(_PAUSE_SECONDS)
    return take()


def read_superblock(fd: int, offset: int) -> bytes:
    """The superblock at `offset`; less where the file or device ends before. Raises: OSError."""
    return os.pread(fd, SUPERBLOCK_BYTES, offset)


def write_superblock(fd: int, superblock: Superblock) -> None:
    """Write and sync one superblock at its place. Raises: OSError."""
    raw = superblock.encode()
    offset = 0 if superblock.device is None else superblock.device.offset()
    if os.pwrite(fd, raw, offset) != len(raw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fdatasync(fd)
    # The superblock's page must not count against a direct store's page-cache footprint.
    drop(fd, offset, DATA_OFFSET)


_LOOKING = ("inspect", "verify", "wipe")


def storage_error(operation: str, name: str, exc: OSError) -> StorageError:
    """`exc` in our words: what was tried on which store, and what to do."""
    kind = NoSpace if exc.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    hints = {
        errno.EACCES: "do so as the user that it belongs to, or as root"
        if operation in _LOOKING
        else "choose a place that you may write to",
        errno.EROFS: "the file system is read-only; choose another",
        errno.ENOSPC: "free some space there, or name a store on another drive",
    }
    return kind(
        f"cannot {operation} the store {name}: {exc.strerror or exc}",
        operation=operation,
        path=name,
        hint=hints.get(exc.errno or 0),
    )
