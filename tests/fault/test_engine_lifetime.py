"""Programs that end, are interrupted or fork while transfers are in flight."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dualblade.errors import BudgetError, Closed, ConfigError
from dualblade.io import Arena, EngineChoice, Op, Transfer, open_engine
from dualblade.testing.contract import CHUNK_BYTES, QUEUE_DEPTH, Target, stalled_read
from dualblade.units import MIB

ENGINES: list[EngineChoice] = ["io_uring", "posix"]

HEAD = """
import os, sys
from dualblade.io import Arena, Op, Transfer, open_engine
fd = os.open(sys.argv[2], os.O_RDWR | os.O_DIRECT)
engine = open_engine(sys.argv[1], chunk_bytes=4096)
arena = Arena(8 << 20)
engine.register_arena(arena)
ticket = engine.submit([Transfer(fd, Op.READ, arena.address, 8 << 20, 0)])
"""
# Python 3.12 warns of forking with threads.
PYTHON = (sys.executable, "-X", "faulthandler", "-W", "ignore::DeprecationWarning")
# One program each: what it does with 2048 pieces under way, and what it must print.
ENDINGS = {
    "end with everything in globals": ("pass", ""),
    "end with the memory gone first": ("del arena", ""),
    "exit from deep inside": ("import atexit; atexit.register(print, 'x'); sys.exit()", "x\n"),
    "uncaught error": ("sys.excepthook = lambda *_: print('seen'); raise RuntimeError", "seen\n"),
    "fork and end both in peace": (
        "p = os.fork()\n"
        "if p: print(os.waitpid(p, 0)[1]); ticket.wait(); print(ticket.landed_bytes >> 20)",
        "0\n8\n",
    ),
    "child uses an engine of its own": (
        "p = os.fork()\n"
        "if p == 0:\n"
        "    with open_engine(sys.argv[1]) as own, Arena(4096) as memory:\n"
        "        own.submit([Transfer(fd, Op.READ, memory.address, 4096, 0)]).wait()\n"
        "    assert arena.buffer[:8] == bytes(8)\n"
        "else: print(os.waitpid(p, 0)[1])",
        "0\n",
    ),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "device"
    path.write_bytes(b"\x55" * (8 * MIB))
    return path


@pytest.fixture
def target(path: Path) -> Target:
    return Target(fd=-1, path=str(path), size_bytes=8 * MIB, block_bytes=1, direct=False)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("engine", ENGINES)
def test_programs_end(path: Path, engine: str, ending: str) -> None:
    code, expected = ENDINGS[ending]
    done = subprocess.run(
        [*PYTHON, "-c", HEAD + code, engine, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.stdout == expected
    assert done.returncode == (1 if ending == "uncaught error" else 0)


@pytest.mark.parametrize("engine_name", ENGINES)
def test_ctrl_c_ends_a_wait(target: Target, engine_name: EngineChoice) -> None:
    """The wait is left by KeyboardInterrupt; ticket and engine are as they were."""
    engine = open_engine(engine_name, queue_depth=QUEUE_DEPTH, chunk_bytes=CHUNK_BYTES)
    with engine, stalled_read(engine, target) as (ticket, memory):
        for waiting in (ticket.wait, engine.drain):
            before = signal.signal(signal.SIGALRM, signal.default_int_handler)
            try:
                with pytest.raises(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, 0.05)
                    waiting()
            finally:
                signal.signal(signal.SIGALRM, before)
        assert not ticket.done
        memory.release()
        ticket.wait()


@pytest.mark.parametrize("engine_name", ENGINES)
def test_an_engine_leaves_nothing_open(engine_name: EngineChoice) -> None:
    """No descriptor and no thread of an engine outlives it."""

    open_engine(engine_name).close()
    for _ in range(3):  # what other tests left is not to go in between
        gc.collect()
    fds, tasks = len(os.listdir("/proc/self/fd")), _engine_tasks()
    for _ in range(20):
        with open_engine(engine_name, queue_depth=4) as engine, Arena(4096) as arena:
            engine.register_arena(arena)
            assert _engine_tasks() - tasks
    ends = time.monotonic() + 10
    while (left := _engine_tasks() - tasks) and time.monotonic() < ends:
        time.sleep(0.01)  # one that was joined may be listed for a moment still
    assert not left
    del engine
    assert len(os.listdir("/proc/self/fd")) == fds


def _engine_tasks() -> set[str]:
    """Threads of engines, by their numbers."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if (task / "comm").read_text().startswith("dualblade"):
                found.add(task.name)
    return found


