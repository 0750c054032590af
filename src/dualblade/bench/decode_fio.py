"""fio as a yardstick: how fast the drive gives bytes away when nothing else is to be done.

fio is run as a program where it is installed, and never needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dualblade.errors import Unsupported
from dualblade.units import GIB, MIB

SECONDS = 3
"""Long enough for dozens of chunks per millisecond to average out; a run costs no more."""

SCRATCH_BYTES_MAX = GIB

_HUGE_PAGE_BYTES = 2 * MIB
_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


def fio_read(
    folder: Path, size_bytes: int, chunk_bytes: int, queue_depth: int, seconds: float = SECONDS
) -> dict[str, Any]:
    """Sequential O_DIRECT reads of a scratch file of random bytes in `folder`, by io_uring.

    Returns read_bytes_per_second, huge_pages, and what was run. Huge pages are set aside for the
    time where that is allowed, because a device pays for each 4 KiB page of a buffer.

    Raises: Unsupported when fio is not there or fails.
    """
    fio = shutil.which("fio")
    if fio is None:
        raise Unsupported("fio is not installed", hint="apt-get install fio")
    size_bytes = min(size_bytes, SCRATCH_BYTES_MAX) // chunk_bytes * chunk_bytes or chunk_bytes
    with _scratch(folder, size_bytes) as file, _huge_pages(chunk_bytes * queue_depth) as huge:
        command = [
            fio,
            "--name=read",
            f"--filename={file}",
            "--readonly",
            "--rw=read",
            "--direct=1",
            "--ioengine=io_uring",
            f"--bs={chunk_bytes}",
            f"--iodepth={queue_depth}",
            f"--size={size_bytes}",
            "--time_based",
            f"--runtime={seconds}",
            f"--iomem={'mmaphuge' if huge else 'mmap'}",
            "--output-format=json",
        ]
        read = _run(command)["jobs"][0]["read"]
    return {
        "read_bytes_per_second": int(read["bw_bytes"]),
        "read_bytes": int(read["io_bytes"]),
        "huge_pages": huge,
        "chunk_bytes": chunk_bytes,
        "queue_depth": queue_depth,
        "command": " ".join(command),
    }


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise Unsupported(f"fio failed: {' '.join(last) or done.returncode}")
    # Notes on stdout may come before the JSON.
    result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return result


@contextlib.contextmanager
def _scratch(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file of random bytes on the device, removed afterwards."""
    fd, name = tempfile.mkstemp(prefix=".dualblade-fio-", dir=folder)
    try:
        with open(fd, "wb") as file:
            for start in range(0, size_bytes, 4 * MIB):
                file.write(os.urandom(min(4 * MIB, size_bytes - start)))
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        os.unlink(name)


@contextlib.contextmanager
def _huge_pages(size_bytes: int) -> Iterator[bool]:
    """Set huge pages aside for buffers of `size_bytes`; whether that was possible."""
    count = size_bytes // _HUGE_PAGE_BYTES + 2  # fio aligns its buffers, and adds a page
    try:
        before = int(_HUGE_PAGES.read_text())
        _HUGE_PAGES.write_text(str(before + count))
    except OSError:
        yield False
        return
    try:
        yield int(_HUGE_PAGES.read_text()) >= before + count
    finally:
        _HUGE_PAGES.write_text(str(before))
