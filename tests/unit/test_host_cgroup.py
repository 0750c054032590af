"""Real memory cgroups of this machine; skipped, saying why, where none can be made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dualblade.errors import BudgetError
from dualblade.host.cgroup import MemoryCgroup, MemoryLimit, _find_parent
from dualblade.units import MIB

REASON = MemoryCgroup.available()
needs_cgroup = pytest.mark.skipif(REASON is not None, reason=f"no memory cgroup: {REASON}")

TAKE = "import sys; block = bytearray(int(sys.argv[1])); print(len(block))"


def take(group: MemoryCgroup, size_bytes: int) -> subprocess.Popen[str]:
    """A program in `group` that touches `size_bytes` of memory and says so."""
    command = [sys.executable, "-c", TAKE, str(size_bytes)]
    return group.popen(command, stdout=subprocess.PIPE, text=True)


@needs_cgroup
def test_a_program_that_fits_ends_well_and_its_peak_is_known() -> None:
    with MemoryCgroup(256 * MIB) as group:
        process = take(group, 100 * MIB)
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, str(100 * MIB))
        assert not group.was_oom_killed(process.returncode)
        peak = group.limit.peak_bytes()
        assert peak is not None
        assert 100 * MIB <= peak <= 256 * MIB
        directory = group.directory
        assert directory.exists()
    assert not directory.exists()
    group.close()  # again: nothing to do


@needs_cgroup
def test_a_program_that_does_not_fit_is_killed_and_that_is_seen() -> None:
    with MemoryCgroup(64 * MIB) as group:
        process = take(group, 200 * MIB)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert out == ""
        assert group.was_oom_killed(process.returncode)
        assert group.limit.oom_kills() >= 1


@needs_cgroup
def test_another_kill_is_not_an_oom_kill() -> None:
    with MemoryCgroup(64 * MIB) as group:
        process = group.popen(["sleep", "60"])
        process.kill()
        assert not group.was_oom_killed(process.wait(timeout=60))


@needs_cgroup
def test_failure_in_the_block_leaves_neither_process_nor_group() -> None:
    started: list[subprocess.Popen[bytes]] = []

    def fail(group: MemoryCgroup) -> None:
        command = ["sh", "-c", "sleep 60 & echo ready; wait"]
        started.append(group.popen(command, stdout=subprocess.PIPE))
        assert started[0].stdout is not None
        assert started[0].stdout.readline() == b"ready\n"
        raise RuntimeError("stop")

    group = MemoryCgroup(64 * MIB)
    with pytest.raises(RuntimeError, match="stop"), group:
        fail(group)
    assert not group.directory.exists()
    started[0].communicate(timeout=60)
    assert started[0].returncode == -signal.SIGKILL


@needs_cgroup
def test_the_limit_may_be_set_and_lifted_later_and_the_peak_reset() -> None:
    script = "b = bytearray(100 << 20); print('big', flush=True); input(); del b; print('small')"
    with MemoryCgroup() as group:
        process = group.popen(
            [sys.executable, "-uc", script + "; input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "big\n"
        assert group.limit.needed_bytes() >= 100 * MIB
        if group.limit.version == 1:  # v2 would kill
            with pytest.raises(BudgetError) as caught:
                group.limit.set(50 * MIB)
            assert caught.value.needed_bytes >= 100 * MIB
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "small\n"
        group.limit.set(50 * MIB)
        if group.limit.reset_peak():
            peak = group.limit.peak_bytes()
            assert peak is not None
            assert peak <= 50 * MIB
        group.limit.set(None)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(timeout=60) == 0
        process.stdout.close()


@needs_cgroup
def test_groups_of_dead_processes_are_swept() -> None:
    parent, _ = _find_parent(enable=True)
    assert parent is not None
    stale = parent.directory / "dualblade-4194305-0"  # above the largest process id there can be
    stale.mkdir()
    ours = parent.directory / f"dualblade-{os.getppid()}-99"
    ours.mkdir()
    try:
        with MemoryCgroup():
            assert not stale.exists()
            assert ours.exists()
    finally:
        ours.rmdir()


def test_v2_files_are_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The v2 names, on a recorded directory: the guest of tests/lab has the real thing."""
    recorded = {
        "memory.max": "max\n",
        "memory.swap.max": "max\n",
        "memory.current": f"{300 * MIB}\n",
        "memory.peak": f"{400 * MIB}\n",
        "memory.stat": f"active_file {MIB}\ninactive_file {9 * MIB}\nfile_mapped {2 * MIB}\n",
        "memory.events": "low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n",
    }
    for name, text in recorded.items():
        (tmp_path / name).write_text(text)
    limit = MemoryLimit(tmp_path, 2)
    assert limit.used_bytes() == 300 * MIB
    assert limit.needed_bytes() == 292 * MIB
    assert limit.peak_bytes() == 400 * MIB
    assert limit.oom_kills() == 1
    # Killed for want of memory above the group, or in the machine: its own limit was not reached.
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 0\noom_kill 1\n")
    assert limit.oom_kills() == 0
    order: list[str] = []
    monkeypatch.setattr(
        MemoryLimit,
        "_write",
        lambda self, name, text, real=MemoryLimit._write: (
            order.append(name) or real(self, name, text)
        ),
    )
    limit.set(512 * MIB)
    assert order == ["memory.swap.max", "memory.max"], "else what is reclaimed goes to swap"
    assert (tmp_path / "memory.max").read_text() == str(512 * MIB)
    assert (tmp_path / "memory.swap.max").read_text() == "0"
    limit.set(None)
    assert (tmp_path / "memory.max").read_text() == "max"
    (tmp_path / "memory.peak").unlink()
    assert limit.peak_bytes() is None
    assert not limit.reset_peak()


