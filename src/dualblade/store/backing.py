"""A store's file: made, found, locked, and given back.

A private store, in the user's cache or in a folder that was named, has no name from its first
moment (O_TMPFILE), so nothing is left after a crash. A named one is created 0600 and formatted when
it does not exist and its name has an ending; an existing file is taken only when it is a dualblade
store that nobody has open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from dualblade.errors import ConfigError, NotAStore, StorageError, Unsupported
from dualblade.host.devices import device_facts
from dualblade.host.drives import find_drive
from dualblade.host.page_cache import waits_for_device
from dualblade.io import Engine, Op
from dualblade.store.fiemap import count_fragments, file_extents
from dualblade.store.format import DATA_OFFSET, Superblock
from dualblade.store.place import (
    Location,
    close_descriptors,
    patiently,
    read_superblock,
    storage_error,
    write_superblock,
)
from dualblade.units import BLOCK_BYTES, GIB, KIB

log = logging.getLogger("dualblade.store")

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
    sync: Op

    @property
    def coherent(self) -> bool:
        return True

    @property
    def by_commands(self) -> bool:
        return False

    def allocate(self, offset: int, size_bytes: int) -> None:
        os.posix_fallocate(self.buffered_fd, offset, size_bytes)

    @property
    def end(self) -> int:
        return os.fstat(self.buffered_fd).st_size

    def cut(self, end: int) -> None:
        os.ftruncate(self.buffered_fd, end)

    def locate(self, offset: int) -> Location:
        return Location(self.path, offset, None)

    def discard(self, offset: int, size_bytes: int) -> None:
        """A file keeps its blocks until it is closed: the next extent needs them."""

    def fragments(self) -> int | None:
        try:
            extents = file_extents(self.buffered_fd)
        except OSError:
            return None
        return count_fragments([e for e in extents if e.logical_offset >= DATA_OFFSET])

    def close(self, *, keep_blocks: bool, end: int) -> None:  # noqa: ARG002 - the file knows its end
        try:
            if self.private:
                # It is gone with its descriptors, which a program that was started may have.
                with contextlib.suppress(OSError):  # what went wrong with it was told before
                    os.ftruncate(self.buffered_fd, 0)
            else:
                if not keep_blocks:
                    os.ftruncate(self.buffered_fd, DATA_OFFSET)
                write_superblock(self.buffered_fd, replace(self.superblock, in_use=False))
            fcntl.flock(self.buffered_fd, fcntl.LOCK_UN)  # whoever has the descriptor as well
        except OSError as exc:
            raise storage_error("close", self.path, exc) from exc
        finally:
            self.let_go()

    def let_go(self) -> None:
        close_descriptors(self.direct_fd, self.buffered_fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFile:
    """A file of ours, or a new one, locked. See place.Held."""

    name: str
    fd: int
    direct_fd: int | None
    superblock: Superblock | None
    private: bool

    @property
    def path(self) -> str:
        return f"{self.name} (private)" if self.private else self.name

    @property
    def file_system(self) -> int:
        return os.fstat(self.fd).st_dev

    def capacity(self, wanted: int | None, sharers: int) -> int:
        """Blocks that the file already has count as free."""
        if wanted is not None:
            return wanted
        return file_room(os.fstatvfs(self.fd), os.fstat(self.fd).st_blocks, sharers)

    def take(self, superblock: Superblock, *, unclean: bool) -> FileBacking:
        try:
            if self.superblock is None or unclean:  # what a crash left behind
                os.ftruncate(self.fd, DATA_OFFSET)
            write_superblock(self.fd, superblock)
        except OSError as exc:
            raise storage_error("open", self.name, exc) from exc
        return FileBacking(
            path=self.path,
            private=self.private,
            direct_fd=self.direct_fd,
            buffered_fd=self.fd,
            superblock=superblock,
            sync=Op.SYNC_RANGE if waits_for_device(self.fd) else Op.DATASYNC,
        )

    def let_go(self) -> None:
        if self.superblock is None and not self.private:
            _unlink_own(self.name, self.fd)
        close_descriptors(self.direct_fd, self.fd)


def _unlink_own(name: str, fd: int) -> None:
    """Remove a name, unless it is another file's by now. What it is removed for is told."""
    with contextlib.suppress(OSError):
        if _is_at(name, fd):
            os.unlink(name)


