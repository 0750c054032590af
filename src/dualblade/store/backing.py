"""The file behind a store: made, found, locked, and given back.

A private store has no name from its first moment (O_TMPFILE), so nothing is left after a crash.
A named one is created 0600 and formatted when it does not exist; an existing file is taken only
when it is a dualblade store that nobody has open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
import time
import uuid as uuid_module
from dataclasses import dataclass, replace
from pathlib import Path

from dualblade.errors import DualBladeError, NoSpace, NotAStore, StorageError, Unsupported
from dualblade.host.devices import device_facts
from dualblade.store.format import DATA_OFFSET, SUPERBLOCK_BYTES, Superblock
from dualblade.units import EXTENT_ALIGN_BYTES, GIB, format_size

_RESERVE_BYTES_MAX = 2 * GIB
_RESERVE_FRACTION = 20
"""Left free on the file system by default: a twentieth of its free space, at most 2 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backing:
    """An open, locked, formatted store file.

    `direct_fd` is O_DIRECT, None when no direct door was asked for; `buffered_fd` is the
    page-cache door, and the descriptor whose writeback errors count.
    """

    path: str
    private: bool
    direct_fd: int | None
    buffered_fd: int
    superblock: Superblock
    was_unclean: bool

    def close(self, *, keep_blocks: bool) -> None:
        """Discard the content (or keep the blocks), mark it clean, and unlock."""
        try:
            if not self.private:
                if not keep_blocks:
                    os.ftruncate(self.buffered_fd, DATA_OFFSET)
                _write_superblock(self.buffered_fd, replace(self.superblock, in_use=False))
        except OSError as exc:
            raise _storage_error("close", self.path, exc) from exc
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the descriptors and nothing else; a private file is gone with them."""
        if self.direct_fd is not None:
            os.close(self.direct_fd)
        os.close(self.buffered_fd)


def cache_directory() -> Path:
    """Where private stores and fetched models live: $XDG_CACHE_HOME/dualblade, made 0700."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "dualblade"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageError(
            f"the cache directory {folder} cannot be made: {exc.strerror}",
            path=str(folder),
            hint="set XDG_CACHE_HOME to a directory on the drive, or name a store file",
        ) from exc
    return folder


def open_backing(
    path: str | os.PathLike[str] | None, *, direct: bool, capacity_bytes: int | None
) -> Backing:
    """Open the store file at `path`, or a private one for None; see the module's text.

    With `direct` the file system must do O_DIRECT. `capacity_bytes` None: free space less a
    reserve. Raises: NotAStore, NoSpace, StorageError, Unsupported; nothing is left behind.
    """
    private = path is None
    name = str(cache_directory()) if path is None else os.fspath(path)
    fd, is_new = _open_private(name) if private else _open_named(name)
    direct_fd = None
    try:
        _lock(fd, name)
        if direct:
            direct_fd = _open_direct(fd, name)
        capacity = _capacity(fd, name, capacity_bytes)
        if is_new:
            old = None
            os.ftruncate(fd, DATA_OFFSET)
        else:
            raw = os.pread(fd, SUPERBLOCK_BYTES, 0)
            old = Superblock.decode(raw, path=name, file_bytes=os.fstat(fd).st_size)
        superblock = Superblock(
            uuid=old.uuid if old else uuid_module.uuid4(),
            capacity_bytes=capacity,
            generation=old.generation + 1 if old else 1,
            created_unix_seconds=old.created_unix_seconds if old else int(time.time()),
            in_use=True,
        )
        _write_superblock(fd, superblock)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    except (OSError, DualBladeError) as exc:
        if direct_fd is not None:
            os.close(direct_fd)
        os.close(fd)
        if is_new and not private:
            os.unlink(name)
        if isinstance(exc, OSError):
            raise _storage_error("open", name, exc) from exc
        raise
    return Backing(
        path=f"{name} (private)" if private else name,
        private=private,
        direct_fd=direct_fd,
        buffered_fd=fd,
        superblock=superblock,
        was_unclean=old is not None and old.in_use,
    )


def _open_private(folder: str) -> tuple[int, bool]:
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600), True
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise _storage_error("open", folder, exc) from exc
    fd, name = tempfile.mkstemp(prefix="dualblade-", dir=folder)
    os.unlink(name)
    return fd, True


def _open_named(name: str) -> tuple[int, bool]:
    parent = os.path.dirname(name) or "."
    if not os.path.isdir(parent):
        raise StorageError(
            f"the store's directory {parent} does not exist", path=name, hint="make it first"
        )
    try:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), True
    except FileExistsError:
        pass
    except OSError as exc:
        raise _storage_error("open", name, exc) from exc
    _refuse_special(name)
    try:
        return os.open(name, os.O_RDWR), False
    except OSError as exc:
        raise _storage_error("open", name, exc) from exc


def _refuse_special(name: str) -> None:
    mode = os.stat(name).st_mode
    if stat.S_ISDIR(mode):
        raise NotAStore(
            f"{name} is a directory", path=name, hint=f"name a file, such as {name}/kv.store"
        )
    if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        raise Unsupported(
            f"{name} is a device; this version stores KV in files only",
            hint="name a file on that drive's file system",
        )
    if not stat.S_ISREG(mode):
        raise NotAStore(f"{name} is not a regular file", path=name)


def _lock(fd: int, name: str) -> None:
    """Take the file for this open alone; the kernel gives it back when the process dies."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NotAStore(
            f"{name} is in use by another cache or process",
            operation="lock",
            path=name,
            hint="name another store file, or wait until that one is closed",
        ) from None


def _open_direct(fd: int, name: str) -> int:
    facts = device_facts(name if os.path.isdir(name) else os.path.dirname(name) or ".")
    if not facts.direct.possible:
        raise Unsupported(
            f"{name} cannot be accessed directly: {facts.direct.reason}",
            hint="put the store on a drive's file system (ext4, xfs), or use path page-cache",
        )
    # The same file whether it still has a name or not.
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT)


def _capacity(fd: int, name: str, wanted: int | None) -> int:
    """Bytes for extents, a multiple of 2 MiB; blocks that the file already has count as free."""
    system = os.fstatvfs(fd)
    available = system.f_bavail * system.f_frsize + os.fstat(fd).st_blocks * 512
    reserve = min(_RESERVE_BYTES_MAX, available // _RESERVE_FRACTION)
    most = (available - reserve) if wanted is None else wanted
    capacity = (most - DATA_OFFSET if wanted is None else most) // EXTENT_ALIGN_BYTES
    if capacity < 1:
        raise NoSpace(
            f"no room for a store at {name}: {format_size(max(most, 0))}",
            operation="open",
            path=name,
            hint="free some space, or raise disk_capacity_bytes to at least 2 MiB",
        )
    return capacity * EXTENT_ALIGN_BYTES


def _write_superblock(fd: int, superblock: Superblock) -> None:
    raw = superblock.encode()
    if os.pwrite(fd, raw, 0) != len(raw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fdatasync(fd)
    # The superblock's page must not count against a direct store's page-cache footprint.
    os.posix_fadvise(fd, 0, DATA_OFFSET, os.POSIX_FADV_DONTNEED)


def _storage_error(operation: str, name: str, exc: OSError) -> StorageError:
    kind = NoSpace if exc.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    hints = {
        errno.EACCES: "choose a place that you may write to",
        errno.EROFS: "the file system is read-only; choose another",
        errno.ENOSPC: "free some space there, or name a store on another drive",
    }
    return kind(
        f"cannot {operation} the store {name}: {exc.strerror or exc}",
        operation=operation,
        path=name,
        hint=hints.get(exc.errno or 0),
    )