MAP = """
import mmap, os, sys
from dualblade.host.memory import available_memory
path, size = sys.argv[1], int(sys.argv[2])
before = available_memory()
file = os.open(path, os.O_RDONLY)
mapped = mmap.mmap(file, size, prot=mmap.PROT_READ)
sum(mapped[i] for i in range(0, size, mmap.PAGESIZE))
after = available_memory()
spare = sum(limit.reclaimable_bytes for limit in after.limits)
print(before.available_bytes, after.available_bytes, spare, flush=True)
"""


@needs_cgroup
def test_a_mapped_file_of_twice_the_limit_is_not_spare(tmp_path: Path) -> None:
    """Its pages fill the group to the limit, and none of them is there for us."""
    limit, size = 128 * MIB, 256 * MIB
    weights = tmp_path / "weights"
    with weights.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
    with MemoryCgroup(limit) as group:
        command = [sys.executable, "-c", MAP, str(weights), str(size)]
        process = group.popen(command, stdout=subprocess.PIPE, text=True)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
    before, after, spare = (int(word) for word in out.split())
    assert 64 * MIB < before <= limit
    assert after <= 16 * MIB
    assert spare <= 16 * MIB


READ = """
import os, sys
from dualblade.host.memory import MemoryProbe, OwnMemory
from dualblade.host.page_cache import cached_bytes
path, size = sys.argv[1], int(sys.argv[2])
probe = MemoryProbe()
before = probe.read()
file = os.open(path, os.O_RDONLY)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
for offset in range(0, size, 1 << 20):
    os.pread(file, 1 << 20, offset)
own = OwnMemory(page_cache_bytes=cached_bytes(file, 0, size).cached_bytes)
after = probe.read(own)
print(before.available_bytes, after.available_bytes, after.binding.ours_bytes, flush=True)
input()
print(probe.read(own).available_bytes)
"""


@needs_cgroup
def test_our_page_cache_is_ours_and_a_new_limit_is_seen(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with store.open("wb") as file:
        file.write(os.urandom(MIB) * 100)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 100 * MIB, os.POSIX_FADV_DONTNEED)
    with MemoryCgroup(256 * MIB) as group:
        command = [sys.executable, "-uc", READ, str(store), str(100 * MIB)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = group.popen(command, **pipes)
        assert process.stdout is not None
        before, after, ours = (int(word) for word in process.stdout.readline().split())
        assert 99 * MIB <= ours <= 100 * MIB  # the newest pages are on no list yet
        assert abs(after - before) <= 8 * MIB
        group.limit.set(192 * MIB)
        out, _ = process.communicate("\n", timeout=60)
        assert process.returncode == 0
        assert abs(after - 64 * MIB - int(out)) <= 8 * MIB
