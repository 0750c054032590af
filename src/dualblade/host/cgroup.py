"""Running a program under a real memory limit: a memory cgroup of its own, v1 or v2.

`MemoryLimit` works on the files of one group, from outside or from within; `MemoryCgroup` makes
such a group below ours and removes it again.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from dualblade.errors import BudgetError, Unsupported
from dualblade.host.groups import MemoryGroup, file_pages, find_memory_groups
from dualblade.units import format_size

_NAME = re.compile(r"^dualblade-(\d+)-\d+$")
_EMPTY_SECONDS = 10.0
"""A killed process leaves its group once its memory is freed: about 0.3 s per GiB here."""

_ENTER = 'echo $$ > "$1" && shift && exec "$@"'
_numbers = itertools.count()


@dataclass(slots=True)
class MemoryLimit:
    """The memory files of one cgroup: limit, use, peak and kills. All sizes in bytes."""

    directory: Path
    version: int
    _peak_fd: int | None = field(default=None, repr=False)

    def set(self, limit_bytes: int | None) -> None:
        """Limit memory, swap included, to `limit_bytes`; None lifts it.

        Page cache above the new limit is reclaimed before this returns. v1 then refuses a limit
        that still is below what is used; v2 kills instead.

        Raises: BudgetError with what is used; Unsupported.
        """
        try:
            if self.version == 2:
                # Swap first: what the limit reclaims would go there, and stay.
                self._write_if_there("memory.swap.max", "max" if limit_bytes is None else "0")
                self._write("memory.max", "max" if limit_bytes is None else str(limit_bytes))
                return
            # Memory plus swap may never be below memory alone: lift it before, set it after.
            self._write_if_there("memory.memsw.limit_in_bytes", "-1")
            limit = "-1" if limit_bytes is None else str(limit_bytes)
            self._write("memory.limit_in_bytes", limit)
            self._write_if_there("memory.memsw.limit_in_bytes", limit)
        except OSError as exc:
            if exc.errno == errno.EBUSY and limit_bytes is not None:
                raise _below_use(limit_bytes, self.used_bytes()) from exc
            raise Unsupported(f"cannot set a memory limit: {exc}") from exc

    def used_bytes(self) -> int:
        """What is charged to the group now, page cache included."""
        return self._read_int("memory.current", "memory.usage_in_bytes")

    def needed_bytes(self) -> int:
        """What is charged less the file pages that could be dropped: a limit below this kills."""
        return max(0, self.used_bytes() - file_pages(self._group()).reclaimable())

    def peak_bytes(self) -> int | None:
        """Most that was charged since the start or `reset_peak`; None before kernel 5.19 (v2)."""
        if self._peak_fd is not None:
            return int(os.pread(self._peak_fd, 64, 0))
        try:
            return self._read_int("memory.peak", "memory.max_usage_in_bytes")
        except FileNotFoundError:
            return None

    def reset_peak(self) -> bool:
        """Start the peak anew; False where this kernel cannot (v2 before 6.12).

        v2 resets it for the one descriptor that was written, so that stays open until `close`.
        """
        try:
            if self.version == 1:
                self._write("memory.max_usage_in_bytes", "0")
                return True
            if self._peak_fd is None:
                self._peak_fd = os.open(self.directory / "memory.peak", os.O_RDWR)
            os.pwrite(self._peak_fd, b"reset\n", 0)
            return True
        except OSError:
            self.close()
            return False

    def oom_kills(self) -> int:
        """Processes of this group that were killed because its limit was reached. v1 counts those
        too that were killed for want of memory above it, or in the machine."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        text = (self.directory / name).read_text()
        events = dict(re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE))
        if self.version == 2 and events.get("oom") == "0":
            return 0
        return int(events.get("oom_kill", 0))

    def close(self) -> None:
        """Give the peak's descriptor back. The group itself stays."""
        if self._peak_fd is not None:
            os.close(self._peak_fd)
            self._peak_fd = None

    def _group(self) -> MemoryGroup:
        return MemoryGroup(
            directory=self.directory, version=self.version, path=self.directory.name, is_ours=True
        )

    def _read_int(self, v2_name: str, v1_name: str) -> int:
        return int((self.directory / (v2_name if self.version == 2 else v1_name)).read_text())

    def _write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)

    def _write_if_there(self, name: str, text: str) -> None:
        """Swap limits exist only where swap accounting is on."""
        if (self.directory / name).exists():
            self._write(name, text)


