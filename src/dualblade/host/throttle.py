"""Holding a drive to a speed, for this process and its children, by the blkio cgroup (v1).

Direct reads and writes and buffered reads are held; buffered writes are not, because the kernel
writes them back from outside the group. cgroup v2's io.max would need the groups of the memory
limits below one group of ours, which cannot be made around a process that runs already.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dualblade.errors import Unsupported
from dualblade.host.devices import whole_drive
from dualblade.host.groups import ROOT

_HINT = "run it as root with the blkio controller of cgroup v1, or on a drive of that speed"


@contextlib.contextmanager
def throttled(folder: Path, bytes_per_second: int) -> Iterator[None]:
    """Within, the device below `folder` reads and writes at most so fast for us.

    Raises: Unsupported where that is not possible, with the reason.
    """
    rule = f"{_device_number(folder)} {bytes_per_second}"
    mount, ours = _blkio_group()
    group = mount / f"dualblade-{os.getpid()}"
    before = mount / ours.lstrip("/")
    try:
        group.mkdir()
    except OSError as exc:
        raise _impossible(f"no blkio cgroup can be made: {exc}") from exc
    try:
        try:
            for what in ("read", "write"):
                (group / f"blkio.throttle.{what}_bps_device").write_text(rule)
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as exc:
            raise _impossible(f"the blkio cgroup refuses: {exc}") from exc
        yield
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _device_number(folder: Path) -> str:
    """MAJOR:MINOR of the whole drive below."""
    drive = whole_drive(folder)
    if drive is None:
        raise _impossible(f"no single block device is below {folder}")
    return (drive / "dev").read_text().strip()


def _blkio_group(root: Path = ROOT) -> tuple[Path, str]:
    """Where the controller is mounted, and our group in it."""
    mounts = (
        line.split()
        for line in (root / "proc/self/mounts").read_text(errors="surrogateescape").splitlines()
    )
    mount = next(
        (Path(at) for _, at, kind, opts, *_ in mounts if kind == "cgroup" and "blkio" in opts), None
    )
    groups = (line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines())
    ours = next((path for _, names, path in groups if "blkio" in names.split(",")), None)
    if mount is None or ours is None:
        raise _impossible("the blkio controller of cgroup v1 is not mounted")
    return mount, ours


def _impossible(why: str) -> Unsupported:
    return Unsupported(f"the drive cannot be throttled: {why}", hint=_HINT)
