"""The engine as Python sees it: what crosses into `native/`, and errors with their words."""

from __future__ import annotations

import atexit
import contextlib
import errno
import math
import os
import resource
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import get_args

from dualblade.config import EngineChoice, check_word
from dualblade.errors import Closed, ConfigError, DeviceError, Unsupported
from dualblade.io import _native
from dualblade.io.arena import Arena
from dualblade.io.transfer import Namespace, Op, Transfer
from dualblade.units import BLOCK_BYTES, GIB, MIB, format_size

Paths = str | Mapping[int, str] | None

# The kernel's result of one request is a signed 32-bit count.
CHUNK_BYTES_MAX = GIB
# io_uring's own limit is 32768 entries; no drive takes more than some thousands.
QUEUE_DEPTH_MAX = 4096
# One registered buffer is at most 1 GiB (EFAULT above).
REGISTERED_BYTES_MAX = GIB

NVME_STATUS = 0x10000  # kNvmeStatus in native/engine/types.hpp
_ALL_BYTES = 2**64 - 1
_LANDED, _FAILED, _TIMED_OUT, _FORKED = range(4)  # WaitResult in native/bindings.cpp

_live: weakref.WeakSet[Engine] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since the engine was opened; subtract two snapshots for an interval.

    `backlog_*` are over the time in which a piece was waiting for a free place in the queue. With
    io_uring each door has a queue of its own; the seconds of both are added up, and may be more
    than went by. `direct_busy_seconds` are the direct door's alone (posix: all).
    """

    read_ops: int
    read_bytes: int
    write_ops: int
    write_bytes: int
    sync_ops: int
    errors: int
    retries: int
    short_transfers: int
    busy_seconds: float
    depth_seconds: float
    backlog_seconds: float
    backlog_depth_seconds: float
    thread_cpu_seconds: float
    direct_busy_seconds: float

    @property
    def effective_queue_depth(self) -> float:
        """Mean number in flight while work was waiting; 0 if none ever waited."""
        return self.backlog_depth_seconds / self.backlog_seconds if self.backlog_seconds else 0.0

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(*(getattr(self, name) - getattr(earlier, name) for name in self.__slots__))


class Ticket:
    """A started batch. Any thread may wait; several may. Made by Engine.submit."""

    __slots__ = ("_native", "_path", "_size_bytes")

    def __init__(self, native: _native.Ticket, path: Paths) -> None:
        self._native = native
        self._path = path
        self._size_bytes = native.size_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes that the batch reads and writes; syncs count nothing."""
        return self._size_bytes

    @property
    def done(self) -> bool:
        """Ended, well or badly: the kernel will not touch the memory any more."""
        return self._native.done

    @property
    def failed(self) -> bool:
        """Ended badly: `wait` raises."""
        return self.done and self._native.failure is not None

    @property
    def ended_ns(self) -> int:
        """When it ended, on the clock of `time.monotonic_ns`; 0 before."""
        return self._native.ended_ns

    @property
    def landed_bytes(self) -> int:
        """The first n contiguous bytes, in batch order, that have been transferred."""
        return self._native.landed_bytes

    def wait(self, size_bytes: int | None = None, timeout_seconds: float | None = None) -> None:
        """Block until all landed and synced, or (with `size_bytes`) until the first bytes landed.

        A failure is raised only when nothing is in flight any more. Python's lock is released;
        signal handlers run at least every 100 ms.

        Raises: DeviceError of the first failed piece (errno 0: end of file; ECANCELED: the engine
            was closed before it started), TimeoutError, ConfigError for more than there is,
            Closed in a forked child.
        """
        if size_bytes is not None and not 0 <= size_bytes <= self._size_bytes:
            raise ConfigError(f"cannot wait for {size_bytes} of {self._size_bytes} bytes")
        result = self._native.wait(
            _ALL_BYTES if size_bytes is None else size_bytes,
            math.inf if timeout_seconds is None else timeout_seconds,
        )
        if result == _LANDED:
            return
        if result == _TIMED_OUT:
            raise TimeoutError(
                f"{self.landed_bytes} of {self._size_bytes} bytes landed in {timeout_seconds} s"
            )
        if result == _FORKED:
            raise Closed("the engine of this transfer lives in the parent process")
        failure = self._native.failure
        assert result == _FAILED
        assert failure is not None
        error_number, op, fd, offset, failed_bytes = failure
        status = error_number - NVME_STATUS if error_number >= NVME_STATUS else None
        raise DeviceError(
            errno=error_number if status is None else errno.EIO,
            nvme_status=status,
            operation=Op(op).word,
            path=path_of(self._path, fd),
            offset=offset,
            size_bytes=failed_bytes,
        )


