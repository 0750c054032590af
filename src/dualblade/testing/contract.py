"""What every engine keeps, on every device: a conformance suite.

Subclass DeviceContract in a test file, give it a `target` and an `open_engine`, and pytest runs
every rule. Needs pytest and hypothesis.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualblade.errors import Closed, ConfigError, DeviceError, Unsupported
from dualblade.io import Arena, Engine, Op, Ticket, Transfer
from dualblade.testing.stall import StalledMemory
from dualblade.units import KIB, MIB

CHUNK_BYTES = 64 * KIB
QUEUE_DEPTH = 4
# No time limit of a test decides whether it passes; this one ends a hang with an error.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something to transfer to: `size_bytes` long, in transfers of whole `block_bytes`.

    `block_bytes` is 1 for a buffered descriptor. `direct`: misaligned transfers are refused.
    """

    fd: int
    path: str
    size_bytes: int
    block_bytes: int
    direct: bool


def pattern(size_bytes: int, seed: int) -> bytes:
    """Bytes that differ by place and seed, so that a shift by any block shows."""
    return random.Random(seed).randbytes(size_bytes)


class DeviceContract:
    """The rules. `target` is at least 8 MiB and may be overwritten."""

    @pytest.fixture
    def target(self) -> Iterator[Target]:
        raise NotImplementedError

    def open_engine(self) -> Engine:
        """A fresh engine with CHUNK_BYTES and QUEUE_DEPTH."""
        raise NotImplementedError

    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        with self.open_engine() as engine:
            yield engine

    @pytest.fixture
    def arena(self) -> Iterator[Arena]:
        with Arena(8 * MIB) as arena:
            yield arena

    @pytest.mark.parametrize("around", [4 * KIB, CHUNK_BYTES, 2 * MIB])
    @pytest.mark.parametrize("blocks_off", [-1, 0, 1])
    def test_sizes_around_limits(
        self, target: Target, engine: Engine, arena: Arena, around: int, blocks_off: int
    ) -> None:
        """What is written is read back, and not one byte beside it is touched."""
        size_bytes = around + blocks_off * target.block_bytes
        offset = 3 * max(target.block_bytes, 4096)
        data = pattern(size_bytes, seed=around + blocks_off)
        arena.buffer[:size_bytes] = data
        self.transfer(engine, target, Op.WRITE, arena.address, size_bytes, offset)
        guard = 4096
        arena.buffer[: size_bytes + 2 * guard] = b"\xaa" * (size_bytes + 2 * guard)
        self.transfer(engine, target, Op.READ, arena.address + guard, size_bytes, offset)
        found = bytes(arena.buffer[: size_bytes + 2 * guard])
        assert found == b"\xaa" * guard + data + b"\xaa" * guard

    @settings(
        max_examples=20,
        deadline=None,
        # The batches of one target may follow each other; each subclass runs it for itself.
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
        ],
    )
    @given(data=st.data())
    def test_batches_equal_a_bytearray(self, target: Target, data: st.DataObject) -> None:
        """Batches of reads and writes in any order are those of a bytearray."""
        unit = max(target.block_bytes, 512)
        slot_bytes = 2 * MIB  # room for the largest transfer
        slots = target.size_bytes // slot_bytes
        with self.open_engine() as engine, Arena(slots * slot_bytes) as arena:
            model = bytearray(pattern(slots * slot_bytes, seed=1))
            arena.buffer[:] = model
            self.transfer(engine, target, Op.WRITE, arena.address, len(model), 0)
            for number in range(data.draw(st.integers(1, 6), label="batches")):
                # One transfer per slot: within a batch no order is promised.
                chosen = data.draw(st.permutations(range(slots)).map(lambda p: p[:4]), label="at")
                batch, reads = [], []
                for slot in chosen:
                    begin = data.draw(st.integers(0, 8), label="begin") * unit
                    size = data.draw(st.sampled_from([1, 7, 8, 9, 127, 128, 129, 400])) * unit
                    at = slot * slot_bytes + begin
                    write = data.draw(st.booleans(), label="write")
                    if write:
                        model[at : at + size] = pattern(size, seed=number * 100 + slot)
                        arena.buffer[at : at + size] = bytes(model[at : at + size])
                    else:
                        arena.buffer[at : at + size] = bytes(size)
                        reads.append((at, size))
                    op = Op.WRITE if write else Op.READ
                    batch.append(Transfer(target.fd, op, arena.address + at, size, at))
                engine.submit(batch).wait(timeout_seconds=PATIENCE_SECONDS)
                for at, size in reads:
                    assert arena.buffer[at : at + size] == model[at : at + size]

    def test_waiting_for_the_first_bytes(
        self, target: Target, engine: Engine, arena: Arena
    ) -> None:
        """wait(n) returns when the first n are there, whatever else is not."""
        data = pattern(4 * MIB, seed=2)
        arena.buffer[: len(data)] = data
        self.transfer(engine, target, Op.WRITE, arena.address, len(data), 0)
        for _ in range(5):
            arena.buffer[: len(data)] = bytes(len(data))
            # Batch order is not file order: the second half of the file is the first to land.
            half = len(data) // 2
            ticket = engine.submit(
                [
                    Transfer(target.fd, Op.READ, arena.address, half, half),
                    Transfer(target.fd, Op.READ, arena.address + half, half, 0),
                ]
            )
            rotated = data[half:] + data[:half]
            for first in (0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, half, half + 1, len(data)):
                ticket.wait(first, timeout_seconds=PATIENCE_SECONDS)
                assert ticket.landed_bytes >= first
                assert arena.buffer[:first] == rotated[:first]
            ticket.wait(timeout_seconds=PATIENCE_SECONDS)
            assert ticket.done
            assert ticket.landed_bytes == ticket.size_bytes == len(data)
        with pytest.raises(ConfigError):
            ticket.wait(len(data) + 1)

    def test_nothing_to_do(self, target: Target, engine: Engine, arena: Arena) -> None:
        for batch in ([], [Transfer(target.fd, Op.READ, arena.address, 0, 0)]):
            ticket = engine.submit(batch)
            ticket.wait(timeout_seconds=PATIENCE_SECONDS)
            assert ticket.done
            assert ticket.size_bytes == 0
        assert engine.counters().read_ops == 0

    def test_counters_count(self, target: Target, engine: Engine, arena: Arena) -> None:
        """Pieces and bytes, no more and no less."""
        size_bytes = 5 * CHUNK_BYTES + target.block_bytes
        self.transfer(engine, target, Op.WRITE, arena.address, size_bytes, 0)
        before = engine.counters()
        self.transfer(engine, target, Op.READ, arena.address, size_bytes, 0)
        engine.submit([Transfer(target.fd, Op.DATASYNC, 0, 0, 0)]).wait()
        done = engine.counters() - before
        assert (done.read_ops, done.read_bytes) == (6, size_bytes)
        assert (done.write_ops, done.sync_ops, done.errors) == (0, 1, 0)
        assert done.busy_seconds > 0
        assert 0 < done.depth_seconds <= QUEUE_DEPTH * done.busy_seconds

    def test_syncs_are_barriers(self, target: Target, engine: Engine, arena: Arena) -> None:
        """All four land and sync; a failure before a sync keeps the sync from running."""
        batch = [
            Transfer(target.fd, Op.WRITE, arena.address, MIB, 0),
            Transfer(target.fd, Op.SYNC_RANGE, 0, MIB, 0),
            Transfer(target.fd, Op.WRITE, arena.address, MIB, MIB),
            Transfer(target.fd, Op.DATASYNC, 0, 0, 0),
        ]
        ticket = engine.submit(batch)
        ticket.wait(timeout_seconds=PATIENCE_SECONDS)
        assert ticket.landed_bytes == 2 * MIB
        assert engine.counters().sync_ops == 2
        failing = [Transfer(-1, Op.WRITE, arena.address, MIB, 0), *batch[1:]]
        with pytest.raises(DeviceError):
            engine.submit(failing).wait(timeout_seconds=PATIENCE_SECONDS)
        assert engine.counters().sync_ops == 2

    def test_thousands_of_small_batches(self, target: Target, engine: Engine, arena: Arena) -> None:
        """Many tickets at once, each with its own bytes; none is lost or mixed up."""
        block = max(target.block_bytes, 512)
        count = 1500
        data = pattern(count * block, seed=3)
        arena.buffer[: len(data)] = data
        for op in (Op.WRITE, Op.READ):
            tickets = [
                engine.submit([Transfer(target.fd, op, arena.address + at, block, at)])
                for at in range(0, len(data), block)
            ]
            engine.drain(timeout_seconds=PATIENCE_SECONDS)
            assert all(ticket.done and ticket.landed_bytes == block for ticket in tickets)
            if op == Op.WRITE:
                arena.buffer[: len(data)] = bytes(len(data))
        assert arena.buffer[: len(data)] == data

    def test_many_submitters(self, target: Target, engine: Engine, arena: Arena) -> None:
        """Threads write and read back their own stretch, all on one engine."""
        stretch = MIB // 2
        failures: list[BaseException] = []

        def work(number: int) -> None:
            at = number * stretch
            try:
                for turn in range(10):
                    data = pattern(stretch, seed=number * 100 + turn)
                    arena.buffer[at : at + stretch] = data
                    where = (arena.address + at, stretch, at)
                    self.transfer(engine, target, Op.WRITE, *where)
                    arena.buffer[at : at + stretch] = bytes(stretch)
                    self.transfer(engine, target, Op.READ, *where)
                    assert arena.buffer[at : at + stretch] == data
            except BaseException as error:  # noqa: BLE001 - told by the main thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_end_of_file(self, target: Target, engine: Engine, arena: Arena) -> None:
        """Reading past the end fails with errno 0, at the end; what is there has landed."""
        block = max(target.block_bytes, 512)
        self.transfer(engine, target, Op.WRITE, arena.address, 4096, target.size_bytes - 4096)
        ticket = engine.submit(
            [Transfer(target.fd, Op.READ, arena.address, 2 * block, target.size_bytes - block)],
            path=target.path,
        )
        with pytest.raises(DeviceError) as caught:
            ticket.wait(timeout_seconds=PATIENCE_SECONDS)
        assert caught.value.errno == 0
        assert caught.value.offset == target.size_bytes
        assert caught.value.size_bytes == block
        assert ticket.landed_bytes == block
        ticket.wait(block)

    def test_failure_says_what_and_where(
        self, target: Target, engine: Engine, arena: Arena
    ) -> None:
        """A bad descriptor among good ones: errno, place and size; later pieces do not start."""
        at = 2 * CHUNK_BYTES
        ticket = engine.submit(
            [
                Transfer(target.fd, Op.WRITE, arena.address, at, 0),
                Transfer(-1, Op.WRITE, arena.address, 3 * CHUNK_BYTES, at),
                Transfer(target.fd, Op.WRITE, arena.address, 64 * CHUNK_BYTES, MIB),
            ],
            path="some/store",
        )
        with pytest.raises(DeviceError) as caught:
            ticket.wait(timeout_seconds=PATIENCE_SECONDS)
        error = caught.value
        assert (error.errno, error.operation, error.path) == (errno.EBADF, "write", "some/store")
        assert error.offset == at
        # Not through the direct door, for a bad descriptor is none: writes are cut less finely.
        assert error.size_bytes in (CHUNK_BYTES, 3 * CHUNK_BYTES)
        assert ticket.done
        assert ticket.landed_bytes == at
        assert engine.counters().write_ops < 66
        ticket.wait(at)  # the first bytes did land
        self.transfer(engine, target, Op.READ, arena.address, 4096, 0)

    def test_misaligned_transfers(self, target: Target, engine: Engine, arena: Arena) -> None:
        """The direct door refuses what is not whole blocks, nothing is rounded; buffered serves."""
        if not target.direct:
            self.transfer(engine, target, Op.READ, arena.address + 1, 4095, 1)
            return
        with pytest.raises(DeviceError) as caught:
            self.transfer(engine, target, Op.READ, arena.address, 4096, 1)
        assert caught.value.errno == errno.EINVAL
        assert (caught.value.operation, caught.value.offset) == ("read", 1)

    @pytest.mark.parametrize(
        "transfer",
        [(1, 2, 3), (0, 9, 0, 1, 0), (0, 0, 0, -1, 0), (0, 0, 0, 2**63, 0), (0, 0, 0, 1, 2**63)],
    )
    def test_nonsense_is_refused_at_once(self, engine: Engine, transfer: tuple[int, ...]) -> None:
        with pytest.raises(ConfigError):
            engine.submit([transfer])  # type: ignore[list-item]

    def test_use_after_close(self, target: Target, arena: Arena) -> None:
        engine = self.open_engine()
        ticket = engine.submit([Transfer(target.fd, Op.WRITE, arena.address, 4096, 0)])
        ticket.wait(timeout_seconds=PATIENCE_SECONDS)
        engine.close()
        engine.close()
        assert ticket.done
        ticket.wait()
        assert engine.counters().write_bytes == 4096
        assert not engine.register_file(target.fd)
        engine.unregister_file(target.fd)
        engine.drain(timeout_seconds=PATIENCE_SECONDS)
        with pytest.raises(Closed):
            engine.submit([])

    def test_engine_dropped_with_tickets_alive(self, target: Target, arena: Arena) -> None:
        """An engine that is never closed ends its tickets when it is gone."""
        engine = self.open_engine()
        ticket = engine.submit([Transfer(target.fd, Op.WRITE, arena.address, 4 * MIB, 0)])
        del engine
        assert ticket.done

    def test_registered_files_and_buffers(
        self, target: Target, engine: Engine, arena: Arena
    ) -> None:
        """Registering changes nothing but the cost; memory beside the arena still works."""
        engine.register_arena(arena)
        engine.register_file(target.fd)
        data = pattern(MIB, seed=5)
        arena.buffer[: len(data)] = data
        self.transfer(engine, target, Op.WRITE, arena.address, len(data), 0)
        with Arena(2 * MIB) as other:
            self.transfer(engine, target, Op.READ, other.address, len(data), 0)
            assert other.buffer[: len(data)] == data
        engine.unregister_file(target.fd)
        arena.buffer[: len(data)] = bytes(len(data))
        self.transfer(engine, target, Op.READ, arena.address, len(data), 0)
        assert arena.buffer[: len(data)] == data

    def test_time_limit_then_end(self, target: Target, engine: Engine) -> None:
        """A device that does not answer: TimeoutError, and the ticket goes on afterwards."""
        with stalled_read(engine, target) as (ticket, memory):
            with pytest.raises(TimeoutError):
                ticket.wait(timeout_seconds=0.15)
            with pytest.raises(TimeoutError):
                ticket.wait(1, timeout_seconds=0)
            with pytest.raises(TimeoutError):
                engine.drain(timeout_seconds=0.01)
            assert not ticket.done
            memory.release()
            ticket.wait(timeout_seconds=PATIENCE_SECONDS)
            assert ticket.landed_bytes == memory.size_bytes

    def test_close_waits_for_what_is_in_flight(self, target: Target, arena: Arena) -> None:
        """In flight: ends as usual, and close waits for it. Not started: ECANCELED, at once."""
        engine = self.open_engine()
        buffered = os.open(target.path, os.O_RDONLY)  # the same door: behind it in the same queue
        with stalled_read(engine, target) as (stalled, memory):
            behind = engine.submit([Transfer(buffered, Op.READ, arena.address, 8 * MIB, 0)])
            closer = threading.Thread(target=engine.close)
            closer.start()
            with pytest.raises(DeviceError) as caught:
                behind.wait(timeout_seconds=PATIENCE_SECONDS)
            assert caught.value.errno == errno.ECANCELED
            assert closer.is_alive()
            assert not stalled.done
            memory.release()
            closer.join()
            stalled.wait()
        os.close(buffered)

    def test_neither_door_waits_for_the_other(
        self, target: Target, engine: Engine, arena: Arena
    ) -> None:
        """The page-cache door's queue stands still, full: the direct one works."""
        if not target.direct or engine.name in ("posix", "nvme-ioctl"):
            pytest.skip("one queue for both doors: posix threads, or a target without a direct one")
        with stalled_read(engine, target) as (ticket, memory):
            self.transfer(engine, target, Op.READ, arena.address, 8 * MIB, 0)
            assert not ticket.done
            memory.release()
            ticket.wait(timeout_seconds=PATIENCE_SECONDS)

    def test_forked_child_cannot_use_it(self, target: Target, engine: Engine) -> None:
        """With a transfer in flight: the child is told, ends in peace; the parent goes on."""
        with stalled_read(engine, target) as (ticket, memory):
            child = fork()
            if child == 0:
                os._exit(use_in_child(engine, ticket))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            memory.release()
            ticket.wait(timeout_seconds=PATIENCE_SECONDS)
            assert ticket.landed_bytes == memory.size_bytes

    def transfer(
        self, engine: Engine, target: Target, op: Op, address: int, size_bytes: int, offset: int
    ) -> None:
        """One transfer, waited for."""
        ticket = engine.submit(
            [Transfer(target.fd, op, address, size_bytes, offset)], path=target.path
        )
        ticket.wait(timeout_seconds=PATIENCE_SECONDS)