def test_out_of_order_landing(target: Target) -> None:
    """Later pieces land first: nothing counts until the bytes before them are there."""
    engine = open_engine("posix", queue_depth=QUEUE_DEPTH, chunk_bytes=CHUNK_BYTES)
    with engine, stalled_read(engine, target) as (ticket, memory):
        assert memory.size_bytes == 4 * CHUNK_BYTES
        for piece in (3, 1):
            memory.release(piece * CHUNK_BYTES, CHUNK_BYTES)
        # Another ticket passes through the places that came free: the two pieces have ended.
        done_bytes = 0
        while done_bytes < 2 * CHUNK_BYTES:
            done_bytes = engine.counters().read_bytes
        assert ticket.landed_bytes == 0
        with pytest.raises(TimeoutError):
            ticket.wait(1, timeout_seconds=0)
        memory.release(0, CHUNK_BYTES)
        ticket.wait(2 * CHUNK_BYTES)
        assert ticket.landed_bytes == 2 * CHUNK_BYTES
        assert not ticket.done
        memory.release(2 * CHUNK_BYTES, CHUNK_BYTES)
        ticket.wait()
        assert memory.read(0, memory.size_bytes) == b"\x55" * memory.size_bytes


def test_arena_memory_lives_as_long_as_a_view() -> None:
    arena = Arena(4 * MIB + 4096)
    assert arena.size_bytes == 4 * MIB + 4096
    assert arena.address % (2 * MIB) == 0
    assert len(arena.buffer) == arena.size_bytes
    view = arena.buffer[4096:8192]
    arena.close()
    arena.close()
    view[:] = b"\x01" * 4096
    assert bytes(view) == b"\x01" * 4096
    for use in (lambda: arena.address, lambda: arena.buffer):
        with pytest.raises(Closed):
            use()


def test_arena_says_which_pages_it_got() -> None:
    with Arena(4 * MIB, huge=False) as small:
        assert (small.huge_bytes, small.huge) == (0, False)
        with open_engine("posix") as engine:
            engine.register_arena(small)
            assert engine.notes == ("huge pages: 0 B of 4.00 MiB",)
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    if "[never]" not in modes:
        with Arena(4 * MIB) as large:
            assert large.huge_bytes in range(0, 4 * MIB + 1, 2 * MIB)
            assert large.huge == (large.huge_bytes == 4 * MIB)


def test_arenas_that_cannot_be() -> None:
    with pytest.raises(ConfigError):
        Arena(0)
    with pytest.raises(BudgetError) as caught:
        Arena(1 << 60)
    assert caught.value.needed_bytes == 1 << 60


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "aio"},
        {"queue_depth": 0},
        {"queue_depth": 5000},
        {"chunk_bytes": 1000},
        {"chunk_bytes": 0},
        {"chunk_bytes": 2 << 30},
    ],
)
def test_wrong_options(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        open_engine(**wrong)  # type: ignore[arg-type]


def test_registered_memory_outlives_its_arena(path: Path) -> None:
    """The ring still knows the old pages: memory mapped anew must not take their address."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with open_engine("io_uring") as engine:
        arena = Arena(2 * MIB)
        if not engine.register_arena(arena):
            pytest.skip(f"not registered: {engine.notes}")
        address = arena.address
        arena.close()
        del arena
        with Arena(2 * MIB) as other:
            assert other.address != address
            engine.submit([Transfer(fd, Op.READ, other.address, 4096, 0)]).wait()
            assert other.buffer[:4096] == b"\x55" * 4096
    os.close(fd)


def pinned_bytes() -> int:
    (line,) = re.findall(r"VmPin:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


def test_memory_that_is_registered_twice_is_pinned_once() -> None:
    """As after a Ctrl-C in the middle: whoever registers does it again."""
    before = pinned_bytes()
    with open_engine("io_uring") as engine, Arena(4 * MIB, huge=False) as arena:
        if not engine.register_arena(arena):
            pytest.skip(f"not registered: {engine.notes}")
        pinned = pinned_bytes()
        assert pinned - before >= 4 * MIB
        assert engine.register_arena(arena)
        assert pinned_bytes() == pinned
