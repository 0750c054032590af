"""The memory cgroups that hold this process, v1 and v2, and what their files say.

A group's figure is limit - usage + reclaimable file pages. Reclaimable are the active and
inactive file pages that nobody has mapped: libraries and mapped weights would have to be read
again, so they are not spare.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path("/")

_FILE_BYTES_MAX = 64 * 1024
"""The longest, memory.stat, has about 4 KiB."""

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
class FilePages:
    """File pages of a machine or cgroup, in bytes. `mapped` may include shared memory, which is
    not among `active_and_inactive`; `shared` is all of that."""

    active_and_inactive: int
    mapped: int
    shared: int = 0

    def without(self, own_mapped_bytes: int) -> FilePages:
        """The same, had we not mapped so much of our store: that can go like the rest of it."""
        return replace(self, mapped=max(0, self.mapped - own_mapped_bytes))

    def ours(self, own_bytes: int) -> int:
        """How much of `own_bytes` of page cache that is ours can be charged here.

        Pages that surely are mapped files are not ours (`without` takes out those that are): at
        least mapped - shared. An upper bound: what another group is charged for cannot be told
        apart.
        """
        surely_mapped = max(0, self.mapped - self.shared)
        return min(own_bytes, max(0, self.active_and_inactive - surely_mapped))

    def reclaimable(self, own_bytes: int = 0) -> int:
        """Pages that may go: ours once, and of the others those that nobody has mapped.

        600 MiB ours, 400 other, 800 mapped shared memory: 600, where 1000 - 800 would be 200.
        """
        ours = self.ours(own_bytes)
        return ours + max(0, self.active_and_inactive - ours - self.mapped)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimit:
    """A cgroup with a limit. All figures include the groups below it; `ours` is what of the
    reclaimable pages is our store's."""

    path: str
    version: int
    limit_bytes: int
    limit_name: str
    usage_bytes: int
    reclaimable_bytes: int
    ours_bytes: int = 0

    @property
    def unused_bytes(self) -> int:
        """Of the limit, what nobody uses, not even for page cache."""
        return max(0, self.limit_bytes - self.usage_bytes)

    @property
    def available_bytes(self) -> int:
        return max(0, self.limit_bytes - self.usage_bytes + self.reclaimable_bytes)


def find_memory_groups(root: Path = ROOT) -> tuple[MemoryGroup, ...]:
    """The memory cgroups of this process, ours first, then outwards to the top of the mount.

    In a container with a cgroup namespace of its own, or with only its own group mounted,
    /proc/self/cgroup can name a path that does not exist below the mount: then the top of the
    mount is our group. No cgroups, or no readable tables: an empty tuple.
    """
    try:
        own_paths = _own_paths(_table(root / "proc/self/cgroup"))
        mounts = _cgroup_mounts(_table(root / "proc/self/mountinfo"), own_paths)
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


def read_limit(
    group: MemoryGroup, own_bytes: int = 0, own_mapped_bytes: int = 0
) -> GroupLimit | None:
    """The limit of one group and what is used of it; None when it has none that binds us.

    `own_bytes`: page cache of our store; `own_mapped_bytes`: of it mapped by us.
    Raises: OSError, ValueError when the group's files are missing or not as the kernel writes them.
    """
    name, limit = _limit_v1(group) if group.version == 1 else _limit_v2(group)
    if limit >= NO_LIMIT_BYTES:
        return None
    usage_file = "memory.usage_in_bytes" if group.version == 1 else "memory.current"
    usage = int(read_file(group.directory / usage_file))
    pages = file_pages(group).without(own_mapped_bytes)
    return GroupLimit(
        path=group.path,
        version=group.version,
        limit_bytes=limit,
        limit_name=name,
        usage_bytes=usage,
        reclaimable_bytes=pages.reclaimable(own_bytes),
        ours_bytes=pages.ours(own_bytes),
    )


def file_pages(group: MemoryGroup) -> FilePages:
    """File pages of the group and those below it. Raises: OSError."""
    stat = _memory_stat(group)
    prefix, mapped = ("total_", "total_mapped_file") if group.version == 1 else ("", "file_mapped")
    return FilePages(
        active_and_inactive=stat.get(f"{prefix}active_file", 0)
        + stat.get(f"{prefix}inactive_file", 0),
        mapped=stat.get(mapped, 0),
        shared=stat.get(f"{prefix}shmem", 0),
    )


def read_file(path: Path) -> str:
    """A small file of the kernel's, in one read: three times faster than Path.read_text, and a
    probe reads a dozen at step boundaries. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _FILE_BYTES_MAX).decode(errors="surrogateescape")
    finally:
        os.close(descriptor)


def _limit_v1(group: MemoryGroup) -> tuple[str, int]:
    """Own limit, and for our own group the kernel's least over all that enclose it.

    That one also covers groups above the mount, which a container cannot see: of those only the
    limit is known, not what others use of it.
    """
    if not group.is_ours and _read(group.directory / "memory.use_hierarchy") == "0":
        return "no hierarchy", NO_LIMIT_BYTES  # its limit binds its own processes only
    limit = int(read_file(group.directory / "memory.limit_in_bytes"))
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
            text = read_file(group.directory / name).strip()
        except FileNotFoundError:
            continue
        if text != "max" and int(text) < least[1]:
            least = (name, int(text))
    return least


def _memory_stat(group: MemoryGroup) -> dict[str, int]:
    lines = read_file(group.directory / "memory.stat").splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def _table(path: Path) -> str:
    """Paths in it may be in any encoding, as Python has them. Raises: OSError."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")


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


def _cgroup_mounts(table: str, own: dict[int, str]) -> list[tuple[int, str, str]]:
    """(version, root within the hierarchy, mount point) of each from /proc/self/mountinfo.

    Line: 35 31 0:32 /root /mount/point rw,relatime shared:1 - cgroup source rw,memory
    A hierarchy mounted twice is taken once: by a mount that our path `own` lies below, of several
    by the later one, which may hide the earlier. A root that begins with '..' is outside our cgroup
    namespace (a container that sees its host's tree): it is taken only where there is no other.
    """
    mounts: dict[int, tuple[int, str, str]] = {}
    ranks: dict[int, int] = {}
    for line in table.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or not kind:
            continue
        entry = (unescape(fields[3]), unescape(fields[4]))
        if kind[0] == "cgroup2":
            version = 2
        elif kind[0] == "cgroup" and "memory" in kind[-1].split(","):
            version = 1
        else:
            continue
        rank = _closeness(entry[0], own.get(version, "/"))
        if rank >= ranks.get(version, 0):
            mounts[version], ranks[version] = (version, *entry), rank
    return list(mounts.values())


def _closeness(mount_root: str, own: str) -> int:
    """2 for a mount that our path lies below, 0 for one outside our namespace."""
    if mount_root.startswith("/.."):
        return 0
    return 2 if (own + "/").startswith(mount_root.rstrip("/") + "/") else 1


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
        return read_file(path).strip()
    except OSError:
        return None