def file_room(system: os.statvfs_result, blocks: int, sharers: int) -> int:
    """Bytes for extents of a store file that has `blocks` of 512 bytes already, on a file system
    that `sharers` members of one store share; some are left free."""
    available = system.f_bavail * system.f_frsize // sharers + blocks * 512
    reserve = min(_RESERVE_BYTES_MAX, available // _RESERVE_FRACTION)
    return available - reserve - DATA_OFFSET


def cache_directory() -> Path:
    """Where private stores and fetched models live: $XDG_CACHE_HOME/dualblade, made 0700."""
    folder = cache_folder()
    try:
        if str(folder).startswith("~/"):  # it is not expanded, and would be a folder of that name
            raise FileNotFoundError(errno.ENOENT, "there is no home directory")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageError(
            f"the cache directory {folder} cannot be made: {exc.strerror}",
            path=str(folder),
            hint="set XDG_CACHE_HOME to a directory on the drive, or name a store file",
        ) from exc
    return folder


def cache_folder() -> Path:
    """Where that is, or would be made."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dualblade"


def nearest_cache_folder() -> Path:
    """That, or the nearest folder above that exists: looking makes nothing."""
    folder = cache_folder()
    return next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))


def check_engine(path: str | os.PathLike[str] | None, engine: Engine, *, direct: bool) -> None:
    """What was asked of the engine must be what the place can give it. Raises: Unsupported."""
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
    """Whether `path` is a device node, or the name of a missing one.

    A drive may be unplugged and a name mistyped: a new file among device nodes would lie in memory.
    """
    mode = _mode(path)
    return stat.S_ISBLK(mode) or stat.S_ISCHR(mode) or (mode == 0 and _is_among_nodes(path))


def _is_among_nodes(path: str | os.PathLike[str]) -> bool:
    """/dev and its folders, but no file system mounted there (/dev/shm)."""
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    if os.path.commonpath((folder, "/dev")) != "/dev" or not os.path.isdir(folder):
        return False
    return os.stat(folder).st_dev == os.stat("/dev").st_dev


def _mode(path: str | os.PathLike[str]) -> int:
    """st_mode; 0 where nothing is."""
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


_OPENED_AGAIN_MAX = 10


def hold_file(
    path: str | os.PathLike[str] | None, *, direct: bool, existing_only: bool = False
) -> HeldFile:
    """The store file at `path`, a new one where nothing is (`check_place`), or a private one: in
    `path` where that is a folder, for None in the user's cache.

    With `direct` the file system must do O_DIRECT. One that exists must be the user's own, and is
    made unreadable to others; with `existing_only`, to look at it or wipe it, it may be anybody's.
    Raises: ConfigError, NotAStore, StorageError, Unsupported; nothing is left behind.
    """
    name = str(cache_directory()) if path is None else os.fspath(path)
    private = not existing_only and os.path.isdir(name)
    fd, is_new = _open_private(name) if private else _open_locked(name, existing_only)
    try:
        superblock = None
        if not is_new:
            raw = read_superblock(fd, 0)
            superblock = Superblock.decode(raw, path=name, file_bytes=os.fstat(fd).st_size)
        if not existing_only and not private:
            _make_private(fd, name, is_new=is_new)
        direct_fd = _open_direct(fd, name) if direct else None
    except BaseException as exc:
        if is_new and not private:
            _unlink_own(name, fd)
        os.close(fd)
        if isinstance(exc, OSError):
            raise storage_error("open", name, exc) from exc
        raise
    return HeldFile(name=name, fd=fd, direct_fd=direct_fd, superblock=superblock, private=private)


def _open_locked(name: str, existing_only: bool) -> tuple[int, bool]:
    """(descriptor of the file at `name`, locked; whether it is new). One that another process
    removed while its lock was waited for is nobody's: the name is opened again."""
    for _ in range(_OPENED_AGAIN_MAX):
        fd, is_new = _open_named(name, existing_only)
        try:
            _lock(fd, name)
            if is_new or _is_at(name, fd):
                return fd, is_new
        except BaseException:
            if is_new:
                _unlink_own(name, fd)
            os.close(fd)
            raise
        os.close(fd)
    raise StorageError(
        f"{name} is made and removed again and again by others",
        operation="open",
        path=name,
        hint="name another store file",
    )


def _is_at(name: str, fd: int) -> bool:
    """Whether the open file still has its name."""
    try:
        return os.path.samestat(os.stat(name), os.fstat(fd))
    except OSError:
        return False


def _open_private(folder: str) -> tuple[int, bool]:
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600), True
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise storage_error("open", folder, exc) from exc
    try:
        fd, name = tempfile.mkstemp(prefix="dualblade-", dir=folder)
    except OSError as exc:
        raise storage_error("open", folder, exc) from exc
    os.unlink(name)
    if os.fstat(fd).st_nlink:  # a network file system that renames what is open
        log.warning(
            "%s gives a file a name until it is closed: if this machine stops before, what is "
            "stored stays there",
            folder,
        )
    return fd, True


