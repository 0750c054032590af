"""Making a store on purpose, and wiping one: the only writes that meet what is not ours yet.

Both are planned first (only looking, raising what refuses them) and carried out afterwards; the
device is held and looked at again in between, since anything may have happened meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import uuid as uuid_module
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dualblade.errors import NotAStore, Unsupported
from dualblade.host.drives import (
    Drive,
    Finding,
    find_drive,
    findings,
    loop_devices,
    signatures,
)
from dualblade.host.page_cache import drop
from dualblade.store.backing import check_place, hold_file, is_device
from dualblade.store.device import (
    discard,
    discard_content,
    hold_device,
    recognise,
    section_of,
    write_superblocks,
    zero,
)
from dualblade.store.format import (
    DATA_OFFSET,
    DEVICE_BYTES_MIN,
    MAGIC,
    SUPERBLOCK_BYTES,
    MemberSection,
    OtherVersion,
    Superblock,
    device_capacity,
    second_copy_offset,
)
from dualblade.store.inspect import inspect_store
from dualblade.store.members import as_places, check_kinds, open_members
from dualblade.store.place import read_superblock, storage_error
from dualblade.units import BLOCK_BYTES, GIB, MIB, format_size

_WIPE_STEP_BYTES = GIB
"""Discarded or zeroed at once, so that a long wipe can be told of and interrupted."""

_SAMPLES = 16
"""Blocks of a step that are read after it was discarded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `format` or `wipe` would do to a place that allows it. `drive` None: a file.

    `member`: of which part of a striped store `wipe` would take it out.
    """

    path: str
    drive: Drive | None
    capacity_bytes: int | None
    member: MemberSection | None = None

    @property
    def confirmation(self) -> str:
        """What people type to say that they mean this place: its serial, else its path."""
        return self.path if self.drive is None else self.drive.name


def plan_formats(paths: Sequence[str]) -> list[Plan]:
    """Whether a store may be made of `paths`, striped over several; only looks.

    Raises: as plan_format; ConfigError, NotAStore for paths that cannot be members of one store.
    """
    plans = [plan_format(os.fspath(path)) for path in as_places(paths) or ()]
    check_kinds(paths)
    seen: dict[tuple[object, ...], str] = {}
    for drive in (plan.drive for plan in plans if plan.drive is not None and plan.drive.wwid):
        same = (drive.wwid, drive.partition, drive.size_bytes)
        if same in seen:
            raise NotAStore(
                f"{seen[same]} and {drive.path} are two names of one drive ({drive.wwid})",
                operation="format",
                path=drive.path,
                hint="name each drive once; of several that a USB bridge names alike, one",
            )
        seen[same] = drive.path
    return plans


def plan_wipes(paths: Sequence[str]) -> list[Plan]:
    """As plan_wipe, for each; they need not be all members of a store, or of the same one."""
    return [plan_wipe(os.fspath(path)) for path in as_places(paths) or ()]


def plan_format(path: str) -> Plan:
    """Whether a store may be made at `path`; only looks.

    Raises: NotAStore listing all that stands against it, ConfigError, Unsupported, StorageError.
    """
    if not is_device(path):
        if os.path.lexists(path):
            raise NotAStore(
                f"{path} exists already",
                operation="format",
                path=path,
                hint=f"name a new file; a store is removed by dualblade store wipe {path}",
            )
        check_place(path)
        return Plan(path=path, drive=None, capacity_bytes=None)
    drive = find_drive(path)
    _refuse(drive, "format", findings(drive))
    if drive.size_bytes < DEVICE_BYTES_MIN:
        raise Unsupported(
            f"{path} is too small: {format_size(drive.size_bytes)} of "
            f"{format_size(DEVICE_BYTES_MIN)}",
            hint="name a larger device",
        )
    if drive.block_bytes > SUPERBLOCK_BYTES:
        raise Unsupported(f"{path} has blocks of {drive.block_bytes} bytes, more than 4096")
    try:
        fd = os.open(drive.block_path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise storage_error("format", path, exc) from exc
    try:
        _refuse_store(fd, drive)
    finally:
        os.close(fd)
    return Plan(path=path, drive=drive, capacity_bytes=device_capacity(drive.size_bytes))


def _refuse_store(fd: int, drive: Drive) -> None:
    """Raises: NotAStore where one of ours is on `drive`, of whatever version."""
    try:
        held = recognise(fd, drive)
    except OtherVersion:
        raise
    except NotAStore:
        return
    raise NotAStore(
        f"{drive.path} is a dualblade store already (generation {held.generation})",
        operation="format",
        path=drive.path,
        hint=f"use it as it is; or make it free: dualblade store wipe {drive.path}",
    )


def empty_store(*paths: str) -> Superblock:
    """Have the store of the files at `paths` empty, made where nothing is, and closed cleanly.
    Returns the first superblock. Raises: as `Store.open`."""
    store = open_members(paths, None, direct=False, capacity_bytes=None)
    store.close(keep_blocks=False, end=DATA_OFFSET)
    return store.backings[0].superblock


def carry_out_format(*plans: Plan) -> Superblock:
    """Make the store that `plans` describe: one, or the members of a striped one, in their order.

    All are held and looked at again before one is written. Returns the first superblock.
    Raises: NotAStore when one is not free any more.
    """
    if plans[0].drive is None:
        return empty_store(*(plan.path for plan in plans))
    with contextlib.ExitStack() as stack:
        held = [_hold(plan, stack) for plan in plans]
        blocks = _new_superblocks(plans, held)
        for plan, fd, superblock in zip(plans, held, blocks, strict=True):
            assert plan.drive is not None
            try:
                if _was_store(fd, plan.drive):
                    discard_content(fd, plan.drive, DATA_OFFSET + superblock.capacity_bytes)
                write_superblocks(fd, superblock)
                drop(fd, 0, plan.drive.size_bytes)
            except OSError as exc:
                raise storage_error("format", plan.path, exc) from exc
    return blocks[0]


def _was_store(fd: int, drive: Drive) -> bool:
    """Whether one that is none any more may have left content. Raises: OSError."""
    offsets = (0, second_copy_offset(drive.size_bytes))
    return any(read_superblock(fd, offset).startswith(MAGIC) for offset in offsets)


def _new_superblocks(plans: Sequence[Plan], held: Sequence[int]) -> list[Superblock]:
    """Of devices, each looked at once more. Raises: NotAStore."""
    uuid, now, count = uuid_module.uuid4(), int(time.time()), len(plans)
    blocks = []
    for index, (plan, fd) in enumerate(zip(plans, held, strict=True)):
        assert plan.drive is not None
        # What O_EXCL does not keep out.
        _refuse(plan.drive, "format", [*signatures(plan.drive), *loop_devices(plan.drive)])
        _refuse_store(fd, plan.drive)
        blocks.append(
            Superblock(
                uuid=uuid,
                capacity_bytes=device_capacity(plan.drive.size_bytes),
                generation=1,
                created_unix_seconds=now,
                in_use=False,
                device=section_of(plan.drive),
                member=MemberSection(index=index, count=count) if count > 1 else None,
            )
        )
    return blocks


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
            member=superblock.member,
        )
    drive = find_drive(path)
    _refuse(drive, "wipe", findings(drive, has_store=True))
    fd = hold_device(drive)
    try:
        superblock = recognise(fd, drive)
    finally:
        os.close(fd)
    return Plan(
        path=path,
        drive=drive,
        capacity_bytes=superblock.capacity_bytes,
        member=superblock.member,
    )


def carry_out_wipe(*plans: Plan, tell: Callable[[float], None]) -> list[str]:
    """Wipe stores or members: content first, superblocks last. Returns how, in words, of each.

    All are held and compared again before one is written. `tell` gets the part done, 0 to 1.
    Raises: NotAStore when one is no store any more.
    """
    with contextlib.ExitStack() as stack:
        held = [_hold(plan, stack) for plan in plans]
        for plan, fd in zip(plans, held, strict=True):
            if plan.drive is not None:
                _refuse(plan.drive, "wipe", loop_devices(plan.drive))
                recognise(fd, plan.drive)
        hows: list[str] = []
        for plan, fd in zip(plans, held, strict=True):
            done, count = len(hows), len(plans)
            try:
                hows.append(_wipe(plan, fd, functools.partial(_tell_of, tell, done, count)))
            except OSError as exc:
                raise storage_error("wipe", plan.path, exc) from exc
        return hows


def _tell_of(tell: Callable[[float], None], done: int, count: int, part: float) -> None:
    tell((done + part) / count)


def _wipe(plan: Plan, fd: int, tell: Callable[[float], None]) -> str:
    """One held store or member. Raises: OSError; NotAStore for a name that is another file's."""
    if plan.drive is None:
        # The name first: a store that cannot be removed stays one. `fd` may be behind a link.
        target = os.path.realpath(plan.path)
        if not os.path.samestat(os.stat(target), os.fstat(fd)):
            raise NotAStore(f"{plan.path} is another file by now", path=plan.path)
        os.unlink(target)
        os.ftruncate(fd, 0)
        if os.path.islink(plan.path):
            os.unlink(plan.path)
        tell(1)
        return "removed"
    assert plan.capacity_bytes is not None
    how = _wipe_content(fd, plan.drive, DATA_OFFSET + plan.capacity_bytes, tell)
    for offset in (second_copy_offset(plan.drive.size_bytes), 0):
        zero(fd, offset, SUPERBLOCK_BYTES)
    os.fsync(fd)
    drop(fd, 0, plan.drive.size_bytes)
    return how


