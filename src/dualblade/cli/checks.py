"""What `doctor` finds out. Each function looks at one thing and returns plain values."""

from __future__ import annotations

import contextlib
import resource
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dualblade.cli import device_checks
from dualblade.cli.store_place import look_at_store, superblock_at
from dualblade.errors import DualBladeError, NotAStore
from dualblade.host.cgroup import MemoryCgroup
from dualblade.host.devices import device_facts
from dualblade.host.groups import find_memory_groups
from dualblade.host.machine import machine_facts
from dualblade.host.memory import auto_budget_bytes, available_memory
from dualblade.host.page_cache import cached_bytes
from dualblade.host.profile import load_profile
from dualblade.io import Arena, open_engine
from dualblade.store import nearest_cache_folder
from dualblade.store.fiemap import count_fragments, file_extents
from dualblade.store.inspect import inspect_store
from dualblade.units import BLOCK_BYTES, MIB

_ARENA_BYTES = 4 * MIB


def machine() -> dict[str, Any]:
    """Kernel, processor and versions; what torch can compute on."""
    facts = machine_facts()
    names = ["kernel", "architecture", "cpu_model", "cpu_features", "cpu_usable_count"]
    names += ["memory_bytes", "python"]
    return {**{name: facts[name] for name in names}, "versions": facts["versions"], **_torch()}


def memory() -> dict[str, Any]:
    """The budget that is seen, where from, and whether limits can be set here."""
    found = available_memory()
    groups = find_memory_groups()
    return {
        "available_bytes": found.available_bytes,
        "source": found.source,
        "auto_budget_bytes": auto_budget_bytes(found),
        "reserve_bytes": found.reserve_bytes,
        "warnings": list(found.warnings),
        "cgroup_version": groups[0].version if groups else None,
        "cgroup_path": groups[0].path if groups else None,
        "cgroup_cannot_limit": MemoryCgroup.available(),
    }


def engine() -> dict[str, Any]:
    """The engine that `auto` gives and why; memlock, huge pages and cachestat."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with open_engine("auto") as opened, Arena(_ARENA_BYTES) as arena:
        registered = opened.register_arena(arena)
        return {
            "engine": opened.name,
            "reason": opened.reason,
            "io_uring_disabled": _sysctl("io_uring_disabled"),
            "registered_buffers": registered,
            "notes": list(opened.notes),
            "memlock_limit_bytes": None if soft == resource.RLIM_INFINITY else soft,
            "huge_pages": _huge_page_mode(),
            "huge_pages_given": arena.huge,
        }


def store(path: Path | None) -> dict[str, Any]:
    """What a store at `path` (None: the cache directory) would stand on, or stands on; with `error`
    alone what keeps it from being looked at.

    Nothing is written to an existing file.
    """
    try:
        return _store_at(nearest_cache_folder() if path is None else path, is_default=path is None)
    except DualBladeError as exc:
        named = None if path is None else str(path)
        return {"path": named, "is_default": path is None, "error": exc.message}


def _store_at(place: Path, *, is_default: bool) -> dict[str, Any]:
    with contextlib.suppress(OSError):
        mode = place.stat().st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):  # a pipe would be waited for
            raise NotAStore(f"{place} is neither a file, a folder nor a device", path=str(place))
    device = device_checks.examine(str(place))
    facts = device_facts(place if device is None else device["drive"]["block_path"])
    queue, direct = facts.queue, facts.direct_io()
    return {
        "path": str(place),
        "is_default": is_default,
        "error": None,
        "refused": _refusal(place),
        "speeds": _speeds(place),
        "file_system": facts.file_system,
        "mount_point": facts.mount_point,
        "free_bytes": facts.free_bytes,
        "direct": direct.possible,
        "direct_reason": direct.reason,
        "direct_align_bytes": direct.offset_align_bytes,
        "device": None if queue is None else queue.name,
        "device_model": None if queue is None else queue.model,
        "logical_block_bytes": None if queue is None else queue.logical_block_bytes,
        "physical_block_bytes": None if queue is None else queue.physical_block_bytes,
        "rotational": None if queue is None else queue.rotational,
        "write_cache": None if queue is None else queue.write_cache,
        "max_sectors_kb": None if queue is None else queue.max_sectors_kb,
        "cachestat": _cachestat_works(place),
        **(_content(place) if device is None else device),
        "ways": _ways(direct.possible),
    }


def together(paths: Sequence[Path]) -> str | None:
    """Why `paths` could not be opened as one store; None: they could, or would be made."""
    try:
        look_at_store(paths)
    except DualBladeError as exc:
        return exc.message
    return None


def _refusal(place: Path) -> str | None:
    """Why no store, and no member of one, can be at `place`; None: one is, or would be made."""
    try:
        superblock_at(str(place))
    except DualBladeError as exc:
        return exc.message
    return None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError as exc:
        return {"torch_error": str(exc), "threads": None, "gpus": []}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    return {"torch_error": None, "threads": torch.get_num_threads(), "gpus": names}


def _content(place: Path) -> dict[str, Any]:
    """Whether the file is a dualblade store, its state, and how contiguous it is on the device."""
    empty = dict.fromkeys(("store", "store_problem", "in_use_now", "fragments", "drive"))
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        return {**empty, "kind": "missing"}
    if stat.S_ISDIR(mode):
        return {**empty, "kind": "directory"}
    if not stat.S_ISREG(mode):
        return {**empty, "kind": "other"}
    report = inspect_store(str(place))
    found = {**empty, "kind": "file", "store_problem": report.problem}
    found["fragments"] = _fragments(place)
    if report.problem is not None or report.superblock is None:
        return found
    told = device_checks.superblock_facts(report.superblock)
    return {**found, "store": told, "in_use_now": report.in_use_now}


def _fragments(place: Path) -> int | None:
    """Contiguous ranges on the device; None for a file system that cannot tell."""
    with contextlib.suppress(OSError), place.open("rb") as file:
        return count_fragments(file_extents(file.fileno()))
    return None


def _cachestat_works(place: Path) -> bool | None:
    """Whether the kernel tells what is cached directly; None where it could not be tried."""
    folder = place if place.is_dir() else place.absolute().parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(BLOCK_BYTES))
            file.flush()
            return cached_bytes(file.fileno(), 0, BLOCK_BYTES).dirty_bytes is not None
    except (OSError, DualBladeError):
        return None


def _speeds(place: Path) -> dict[str, Any] | None:
    """The profile of the device below; None when it was not measured."""
    profile = load_profile(place)
    return None if profile is None else asdict(profile)


def _ways(direct: bool) -> dict[str, str]:
    """What each path word would come to here."""
    if direct:
        return {"dual": "works", "direct": "works", "page-cache": "works", "memory": "works"}
    refused = "refused: no direct I/O here"
    return {"dual": refused, "direct": refused, "page-cache": "works", "memory": "works"}


def _huge_page_mode() -> str | None:
    """`always`, `madvise` or `never`; None on a kernel without transparent huge pages."""
    with contextlib.suppress(OSError):
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return text[text.index("[") + 1 : text.index("]")]
    return None


def _sysctl(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/sys/kernel", name).read_text())
    return None