def _open_named(name: str, existing_only: bool) -> tuple[int, bool]:
    if not existing_only:
        check_place(name)
        try:
            return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), True
        except FileExistsError:
            pass
        except OSError as exc:
            raise storage_error("open", name, exc) from exc
    try:
        refuse_special(name)
        return os.open(name, os.O_RDWR), False
    except OSError as exc:
        raise storage_error("open", name, exc) from exc


def check_place(path: str | os.PathLike[str]) -> None:
    """That something is at `path`, or that a store file may be made there.

    Raises: StorageError where it would have no directory to be in; ConfigError for a name that may
        be a folder's whose drive is not mounted: a file would be made on another drive, and stay.
    """
    if os.path.exists(path):
        return
    name = os.fspath(path)
    if os.path.islink(name):
        raise StorageError(
            f"{name} is a link to {os.readlink(name)}, which is not there",
            path=name,
            hint="mount the drive that it leads to, or remove the link",
        )
    parent = os.path.dirname(name) or "."
    if not os.path.isdir(parent):
        raise StorageError(
            f"the store's directory {parent} does not exist",
            path=name,
            hint="mount the drive, or make the directory first",
        )
    if not os.path.splitext(name)[1]:
        raise ConfigError(
            f"there is no {name}",
            hint="mount the drive or make the folder; a store file to be made has an ending, such "
            f"as {name}/kv.store",
        )


def refuse_special(name: str) -> None:
    """Raises: NotAStore for what is no regular file, OSError."""
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
        patiently(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB), errno.EWOULDBLOCK)
    except BlockingIOError:
        raise NotAStore(
            f"{name} is in use by another cache or process",
            operation="lock",
            path=name,
            hint="name another store file, or wait until that one is closed",
        ) from None


def _make_private(fd: int, name: str, *, is_new: bool) -> None:
    """KV tells of prompts. Raises: NotAStore for the file of somebody else, who could read it. A
    new one can be that where owners are the mount's, or root is nobody: it is told of."""
    facts = os.fstat(fd)
    if facts.st_uid != os.geteuid() and is_new:
        log.warning("%s belongs to user %d, who can read what is stored in it", name, facts.st_uid)
    elif facts.st_uid != os.geteuid():
        raise NotAStore(
            f"{name} belongs to user {facts.st_uid}, who could read what is stored in it",
            operation="open",
            path=name,
            hint="name a file of your own",
        )
    if facts.st_mode & 0o077:
        why = "its file system keeps no modes"
        try:
            os.fchmod(fd, 0o600)
        except OSError as exc:
            why = exc.strerror or str(exc)
        if os.fstat(fd).st_mode & 0o077:
            log.warning("%s can be read by others, which stays: %s", name, why)


def _open_direct(fd: int, name: str) -> int:
    found = device_facts(name).direct_io()
    if not found.possible:
        raise Unsupported(
            f"{name} cannot be accessed directly: {found.reason}",
            hint="put the store on a drive's file system (ext4, xfs), or use path page-cache",
        )
    for align_bytes in (found.memory_align_bytes, found.offset_align_bytes):
        if align_bytes is not None and align_bytes > BLOCK_BYTES:
            raise Unsupported(
                f"{name} can only be accessed directly in blocks of {align_bytes} bytes, and a "
                f"store's are of {BLOCK_BYTES}",
                hint="put the store on another file system, or use path page-cache",
            )
    # The same file whether it still has a name or not.
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT)
