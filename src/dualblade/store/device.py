"""A store on a block device or partition: held, recognised, opened, and let go of.

Nothing is written to a device before its superblocks, and the device that they name, have been
compared with what is there.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from dataclasses import dataclass, replace

from dualblade.errors import NotAStore, StorageError, Unsupported
from dualblade.host.drives import PERMISSION_WORDS, Drive, find_drive, signatures
from dualblade.host.nvme import nvme_facts
from dualblade.host.page_cache import drop
from dualblade.io import Engine, Namespace, Op
from dualblade.store.format import (
    DATA_OFFSET,
    DeviceSection,
    Superblock,
    choose_superblock,
    second_copy_offset,
)
from dualblade.store.place import (
    Location,
    close_descriptors,
    patiently,
    read_superblock,
    storage_error,
    write_superblock,
)
from dualblade.units import BLOCK_BYTES

log = logging.getLogger("dualblade.store")

_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_NAME_CHARACTERS_MAX = 64  # of a serial or a world-wide name; longer ones are compared by these


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBacking:
    """A formatted device, open; `buffered_fd` holds it O_EXCL. See place.Backing."""

    path: str
    drive: Drive
    direct_fd: int | None
    buffered_fd: int
    superblock: Superblock
    by_commands: bool

    @property
    def coherent(self) -> bool:
        return False

    @property
    def sync(self) -> Op:
        return Op.SYNC_RANGE

    def allocate(self, offset: int, size_bytes: int) -> None:
        """A device has all its blocks."""

    @property
    def end(self) -> int:
        return self.drive.size_bytes

    def cut(self, end: int) -> None:
        """It keeps them."""

    def locate(self, offset: int) -> Location:
        return Location(self.path, offset, offset // self.drive.block_bytes)

    def discard(self, offset: int, size_bytes: int) -> None:
        discard(self.buffered_fd, self.drive, offset, size_bytes)

    def fragments(self) -> int:
        return 1

    def close(self, *, keep_blocks: bool, end: int) -> None:
        try:
            if not keep_blocks and end > DATA_OFFSET:
                discard_content(self.buffered_fd, self.drive, end)
            write_superblocks(self.buffered_fd, replace(self.superblock, in_use=False))
        except OSError as exc:
            raise storage_error("close", self.path, exc) from exc
        finally:
            self.let_go()

    def let_go(self) -> None:
        close_descriptors(self.direct_fd, self.buffered_fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldDevice:
    """A device of ours, held O_EXCL by `fd`. See place.Held."""

    drive: Drive
    engine: Engine
    fd: int
    direct_fd: int | None
    superblock: Superblock
    by_commands: bool

    @property
    def path(self) -> str:
        return self.drive.path

    @property
    def file_system(self) -> None:
        return None

    def capacity(self, wanted: int | None, sharers: int) -> int:  # noqa: ARG002 - it shares nothing
        """What it was formatted with, or less where less is wanted."""
        most = self.superblock.capacity_bytes
        return most if wanted is None else min(most, wanted)

    def take(self, superblock: Superblock, *, unclean: bool) -> DeviceBacking:
        try:
            write_superblocks(self.fd, superblock)
            if unclean:  # what a crash left behind
                discard_content(self.fd, self.drive, DATA_OFFSET + self.superblock.capacity_bytes)
            # What probing and readahead left: pages that direct writes would make stale.
            drop(self.fd, 0, self.drive.size_bytes)
        except OSError as exc:
            raise device_error("open", self.path, exc) from exc
        return DeviceBacking(
            path=self.path,
            drive=self.drive,
            direct_fd=self.direct_fd,
            buffered_fd=self.fd,
            superblock=superblock,
            by_commands=self.by_commands,
        )

    def let_go(self) -> None:
        for fd in (self.direct_fd, self.fd):
            if fd is not None:
                self.engine.unregister_file(fd)
                os.close(fd)


def hold_store(path: str | os.PathLike[str], engine: Engine, *, direct: bool) -> HeldDevice:
    """The store, or member of one, on the device at `path`; nothing is written.

    Its direct door is NVMe passthrough for a namespace's character device, where `engine` can and
    was not asked for O_DIRECT; else O_DIRECT on the block device, and `engine.reason` says why.
    Raises: NotAStore (foreign, damaged, in use, another device), StorageError, Unsupported;
    nothing is left behind.
    """
    drive = find_drive(path)
    if drive.read_only:  # the kernel opens it, and refuses the first write
        raise NotAStore(
            f"{drive.path} is read-only",
            operation="open",
            path=drive.path,
            hint=f"blockdev --setrw {drive.block_path}",
        )
    fd = hold_device(drive)
    try:
        superblock = recognise(fd, drive)
        direct_fd, by_commands = None, False
        if direct:
            direct_fd, by_commands = _open_direct(drive, engine, superblock.capacity_bytes)
    except BaseException as exc:
        os.close(fd)
        if isinstance(exc, OSError):
            raise device_error("open", drive.path, exc) from exc
        raise
    return HeldDevice(
        drive=drive,
        engine=engine,
        fd=fd,
        direct_fd=direct_fd,
        superblock=superblock,
        by_commands=by_commands,
    )


def _open_direct(drive: Drive, engine: Engine, capacity_bytes: int) -> tuple[int, bool]:
    """(descriptor of the direct door, whether it takes NVMe commands).

    Raises: OSError; Unsupported, StorageError where commands alone were asked for.
    """
    if drive.is_ng and engine.choice == "io_uring":
        engine.note_fallback(f"io_engine io_uring was asked for: O_DIRECT on {drive.block_path}")
    elif drive.is_ng:
        try:
            return _open_passthrough(drive, engine, capacity_bytes), True
        except (Unsupported, StorageError) as problem:
            if engine.choice == "uring-cmd":
                raise
            engine.note_fallback(f"{problem.message}: O_DIRECT on {drive.block_path}")
    return os.open(drive.block_path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC), False


def _open_passthrough(drive: Drive, engine: Engine, capacity_bytes: int) -> int:
    """A namespace's character device that `engine` sends NVMe commands to.

    Raises: Unsupported, StorageError, OSError.
    """
    fd = os.open(drive.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        facts = nvme_facts(fd, drive.path)
        if (facts.block_bytes, facts.metadata_bytes) != (drive.block_bytes, 0):
            raise Unsupported(
                f"{drive.path} says {facts.block_bytes} + {facts.metadata_bytes} bytes a block, "
                f"its block device {drive.block_bytes}"
            )
        size_bytes = facts.block_count * facts.block_bytes
        if (facts.serial, size_bytes) != (drive.serial or facts.serial, drive.size_bytes):
            raise Unsupported(
                f"{drive.path} is {facts.serial} of {size_bytes} bytes, its block device "
                f"{drive.serial} of {drive.size_bytes}"
            )
        most = min(drive.command_bytes_max, facts.mdts_bytes or drive.command_bytes_max)
        most = min(most, facts.block_bytes << 16)  # the block count of a command is 16 bits
        # A page of memory is a segment; of a buffer that starts inside a page, one is lost.
        scattered = min(most, (drive.segments_max - 1) * BLOCK_BYTES)
        namespace = Namespace(
            namespace_id=facts.namespace_id,
            block_bytes=facts.block_bytes,
            begin=DATA_OFFSET,
            end=DATA_OFFSET + capacity_bytes,
            command_bytes_max=most // BLOCK_BYTES * BLOCK_BYTES,
            scattered_bytes_max=max(scattered // BLOCK_BYTES * BLOCK_BYTES, BLOCK_BYTES),
        )
        engine.register_namespace(fd, namespace)
    except BaseException:
        engine.unregister_file(fd)
        os.close(fd)
        raise
    return fd


def hold_device(drive: Drive) -> int:
    """A descriptor that has the block device for itself (O_EXCL) until it is closed.

    Raises: NotAStore when somebody else has it, or `drive` is another device by now; StorageError.
    """
    try:
        flags = os.O_RDWR | os.O_EXCL | os.O_CLOEXEC
        fd = patiently(lambda: os.open(drive.block_path, flags), errno.EBUSY)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise NotAStore(
                f"{drive.path} is in use: mounted, part of something, or open in another cache",
                operation="lock",
                path=drive.path,
                hint=f"see dualblade doctor {drive.path}",
            ) from exc
        raise device_error("open", drive.block_path, exc) from exc
    try:
        _check_unchanged(fd, drive)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_unchanged(fd: int, drive: Drive) -> None:
    """The name may belong to another device by now: people take time to type a serial, and names
    are given anew as drives come and go. Raises: NotAStore, StorageError.
    """
    same_node = os.fstat(fd).st_rdev == os.stat(drive.block_path).st_rdev
    if not same_node or find_drive(drive.path) != drive:
        raise NotAStore(
            f"{drive.path} is not the device any more that was looked at",
            operation="open",
            path=drive.path,
            hint=f"see dualblade doctor {drive.path}",
        )


def recognise(fd: int, drive: Drive) -> Superblock:
    """The newest superblock of the store on `drive`, which is proven to be this very device.

    Reads only. Raises: NotAStore, Unsupported, StorageError.
    """
    if drive.metadata_bytes:
        raise Unsupported(
            f"{drive.path} has blocks with {drive.metadata_bytes} bytes of metadata",
            hint=f"format it without: nvme format {drive.block_path} --lbaf=N",
        )
    offsets = (0, max(0, second_copy_offset(drive.size_bytes)))
    try:
        raws = tuple(read_superblock(fd, offset) for offset in offsets)
    except OSError as exc:
        raise storage_error("open", drive.path, exc) from exc
    superblock = choose_superblock(raws[0], raws[1], path=drive.path, here=section_of(drive))
    # Foreign metadata can lie beside an untouched superblock (RAID and pools do): theirs, then.
    found = signatures(drive)
    if found:
        raise NotAStore(
            f"{drive.path} was a dualblade store; now: {found[0].what}",
            operation="open",
            path=drive.path,
            hint=f"if that is not wanted: {found[0].free_with}",
        )
    return superblock


def section_of(drive: Drive, copy: int = 0) -> DeviceSection:
    """What a superblock on `drive` says of it."""
    names = (drive.serial, drive.wwid, drive.part_uuid)
    serial, wwid, part_uuid = (" ".join(name.split())[:_NAME_CHARACTERS_MAX] for name in names)
    return DeviceSection(
        size_bytes=drive.size_bytes,
        block_bytes=drive.block_bytes,
        copy=copy,
        serial=serial,
        wwid=wwid,
        part_uuid=part_uuid,
    )


def write_superblocks(fd: int, superblock: Superblock) -> None:
    """Both copies, each synced before the next: one of them is always whole. Raises: OSError."""
    assert superblock.device is not None
    for copy in (1, 0):
        device = replace(superblock.device, copy=copy)
        write_superblock(fd, replace(superblock, device=device))


def discard(fd: int, drive: Drive, offset: int, size_bytes: int) -> bool:
    """Tell the drive that a range is of no use any more (TRIM); False if it does not take that, or
    refuses what it says that it takes, as bridges to USB and SCSI do: TRIM is advice. Raises:
    OSError.
    """
    if not drive.discard_bytes_max:
        return False
    try:
        fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", offset, size_bytes))
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EREMOTEIO, errno.EIO, errno.EINVAL):
            raise
        return False
    return True


def discard_content(fd: int, drive: Drive, end: int) -> None:
    """`discard` all extents before `end`; where the drive does not take that, it is told. Raises:
    OSError."""
    if not discard(fd, drive, DATA_OFFSET, end - DATA_OFFSET):
        log.warning(
            "%s %s TRIM: what was stored stays on it until it is overwritten or wiped "
            "(dualblade store wipe)",
            drive.path,
            "refuses" if drive.discard_bytes_max else "has no",
        )


def zero(fd: int, offset: int, size_bytes: int) -> None:
    """Write zeros over a range, by the kernel. Raises: OSError."""
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, size_bytes))


def device_error(operation: str, node: str, exc: OSError) -> StorageError:
    """`storage_error` of a device, whose nodes are opened to a user or group."""
    if exc.errno not in (errno.EACCES, errno.EPERM):
        return storage_error(operation, node, exc)
    return StorageError(
        f"cannot {operation} {node}: {exc.strerror}",
        operation=operation,
        path=node,
        hint=f"give your user or group {PERMISSION_WORDS}",
    )
