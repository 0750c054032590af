"""How much memory this process may still use, and how much it uses.

available = the least of the machine's own figure and, for every memory cgroup from ours to the
root (v1 and v2), limit - usage + reclaimable file pages (`host/groups.py`). MemAvailable is
reduced by mapped file pages likewise. Page cache of our own store is reclaimable and ours to
keep: it counts once. Swap counts as nothing, huge pages set aside by the administrator as used.
Where the GPU has no memory of its own, what it allocates is used memory like any other: the
figure is right once the model is loaded, and the reserve is for what it allocates later.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dualblade.errors import Unsupported
from dualblade.host.groups import (
    ROOT,
    FilePages,
    GroupLimit,
    MemoryGroup,
    find_memory_groups,
    read_file,
    read_limit,
)
from dualblade.host.pressure import Pressure, read_pressure
from dualblade.units import KIB, MIB, format_size

__all__ = [
    "AUTO_RESERVE_BYTES",
    "MemoryProbe",
    "MemoryReading",
    "OwnMemory",
    "ProcessMemory",
    "auto_budget_bytes",
    "available_memory",
    "process_memory",
]

AUTO_RESERVE_BYTES = 256 * MIB
"""Left to everything else by default; at most a quarter of what there is."""

_FREE_SHARE = 16
"""With a sixteenth of the machine's memory free nobody waits for what others hold: the kernel makes
room when a hundredth or less is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnMemory:
    """What this cache holds already: page cache of its store, and `fixed_bytes` of staging,
    gather buffers, tails and tables. Both are its own to keep, so a budget includes them.

    `mapped_bytes`: most of the page cache that it has mapped; else mapped pages are others'."""

    page_cache_bytes: int = 0
    fixed_bytes: int = 0
    mapped_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReading:
    """What may be used now, which limit said so (`binding`; None: the machine), and all limits.

    `source` is the same in words. `warnings` names what could not be read and was left out.
    `machine_has_free`: memory that nobody uses, and not a little. `unused_bytes`: how much of it
    there is, of the machine and in each group.
    """

    available_bytes: int
    source: str
    machine_available_bytes: int
    limits: tuple[GroupLimit, ...]
    warnings: tuple[str, ...] = ()
    binding: GroupLimit | None = None
    own: OwnMemory = OwnMemory()
    reserve_bytes: int = 0
    machine_has_free: bool = False
    unused_bytes: int = 0
    machine_pressure: Pressure | None = None
    group_pressure: Pressure | None = None

    @property
    def budget_bytes(self) -> int:
        """What this cache may have in all, the memory that it holds included."""
        return max(0, self.available_bytes + self.own.fixed_bytes - self.reserve_bytes)

    @property
    def pressure(self) -> Pressure | None:
        """Of our group; of the machine only where its memory is what binds us and is short: other
        groups at limits of their own gain nothing from what we give back."""
        if self.group_pressure is not None or self.binding is not None:
            return self.group_pressure
        return None if self.machine_has_free else self.machine_pressure


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """Resident memory of this process; `anonymous` is what no file backs (heap, staging)."""

    resident_bytes: int
    peak_resident_bytes: int
    anonymous_bytes: int
    file_bytes: int


