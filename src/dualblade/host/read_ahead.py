"""How far the kernel reads ahead of mapped files and buffered reads, by the drive's queue."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dualblade.errors import Unsupported
from dualblade.host.devices import device_facts, whole_drive
from dualblade.units import KIB


@contextlib.contextmanager
def reading_ahead(folder: Path, size_bytes: int) -> Iterator[None]:
    """Within, files that are opened on the drive below `folder` are read ahead of by `size_bytes`
    (whole KiB), by whatever program; then it is as before. A kill leaves it.

    Raises: Unsupported where that is not possible, with the reason.
    Source: Documentation/ABI/stable/sysfs-block, queue/read_ahead_kb.
    """
    if device_facts(folder).file_system == "btrfs":
        raise _impossible("btrfs reads ahead by a setting of its own")
    drive = whole_drive(folder)
    if drive is None:
        raise _impossible(f"no single block device is below {folder}")
    setting = drive / "queue" / "read_ahead_kb"
    try:
        before = setting.read_text(encoding="ascii")
        setting.write_text(str(size_bytes // KIB), encoding="ascii")
    except OSError as exc:
        raise _impossible(f"{setting}: {exc.strerror}") from exc
    try:
        yield
    finally:
        setting.write_text(before, encoding="ascii")


def _impossible(why: str) -> Unsupported:
    return Unsupported(
        f"the drive's read-ahead cannot be set: {why}",
        hint="run it as root with the store in a file, or leave read_ahead out",
    )