class Engine:
    """Carries transfers. Made by open_engine; any thread may submit.

    Limits: `queue_depth` pieces of at most `chunk_bytes` are in flight, first in, first out
    across tickets; with io_uring that holds for each door, and neither waits for the other, and
    writes of the page cache are cut into pieces of 4 MiB (native/engine/uring_engine.cpp). A forked
    child cannot use it (Closed); the parent is not disturbed.

    name     what carries the direct door: uring-cmd, io_uring, nvme-ioctl or posix.
    choice   the word that it was asked for by; a store obeys it.
    io_poll  direct reads and writes are polled for: only on devices with poll queues.
    reads_in_place  what is in the page cache may be read there, past the engine.
    """

    choice: EngineChoice = "auto"
    io_poll: bool = False
    reads_in_place: bool = True
    name: str
    reason: str | None
    queue_depth: int
    chunk_bytes: int

    def __init__(
        self, native: _native.Engine, name: str, reason: str | None, depth: int, chunk_bytes: int
    ) -> None:
        self._native = native
        self.name = name
        self.reason = reason
        self.queue_depth = depth
        self.chunk_bytes = chunk_bytes
        self._has_ring = name == "io_uring"
        self._notes: list[str] = []
        # Registered memory stays pinned until the ring is gone. Unmapped earlier, a new mapping
        # at the same address would be taken for it, and reads would land in the old pages.
        self._registered: list[memoryview] = []
        self._kept: list[memoryview] = []
        _live.add(self)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is less than it could be, and why."""
        return tuple(self._notes)

    def register_arena(self, arena: Arena) -> bool:
        """Spare the kernel pinning the pages of `arena` for each transfer; False if not allowed.

        The arena's memory then lives as long as the engine. Idempotent. Waits for the engine's
        thread.
        """
        if not arena.huge:
            self._note(
                f"huge pages: {format_size(arena.huge_bytes)} of {format_size(arena.size_bytes)}"
            )
        if not self._has_ring:
            return False
        self._registered.append(arena.buffer)
        for start in range(0, arena.size_bytes, REGISTERED_BYTES_MAX):
            size_bytes = min(REGISTERED_BYTES_MAX, arena.size_bytes - start)
            error = self._native.register_buffer(arena.address + start, size_bytes, arena.huge)
            if error:
                self._note(f"buffers not registered: {_why_not_registered(error)}")
                return False
        return True

    def register_file(self, fd: int) -> bool:
        """Spare the kernel looking up `fd` for each transfer; False if not possible.

        Call unregister_file before closing `fd`.
        """
        return self._native.register_file(fd) == 0

    def unregister_file(self, fd: int) -> None:
        """Forget `fd`; nothing happens if it is not registered."""
        self._native.unregister_file(fd)

    def register_namespace(self, fd: int, namespace: Namespace) -> None:
        """From now on transfers on `fd`, an NVMe character device, are commands to the drive.

        Raises: Unsupported, saying what is missing; the store then takes another door.
        """
        try:
            error = self._native.register_namespace(fd, namespace)
        except ValueError as exc:
            raise ConfigError(f"not a namespace: {namespace}") from exc
        if error == errno.EOPNOTSUPP:
            raise Unsupported(
                "NVMe passthrough needs io_uring with IORING_OP_URING_CMD (Linux 5.19)"
            )
        if error:
            raise Unsupported(f"NVMe passthrough: {os.strerror(error)}")
        self.name = "uring-cmd" if self._has_ring else "nvme-ioctl"

    def limit_direct_pieces(self, size_bytes: int) -> None:
        """Cut direct transfers to pieces of at most `size_bytes` from now on, where that is less.

        The block layer splits what is longer than its limit, and does not poll for what it split.
        """
        size_bytes = max(size_bytes // BLOCK_BYTES, 1) * BLOCK_BYTES
        if size_bytes < self.chunk_bytes:
            self._native.limit_direct_pieces(size_bytes)
            self._note(f"direct pieces of {format_size(size_bytes)}: longer ones are not polled")

    def note_fallback(self, reason: str) -> None:
        """Take note that a better way was wanted, and why it is not in force."""
        self.reason = reason if self.reason is None else f"{reason}; {self.reason}"

    def submit(self, transfers: Sequence[Transfer], *, path: Paths = None) -> Ticket:
        """Start `transfers`; return at once, never block on I/O.

        `path` is for error texts: one, or one for each descriptor. The memory belongs to the
        engine until the ticket is done.

        Raises: Closed; ConfigError for what no kernel could mean. All else comes from wait().
        """
        try:
            native = self._native.submit(transfers)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"not transfers: {error}") from error
        if native is None:
            raise Closed("the engine is closed" if not self._native.forked else _FORKED_TEXT)
        return Ticket(native, path)

    def counters(self) -> Counters:
        """A snapshot; also after close. Raises: Closed in a forked child."""
        values = self._native.counters()
        if not values:
            raise Closed(_FORKED_TEXT)
        return Counters(*values)  # type: ignore[arg-type]

    def drain(self, timeout_seconds: float | None = None) -> None:
        """Block until all submitted tickets ended, well or badly. Raises: TimeoutError."""
        if not self._native.drain(math.inf if timeout_seconds is None else timeout_seconds):
            raise TimeoutError(f"transfers were still in flight after {timeout_seconds} s")

    def close(self) -> None:
        """Refuse new work, cancel what has not started, wait for what is in flight. Idempotent."""
        self._native.close()
        self._registered.clear()
        self._kept.clear()
        _live.discard(self)

    def keep(self, memory: memoryview) -> None:
        """Have `memory` mapped until the engine is closed: transfers may still go there whose end
        nobody waited for."""
        self._kept.append(memory)

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def path_of(path: Paths, fd: int) -> str | None:
    """What error texts call `fd`."""
    return path.get(fd) if isinstance(path, Mapping) else path


_FORKED_TEXT = "the engine lives in the parent process: open one after the fork"


def open_engine(
    name: EngineChoice = "auto",
    *,
    queue_depth: int = 8,
    chunk_bytes: int = MIB,
    io_poll: bool = False,
) -> Engine:
    """The best engine that this machine allows, or the one that is named.

    auto: io_uring, else posix with `reason` saying why. uring-cmd: io_uring, for stores that take
    NVMe commands. `io_poll`: direct reads and writes are polled for, so only devices with poll
    queues may be given to it (a store checks); that keeps a core busy while any is in flight.

    Raises: Unsupported when the named one cannot be had, ConfigError for a wrong argument.
    """
    check_word("io_engine", name, get_args(EngineChoice))
    if io_poll and name == "posix":
        raise ConfigError("io_poll is io_uring's: the posix engine cannot poll for completions")
    if not 1 <= queue_depth <= QUEUE_DEPTH_MAX:
        raise ConfigError(f"queue depth {queue_depth} is not in 1 to {QUEUE_DEPTH_MAX}")
    if not 0 < chunk_bytes <= CHUNK_BYTES_MAX or chunk_bytes % BLOCK_BYTES:
        raise ConfigError(
            f"a chunk of {chunk_bytes} bytes is not a multiple of {BLOCK_BYTES} up to 1 GiB"
        )
    reason = None
    if name != "posix":
        try:
            native = _native.Engine("io_uring", queue_depth, chunk_bytes, io_poll)
        except OSError as error:
            reason = _why_no_uring(error)
            if name != "auto" or io_poll:
                hint = "leave io_poll off" if io_poll else "use io_engine auto or posix"
                if _native.HAVE_URING:
                    hint += ", or allow io_uring"
                raise Unsupported(reason, hint=hint) from error
        else:
            engine = Engine(native, "io_uring", None, queue_depth, chunk_bytes)
            engine.choice, engine.io_poll = name, io_poll
            if io_poll:
                engine._note("completions of direct reads and writes are polled for")
            return engine
    try:
        native = _native.Engine("posix", queue_depth, chunk_bytes, False)
    except OSError as error:
        because = "" if reason is None else f" ({reason})"
        raise Unsupported(
            f"cannot start an engine of {queue_depth} threads: {error.strerror}{because}",
            hint="lower the queue depth, or allow more threads (ulimit -u, pids.max)",
        ) from error
    engine = Engine(native, "posix", reason, queue_depth, chunk_bytes)
    engine.choice = name
    return engine


def _why_no_uring(error: OSError) -> str:
    if not _native.HAVE_URING:
        return "built without liburing 2.3 or newer: install liburing-dev and build dualblade again"
    code = errno.errorcode.get(error.errno or 0, str(error.errno))
    if error.errno == errno.EPERM:
        cause = "seccomp or kernel.io_uring_disabled"
    elif error.errno == errno.ENOSYS:
        cause = "a kernel without it, or seccomp"
    elif error.errno == errno.ECANCELED:
        cause = "no kernel worker may be made: pids.max, RLIMIT_NPROC"
    else:
        cause = os.strerror(error.errno or 0)
    return f"io_uring is forbidden here: {code} at io_uring_setup ({cause})"


def _why_not_registered(error: int) -> str:
    if error in (errno.ENOMEM, errno.EPERM):
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        size = "unlimited" if limit == resource.RLIM_INFINITY else format_size(limit)
        return f"memlock limit {size}"
    return os.strerror(error)


def _close_all() -> None:
    """At exit: without it the interpreter would free memory that the kernel is writing to."""
    with contextlib.ExitStack() as stack:  # all of them, whatever ends one
        for engine in list(_live):
            stack.callback(engine.close)


def _abandon_all() -> None:
    for engine in list(_live):
        engine._native.abandon()
    _live.clear()  # once: a grandchild would close descriptors that are its own by then


atexit.register(_close_all)
os.register_at_fork(after_in_child=_abandon_all)
