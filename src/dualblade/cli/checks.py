"""What `doctor` finds out. Each function looks at one thing and returns plain values."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dualblade.cli import device_checks
from dualblade.errors import DualBladeError, NotAStore, StorageError
from dualblade.host.cgroup import MemoryCgroup
from dualblade.host.devices import device_facts
from dualblade.host.machine import machine_facts
from dualblade.host.memory import auto_budget_bytes, available_memory, find_memory_groups
from dualblade.host.page_cache import cached_bytes
from dualblade.host.profile import load_profile
from dualblade.io import Arena, open_engine
from dualblade.store.fiemap import contiguous_pieces, file_extents
from dualblade.store.format import SUPERBLOCK_BYTES, Superblock
from dualblade.store.inspect import inspect_store, store_problem
from dualblade.store.members import as_places, check_kinds
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
    """What a store at `path` (None: the cache directory) would stand on, or stands on.

    Nothing is written to an existing file. Raises: StorageError when neither it nor its folder
    exists.
    """
    place = _cache_place() if path is None else path
    device = device_checks.examine(str(place))
    facts = device_facts(place if device is None else device["drive"]["block_path"])
    queue = facts.queue
    return {
        "path": str(place),
        "is_default": path is None,
        "speeds": _speeds(place),
        "file_system": facts.file_system,
        "mount_point": facts.mount_point,
        "free_bytes": facts.free_bytes,
        "direct": facts.direct.possible,
        "direct_reason": facts.direct.reason,
        "direct_align_bytes": facts.direct.offset_align_bytes,
        "device": None if queue is None else queue.name,
        "device_model": None if queue is None else queue.model,
        "logical_block_bytes": None if queue is None else queue.logical_block_bytes,
        "physical_block_bytes": None if queue is None else queue.physical_block_bytes,
        "rotational": None if queue is None else queue.rotational,
        "write_cache": None if queue is None else queue.write_cache,
        "max_sectors_kb": None if queue is None else queue.max_sectors_kb,
        "cachestat": _cachestat_works(place),
        **(_content(place) if device is None else device),
        "ways": _ways(facts.direct.possible),
    }


def together(paths: Sequence[Path]) -> str | None:
    """Why `paths` could not be opened as the members of one store; None: they could, or would be
    made."""
    try:
        places = as_places(paths) or ()
        check_kinds(places)
        if not any(os.path.lexists(place) for place in places):
            return None
        return store_problem([inspect_store(str(place)) for place in places])
    except DualBladeError as exc:
        return exc.message


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError as exc:
        return {"torch_error": str(exc), "threads": None, "gpus": []}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    return {"torch_error": None, "threads": torch.get_num_threads(), "gpus": names}


def _cache_place() -> Path:
    """The cache directory, or the nearest folder above that exists: looking makes nothing."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = Path(base) / "dualblade"
    return next(folder for folder in (place, *place.absolute().parents) if folder.exists())


def _content(place: Path) -> dict[str, Any]:
    """Whether the file is a dualblade store, its state, and how contiguous it is on the device."""
    empty = dict.fromkeys(("store", "store_problem", "in_use_now", "pieces", "drive"))
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        return {**empty, "kind": "missing"}
    if stat.S_ISDIR(mode):
        return {**empty, "kind": "directory"}
    if not stat.S_ISREG(mode):
        return {**empty, "kind": "other"}
    try:
        with place.open("rb") as file:
            return {**empty, "kind": "file", **_store_facts(file.fileno(), place)}
    except OSError as exc:
        raise StorageError(f"cannot read {place}: {exc.strerror}", path=str(place)) from exc


def _store_facts(fd: int, place: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    with contextlib.suppress(OSError):  # a file system that cannot tell
        facts["pieces"] = contiguous_pieces(file_extents(fd))
    try:
        size = os.fstat(fd).st_size
        block = Superblock.decode(
            os.pread(fd, SUPERBLOCK_BYTES, 0), path=str(place), file_bytes=size
        )
    except NotAStore as exc:
        return {**facts, "store_problem": exc.message}
    facts["store"] = device_checks.superblock_facts(block)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        facts["in_use_now"] = False
    except BlockingIOError:
        facts["in_use_now"] = True
    return facts


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
