"""fio as a yardstick: how fast the drive gives bytes away when nothing else is to be done.

fio is run as a program where it is installed, and never needed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualblade.errors import NoSpace, StorageError, Unsupported
from dualblade.host.process import may_lock_memory
from dualblade.units import GIB, HUGE_PAGE_BYTES, MIB, format_size

SECONDS = 2.0
"""A thousand chunks and more; every stored run gets one, because drives change their speed."""

SCRATCH_BYTES_MAX = GIB

_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


@dataclass(frozen=True, slots=True, kw_only=True)
class FioRead:
    """Sequential O_DIRECT reads of `file` by io_uring, as our engine does them: into registered
    buffers where the limit on locked memory allows, from a registered file. `seconds` None: one
    pass."""

    file: Path
    size_bytes: int
    chunk_bytes: int
    queue_depth: int
    offset_bytes: int = 0
    seconds: float | None = None

    @property
    def registers_buffers(self) -> bool:
        """Whether this process may lock the buffers, and what fio adds to align them."""
        size_bytes = self.queue_depth * self.chunk_bytes + 2 * HUGE_PAGE_BYTES
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return may_lock_memory() or limit == resource.RLIM_INFINITY or size_bytes <= limit

    def command(self, *, huge: bool) -> list[str]:
        """What is run; `huge`: into huge pages."""
        passes = () if self.seconds is None else ("--time_based", f"--runtime={self.seconds}")
        return [
            find_fio(),
            "--name=read",
            "--filename=" + str(self.file).replace(":", "\\:"),  # it separates names
            "--readonly",
            "--thread",  # else its worker is a process that outlives a killed fio
            "--rw=read",
            "--direct=1",
            "--ioengine=io_uring",
            "--registerfiles=1",
            *(("--fixedbufs=1",) if self.registers_buffers else ()),
            f"--bs={self.chunk_bytes}",
            f"--iodepth={self.queue_depth}",
            f"--offset={self.offset_bytes}",
            f"--size={self.size_bytes}",
            *passes,
            f"--iomem={'mmaphuge' if huge else 'mmap'}",
            "--output-format=json",
        ]

    def run(self, *, huge: bool) -> dict[str, Any]:
        """fio's own account of the job. Raises: Unsupported when it fails."""
        done = subprocess.run(self.command(huge=huge), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = (done.stderr + done.stdout).splitlines()
            told = next((line for line in lines if line[:1].isalpha()), done.returncode)
            raise Unsupported(f"fio failed: {told}")
        # Notes on stdout may come before the JSON.
        job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        return job


def find_fio() -> str:
    """The program. Raises: Unsupported when it is not installed."""
    fio = shutil.which("fio")
    if fio is None:
        raise Unsupported("fio is not installed", hint="apt-get install fio")
    return fio


class FioYardstick:
    """fio on a scratch file of random bytes that lies where the store does; a context manager.

    Raises: Unsupported when fio is not installed; NoSpace or StorageError when the file fails.
    """

    def __init__(self, folder: Path, *, size_bytes: int, chunk_bytes: int, queue_depth: int):
        find_fio()
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
        read = FioRead(
            file=self._file,
            size_bytes=self._size_bytes,
            chunk_bytes=self._chunk_bytes,
            queue_depth=self._queue_depth,
            seconds=seconds,
        )
        with huge_pages(self._chunk_bytes * self._queue_depth) as huge:
            job = read.run(huge=huge)["read"]
        return {
            "read_bytes_per_second": int(job["bw_bytes"]),
            "read_bytes": int(job["io_bytes"]),
            "huge_pages": huge,
            "buffers_registered": read.registers_buffers,
            "chunk_bytes": self._chunk_bytes,
            "queue_depth": self._queue_depth,
            "command": " ".join(read.command(huge=huge)),
        }

    def close(self) -> None:
        """Remove the scratch file."""
        self._file.unlink(missing_ok=True)

    def __enter__(self) -> FioYardstick:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _random_file(folder: Path, size_bytes: int) -> Path:
    """A file of random bytes on the device; nothing is left when writing it fails.

    Raises: NoSpace, StorageError.
    """
    try:
        return _written_file(folder, size_bytes)
    except OSError as exc:
        failure = NoSpace if exc.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise failure(
            f"fio's file of {format_size(size_bytes)} cannot be made in {folder}: {exc.strerror}",
            operation="write",
            path=str(folder),
            size_bytes=size_bytes,
            hint="make room there, name another --store, or compare without fio",
        ) from exc


def _written_file(folder: Path, size_bytes: int) -> Path:
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
def huge_pages(size_bytes: int) -> Iterator[bool]:
    """Set huge pages aside for buffers of `size_bytes`; whether that was possible."""
    count = size_bytes // HUGE_PAGE_BYTES + 2  # fio aligns its buffers, and adds a page
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
