"""`dualblade bench io`: how fast and how cheaply the engine moves bytes, beside fio.

Workload: a file of seeded incompressible data, or several striped as a store is, read and rewritten
sequentially with O_DIRECT into huge-page staging, `queue_depth` pieces of `chunk_bytes` in flight
on each: what a decode step does to the direct door, without the model. Warm: the memory is touched,
the files' blocks are written (first writes into unwritten extents are slower and compare nothing),
a first pass, which also checks what is read, is not counted.

Timed passes cycle through as many pieces of staging, as fio does: the memory that is written
to then fits the processor's cache for both, or for neither. What lands is not looked at.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualblade.bench.fio import FioRead, find_fio, huge_pages
from dualblade.errors import ConfigError, CorruptExtent, NoSpace, StorageError, Unsupported
from dualblade.host.machine import command_line, machine_facts
from dualblade.io import Arena, Engine, EngineChoice, Op, Transfer, open_engine
from dualblade.store import as_places
from dualblade.store.backing import is_device
from dualblade.store.format import DATA_OFFSET
from dualblade.store.stripes import Stripes
from dualblade.units import BLOCK_BYTES, GIB, MIB, format_size, round_up

Progress = Callable[[str], None]

MAGIC = b"dualblade bench io scratch file, version 1\n"

# Data begins where a store's does, so that timed writes leave the magic alone.
HEADER_BYTES = DATA_OFFSET

_FILL_BYTES = 8 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class IoBenchOptions:
    """`store`: the scratch file, or several, made if missing; a file not ours is refused."""

    store: str | Sequence[str]
    size_bytes: int = 2 * GIB
    chunk_bytes: int = MIB
    queue_depth: int = 8
    io_engine: EngineChoice = "auto"
    repeats: int = 5
    compare_fio: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"{self.repeats} repeats")
        if self.io_engine == "uring-cmd":
            raise ConfigError(
                "uring-cmd sends commands to an NVMe namespace; bench io reads a file",
                hint="use io_engine auto, io_uring or posix",
            )
        if self.size_bytes < self.chunk_bytes or self.size_bytes % self.chunk_bytes:
            raise ConfigError(
                f"a file of {self.size_bytes} bytes is not whole chunks of {self.chunk_bytes}"
            )
        if self.compare_fio and len(self.stores) > 1:
            raise ConfigError("fio reads one file", hint="name one --store, or leave fio out")

    @property
    def stores(self) -> tuple[str, ...]:
        """All files."""
        return tuple(os.fspath(place) for place in as_places(self.store) or ())

    @property
    def depth(self) -> int:
        """Requests in flight on all files together."""
        return self.queue_depth * len(self.stores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One sweep over the file. CPU is user and system time of the whole process."""

    seconds: float
    cpu_seconds: float
    bytes: int

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds

    @property
    def cpu_seconds_per_gib(self) -> float:
        return self.cpu_seconds * GIB / self.bytes


