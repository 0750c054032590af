"""System calls that fail, are interrupted or come up short, as strace injects them.

Each case runs a small program under strace: what the kernel answers is decided there, at an exact
call, and the program says what the engine made of it.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dualblade.attention import _attention

# Reads 1 MiB in pieces of 64 KiB into zeroed memory, or writes it; prints what came of it.
PROGRAM = """
import json, os, sys
from dualblade.errors import DeviceError, Unsupported
from dualblade.io import Arena, Op, Transfer, open_engine

name, op, path = sys.argv[1:]
size = 1 << 20
data = open(path, "rb").read()
try:
    engine = open_engine(name, queue_depth=1, chunk_bytes=1 << 16)
except Unsupported as error:
    print(json.dumps({"unsupported": str(error)}))
    sys.exit()
with engine, Arena(size) as arena:
    registered = engine.register_arena(arena)
    fd = os.open(path, os.O_RDWR)
    if op == "WRITE":
        arena.buffer[:] = data
    ticket = engine.submit([Transfer(fd, Op[op], arena.address, size, 0)], path=path)
    error = None
    try:
        ticket.wait(timeout_seconds=60)
    except DeviceError as caught:
        error = [caught.errno, caught.operation, caught.offset, caught.size_bytes]
    wrong = [i for i in range(0, size, 4096) if arena.buffer[i:i+4096] != data[i:i+4096]]
    counters = engine.counters()
    print(json.dumps({
        "name": engine.name, "reason": engine.reason, "notes": engine.notes, "error": error,
        "landed": ticket.landed_bytes, "wrong": wrong, "registered": registered,
        "retries": counters.retries, "short": counters.short_transfers,
    }))
"""
SIZE_BYTES = 1 << 20
PIECE_BYTES = 1 << 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "device"
    path.write_bytes(random.Random(1).randbytes(SIZE_BYTES))
    return path


def run(wrapper: list[str], engine: str, op: str, path: Path) -> dict[str, Any]:
    if shutil.which(wrapper[0]) is None:
        pytest.skip(f"{wrapper[0]} is not installed")
    command = [*wrapper, sys.executable, "-c", PROGRAM, engine, op, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def inject(path: Path, call: str, what: str, *, only_device: bool = True) -> list[str]:
    # -P: only calls on the device's file; the interpreter's own reads are left alone.
    place = ["-P", str(path)] if only_device else []
    trace = str(path.with_suffix(".trace"))
    return ["strace", "-f", "-o", trace, *place, "-e", f"inject={call}:{what}"]


@pytest.mark.parametrize(("op", "call"), [("READ", "pread64"), ("WRITE", "pwrite64")])
@pytest.mark.parametrize("error", ["EINTR", "EAGAIN", "ENOMEM"])
def test_interrupted_calls_are_tried_again(path: Path, error: str, op: str, call: str) -> None:
    result = run(inject(path, call, f"error={error}:when=2..4"), "posix", op, path)
    assert result["error"] is None
    assert result["retries"] == 3
    assert (result["landed"], result["wrong"]) == (SIZE_BYTES, [])


@pytest.mark.parametrize("error", ["ENOMEM", "ECANCELED"])
@pytest.mark.parametrize(
    ("op", "call"), [("SYNC_RANGE", "sync_file_range"), ("DATASYNC", "fdatasync")]
)
def test_a_writeback_that_failed_is_not_asked_again(
    path: Path, op: str, call: str, error: str
) -> None:
    """The kernel tells of it once: the second sync would say that all is well. ECANCELED is told as
    EIO, for it would read as an engine that was closed."""
    result = run(inject(path, call, f"error={error}:when=1"), "posix", op, path)
    assert result["error"] is not None
    assert result["error"][0] == (errno.EIO if error == "ECANCELED" else errno.ENOMEM)
    assert result["retries"] == 0


def test_tries_are_bounded(path: Path) -> None:
    """A call that is interrupted for ever ends as what it is, at the piece it was."""
    result = run(inject(path, "pread64", "error=EAGAIN:when=3+"), "posix", "READ", path)
    assert result["error"] == [11, "read", 2 * PIECE_BYTES, PIECE_BYTES]
    assert result["landed"] == 2 * PIECE_BYTES
    assert result["retries"] == 16


@pytest.mark.parametrize(("op", "call"), [("READ", "pread64"), ("WRITE", "pwrite64")])
def test_short_transfers_are_resumed(path: Path, op: str, call: str) -> None:
    """The second call is told to have moved 4 KiB: the engine goes on from there."""
    before = path.read_bytes()
    result = run(inject(path, call, "retval=4096:when=2"), "posix", op, path)
    assert result["error"] is None
    assert result["short"] == 1
    assert result["landed"] == SIZE_BYTES
    # strace skips the call it answers for: those 4 KiB, and no others, were not read.
    assert result["wrong"] == ([PIECE_BYTES] if op == "READ" else [])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("op", "call", "error", "number"),
    [("READ", "pread64", "EIO", 5), ("WRITE", "pwrite64", "ENOSPC", 28)],
)
def test_failures_carry_their_place(
    path: Path, op: str, call: str, error: str, number: int
) -> None:
    result = run(inject(path, call, f"error={error}:when=5"), "posix", op, path)
    assert result["error"] == [number, op.lower(), 4 * PIECE_BYTES, PIECE_BYTES]
    assert result["landed"] == 4 * PIECE_BYTES


def test_write_without_progress_ends(path: Path) -> None:
    result = run(inject(path, "pwrite64", "retval=0:when=2"), "posix", "WRITE", path)
    assert result["error"] == [5, "write", PIECE_BYTES, PIECE_BYTES]


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS", "ENOMEM"])
@pytest.mark.parametrize("call", ["io_uring_setup", "io_uring_enter"])
def test_io_uring_forbidden(path: Path, call: str, error: str) -> None:
    """As by seccomp: auto takes posix and says why; asked for by name it is refused."""
    wrapper = inject(path, call, f"error={error}", only_device=False)
    result = run(wrapper, "auto", "READ", path)
    assert result["name"] == "posix"
    assert error in result["reason"]
    assert (result["landed"], result["wrong"]) == (SIZE_BYTES, [])
    assert error in run(wrapper, "io_uring", "READ", path)["unsupported"]


def test_an_interrupted_wait_does_not_forbid_io_uring(path: Path) -> None:
    """As by a stop or a freeze of the process while the ring is proven."""
    wrapper = inject(path, "io_uring_enter", "error=EINTR:when=1..3", only_device=False)
    result = run(wrapper, "auto", "READ", path)
    assert (result["name"], result["reason"]) == ("io_uring", None)
    assert (result["landed"], result["wrong"], result["error"]) == (SIZE_BYTES, [], None)


@pytest.mark.parametrize("refused", [1, 2])
def test_older_kernels_refuse_the_newer_flags(path: Path, refused: int) -> None:
    """EINVAL for what a kernel does not know yet: the next simpler ring is tried."""
    wrapper = inject(path, "io_uring_setup", f"error=EINVAL:when=1..{refused}", only_device=False)
    result = run(wrapper, "io_uring", "READ", path)
    assert (result["landed"], result["wrong"], result["error"]) == (SIZE_BYTES, [], None)


def test_registration_refused(path: Path) -> None:
    """No fixed buffers, no fixed files: the transfers go on without."""
    wrapper = inject(path, "io_uring_register", "error=EINVAL:when=2+", only_device=False)
    result = run(wrapper, "io_uring", "READ", path)
    assert result["registered"] is False
    assert "buffers not registered" in result["notes"][0]
    assert (result["landed"], result["wrong"]) == (SIZE_BYTES, [])


def test_memlock_too_small(path: Path) -> None:
    """An ordinary user's limit: unregistered buffers, and a note that says so."""
    wrapper = ["setpriv", "--bounding-set=-ipc_lock", "prlimit", "--memlock=65536:65536"]
    result = run(wrapper, "io_uring", "READ", path)
    assert result["registered"] is False
    assert result["notes"] == ["buffers not registered: memlock limit 64.0 KiB"]
    assert (result["landed"], result["wrong"]) == (SIZE_BYTES, [])


