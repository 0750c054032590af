"""Looking at a store without opening it: what its superblocks say, and whether it can be read."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dualblade.errors import DeviceError, NotAStore, Unsupported
from dualblade.host.drives import Drive, find_drive, is_held
from dualblade.io import Arena, Op, Transfer, open_engine
from dualblade.store.backing import is_device, refuse_special
from dualblade.store.device import device_error, recognise, section_of
from dualblade.store.format import (
    DATA_OFFSET,
    DEVICE_VERSION,
    FILE_VERSION,
    Superblock,
    second_copy_offset,
)
from dualblade.store.members import check_members
from dualblade.store.place import read_superblock, storage_error
from dualblade.units import BLOCK_BYTES, MIB

_READ_BYTES = 4 * MIB  # of one verifying read: far above what a drive needs to stream
UNREADABLE_MAX = 100  # told at most: a drive with more is not worth the list
# The kernel's words for a block, not the whole drive: unknown, medium, protection, target.
_BAD_BLOCK = (errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EREMOTEIO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One superblock, or what is wrong with what lies in its place."""

    offset: int
    superblock: Superblock | None
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"offset": self.offset, "problem": self.problem}
        if self.superblock is not None:
            told |= asdict(self.superblock) | {"uuid": str(self.superblock.uuid)}
        return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is at `path`. `problem` None: it is a store that would open, or a member of one."""

    path: str
    drive: Drive | None
    copies: tuple[Copy, ...]
    problem: str | None
    in_use_now: bool

    @property
    def superblock(self) -> Superblock | None:
        """The newest whole one."""
        whole = [copy.superblock for copy in self.copies if copy.superblock is not None]
        return max(whole, key=lambda block: block.generation, default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "kind": "file" if self.drive is None else "device",
            "drive": None if self.drive is None else asdict(self.drive),
            "is_store": store_problem([self]) is None,  # a member alone is none
            "problem": self.problem,
            "in_use_now": self.in_use_now,
            "superblocks": [copy.to_dict() for copy in self.copies],
        }


def inspect_store(path: str) -> Report:
    """Read the superblocks of the store at `path`. Raises: StorageError, Unsupported, NotAStore."""
    drive = find_drive(path) if is_device(path) else None
    try:
        if drive is None:
            refuse_special(path)  # a pipe would be waited for
        fd = os.open(path if drive is None else drive.block_path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        told = storage_error if drive is None else device_error
        raise told("inspect", path, exc) from exc
    try:
        if drive is None:
            return _inspect_file(fd, path)
        return _inspect_device(fd, drive)
    except OSError as exc:
        raise storage_error("inspect", path, exc) from exc
    finally:
        os.close(fd)


def store_problem(reports: Sequence[Report]) -> str | None:
    """Why the places looked at do not make up one store, and what to do; None: they do."""
    problem = next((report.problem for report in reports if report.problem is not None), None)
    if problem is not None:
        return problem
    found = [(report.path, report.superblock) for report in reports]
    try:
        check_members([(path, block) for path, block in found if block is not None])
    except NotAStore as refusal:
        return "; ".join(filter(None, (refusal.message, refusal.hint)))
    return None


def unreadable_ranges(report: Report, tell: Callable[[float], None]) -> list[tuple[int, int]]:
    """(offset, bytes) of all blocks that cannot be read, up to 100; reads past the page cache.

    `tell` gets the part done, 0 to 1. Raises: Unsupported, StorageError.
    """
    place = report.path if report.drive is None else report.drive.block_path
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno == errno.EINVAL:  # what open(2) answers where there is no O_DIRECT
            raise Unsupported(
                f"the file system of {report.path} has no O_DIRECT, by which all blocks are read",
                hint="--superblocks-only does without",
            ) from exc
        told = storage_error if report.drive is None else device_error
        raise told("verify", report.path, exc) from exc
    bad: list[tuple[int, int]] = []
    try:
        end = os.lseek(fd, 0, os.SEEK_END) // BLOCK_BYTES * BLOCK_BYTES
        # The engine ends first: after Ctrl-C a read may be under way.
        with Arena(_READ_BYTES) as arena, open_engine() as engine:

            def readable(offset: int, size_bytes: int) -> bool:
                read = Transfer(fd, Op.READ, arena.address, size_bytes, offset)
                try:
                    engine.submit([read], path=report.path).wait()
                except DeviceError as exc:
                    if exc.errno not in _BAD_BLOCK:
                        raise  # the drive is gone, or no longer ours to read
                    return False
                return True

            for offset in range(0, end, _READ_BYTES):
                size_bytes = min(_READ_BYTES, end - offset)
                if not readable(offset, size_bytes):
                    for at in range(offset, offset + size_bytes, BLOCK_BYTES):
                        tell(at / end)  # a drive may try for seconds
                        if not readable(at, BLOCK_BYTES):
                            bad.append((at, BLOCK_BYTES))
                        if len(bad) == UNREADABLE_MAX:
                            return bad
                tell((offset + size_bytes) / end)
    finally:
        os.close(fd)
    return bad


def _inspect_file(fd: int, path: str) -> Report:
    copy = _copy(read_superblock(fd, 0), 0, path, os.fstat(fd).st_size, FILE_VERSION)
    in_use = False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        in_use = True
    return Report(path=path, drive=None, copies=(copy,), problem=copy.problem, in_use_now=in_use)


def _inspect_device(fd: int, drive: Drive) -> Report:
    size = drive.size_bytes
    copies = []
    for offset in (0, max(DATA_OFFSET, second_copy_offset(size))):
        copy = _copy(read_superblock(fd, offset), offset, drive.path, size, DEVICE_VERSION)
        if copy.superblock is not None and copy.superblock.device is not None:
            differences = copy.superblock.device.differences(section_of(drive))
            if differences:
                copy = Copy(
                    offset=offset, superblock=copy.superblock, problem="; ".join(differences)
                )
        copies.append(copy)
    problem = None
    try:
        recognise(fd, drive)
    except NotAStore as refusal:
        problem = refusal.message
    return Report(
        path=drive.path,
        drive=drive,
        copies=tuple(copies),
        problem=problem,
        in_use_now=is_held(drive),
    )


def _copy(raw: bytes, offset: int, path: str, size_bytes: int, version: int) -> Copy:
    try:
        found = Superblock.decode(raw, path=path, file_bytes=size_bytes, version=version)
    except NotAStore as refusal:
        return Copy(offset=offset, superblock=None, problem=refusal.message)
    return Copy(offset=offset, superblock=found, problem=None)
