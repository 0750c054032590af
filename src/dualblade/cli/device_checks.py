"""What `doctor` finds out about a block device or NVMe namespace."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from dualblade.errors import DualBladeError, NotAStore, Unsupported
from dualblade.host.drives import Drive, Finding, find_drive, findings
from dualblade.host.nvme import nvme_facts
from dualblade.io import Namespace, open_engine
from dualblade.store.format import Superblock
from dualblade.store.formatting import plan_format
from dualblade.store.inspect import inspect_store
from dualblade.units import BLOCK_BYTES


def examine(path: str) -> dict[str, Any] | None:
    """The drive, what is on it, and the store on it; None for what is no such device.

    Only looks. Raises: StorageError when it may not be looked at.
    """
    if not os.path.exists(path):
        return None
    try:
        drive = find_drive(path)
    except NotAStore:
        return None
    told: dict[str, Any] = {
        "kind": "device",
        "store": None,
        "store_problem": None,
        "in_use_now": None,
        "fragments": None,
        "drive": {
            **asdict(drive),
            **_nvme(drive),
            "passthrough": _passthrough(drive),
            "findings": None,
        },
    }
    try:
        report = inspect_store(path)
    except DualBladeError as exc:
        told["store_problem"] = exc.message
        return told
    told["store_problem"], told["in_use_now"] = report.problem, report.in_use_now
    if report.superblock is not None and report.problem is None:
        told["store"] = superblock_facts(report.superblock)
    is_store = told["store"] is not None
    try:
        found = [] if is_store and report.in_use_now else findings(drive, has_store=is_store)
        if not is_store and not found:
            plan_format(path)  # what stands against a store of its own
    except DualBladeError as exc:
        found = [Finding(what=exc.message, free_with=exc.hint)]
    told["drive"]["findings"] = [asdict(finding) for finding in found]
    return told


def superblock_facts(block: Superblock) -> dict[str, Any]:
    """What `doctor` tells of a superblock."""
    return {
        "uuid": str(block.uuid),
        "capacity_bytes": block.capacity_bytes,
        "generation": block.generation,
        "closed_cleanly": not block.in_use,
        "member": None if block.member is None else block.member.words,
    }


def _nvme(drive: Drive) -> dict[str, Any]:
    """What Identify tells, for NVMe namespaces."""
    if not os.path.basename(drive.whole_path).startswith("nvme"):
        return {"nvme": None, "nvme_problem": None}
    try:
        fd = os.open(drive.path if drive.is_ng else drive.block_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return {"nvme": asdict(nvme_facts(fd, drive.path)), "nvme_problem": None}
        finally:
            os.close(fd)
    except (OSError, DualBladeError) as exc:
        return {"nvme": None, "nvme_problem": str(exc)}


def _passthrough(drive: Drive) -> str | None:
    """Whether NVMe commands could go to the drive, or why not; None for what is no namespace.

    The engine is only asked: no command is made.
    """
    if not drive.is_ng:
        return None
    space = Namespace(1, BLOCK_BYTES, 0, BLOCK_BYTES, BLOCK_BYTES, BLOCK_BYTES)
    try:
        fd = os.open(drive.path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        return f"{drive.path}: {exc.strerror}"
    try:
        with open_engine() as engine:
            engine.register_namespace(fd, space)
            return f"possible: engine {engine.name}"
    except Unsupported as exc:
        return exc.message
    finally:
        os.close(fd)