def test_threads_run_out(path: Path) -> None:
    """A limit on processes: the threads that did start are ended, and the error says what to do."""
    result = run(
        inject(path, "clone,clone3", "error=EAGAIN:when=1", only_device=False),
        "posix",
        "READ",
        path,
    )
    assert "cannot start an engine of 1 threads" in result["unsupported"]


# Loads the kernel alone: torch starts threads of its own.
POOL_PROGRAM = """
import array, importlib.util, random, sys
spec = importlib.util.spec_from_file_location("_attention", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
heads, rows, dim = 64, 64, 16
made = lambda count: array.array("f", [random.random() for _ in range(count)])
query, keys, values = made(heads * dim), made(heads * rows * dim), made(heads * rows * dim)

def attended(threads):
    kernel = kernels.Attention(threads, "")
    kernel.begin(data=query.buffer_info()[0], sequence_stride=heads * dim, head_stride=dim,
        token_stride=heads * dim, batch=1, kv_heads=heads, group=1, tokens=1, key_dim=dim,
        value_dim=dim, past=rows - 1, first_visible=0, scale=0.25, bfloat16=False)
    runs = [kernels.Run(data=some.buffer_info()[0], tile_stride=heads * rows * dim,
        sequence_stride=heads * rows * dim, head_stride=rows * dim, row_stride=dim, first_token=0,
        tokens=rows, tile_rows=rows, first_sequence=0, sequences=1, table=0)
        for some in (keys, values)]
    kernel.both(*runs)
    out = made(heads * dim)
    kernel.finish(0, out.buffer_info()[0])
    return out

print(attended(4) == attended(1))
"""


@pytest.mark.parametrize("first", [1, 2, 3])
def test_attention_does_with_the_threads_that_it_gets(tmp_path: Path, first: int) -> None:
    """The first to be refused is the first, second or third of its helpers."""
    wrapper = inject(
        tmp_path / "none", "clone,clone3", f"error=EAGAIN:when={first}+", only_device=False
    )
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    command = [*wrapper, sys.executable, "-c", POOL_PROGRAM, _attention.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "(INJECTED)" in (tmp_path / "none.trace").read_text()