class MemoryCgroup:
    """A child of our memory cgroup, gone after the `with` block together with what ran in it.

    On v2 a group that holds processes cannot have children with a memory controller: then the
    nearest enclosing group that can is the parent (and the limits between do not hold in it).
    The controller is enabled for that group's children where it was not, and stays so.

    Raises: Unsupported where `available()` says why; BudgetError, see MemoryLimit.set.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        parent, reason = _find_parent(enable=True)
        if parent is None:
            raise Unsupported(f"no memory cgroup can be made: {reason}")
        _sweep(parent.directory)
        directory = parent.directory / f"dualblade-{os.getpid()}-{next(_numbers)}"
        try:
            directory.mkdir()
        except OSError as exc:
            raise Unsupported(f"no memory cgroup can be made: {exc}") from exc
        self.limit = MemoryLimit(directory, parent.version)
        try:
            self.limit.set(limit_bytes)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def available() -> str | None:
        """None when memory cgroups can be made here, else the reason why not."""
        return _find_parent(enable=False)[1]

    @property
    def directory(self) -> Path:
        return self.limit.directory

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start `command` inside: a shell enters the group, then becomes the program.

        So all of the program's memory is charged here, and its process id is the one returned.
        """
        procs = str(self.directory / "cgroup.procs")
        return subprocess.Popen(["sh", "-c", _ENTER, "sh", procs, *command], **options)

    def was_oom_killed(self, returncode: int) -> bool:
        """Whether a process that ended with `returncode` was killed by this group's limit."""
        return returncode == -signal.SIGKILL and self.limit.oom_kills() > 0

    def close(self) -> None:
        """Kill what still runs inside and remove the group. May be called again.

        Raises: Unsupported when the kernel does not let go of it in time.
        """
        self.limit.close()
        deadline = time.monotonic() + _EMPTY_SECONDS
        while self.directory.exists():
            _kill_all(self.directory)
            try:
                self.directory.rmdir()
            except OSError as exc:
                if exc.errno not in (errno.EBUSY, errno.ENOENT) or time.monotonic() > deadline:
                    raise Unsupported(f"cannot remove the memory cgroup: {exc}") from exc
                time.sleep(0.01)

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _below_use(limit_bytes: int, used_bytes: int) -> BudgetError:
    return BudgetError(
        f"a memory limit of {format_size(limit_bytes)} is below the "
        f"{format_size(used_bytes)} already in use",
        needed_bytes=used_bytes,
        hint="raise the limit, or use a smaller model",
    )


def _find_parent(*, enable: bool) -> tuple[MemoryGroup | None, str | None]:
    """The group to make children in, or None and the reason. `enable`: give them the memory
    controller where that is allowed; else it is only looked whether it is."""
    groups = find_memory_groups()
    if not groups:
        return None, "this process is in no memory cgroup (none is mounted)"
    reason = "the memory controller is not enabled in any cgroup mounted here"
    for group in groups:
        if not _has_memory(group):
            continue
        if not os.access(group.directory, os.W_OK):
            needs = "root is needed, and in a container cgroups that are mounted writable"
            return None, f"{group.directory} is not writable ({needs})"
        if group.version == 1 or _delegates_memory(group.directory, enable=enable):
            return group, None
        reason = f"{group.directory} cannot give the memory controller to children"
    return None, reason


def _has_memory(group: MemoryGroup) -> bool:
    if group.version == 1:
        return (group.directory / "memory.limit_in_bytes").exists()
    with contextlib.suppress(OSError):
        return "memory" in (group.directory / "cgroup.controllers").read_text().split()
    return False


def _delegates_memory(directory: Path, *, enable: bool) -> bool:
    """Whether children of a v2 group have the memory controller, or may be given it."""
    control = directory / "cgroup.subtree_control"
    try:
        if "memory" in control.read_text().split():
            return True
        if not enable:  # only the root may hold processes itself and give controllers on
            is_root = not (directory / "cgroup.type").exists()
            is_empty = not (directory / "cgroup.procs").read_text().strip()
            return os.access(control, os.W_OK) and (is_root or is_empty)
        control.write_text("+memory")
    except OSError:  # EBUSY: the group holds processes itself; or not ours to change
        return False
    return True


def _kill_all(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for pid in (directory / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _sweep(parent: Path) -> None:
    """Remove empty groups that processes of ours left when they were killed."""
    for child in parent.glob("dualblade-*-*"):
        match = _NAME.match(child.name)
        if match and not Path("/proc", match[1]).exists():
            with contextlib.suppress(OSError):
                child.rmdir()