def run_io_bench(options: IoBenchOptions, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Measure; return plain values, ready for JSON. Blocks for seconds to minutes.

    Raises: ConfigError for a path that is not ours to write, Unsupported for a file system
        without O_DIRECT or a missing fio, NoSpace, DeviceError, CorruptExtent when what is read
        is not what was written.
    """
    if options.compare_fio:
        find_fio()
    with (
        _scratch_files(options) as (fds, keep),
        Arena(_arena_bytes(options)) as arena,
        # The engine ends first: after Ctrl-C transfers on all these may be under way.
        open_engine(
            options.io_engine, queue_depth=options.depth, chunk_bytes=options.chunk_bytes
        ) as engine,
    ):
        registered = engine.register_arena(arena)
        for fd in fds:
            engine.register_file(fd)
        sweep = _Sweep(engine, arena, fds, options)
        progress(f"{engine.name}: writing {format_size(options.size_bytes)} of random bytes")
        sweep.sign()
        keep()
        sweep.fill()
        sweep.check()
        before = engine.counters()
        reads, fio_reads = _measure_reads(sweep, options, progress)
        counted = engine.counters() - before
        writes = []
        for index in range(options.repeats):
            writes.append(sweep.run(Op.WRITE))
            progress(f"write {index + 1}: {format_size(writes[-1].bytes_per_second)}/s")
        result = {
            "benchmark": "io",
            "command": command_line(),
            "engine": engine.name,
            "engine_reason": engine.reason,
            "engine_notes": list(engine.notes),
            "buffers_registered": registered,
            "huge_pages": arena.huge,
            "read_bytes_per_second": statistics.median(p.bytes_per_second for p in reads),
            "write_bytes_per_second": statistics.median(p.bytes_per_second for p in writes),
            "cpu_seconds_per_gib_read": statistics.median(p.cpu_seconds_per_gib for p in reads),
            "effective_queue_depth": counted.effective_queue_depth,
            "read_counters": asdict(counted),
            "reads": [_describe(p) for p in reads],
            "writes": [_describe(p) for p in writes],
        }
        if options.compare_fio:
            result["fio"] = _compare(reads, fio_reads, options)
        result["options"] = asdict(options)
        result["machine"] = machine_facts(options.stores[0])
        return result


def _measure_reads(
    sweep: _Sweep, options: IoBenchOptions, progress: Progress
) -> tuple[list[Pass], list[Pass]]:
    """Reads by us and, if asked, by fio, pair by pair; who goes first alternates."""
    ours: list[Pass] = []
    theirs: list[Pass] = []
    with _reserved_huge_pages(options) if options.compare_fio else contextlib.nullcontext():
        for index in range(options.repeats):
            turns = [ours, theirs] if options.compare_fio else [ours]
            for passes in turns if index % 2 == 0 else turns[::-1]:
                passes.append(_fio_read(options) if passes is theirs else sweep.run(Op.READ))
                name = "fio" if passes is theirs else sweep.engine.name
                progress(
                    f"read {index + 1}, {name}: {format_size(passes[-1].bytes_per_second)}/s, "
                    f"{passes[-1].cpu_seconds_per_gib:.3f} s CPU per GiB"
                )
    return ours, theirs


def _arena_bytes(options: IoBenchOptions) -> int:
    at_least = max(_FILL_BYTES, options.depth * options.chunk_bytes)
    return round_up(at_least, options.chunk_bytes)


class _Sweep:
    """Passes over the data: filled and checked in large strides, timed in chunks."""

    def __init__(
        self, engine: Engine, arena: Arena, fds: Sequence[int], options: IoBenchOptions
    ) -> None:
        self.engine = engine
        self._address = arena.address
        self._fds = fds
        self._stripes = Stripes(len(fds))
        self._options = options
        self._stride_bytes = arena.size_bytes
        self._blocks = np.frombuffer(arena.buffer, dtype=np.uint64).reshape(-1, BLOCK_BYTES // 8)

    def run(self, op: Op) -> Pass:
        """One timed pass; what is written is what the staging holds (random bytes)."""
        chunk_bytes = self._options.chunk_bytes
        transfers = []
        for index, start in enumerate(range(0, self._options.size_bytes, chunk_bytes)):
            slot = index % self._options.depth * chunk_bytes
            transfers += self._transfers(op, slot, start, chunk_bytes)
        cpu = _cpu_seconds()
        begin = time.perf_counter()
        self._wait_for(transfers)
        seconds = time.perf_counter() - begin
        return Pass(
            seconds=seconds, cpu_seconds=_cpu_seconds() - cpu, bytes=self._options.size_bytes
        )

    def sign(self) -> None:
        """Say in the files that they are this benchmark's: the next one may write them too."""
        self._blocks[:] = 0
        self._blocks[0] = np.frombuffer(MAGIC.ljust(BLOCK_BYTES, b"\0"), dtype=np.uint64)
        self._wait_for([Transfer(fd, Op.WRITE, self._address, HEADER_BYTES, 0) for fd in self._fds])

    def fill(self) -> None:
        """Write the whole file: random blocks, each stamped with its number, unlike any other."""
        noise = np.random.default_rng(self._options.seed)
        self._blocks[:] = noise.integers(0, 2**64, self._blocks.shape, dtype=np.uint64)
        for start, size_bytes in self._strides():
            self._blocks[: size_bytes // BLOCK_BYTES, 0] = self._stamps(start, size_bytes)
            self._wait_for(self._transfers(Op.WRITE, 0, start, size_bytes))
        for fd in self._fds:
            os.fdatasync(fd)

    def check(self) -> None:
        """Read the whole file and look at every stamp. Raises: CorruptExtent."""
        for start, size_bytes in self._strides():
            self._wait_for(self._transfers(Op.READ, 0, start, size_bytes))
            found = self._blocks[: size_bytes // BLOCK_BYTES, 0]
            wrong = np.flatnonzero(found != self._stamps(start, size_bytes))
            if len(wrong):
                at = HEADER_BYTES + start + int(wrong[0]) * BLOCK_BYTES
                (part,) = self._stripes.parts(at, BLOCK_BYTES)
                raise CorruptExtent(
                    "the benchmark read what it did not write",
                    operation="read",
                    path=self._options.stores[part.member],
                    offset=part.offset,
                    size_bytes=BLOCK_BYTES,
                )

    def _strides(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self._options.size_bytes, self._stride_bytes):
            yield start, min(self._stride_bytes, self._options.size_bytes - start)

    def _stamps(self, start: int, size_bytes: int) -> Any:
        first = start // BLOCK_BYTES
        return np.arange(first, first + size_bytes // BLOCK_BYTES, dtype=np.uint64)

    def _transfers(self, op: Op, at: int, start: int, size_bytes: int) -> list[Transfer]:
        return [
            Transfer(
                self._fds[part.member],
                op,
                self._address + at + part.at,
                part.size_bytes,
                part.offset,
            )
            for part in self._stripes.parts(HEADER_BYTES + start, size_bytes)
        ]

    def _wait_for(self, transfers: list[Transfer]) -> None:
        paths = dict(zip(self._fds, self._options.stores, strict=True))
        self.engine.submit(transfers, path=paths).wait()


@contextlib.contextmanager
def _scratch_files(options: IoBenchOptions) -> Iterator[tuple[list[int], Callable[[], object]]]:
    """The files, open O_DIRECT and locked, at full size. Only ours or empty ones are written.

    Files that were missing are so again at the end, and others as long as they were, unless the
    function that comes with them was called.
    Raises: ConfigError, Unsupported, NoSpace, StorageError.
    """
    stripes = Stripes(len(options.stores))
    size_bytes = HEADER_BYTES + stripes.member_bytes(options.size_bytes)
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as undo:
        fds = [_open_scratch(path, opened, undo) for path in options.stores]
        for path, fd in zip(options.stores, fds, strict=True):
            try:
                os.posix_fallocate(fd, 0, size_bytes)
            except OSError as error:
                raise NoSpace(
                    f"no room for {format_size(size_bytes)} in {path}: {error.strerror}",
                    operation="fallocate",
                    path=path,
                    size_bytes=size_bytes,
                ) from error
        yield fds, undo.pop_all


def _open_scratch(path: str, opened: contextlib.ExitStack, undo: contextlib.ExitStack) -> int:
    existed = os.path.exists(path)
    if existed and not os.path.isfile(path):
        raise ConfigError(f"{path} is not a regular file", hint="name a scratch file")
    if is_device(path):
        raise ConfigError(f"there is no device {path}", hint="name a scratch file")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if not existed:  # where there is no O_DIRECT the kernel makes the file, and then refuses
            with contextlib.suppress(OSError):
                os.unlink(os.path.realpath(path))
        raise _open_error(path, error) from error
    opened.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{path} is in use by another benchmark") from error
    size_before = os.fstat(fd).st_size
    if size_before and not _is_ours(fd):
        raise ConfigError(
            f"{path} holds something that this benchmark did not write",
            hint="name a file that does not exist",
        )
    if existed:
        undo.callback(os.ftruncate, fd, size_before)
    else:
        undo.callback(os.unlink, os.path.realpath(path))  # a link is somebody's
    return fd


def _is_ours(fd: int) -> bool:
    with mmap.mmap(-1, BLOCK_BYTES) as block:  # O_DIRECT wants aligned memory
        return os.preadv(fd, [block], 0) >= len(MAGIC) and block[: len(MAGIC)] == MAGIC


def _open_error(path: str, error: OSError) -> Exception:
    if isinstance(error, IsADirectoryError | FileNotFoundError | PermissionError):
        return ConfigError(f"cannot open {path}: {error.strerror}")
    if error.errno == errno.EINVAL:  # what open(2) answers where there is no O_DIRECT
        return Unsupported(
            f"the file system of {path} has no O_DIRECT", hint="name a file on a disk"
        )
    return StorageError(f"cannot open {path}: {error.strerror}", operation="open", path=path)


def _cpu_seconds() -> float:
    """Of all threads, kernel workers of io_uring included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _describe(sweep: Pass) -> dict[str, float]:
    return {
        "seconds": sweep.seconds,
        "bytes_per_second": sweep.bytes_per_second,
        "cpu_seconds_per_gib": sweep.cpu_seconds_per_gib,
    }


@contextlib.contextmanager
def _reserved_huge_pages(options: IoBenchOptions) -> Iterator[None]:
    """What fio takes, for the time of the comparison: without them it pays for each 4 KiB page."""
    with huge_pages(options.queue_depth * options.chunk_bytes) as reserved:
        if not reserved:
            raise Unsupported(
                "the kernel gave no huge pages for fio", hint="run the comparison as root"
            )
        yield


def _fio(options: IoBenchOptions) -> FioRead:
    return FioRead(
        file=Path(options.stores[0]),
        size_bytes=options.size_bytes,
        chunk_bytes=options.chunk_bytes,
        queue_depth=options.queue_depth,
        offset_bytes=HEADER_BYTES,
    )


def _fio_read(options: IoBenchOptions) -> Pass:
    job = _fio(options).run(huge=True)
    return Pass(
        seconds=job["read"]["runtime"] / 1000,
        cpu_seconds=(job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000,
        bytes=job["read"]["io_bytes"],
    )


def _compare(ours: list[Pass], theirs: list[Pass], options: IoBenchOptions) -> dict[str, Any]:
    pairs = list(zip(ours, theirs, strict=True))
    throughput = [own.bytes_per_second / fio.bytes_per_second for own, fio in pairs]
    # fio counts CPU in whole percent: of a pass of a few milliseconds it may see none.
    cpu = [
        own.cpu_seconds_per_gib / fio.cpu_seconds_per_gib for own, fio in pairs if fio.cpu_seconds
    ]
    version = subprocess.run([find_fio(), "--version"], capture_output=True, text=True, check=False)
    return {
        "version": version.stdout.strip(),
        "buffers_registered": _fio(options).registers_buffers,
        "command": " ".join(_fio(options).command(huge=True)),
        "throughput_ratio_median": statistics.median(throughput),
        "cpu_ratio_median": statistics.median(cpu) if cpu else None,
        "throughput_ratios": throughput,
        "cpu_ratios": cpu,
        "reads": [_describe(fio) for fio in theirs],
    }
