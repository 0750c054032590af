"""An engine that fails on purpose.

Fault model. What a device, a file system or a kernel does to a batch, seen from above the engine:

1. A transfer fails with an errno (EIO, ENOSPC, ...). What came before it in its batch lands; of
   itself the first `landed_bytes` land, so a write may be torn; what follows does not start.
2. A read is short: the same with errno 0, as at the end of a file.
3. A transfer is late by `latency_seconds`; later batches pass it.
4. Transfers stand still until the test releases them, in order.
5. A sync fails: the data before it was transferred, and whether it is durable is unknown.
6. A read lands, without an error, with one byte damaged on the way (`flipped_byte`): what is stored
   is sound, and reading it again helps.

Stored bytes that rot, and writes that are lost or go astray, are made by changing the file behind
the engine's back: tests/fault/test_checksums.py. A fault strikes by operation, by count (`nth`) or
by place (`offsets`), a set number of times; or, with a seed and a rate, at random but reproducibly.
"""

from __future__ import annotations

import ctypes
import errno
import random
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dualblade.errors import Closed, DeviceError, DualBladeError
from dualblade.io import Arena, Counters, Engine, Namespace, Op, Ticket, Transfer
from dualblade.io.engine import Paths, path_of
from dualblade.units import BLOCK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Strikes transfers that match all that is given.

    `nth` counts the transfers of `op` (of any, if None) from 0, since the engine was made.
    `offsets` strikes what touches that range of the file. `times` None: every time.
    `errno` None: no failure, only latency or a flipped byte; 0: end of file.
    `flipped_byte` of a read counts from its first one.
    """

    op: Op | None = None
    nth: int | None = None
    offsets: range | None = None
    errno: int | None = errno.EIO
    landed_bytes: int = 0
    latency_seconds: float = 0.0
    flipped_byte: int | None = None
    times: int | None = 1

    def matches(self, transfer: Transfer, nth_of_op: int, nth_of_all: int) -> bool:
        if self.op is not None and transfer.op != self.op:
            return False
        if self.nth is not None and self.nth != (nth_of_all if self.op is None else nth_of_op):
            return False
        where = self.offsets
        return where is None or (
            transfer.offset < where.stop and transfer.offset + transfer.size_bytes > where.start
        )


@dataclass(slots=True)
class _Armed:
    fault: Fault
    strikes_left: int | None


class FaultyEngine(Engine):
    """Wraps `inner` with the same interface. Closing it closes `inner`."""

    reads_in_place = False  # faults strike transfers, so all has to be one

    def __init__(
        self, inner: Engine, faults: Iterable[Fault] = (), *, seed: int = 0, rate: float = 0.0
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self.reason = inner.reason
        self.choice = inner.choice
        self.io_poll = inner.io_poll
        self.queue_depth = inner.queue_depth
        self.chunk_bytes = inner.chunk_bytes
        self.struck: list[tuple[Fault, Transfer]] = []
        self._armed = [_Armed(fault, fault.times) for fault in faults]
        self._random = random.Random(seed)
        self._rate = rate
        self._lock = threading.Lock()  # without it two submitters would count alike
        self._counts = dict.fromkeys(Op, 0)
        self._held_ops: set[Op] = set()
        self._waiting: list[_FaultyTicket] = []  # held or late, in order
        self._closed = False

    @property
    def notes(self) -> tuple[str, ...]:
        return self.inner.notes

    @property
    def held(self) -> int:
        """Batches that stand still or are late."""
        return len(self._waiting)

    def inject(self, fault: Fault) -> None:
        """Add a fault to the plan; `nth` still counts from the engine's beginning."""
        with self._lock:
            self._armed.append(_Armed(fault, fault.times))

    def hold(self, *ops: Op) -> None:
        """From now on batches with one of `ops` stand still until release()."""
        self._held_ops.update(ops)

    def release(self, count: int | None = None) -> None:
        """Start the `count` oldest held batches, or all and hold no more."""
        if count is None:
            self._held_ops.clear()
        for ticket in list(self._waiting)[:count]:
            self._start(ticket)

    def register_arena(self, arena: Arena) -> bool:
        return self.inner.register_arena(arena)

    def register_file(self, fd: int) -> bool:
        return self.inner.register_file(fd)

    def unregister_file(self, fd: int) -> None:
        self.inner.unregister_file(fd)

    def register_namespace(self, fd: int, namespace: Namespace) -> None:
        self.inner.register_namespace(fd, namespace)
        self.name = self.inner.name

    def limit_direct_pieces(self, size_bytes: int) -> None:
        self.inner.limit_direct_pieces(size_bytes)

    def keep(self, memory: memoryview) -> None:
        self.inner.keep(memory)

    def submit(self, transfers: Sequence[Transfer], *, path: Paths = None) -> Ticket:
        with self._lock:
            if self._closed:
                raise Closed("the engine is closed")
            kept, failure, delay, flips = self._plan(transfers, path)
            size_bytes = sum(t.size_bytes for t in transfers if t.op in (Op.READ, Op.WRITE))
            ticket = _FaultyTicket(kept, path, size_bytes, failure, flips)
            held = any(transfer.op in self._held_ops for transfer in transfers)
            if held or delay:
                self._waiting.append(ticket)
        if delay and not held:
            timer = threading.Timer(delay, self._start, [ticket])
            timer.daemon = True
            timer.start()
        elif not held:
            ticket.start(self.inner)
        return ticket

    def counters(self) -> Counters:
        counters = self.inner.counters()
        injected = sum(1 for fault, _ in self.struck if fault.errno is not None)
        return replace(counters, errors=counters.errors + injected)

    def drain(self, timeout_seconds: float | None = None) -> None:
        deadline = _deadline(timeout_seconds)
        for ticket in list(self._waiting):
            ticket.wait_for_start(deadline)
        self.inner.drain(_seconds_left(deadline))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, []
        for ticket in waiting:
            ticket.cancel()
        self.inner.close()

    def _start(self, ticket: _FaultyTicket) -> None:
        with self._lock:
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        ticket.start(self.inner)

    def _plan(
        self, transfers: Sequence[Transfer], path: Paths
    ) -> tuple[list[Transfer], DeviceError | None, float, list[int]]:
        """What is left of the batch, how it fails, how late it starts, and addresses to damage."""
        kept: list[Transfer] = []
        flips: list[int] = []
        delay = 0.0
        for transfer in transfers:
            fault = self._strike(transfer)
            if fault is not None:
                self.struck.append((fault, transfer))
                delay = max(delay, fault.latency_seconds)
                if fault.errno is not None:
                    torn, error = _torn(transfer, fault), _error(transfer, fault, path)
                    return [*kept, *torn], error, delay, flips
                if fault.flipped_byte is not None and transfer.op is Op.READ:
                    flips.append(transfer.address + fault.flipped_byte)
            kept.append(transfer)
        return kept, None, delay, flips

    def _strike(self, transfer: Transfer) -> Fault | None:
        nth_of_op, nth_of_all = self._counts[transfer.op], sum(self._counts.values())
        self._counts[transfer.op] += 1
        for armed in self._armed:
            if armed.strikes_left == 0 or not armed.fault.matches(transfer, nth_of_op, nth_of_all):
                continue
            if armed.strikes_left is not None:
                armed.strikes_left -= 1
            return armed.fault
        if self._rate and self._random.random() < self._rate:
            return Fault(op=transfer.op)
        return None


