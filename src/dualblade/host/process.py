"""This process as the kernel counts it: bytes from the device, peak memory, its parent's death."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from dualblade.errors import Unsupported
from dualblade.host.groups import ROOT

_PR_SET_PDEATHSIG = 1
_RESET_PEAK = "5"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIO:
    """Bytes that this process made the devices read and write (not what the page cache gave).

    Readahead counts as read when it is started; buffered writes count when a page gets dirty.
    """

    read_bytes: int
    write_bytes: int


def process_io(root: Path = ROOT) -> ProcessIO:
    """Device traffic of all threads so far. Raises: Unsupported without task accounting.

    Source: proc_pid_io(5), read_bytes and write_bytes.
    """
    try:
        text = (root / "proc/self/io").read_text()
    except OSError as exc:
        raise Unsupported(
            f"cannot read /proc/self/io: {exc.strerror}",
            hint="the kernel needs CONFIG_TASK_IO_ACCOUNTING",
        ) from exc
    fields = dict(line.split(": ") for line in text.splitlines())
    return ProcessIO(read_bytes=int(fields["read_bytes"]), write_bytes=int(fields["write_bytes"]))


def reset_peak_memory(root: Path = ROOT) -> bool:
    """Start `process_memory().peak_resident_bytes` anew; False where that is not allowed."""
    try:
        (root / "proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


_CAP_IPC_LOCK = 14


def may_lock_memory(root: Path = ROOT) -> bool:
    """Whether no limit on locked memory holds for this process. Source: capabilities(7)."""
    try:
        text = (root / "proc/self/status").read_text()
    except OSError:
        return False
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", text, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _CAP_IPC_LOCK & 1)


def release_memory() -> None:
    """Give back what the program no longer uses: garbage, then the allocator's free lists."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc only
        _libc.malloc_trim(0)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), signal.SIGKILL)