@contextlib.contextmanager
def stalled_read(engine: Engine, target: Target) -> Iterator[tuple[Ticket, StalledMemory]]:
    """A buffered read that is in flight until the memory is released.

    QUEUE_DEPTH pieces long: what is submitted behind it does not start. Skips where it cannot be.
    """
    fd = os.open(target.path, os.O_RDONLY)
    try:
        memory = StalledMemory(QUEUE_DEPTH * CHUNK_BYTES)
    except Unsupported as error:
        os.close(fd)
        pytest.skip(str(error))
    with memory:
        ticket = engine.submit([Transfer(fd, Op.READ, memory.address, memory.size_bytes, 0)])
        # Until all its pieces are in flight: time passes with some in flight and none waiting.
        was = engine.counters()
        while not (
            (now := engine.counters()).depth_seconds > was.depth_seconds
            and now.backlog_seconds == was.backlog_seconds
        ):
            was = now
        yield ticket, memory
        engine.drain(timeout_seconds=PATIENCE_SECONDS)
    os.close(fd)


def fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of forking with threads: that it is survived is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def use_in_child(engine: Engine, ticket: Ticket) -> int:
    """What a forked child may try; 0 if each was answered as it should be."""
    signal.alarm(int(PATIENCE_SECONDS))  # a hang ends the child by a signal, which is not 0
    tries: list[Callable[[], object]] = [
        lambda: engine.submit([]),
        engine.counters,
        lambda: ticket.wait(),
        lambda: ticket.wait(timeout_seconds=1),
    ]
    for wrong, attempt in enumerate(tries, start=1):
        try:
            attempt()
        except Closed:
            continue
        return wrong
    if ticket.done:
        return 100
    engine.drain()
    engine.close()
    return 0
