"""FaultyEngine does what its fault model says, on a real engine and a real file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualblade.errors import Closed, DeviceError
from dualblade.io import Arena, Op, Transfer, open_engine
from dualblade.testing import Fault, FaultyEngine

SIZE_BYTES = 64 << 10


class Bench:
    """A file of 0x55 and staging of zeros, with an engine that fails on purpose."""

    def __init__(self, fd: int, arena: Arena, engine: FaultyEngine) -> None:
        self.fd, self.arena, self.engine = fd, arena, engine

    def batch(self, op: Op, *offsets: int, size_bytes: int = 8192) -> list[Transfer]:
        return [Transfer(self.fd, op, self.arena.address + at, size_bytes, at) for at in offsets]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    path = tmp_path / "device"
    path.write_bytes(b"\x55" * SIZE_BYTES)
    fd = os.open(path, os.O_RDWR)
    with Arena(SIZE_BYTES) as arena, FaultyEngine(open_engine("posix")) as engine:
        yield Bench(fd, arena, engine)
    os.close(fd)


def test_without_faults_it_is_the_engine(bench: Bench) -> None:
    ticket = bench.engine.submit(bench.batch(Op.READ, 0, 8192))
    ticket.wait(timeout_seconds=60)
    assert (ticket.size_bytes, ticket.landed_bytes, ticket.done) == (16384, 16384, True)
    assert bench.arena.buffer[:16384] == b"\x55" * 16384
    assert bench.engine.counters().read_ops == 2


def test_the_nth_write_fails_and_is_torn(bench: Bench) -> None:
    bench.engine.inject(Fault(op=Op.WRITE, nth=1, errno=errno.ENOSPC, landed_bytes=4096))
    ticket = bench.engine.submit(bench.batch(Op.WRITE, 0, 8192, 16384), path="p")
    with pytest.raises(DeviceError) as caught:
        ticket.wait(timeout_seconds=60)
    assert (caught.value.errno, caught.value.offset, caught.value.path) == (28, 8192, "p")
    assert ticket.done
    assert ticket.landed_bytes == 8192 + 4096
    ticket.wait(12288)
    found = os.pread(bench.fd, SIZE_BYTES, 0)
    assert found == bytes(12288) + b"\x55" * (SIZE_BYTES - 12288)
    assert bench.engine.counters().errors == 1
    bench.engine.submit(bench.batch(Op.WRITE, 8192)).wait()  # it struck once


def test_a_place_fails_for_reads_only_and_every_time(bench: Bench) -> None:
    bench.engine.inject(Fault(op=Op.READ, offsets=range(10000, 10001), times=None))
    bench.engine.submit(bench.batch(Op.WRITE, 8192)).wait()
    for _ in range(3):
        with pytest.raises(DeviceError) as caught:
            bench.engine.submit(bench.batch(Op.READ, 8192)).wait()
        assert caught.value.errno == errno.EIO
    bench.engine.submit(bench.batch(Op.READ, 0, 16384)).wait()
    assert len(bench.engine.struck) == 3


def test_short_read(bench: Bench) -> None:
    bench.engine.inject(Fault(errno=0, landed_bytes=5000))
    ticket = bench.engine.submit(bench.batch(Op.READ, 0))
    with pytest.raises(DeviceError, match="end of file"):
        ticket.wait()
    assert ticket.landed_bytes == 4096  # whole blocks


def test_sync_fails_after_its_data(bench: Bench) -> None:
    bench.engine.inject(Fault(op=Op.DATASYNC))
    batch = [*bench.batch(Op.WRITE, 0), Transfer(bench.fd, Op.DATASYNC, 0, 0, 0)]
    ticket = bench.engine.submit(batch)
    with pytest.raises(DeviceError, match="fdatasync"):
        ticket.wait()
    assert ticket.landed_bytes == 8192
    assert bench.engine.counters().sync_ops == 0


def test_held_writes_stand_until_released(bench: Bench) -> None:
    bench.engine.hold(Op.WRITE)
    first, second = (bench.engine.submit(bench.batch(Op.WRITE, at)) for at in (0, 8192))
    bench.engine.submit(bench.batch(Op.READ, 0)).wait()  # reads pass
    with pytest.raises(TimeoutError):
        first.wait(timeout_seconds=0)
    with pytest.raises(TimeoutError):
        bench.engine.drain(timeout_seconds=0)
    assert bench.engine.held == 2
    bench.engine.release(1)
    first.wait(timeout_seconds=60)
    assert (first.done, second.done, second.landed_bytes) == (True, False, 0)
    bench.engine.release()
    second.wait(timeout_seconds=60)
    bench.engine.submit(bench.batch(Op.WRITE, 0)).wait(timeout_seconds=60)


def test_late_transfers_arrive(bench: Bench) -> None:
    bench.engine.inject(Fault(op=Op.READ, nth=0, errno=None, latency_seconds=0.3))
    late = bench.engine.submit(bench.batch(Op.READ, 0))
    other = bench.engine.submit(bench.batch(Op.READ, 8192))
    other.wait()
    bench.engine.drain(timeout_seconds=60)
    assert late.done
    assert late.landed_bytes == 8192
    assert late.ended_ns > other.ended_ns


def test_closing_cancels_what_is_held(bench: Bench) -> None:
    bench.engine.hold(Op.WRITE)
    ticket = bench.engine.submit(bench.batch(Op.WRITE, 0))
    bench.engine.close()
    with pytest.raises(DeviceError) as caught:
        ticket.wait()
    assert caught.value.errno == errno.ECANCELED
    with pytest.raises(Closed):
        bench.engine.submit([])


def test_a_seed_fails_the_same_transfers(bench: Bench) -> None:
    def offsets_struck(seed: int) -> list[int]:
        engine = FaultyEngine(bench.engine.inner, seed=seed, rate=0.3)
        for at in range(0, SIZE_BYTES, 8192):
            engine.submit(bench.batch(Op.READ, at))
        return [transfer.offset for _, transfer in engine.struck]

    assert offsets_struck(7) == offsets_struck(7)
    assert 0 < len(offsets_struck(7)) < 8
    assert offsets_struck(7) != offsets_struck(8)
