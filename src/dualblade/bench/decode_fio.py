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

SECONDS = 2.0
"""A thousand chunks and more; every stored run gets one, because drives change their speed."""

SCRATCH_BYTES_MAX = GIB

_HUGE_PAGE_BYTES = 2 * MIB
_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


class FioYardstick:
    """fio on a scratch file of random bytes that lies where the store does; a context manager.

    Raises: Unsupported when fio is not installed.
    """

    def __init__(self, folder: Path, *, size_bytes: int, chunk_bytes: int, queue_depth: int):
        fio = shutil.which("fio")
        if fio is None:
            raise Unsupported("fio is not installed", hint="apt-get install fio")
        self._fio = fio
        self._chunk_bytes = chunk_bytes
        self._queue_depth = queue_depth
        whole = min(size_bytes, SCRATCH_BYTES_MAX) // chunk_bytes * chunk_bytes
        self._size_bytes = max(whole, chunk_bytes)
        self._file = _random_file(folder, self._size_bytes)

    def measure(self, seconds: float = SECONDS) -> dict[str, Any]:
        """Sequential O_DIRECT reads by io_uring: read_bytes_per_second, and what was run.

        Huge pages are set aside for the time where that is allowed, because a device pays for
        each 4 KiB page of a buffer; `huge_pages` says whether they were. Raises: Unsupported.
        """
        with _huge_pages(self._chunk_bytes * self._queue_depth) as huge:
            command = self._command(seconds, huge=huge)
            read = _run(command)["jobs"][0]["read"]
        return {
            "read_bytes_per_second": int(read["bw_bytes"]),
            "read_bytes": int(read["io_bytes"]),
            "huge_pages": huge,
            "chunk_bytes": self._chunk_bytes,
            "queue_depth": self._queue_depth,
            "command": " ".join(command),
        }

    def close(self) -> None:
        """Remove the scratch file."""
        self._file.unlink(missing_ok=True)

    def __enter__(self) -> FioYardstick:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _command(self, seconds: float, *, huge: bool) -> list[str]:
        return [
            self._fio,
            "--name=read",
            "--filename=" + str(self._file).replace(":", "\\:"),  # it separates names
            "--readonly",
            "--thread",  # else its worker is a process that outlives a killed fio
            "--rw=read",
            "--direct=1",
            "--ioengine=io_uring",
            f"--bs={self._chunk_bytes}",
            f"--iodepth={self._queue_depth}",
            f"--size={self._size_bytes}",
            "--time_based",
            f"--runtime={seconds}",
            f"--iomem={'mmaphuge' if huge else 'mmap'}",
            "--output-format=json",
        ]


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise Unsupported(f"fio failed: {' '.join(last) or done.returncode}")
    # Notes on stdout may come before the JSON.
    result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return result


def _random_file(folder: Path, size_bytes: int) -> Path:
    """A file of random bytes on the device; nothing is left when writing it fails."""
    fd, name = tempfile.mkstemp(prefix=".dualblade-fio-", dir=folder)
    try:
        with open(fd, "wb") as file:
            for start in range(0, size_bytes, 4 * MIB):
                file.write(os.urandom(min(4 * MIB, size_bytes - start)))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


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
    got = int(_HUGE_PAGES.read_text()) - before
    try:
        yield got >= count
    finally:  # ours alone: another program may have set some aside meanwhile
        now = int(_HUGE_PAGES.read_text())
        _HUGE_PAGES.write_text(str(max(0, now - max(0, got))))