def _hold(plan: Plan, stack: contextlib.ExitStack) -> int:
    """What is planned, held until `stack` ends; its descriptor. Raises: NotAStore, StorageError."""
    if plan.drive is None:
        held = hold_file(plan.path, direct=False, existing_only=True)
        stack.callback(held.let_go)
        return held.fd
    fd = hold_device(plan.drive)
    stack.callback(os.close, fd)
    return fd


def _wipe_content(fd: int, drive: Drive, end: int, tell: Callable[[float], None]) -> str:
    how = "discarded"
    for offset in range(DATA_OFFSET, end, _WIPE_STEP_BYTES):
        size_bytes = min(_WIPE_STEP_BYTES, end - offset)
        told = discard(fd, drive, offset, size_bytes)
        if not told or not _reads_as_empty(fd, offset, size_bytes):
            how = "overwritten with zeros"
            for at in range(offset, offset + size_bytes, 64 * MIB):
                zero(fd, at, min(64 * MIB, offset + size_bytes - at))
        tell((offset + size_bytes) / end)
    return how


def _reads_as_empty(fd: int, offset: int, size_bytes: int) -> bool:
    """Whether samples of a range that was discarded tell nothing: a drive may read what was there
    all the same. Flash that was erased reads as ones; what cannot be read is to be overwritten."""
    step = max(BLOCK_BYTES, size_bytes // _SAMPLES // BLOCK_BYTES * BLOCK_BYTES)
    try:
        found = {os.pread(fd, BLOCK_BYTES, at) for at in range(offset, offset + size_bytes, step)}
    except OSError:
        return False
    return found <= {bytes(BLOCK_BYTES), b"\xff" * BLOCK_BYTES}


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
