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
from dualblade.host.drives import find_drive
from dualblade.io import Engine
from dualblade.store.device import open_device
from dualblade.store.fiemap import contiguous_pieces, file_extents
from dualblade.store.format import DATA_OFFSET, Superblock
from dualblade.store.place import (
    Backing,
    Location,
    read_superblock,
    storage_error,
    write_superblock,
)
from dualblade.units import EXTENT_ALIGN_BYTES, GIB, KIB, format_size

_RESERVE_BYTES_MAX = 2 * GIB
_RESERVE_FRACTION = 20
"""Left free on the file system by default: a twentieth of its free space, at most 2 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileBacking:
    """An open, locked, formatted store file. See place.Backing."""

    path: str
    private: bool
    direct_fd: int | None
    buffered_fd: int
    superblock: Superblock
    was_unclean: bool

    @property
    def capacity_bytes(self) -> int:
        return self.superblock.capacity_bytes

    @property
    def coherent(self) -> bool:
        return True

    def allocate(self, offset: int, size_bytes: int) -> None:
        os.posix_fallocate(self.buffered_fd, offset, size_bytes)

    def locate(self, offset: int) -> Location:
        return Location(self.path, offset, None)

    def discard(self, offset: int, size_bytes: int) -> None:
        """A file keeps its blocks until it is closed: the next extent needs them."""

    def pieces(self) -> int | None:
        try:
            extents = file_extents(self.buffered_fd)
        except OSError:
            return None
        return contiguous_pieces([e for e in extents if e.logical_offset >= DATA_OFFSET])

    def close(self, *, keep_blocks: bool, end: int) -> None:  # noqa: ARG002 - the file knows its end
        try:
            if not self.private:
                if not keep_blocks:
                    os.ftruncate(self.buffered_fd, DATA_OFFSET)
                write_superblock(self.buffered_fd, replace(self.superblock, in_use=False))
        except OSError as exc:
            raise storage_error("close", self.path, exc) from exc
        finally:
            # A private file is gone with its descriptors.
            for fd in (self.direct_fd, self.buffered_fd):
                if fd is not None:
                    os.close(fd)


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
    path: str | os.PathLike[str] | None,
    engine: Engine,
    *,
    direct: bool,
    capacity_bytes: int | None,
) -> Backing:
    """Open what is at `path`: the store on a device, a store file, or for None a private one.

    With `direct` the place must do O_DIRECT. `capacity_bytes` None: free space less a reserve; a
    device has what it was formatted with.
    Raises: NotAStore, NoSpace, StorageError, Unsupported; nothing is left behind.
    """
    _check_engine(path, engine, direct=direct)
    if path is not None and is_device(path):
        return open_device(path, engine, direct=direct, capacity_bytes=capacity_bytes)
    return open_file(path, direct=direct, capacity_bytes=capacity_bytes)


def _check_engine(path: str | os.PathLike[str] | None, engine: Engine, *, direct: bool) -> None:
    """What was asked of the engine must be what the store can give it. Raises: Unsupported."""
    if engine.choice == "uring-cmd" and not direct:
        raise Unsupported(
            "io_engine uring-cmd is for the direct path, which path page-cache does not use",
            hint="use path direct or dual, or io_engine auto",
        )
    if engine.choice == "uring-cmd" and not (path and stat.S_ISCHR(_mode(path))):
        raise Unsupported(
            "io_engine uring-cmd needs a store on an NVMe namespace (/dev/ngXnY), "
            f"not {path or 'a private file'}",
            hint="name the namespace, or use io_engine auto",
        )
    if engine.io_poll and direct:
        place = cache_directory() if path is None else path
        queue = device_facts(find_drive(place).block_path if is_device(place) else place).queue
        if queue is None or not queue.io_poll:
            raise Unsupported(
                f"io_poll: {queue.name if queue else place} has no poll queues",
                hint="leave it off, or give the driver some (nvme.poll_queues=N at boot)",
            )
        if queue.max_sectors_kb:
            engine.limit_direct_pieces(queue.max_sectors_kb * KIB)


def is_device(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a device node; False where nothing is."""
    mode = _mode(path)
    return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)


def _mode(path: str | os.PathLike[str]) -> int:
    """st_mode; 0 where nothing is."""
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def open_file(
    path: str | os.PathLike[str] | None,
    *,
    direct: bool,
    capacity_bytes: int | None,
    existing_only: bool = False,
) -> FileBacking:
    """The store file at `path`, or a private one; see open_backing and the module's text."""
    private = path is None
    name = str(cache_directory()) if path is None else os.fspath(path)
    fd, is_new = _open_private(name) if private else _open_named(name, existing_only)
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
            raw = read_superblock(fd, 0)
            old = Superblock.decode(raw, path=name, file_bytes=os.fstat(fd).st_size)
        superblock = Superblock(
            uuid=old.uuid if old else uuid_module.uuid4(),
            capacity_bytes=capacity,
            generation=old.generation + 1 if old else 1,
            created_unix_seconds=old.created_unix_seconds if old else int(time.time()),
            in_use=True,
        )
        write_superblock(fd, superblock)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    except (OSError, DualBladeError) as exc:
        if direct_fd is not None:
            os.close(direct_fd)
        os.close(fd)
        if is_new and not private:
            os.unlink(name)
        if isinstance(exc, OSError):
            raise storage_error("open", name, exc) from exc
        raise
    return FileBacking(
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
            raise storage_error("open", folder, exc) from exc
    fd, name = tempfile.mkstemp(prefix="dualblade-", dir=folder)
    os.unlink(name)
    return fd, True


def _open_named(name: str, existing_only: bool) -> tuple[int, bool]:
    parent = os.path.dirname(name) or "."
    if not os.path.isdir(parent):
        raise StorageError(
            f"the store's directory {parent} does not exist", path=name, hint="make it first"
        )
    if not existing_only:
        try:
            return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), True
        except FileExistsError:
            pass
        except OSError as exc:
            raise storage_error("open", name, exc) from exc
    try:
        _refuse_special(name)
        return os.open(name, os.O_RDWR), False
    except OSError as exc:
        raise storage_error("open", name, exc) from exc


def _refuse_special(name: str) -> None:
    mode = os.stat(name).st_mode
    if stat.S_ISDIR(mode):
        raise NotAStore(
            f"{name} is a directory", path=name, hint=f"name a file, such as {name}/kv.store"
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