class MemoryProbe:
    """Asks again and again what this process may use. Used by one thread; keeps nothing open.

    The groups are found once and looked for again when the process was moved or one of them is
    gone. One read: 0.11 ms, 0.17 at the 99th percentile, with three groups and pressure (2-core
    machine, Linux 6.18, 1000 reads). Kept descriptors would save half, and hide a group's end.

    `root` stands for `/` (a recorded tree in tests). `reserve_bytes` is left to everything else;
    None: AUTO_RESERVE_BYTES, at most a quarter of what there is.
    """

    def __init__(self, root: Path = ROOT, *, reserve_bytes: int | None = None) -> None:
        self._root = root
        self._reserve_bytes = reserve_bytes
        self._groups: tuple[MemoryGroup, ...] = ()
        self._found_in: str | None = None

    def read(self, own: OwnMemory | None = None) -> MemoryReading:
        """What may be used now; `own` is what the cache holds of it.

        Raises:  Unsupported when there is no readable /proc/meminfo.
        Source:  Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst; proc(5).
        """
        held = own or OwnMemory()
        self._find_groups()
        fields = _kib_fields(self._root / "proc/meminfo")
        machine = _machine_available_bytes(fields, held)
        limits: list[GroupLimit] = []
        warnings: list[str] = []
        for group in self._groups:
            try:
                limit = read_limit(group, held.page_cache_bytes, held.mapped_bytes)
            except (OSError, ValueError) as exc:
                warnings.append(f"cgroup {group.path} (v{group.version}) left out: {exc}")
                self._found_in = None  # it may be gone: look again at the next reading
                continue
            if limit is not None:
                limits.append(limit)
        least = min(limits, key=lambda limit: limit.available_bytes, default=None)
        if least is not None and least.available_bytes >= machine:
            least = None
        available = machine if least is None else least.available_bytes
        return MemoryReading(
            available_bytes=available,
            source=_source(least),
            machine_available_bytes=machine,
            limits=tuple(limits),
            warnings=tuple(warnings),
            binding=least,
            own=held,
            reserve_bytes=self._reserve(available + held.fixed_bytes),
            machine_has_free=_FREE_SHARE * fields.get("MemFree", 0) > fields.get("MemTotal", 0),
            unused_bytes=min([_machine_unused_bytes(fields), *(g.unused_bytes for g in limits)]),
            machine_pressure=read_pressure(self._root / "proc/pressure/memory"),
            group_pressure=self._group_pressure(),
        )

    def _find_groups(self) -> None:
        try:
            table = read_file(self._root / "proc/self/cgroup")
        except OSError:
            table = ""
        if table != self._found_in:
            self._groups = find_memory_groups(self._root)
            self._found_in = table

    def _reserve(self, whole_bytes: int) -> int:
        if self._reserve_bytes is not None:
            return self._reserve_bytes
        return _auto_reserve_bytes(whole_bytes)

    def _group_pressure(self) -> Pressure | None:
        """v1 has none; where both are mounted, the v2 tree has it without the controller.

        The root's is the machine's, and the root alone has no cgroup.events.
        """
        for group in self._groups:
            if (
                group.version == 2
                and group.is_ours
                and (group.directory / "cgroup.events").exists()
            ):
                return read_pressure(group.directory / "memory.pressure")
        return None


def available_memory(root: Path = ROOT) -> MemoryReading:
    """Memory that this process may still use, now. Raises: as `MemoryProbe.read`."""
    return MemoryProbe(root).read()


def auto_budget_bytes(memory: MemoryReading | None = None) -> int:
    """The budget that `memory_budget="auto"` begins with: what there is less the reserve. It
    follows the memory from then on, so nothing need be left for what changes later.

    2 GiB available -> 2048 - 256 = 1792 MiB; 200 MiB -> 200 - 50 = 150 MiB.
    """
    return (available_memory() if memory is None else memory).budget_bytes


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


def _machine_available_bytes(fields: dict[str, int], own: OwnMemory) -> int:
    """MemAvailable less the mapped file pages in it."""
    pages = FilePages(
        active_and_inactive=fields.get("Active(file)", 0) + fields.get("Inactive(file)", 0),
        mapped=fields.get("Mapped", 0),
        shared=fields.get("Shmem", 0),
    ).without(own.mapped_bytes)
    available = fields.get("MemAvailable")
    if available is None:  # before Linux 3.14
        available = fields.get("MemFree", 0) + pages.active_and_inactive
    return max(0, available - pages.active_and_inactive + pages.reclaimable(own.page_cache_bytes))


def _machine_unused_bytes(fields: dict[str, int]) -> int:
    """MemFree less the hundredth that the kernel keeps free by taking page cache."""
    return max(0, fields.get("MemFree", 0) - fields.get("MemTotal", 0) // 100)


def _auto_reserve_bytes(whole_bytes: int) -> int:
    return min(AUTO_RESERVE_BYTES, whole_bytes // 4)


def _source(binding: GroupLimit | None) -> str:
    if binding is None:
        return "MemAvailable of the machine, less mapped file pages"
    ours = f", {format_size(binding.ours_bytes)} of that our store's" if binding.ours_bytes else ""
    return (
        f"{binding.limit_name} of cgroup {binding.path} (v{binding.version}): "
        f"{format_size(binding.limit_bytes)}, used {format_size(binding.usage_bytes)}, "
        f"of it reclaimable {format_size(binding.reclaimable_bytes)}{ours}"
    )


def _kib_fields(path: Path) -> dict[str, int]:
    """The `Name:   123 kB` lines of a /proc file, in bytes. Raises: Unsupported."""
    try:
        text = read_file(path)
    except OSError as exc:
        raise Unsupported(
            f"cannot read {path}: {exc.strerror}",
            hint="dualblade needs Linux with /proc mounted",
        ) from exc
    found = re.findall(r"^([^\s:]+):\s+(\d+) kB$", text, re.MULTILINE)
    return {name: int(value) * KIB for name, value in found}
