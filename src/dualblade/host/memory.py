"""How much memory this process may still use, and how much it uses.

available = the least of the machine's own figure and, for every memory cgroup from ours to the
root (v1 and v2), limit - usage + reclaimable file pages. Reclaimable are the active and inactive
file pages that nobody has mapped: libraries and mapped weights would have to be read again, so
they are not spare. Page cache of our own store is among the reclaimable pages: it counts once.
Swap counts as nothing, huge pages set aside by the administrator as used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dualblade.errors import Unsupported
from dualblade.units import KIB, MIB, format_size

ROOT = Path("/")

AUTO_RESERVE_BYTES = 256 * MIB
"""Left to everything else before `auto` takes its half; at most a quarter of what is available."""

NO_LIMIT_BYTES = 1 << 60
"""v1 writes 'no limit' as 2**63 less a page, v2 as `max`; no machine has an exbibyte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGroup:
    """A memory cgroup that holds this process: its directory, version (1 or 2) and place.

    `path` is as seen in the mount, `/` for its top; `is_ours` marks the one we are in, which the
    limits of the others enclose.
    """

    directory: Path
    version: int
    path: str
    is_ours: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimit:
    """A cgroup with a limit. All figures include the groups below it."""

    path: str
    version: int
    limit_bytes: int
    limit_name: str
    usage_bytes: int
    reclaimable_bytes: int

    @property
    def available_bytes(self) -> int:
        return max(0, self.limit_bytes - self.usage_bytes + self.reclaimable_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """What may still be used, which limit said so, and all the limits that were asked.

    `warnings` names what could not be read and was therefore left out.
    """

    available_bytes: int
    source: str
    machine_available_bytes: int
    limits: tuple[GroupLimit, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """Resident memory of this process; `anonymous` is what no file backs (heap, staging)."""

    resident_bytes: int
    peak_resident_bytes: int
    anonymous_bytes: int
    file_bytes: int


def available_memory(
    root: Path = ROOT, groups: Sequence[MemoryGroup] | None = None
) -> MemoryBudget:
    """Memory that this process may still use, now.

    `root` stands for `/` (a recorded tree in tests). `groups` saves finding them again: they stay
    the same while the process is not moved. Reads about four small files per group.

    Raises:  Unsupported when there is no readable /proc/meminfo.
    Source:  Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst; proc(5).
    """
    machine = machine_available_bytes(root)
    limits: list[GroupLimit] = []
    warnings: list[str] = []
    for group in find_memory_groups(root) if groups is None else groups:
        try:
            limit = read_limit(group)
        except (OSError, ValueError) as exc:
            warnings.append(f"cgroup {group.path} (v{group.version}) left out: {exc}")
            continue
        if limit is not None:
            limits.append(limit)
    least, source = machine, "MemAvailable of the machine, less mapped file pages"
    for limit in limits:
        if limit.available_bytes < least:
            least = limit.available_bytes
            source = (
                f"{limit.limit_name} of cgroup {limit.path} (v{limit.version}): "
                f"{format_size(limit.limit_bytes)}, used {format_size(limit.usage_bytes)}, "
                f"of it reclaimable {format_size(limit.reclaimable_bytes)}"
            )
    return MemoryBudget(
        available_bytes=least,
        source=source,
        machine_available_bytes=machine,
        limits=tuple(limits),
        warnings=tuple(warnings),
    )


def auto_budget_bytes(memory: MemoryBudget | None = None) -> int:
    """The budget that `memory_budget="auto"` means: half of what is left after a reserve.

    Half, because the figure is taken once while everything else goes on growing, and because
    taking too much costs far more than taking too little: one step past the memory that there is,
    a cyclic sweep gets no page-cache hits at all (docs/performance.md).
    1 GiB available -> (1024 - 256) / 2 = 384 MiB; 200 MiB -> (200 - 50) / 2 = 75 MiB.
    """
    available = (available_memory() if memory is None else memory).available_bytes
    return (available - min(AUTO_RESERVE_BYTES, available // 4)) // 2


def process_memory(root: Path = ROOT) -> ProcessMemory:
    """Memory of this process. Raises: Unsupported when /proc/self/status cannot be read."""
    fields = _kib_fields(root / "proc/self/status")
    anonymous = fields.get("RssAnon", 0) + fields.get("RssShmem", 0)
    return ProcessMemory(
        resident_bytes=fields.get("VmRSS", 0),
        peak_resident_bytes=fields.get("VmHWM", fields.get("VmRSS", 0)),
        anonymous_bytes=anonymous,
        file_bytes=fields.get("RssFile", 0),
    )


def machine_available_bytes(root: Path = ROOT) -> int:
    """MemAvailable less the mapped file pages in it. Raises: Unsupported."""
    fields = _kib_fields(root / "proc/meminfo")
    file_pages = fields.get("Active(file)", 0) + fields.get("Inactive(file)", 0)
    mapped = min(fields.get("Mapped", 0), file_pages)
    available = fields.get("MemAvailable")
    if available is None:  # before Linux 3.14
        available = fields.get("MemFree", 0) + file_pages
    return max(0, available - mapped)


def find_memory_groups(root: Path = ROOT) -> tuple[MemoryGroup, ...]:
    """The memory cgroups of this process, ours first, then outwards to the top of the mount.

    In a container with a cgroup namespace of its own, or with only its own group mounted,
    /proc/self/cgroup can name a path that does not exist below the mount: then the top of the
    mount is our group. No cgroups, or no readable tables: an empty tuple.
    """
    try:
        own_paths = _own_paths((root / "proc/self/cgroup").read_text())
        mounts = _cgroup_mounts((root / "proc/self/mountinfo").read_text())
    except OSError:
        return ()
    groups: list[MemoryGroup] = []
    for version, mount_root, mount_point in mounts:
        own = own_paths.get(version)
        if own is None:
            continue
        top = root / mount_point.lstrip("/")
        groups += _groups_upwards(version, top, _below_mount(own, mount_root))
    return tuple(groups)


def read_limit(group: MemoryGroup) -> GroupLimit | None:
    """The limit of one group and what is used of it; None when it has none that binds us.

    Raises: OSError, ValueError when its files are missing or not as the kernel writes them.
    """
    name, limit = _limit_v1(group) if group.version == 1 else _limit_v2(group)
    if limit >= NO_LIMIT_BYTES:
        return None
    usage_file = "memory.usage_in_bytes" if group.version == 1 else "memory.current"
    return GroupLimit(
        path=group.path,
        version=group.version,
        limit_bytes=limit,
        limit_name=name,
        usage_bytes=int((group.directory / usage_file).read_text()),
        reclaimable_bytes=reclaimable_bytes(group),
    )


def reclaimable_bytes(group: MemoryGroup) -> int:
    """File pages of the group and those below it that nobody has mapped. Raises: OSError."""
    stat = _memory_stat(group)
    prefix = "total_" if group.version == 1 else ""
    mapped = stat.get("total_mapped_file" if group.version == 1 else "file_mapped", 0)
    file_pages = stat.get(f"{prefix}active_file", 0) + stat.get(f"{prefix}inactive_file", 0)
    return max(0, file_pages - mapped)


def _limit_v1(group: MemoryGroup) -> tuple[str, int]:
    """Own limit, and for our own group the kernel's least over all that enclose it.

    That one also covers groups above the mount, which a container cannot see: of those only the
    limit is known, not what others use of it.
    """
    if not group.is_ours and _read(group.directory / "memory.use_hierarchy") == "0":
        return "no hierarchy", NO_LIMIT_BYTES  # its limit binds its own processes only
    limit = int((group.directory / "memory.limit_in_bytes").read_text())
    if group.is_ours:
        enclosing = _memory_stat(group).get("hierarchical_memory_limit", limit)
        if enclosing < limit:
            return "hierarchical_memory_limit", enclosing
    return "memory.limit_in_bytes", limit


def _limit_v2(group: MemoryGroup) -> tuple[str, int]:
    """The lesser of memory.max (killed above) and memory.high (throttled above).

    Absent at the root and where the memory controller is not enabled: no limit.
    """
    least = ("memory.max", NO_LIMIT_BYTES)
    for name in ("memory.max", "memory.high"):
        try:
            text = (group.directory / name).read_text().strip()
        except FileNotFoundError:
            continue
        if text != "max" and int(text) < least[1]:
            least = (name, int(text))
    return least


def _memory_stat(group: MemoryGroup) -> dict[str, int]:
    lines = (group.directory / "memory.stat").read_text().splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def _own_paths(table: str) -> dict[int, str]:
    """Our path in the v1 memory hierarchy and in v2, from /proc/self/cgroup."""
    paths: dict[int, str] = {}
    for line in table.splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            paths[1] = path
        elif number == "0" and not controllers:
            paths[2] = path
    return paths


def _cgroup_mounts(table: str) -> list[tuple[int, str, str]]:
    """(version, root within the hierarchy, mount point) of each from /proc/self/mountinfo.

    Line: 35 31 0:32 /root /mount/point rw,relatime shared:1 - cgroup source rw,memory
    A hierarchy mounted twice is taken once; the later mount may hide the earlier one.
    """
    mounts: dict[int, tuple[int, str, str]] = {}
    for line in table.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or not kind:
            continue
        entry = (unescape(fields[3]), unescape(fields[4]))
        if kind[0] == "cgroup2":
            mounts[2] = (2, *entry)
        elif kind[0] == "cgroup" and "memory" in kind[-1].split(","):
            mounts[1] = (1, *entry)
    return list(mounts.values())


def _below_mount(own: str, mount_root: str) -> str:
    """Where path `own` of the hierarchy lies below a mount of `mount_root`."""
    if mount_root != "/" and (own == mount_root or own.startswith(mount_root + "/")):
        own = own[len(mount_root) :]
    return own.strip("/")


def _groups_upwards(version: int, top: Path, below: str) -> list[MemoryGroup]:
    # '..' is how the kernel shows a process outside the root of its cgroup namespace.
    parts = below.split("/") if below and ".." not in below.split("/") else []
    if not top.joinpath(*parts).is_dir():
        parts = []
    return [
        MemoryGroup(
            directory=top.joinpath(*parts[:depth]),
            version=version,
            path="/" + "/".join(parts[:depth]),
            is_ours=depth == len(parts),
        )
        for depth in range(len(parts), -1, -1)
    ]


def unescape(field: str) -> str:
    r"""Mount tables write space, tab, newline and backslash as \040 and the like."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _kib_fields(path: Path) -> dict[str, int]:
    """The `Name:   123 kB` lines of a /proc file, in bytes. Raises: Unsupported."""
    try:
        text = path.read_text()
    except OSError as exc:
        raise Unsupported(
            f"cannot read {path}: {exc.strerror}",
            hint="dualblade needs Linux with /proc mounted",
        ) from exc
    found = re.findall(r"^([^\s:]+):\s+(\d+) kB$", text, re.MULTILINE)
    return {name: int(value) * KIB for name, value in found}
