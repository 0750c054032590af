"""Making a store on purpose, and wiping one: the only writes that meet what is not ours yet.

Both are planned first (only looking, raising what refuses them) and carried out afterwards; the
device is held and looked at again in between, since anything may have happened meanwhile.
"""

from __future__ import annotations

import os
import time
import uuid as uuid_module
from collections.abc import Callable
from dataclasses import dataclass

from dualblade.errors import NotAStore, Unsupported
from dualblade.host.drives import Drive, Finding, find_drive, findings, signatures
from dualblade.host.page_cache import drop
from dualblade.store.backing import is_device, open_file
from dualblade.store.device import (
    discard,
    hold_device,
    recognise,
    section_of,
    write_superblocks,
    zero,
)
from dualblade.store.format import (
    DATA_OFFSET,
    DEVICE_BYTES_MIN,
    SUPERBLOCK_BYTES,
    Superblock,
    device_capacity,
    second_copy_offset,
)
from dualblade.store.inspect import inspect_store
from dualblade.store.place import storage_error
from dualblade.units import GIB, MIB, format_size

_WIPE_STEP_BYTES = GIB
"""Discarded or zeroed at once, so that a long wipe can be told of and interrupted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `format` or `wipe` would do to a place that allows it. `drive` None: a file."""

    path: str
    drive: Drive | None
    capacity_bytes: int | None
    generation: int

    @property
    def confirmation(self) -> str:
        """What people type to say that they mean this place: its serial, else its path."""
        return self.path if self.drive is None else self.drive.name


def plan_format(path: str) -> Plan:
    """Whether a store may be made at `path`; only looks.

    Raises: NotAStore listing all that stands against it, Unsupported, StorageError.
    """
    if not is_device(path):
        if os.path.lexists(path):
            raise NotAStore(
                f"{path} exists already",
                operation="format",
                path=path,
                hint=f"name a new file; a store is removed by dualblade store wipe {path}",
            )
        return Plan(path=path, drive=None, capacity_bytes=None, generation=1)
    drive = find_drive(path)
    _refuse(drive, "format", findings(drive))
    if drive.size_bytes < DEVICE_BYTES_MIN:
        raise Unsupported(
            f"{path} is too small: {format_size(drive.size_bytes)} of "
            f"{format_size(DEVICE_BYTES_MIN)}",
            hint="name a larger device",
        )
    if drive.is_ng and drive.block_bytes > SUPERBLOCK_BYTES:
        raise Unsupported(f"{path} has blocks of {drive.block_bytes} bytes, more than 4096")
    fd = os.open(drive.block_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        held = recognise(fd, drive)
    except NotAStore:
        capacity = device_capacity(drive.size_bytes)
        return Plan(path=path, drive=drive, capacity_bytes=capacity, generation=1)
    finally:
        os.close(fd)
    raise NotAStore(
        f"{path} is a dualblade store already (generation {held.generation})",
        operation="format",
        path=path,
        hint=f"use it as it is; or make it free: dualblade store wipe {path}",
    )


def carry_out_format(plan: Plan) -> Superblock:
    """Make the store that `plan` describes. Raises: NotAStore when it is not free any more."""
    if plan.drive is None:
        backing = open_file(plan.path, direct=False, capacity_bytes=None)
        backing.close(keep_blocks=False, end=DATA_OFFSET)
        return backing.superblock
    superblock = Superblock(
        uuid=uuid_module.uuid4(),
        capacity_bytes=device_capacity(plan.drive.size_bytes),
        generation=plan.generation,
        created_unix_seconds=int(time.time()),
        in_use=False,
        device=section_of(plan.drive),
    )
    fd = hold_device(plan.drive)
    try:
        _refuse(plan.drive, "format", signatures(plan.drive))
        write_superblocks(fd, superblock)
        drop(fd, 0, plan.drive.size_bytes)
    except OSError as exc:
        raise storage_error("format", plan.path, exc) from exc
    finally:
        os.close(fd)
    return superblock


def plan_wipe(path: str) -> Plan:
    """Whether what is at `path` is a store that may be wiped; only looks.

    Raises: NotAStore, Unsupported, StorageError.
    """
    if not is_device(path):
        report = inspect_store(path)
        superblock = report.superblock
        if report.problem is not None or superblock is None:
            raise NotAStore(str(report.problem), operation="wipe", path=path)
        return Plan(
            path=path,
            drive=None,
            capacity_bytes=superblock.capacity_bytes,
            generation=superblock.generation,
        )
    drive = find_drive(path)
    _refuse(drive, "wipe", findings(drive))
    fd = hold_device(drive)
    try:
        superblock = recognise(fd, drive)
    finally:
        os.close(fd)
    return Plan(
        path=path,
        drive=drive,
        capacity_bytes=superblock.capacity_bytes,
        generation=superblock.generation,
    )


def carry_out_wipe(plan: Plan, tell: Callable[[float], None]) -> str:
    """Wipe the store: its content first, its superblocks last. Returns how, in words.

    `tell` gets the part done, 0 to 1. Raises: NotAStore when it is no store any more.
    """
    if plan.drive is None:
        backing = open_file(plan.path, direct=False, capacity_bytes=None, existing_only=True)
        backing.close(keep_blocks=False, end=DATA_OFFSET)
        os.unlink(plan.path)
        return "removed"
    fd = hold_device(plan.drive)
    try:
        superblock = recognise(fd, plan.drive)
        how = _wipe_content(fd, plan.drive, DATA_OFFSET + superblock.capacity_bytes, tell)
        for offset in (second_copy_offset(plan.drive.size_bytes), 0):
            zero(fd, offset, SUPERBLOCK_BYTES)
        os.fsync(fd)
        drop(fd, 0, plan.drive.size_bytes)
    except OSError as exc:
        raise storage_error("wipe", plan.path, exc) from exc
    finally:
        os.close(fd)
    return how


def _wipe_content(fd: int, drive: Drive, end: int, tell: Callable[[float], None]) -> str:
    how = "discarded"
    for offset in range(DATA_OFFSET, end, _WIPE_STEP_BYTES):
        size_bytes = min(_WIPE_STEP_BYTES, end - offset)
        if not discard(fd, drive, offset, size_bytes):
            how = "overwritten with zeros"
            for at in range(offset, offset + size_bytes, 64 * MIB):
                zero(fd, at, min(64 * MIB, offset + size_bytes - at))
        tell((offset + size_bytes) / end)
    return how


def _refuse(drive: Drive, operation: str, found: list[Finding]) -> None:
    """Raise what was found, each with the command that frees it; nothing found: return."""
    if not found:
        return
    lines = [
        f"  {finding.what}" + (f"; to free it: {finding.free_with}" if finding.free_with else "")
        for finding in found
    ]
    raise NotAStore(
        "\n".join([f"{drive.path} is not free to {operation}:", *lines]),
        operation=operation,
        path=drive.path,
    )