class _FaultyTicket(Ticket):
    __slots__ = ("_cancelled", "_failure", "_flips", "_inner", "_started", "_transfers")

    def __init__(
        self,
        transfers: list[Transfer],
        path: Paths,
        size_bytes: int,
        failure: DeviceError | None,
        flips: list[int],
    ) -> None:
        self._transfers = transfers
        self._path = path
        self._size_bytes = size_bytes
        self._failure: DualBladeError | None = failure
        self._flips = flips
        self._inner: Ticket | None = None
        self._started = threading.Event()

    def start(self, engine: Engine) -> None:
        try:
            self._inner = engine.submit(self._transfers, path=self._path)
        except Closed:
            self.cancel()
        except DualBladeError as refusal:
            self._failure = refusal
        self._started.set()

    def cancel(self) -> None:
        first = self._transfers[0] if self._transfers else Transfer(-1, Op.READ, 0, 0, 0)
        self._failure = _error(first, Fault(errno=errno.ECANCELED), self._path)
        self._started.set()

    @property
    def done(self) -> bool:
        return self._started.is_set() and (self._inner is None or self._inner.done)

    @property
    def failed(self) -> bool:
        inner = self._inner is not None and self._inner.failed
        return self.done and (inner or self._failure is not None)

    @property
    def ended_ns(self) -> int:
        return self._inner.ended_ns if self._inner else 0

    @property
    def landed_bytes(self) -> int:
        return self._inner.landed_bytes if self._inner else 0

    def wait_for_start(self, deadline: float | None) -> None:
        if not self._started.wait(_seconds_left(deadline)):
            raise TimeoutError("the transfer is held")

    def wait(self, size_bytes: int | None = None, timeout_seconds: float | None = None) -> None:
        deadline = _deadline(timeout_seconds)
        self.wait_for_start(deadline)
        inner = self._inner
        if inner is not None:
            whole = size_bytes is None or size_bytes > inner.size_bytes
            inner.wait(None if whole else size_bytes, _seconds_left(deadline))
            while self._flips:
                ctypes.c_ubyte.from_address(self._flips.pop()).value ^= 0x10
            if not whole:
                return
        if self._failure is not None:
            raise self._failure


def _torn(transfer: Transfer, fault: Fault) -> list[Transfer]:
    """The part of a failing transfer that lands, whole blocks."""
    landed_bytes = min(fault.landed_bytes, transfer.size_bytes) // BLOCK_BYTES * BLOCK_BYTES
    if landed_bytes == 0 or transfer.op not in (Op.READ, Op.WRITE):
        return []
    return [transfer._replace(size_bytes=landed_bytes)]


def _error(transfer: Transfer, fault: Fault, path: Paths) -> DeviceError:
    assert fault.errno is not None
    return DeviceError(
        errno=fault.errno,
        operation=transfer.op.word,
        path=path_of(path, transfer.fd),
        offset=transfer.offset,
        size_bytes=transfer.size_bytes,
    )


def _deadline(timeout_seconds: float | None) -> float | None:
    return None if timeout_seconds is None else time.monotonic() + timeout_seconds


def _seconds_left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
